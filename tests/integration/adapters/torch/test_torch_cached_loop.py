"""``fl.cached``: the user's own loop, compared with the same loop without it, in float64."""

from __future__ import annotations

import collections
import copy
import dataclasses
import io
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

import frostline as fl
from frostline.types import DataError, ModelError

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

torch.manual_seed(0)
X = torch.randn(21, 3, 12, 12, dtype=torch.float64)
Y = torch.arange(21) % 4
MASK = (X[:, 0] > 0).long()


class Block(nn.Module):
    """A residual block with steps in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.short = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Any) -> Any:
        y = self.norm(self.conv(x))
        y += self.short(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Small; a function in place between frozen modules, dropout before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.layer1 = nn.Sequential(Block(6, 6), Block(6, 6))
        self.layer2, self.drop, self.head = Block(6, 8), nn.Dropout(0.3), nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        x = functional.relu_(self.norm(self.stem(x)))
        return self.head(self.drop(self.layer2(self.layer1(x)).mean((2, 3))))


class Mapped(nn.Module):
    """As the models of Hugging Face: keywords, a mapping, a loss, and decisions by values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet()

    def forward(self, pixel_values: Any, labels: Any = None) -> Any:
        if float(pixel_values.mean()) > 1e9:  # torch.fx gives up here
            raise ValueError
        out = collections.OrderedDict(logits=self.net(pixel_values))
        if labels is not None:
            out["loss"] = functional.cross_entropy(out["logits"], labels)
        return out


class UNet(nn.Module):
    """Three frozen stages, all of which the decoder reads."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = Block(3, 4), Block(4, 6), Block(6, 6)
        self.up1, self.up2, self.out = Block(12, 6), Block(10, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Any) -> Any:
        if float(x.mean()) > 1e9:
            raise ValueError
        a = self.down1(x)
        b = self.down2(functional.max_pool2d(a, 2))
        c = self.down3(functional.max_pool2d(b, 2))
        y = self.up1(torch.cat([functional.interpolate(c, scale_factor=2.0), b], 1))
        return self.out(self.up2(torch.cat([functional.interpolate(y, scale_factor=2.0), a], 1)))


def plain_loss(model: Any, batch: Any) -> Any:
    return functional.cross_entropy(model(batch[0]), batch[1])


def own_loss(model: Any, batch: Any) -> Any:
    return model(pixel_values=batch[0], labels=batch[1])["loss"]


CASES: dict[str, tuple[Any, str, Any, Any]] = {
    "resnet": (ResNet, "layer2", plain_loss, Y),
    "mapped": (Mapped, "net/layer2", own_loss, Y),
    "unet": (UNet, "up1", plain_loss, MASK),
}


def made(kind: Any, until: Any) -> Any:
    torch.manual_seed(1)
    model = kind().double()
    with torch.no_grad():
        model(X[:8]), model(X[8:])
    fl.freeze(model, until)
    return model.train()


def loader(labels: Any, **ways: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    return DataLoader(TensorDataset(X, labels), 4, shuffle=True, generator=generator, **ways)


def trained(model: Any, batches: Any, step: Any, epochs: int = 3) -> Any:
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(epochs):
        for batch in batches() if callable(batches) else batches:
            optimizer.zero_grad()
            step(model, batch).backward()
            optimizer.step()
    return model


class Seen(TorchFunctionMode):
    """The sizes of the batches that a convolution is computed for."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight, self.sizes = conv.weight, list[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and args[1] is self.weight:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def require_same(one: Any, other: Any) -> None:
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ways", [{}, {"num_workers": 2}], ids=["here", "workers"])
def test_three_epochs_give_the_parameters_of_the_loop_alone(case: str, ways: Any) -> None:
    kind, until, step, labels = CASES[case]
    model, twin = made(kind, until), made(kind, until)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    with Seen(first) as seen:
        trained(model, fl.cached(model, loader(labels, **ways)), step)
    require_same(model, trained(twin, loader(labels, **ways), step))
    assert not any(torch.equal(a, b) for a, b in zip(
        [p for p in model.parameters() if p.requires_grad],
        [p for p in made(kind, until).parameters() if p.requires_grad], strict=True))  # fmt: skip
    # The first epoch, and what checks it: 5 runs or fewer of a batch; then two batches again.
    assert sum(seen.sizes) <= 21 + 8 * 4 + 2 * 4


def test_a_new_call_in_every_epoch_finds_the_rows_again() -> None:
    model, twin, batches = made(ResNet, "layer2"), made(ResNet, "layer2"), loader(Y)
    trained(model, lambda: fl.cached(model, batches), plain_loss, 1)
    trained(model, lambda: fl.cached(model, batches), plain_loss, 1)  # two are checked
    with Seen(model.stem) as seen:
        trained(model, lambda: fl.cached(model, batches), plain_loss, 1)
    assert not seen.sizes
    other = loader(Y)
    for _ in range(3):
        trained(twin, other, plain_loss, 1)
    require_same(model, twin)


def test_features_on_disk_serve_another_run(tmp_path: Path) -> None:
    first = trained(made(ResNet, "layer2"), loader(Y), plain_loss)
    model = made(ResNet, "layer2")
    trained(model, fl.cached(model, loader(Y), path=tmp_path), plain_loss, 1)
    again = made(ResNet, "layer2")
    with Seen(again.stem) as seen:
        trained(again, fl.cached(again, loader(Y), path=tmp_path), plain_loss)
    assert sum(seen.sizes) <= 4 * 8 + 4 * 3  # the checks, and the first batch of each shape
    require_same(again, first)
    changed = made(ResNet, "layer2")
    with torch.no_grad():
        changed.stem.weight.mul_(1.5)
    twin = copy.deepcopy(changed)
    trained(changed, fl.cached(changed, loader(Y), path=tmp_path), plain_loss)
    require_same(changed, trained(twin, loader(Y), plain_loss))


def test_the_model_is_left_alone_after_break_and_exception() -> None:
    model = made(UNet, "up1")
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    for _ in fl.cached(model, loader(MASK)):
        assert "forward" in vars(model)
        break
    with pytest.raises(KeyError):  # noqa: PT012
        for batch in fl.cached(model, loader(MASK)):
            model(batch[0])
            raise KeyError
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name
        assert vars(module).get("forward") is before[name].get("forward"), name


def test_copies_made_in_the_loop_are_models_of_their_own() -> None:
    model = made(ResNet, "layer2")
    for batch in fl.cached(model, loader(Y)):
        plain_loss(model, batch)
        twin = copy.deepcopy(model).eval()
        stream = io.BytesIO()
        torch.save(model, stream)
        break
    with torch.no_grad():
        twin.head.bias.add_(1.0)
        torch.testing.assert_close(twin(X), model.eval()(X) + 1.0)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False).eval()
    torch.testing.assert_close(loaded(X), model(X))


def test_what_is_frozen_may_change_between_epochs() -> None:
    def run(model: Any, cached: bool) -> Any:
        batches = loader(Y)
        for until in ("layer2", "layer1", "head"):
            fl.unfreeze(model)
            fl.freeze(model, until)
            model.train()
            trained(model, fl.cached(model, batches) if cached else batches, plain_loss, 2)
            with torch.no_grad():
                model.stem.weight.mul_(1.01)  # frozen weights that move, between epochs
        return model

    require_same(run(made(ResNet, "layer2"), True), run(made(ResNet, "layer2"), False))


def test_a_frozen_part_that_is_not_pure_is_not_cached() -> None:
    """Batch statistics behind frozen parameters, and chance: what comes before them is cached."""

    class Noisy(ResNet):
        def forward(self, x: Any) -> Any:
            x = self.layer1(self.norm(self.stem(x)))
            return self.head(self.layer2(x + torch.randn_like(x) * 0.1).mean((2, 3)))

    def build() -> Any:
        model = made(Noisy, "head")
        fl.unfreeze(model, "layer1", params=False)  # layer1 and 2: statistics of the batch again
        return model.train()

    model, twin = build(), build()
    cached = fl.cached(model, loader(Y))
    require_same(trained(model, cached, plain_loss), trained(twin, loader(Y), plain_loss))
    found = {name for plan, _ in cached.known.values() for name, _ in plan.frontier}
    assert found == {"layer1.0.conv", "layer1.0.short"}


class Augmented(Dataset):  # type: ignore[type-arg]
    """Samples with noise drawn anew at every reading."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index] + torch.randn(X[0].shape, dtype=X.dtype) * 0.01, Y[index]


def test_random_augmentation_is_told_and_views_make_it_repeat() -> None:
    model = made(ResNet, "layer2")
    batches = DataLoader(Augmented(), 4, shuffle=True)
    with pytest.warns(UserWarning, match=r"views=8"):
        trained(model, fl.cached(model, batches), plain_loss, 3)
    model = made(ResNet, "layer2")
    cached = fl.cached(model, batches, views=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = [torch.cat([x for x, _ in cached]) for _ in range(4)]
        trained(model, cached, plain_loss, 4)
    orders = [sorted(map(float, view.sum((1, 2, 3)))) for view in read]
    assert orders[0] == orders[2] != orders[1] == orders[3]
    assert cached.answered == 2 * len(X)
    with pytest.raises(DataError, match="__getitem__"):
        fl.cached(model, [(X, Y)], views=2)


def test_what_cannot_be_is_said_before_the_loop() -> None:
    with pytest.raises(ModelError, match="Freeze first"):
        fl.cached(ResNet(), loader(Y))
    model = made(ResNet, "layer2")
    with pytest.raises(ModelError, match="onnxruntime, openvino"):
        fl.cached(model, loader(Y), engine="tensorrt")
    with pytest.raises(DataError, match="views=0"):
        fl.cached(model, loader(Y), views=0)


def test_single_samples_and_lists_of_images() -> None:
    """A last batch of one, and a model that takes a list, as detectors do."""

    class Detector(ResNet):
        def forward(self, images: Any, targets: Any) -> Any:
            logits = super().forward(torch.stack(images))
            return {"loss": functional.cross_entropy(logits, torch.stack(
                [each["label"] for each in targets]))}  # fmt: skip

    def build() -> Any:
        torch.manual_seed(1)
        model = Detector().double()
        fl.freeze(model, "layer2")
        return model.train()

    def collated(pairs: Any) -> Any:
        return [x for x, _ in pairs], [{"label": y} for _, y in pairs]

    def step(model: Any, batch: Any) -> Any:
        return model(*batch)["loss"]

    data = TensorDataset(X[:9], Y[:9])
    batches = [DataLoader(data, 4, collate_fn=collated) for _ in range(2)]
    model, twin = build(), build()
    cached = fl.cached(model, batches[0])
    require_same(trained(model, cached, step), trained(twin, batches[1], step))
    assert cached.answered > len(X[:9])


def test_an_engine_computes_what_is_not_known_yet(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")

    def build() -> Any:
        return made(ResNet, "layer2").float()

    def float_loader() -> Any:
        generator = torch.Generator().manual_seed(2)
        return DataLoader(TensorDataset(X.float(), Y), 4, shuffle=True, generator=generator)

    model, twin = build(), build()
    cached = fl.cached(model, float_loader(), engine="onnxruntime", path=tmp_path)
    with Seen(model.stem) as seen:
        trained(model, cached, plain_loss)
    trained(twin, float_loader(), plain_loss)
    # The first batch, the last one of another size, checks and export; the first pass has 6.
    assert cached.answered >= 3 * len(X) - 4 - 1
    assert seen.sizes.count(4) < 6 + 6
    theirs = twin.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    other = build()
    native = fl.cached(other, float_loader(), engine="native", path=tmp_path)
    with Seen(other.stem) as seen:
        trained(other, native, plain_loss, 1)
    assert sum(seen.sizes) >= len(X)  # rows of an engine are not those of the model itself


def test_validation_data_beside_the_training_data_are_no_random_augmentation() -> None:
    model, held = made(ResNet, "layer2"), [(X[:6] + 1, Y[:6])]
    batches = loader(Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            trained(model, fl.cached(model, batches), plain_loss, 1)
            for x, _ in (found := fl.cached(model, held)):
                with torch.no_grad():
                    model(x)
    assert found.answered == 6


def test_two_loaders_side_by_side_train_as_without_the_cache() -> None:
    """A semi-supervised loop; the shorter loader ends it."""

    def step(model: Any, pair: Any) -> Any:
        return plain_loss(model, pair[0]) + 0.5 * plain_loss(model, pair[1])

    one, other = [(X[:4], Y[:4]), (X[4:8], Y[4:8])], [(X[8:], Y[8:])] * 3
    plain = trained(made(ResNet, "layer2"), lambda: zip(one, other, strict=False), step)
    model = made(ResNet, "layer2")
    through, beside = fl.cached(model, one), fl.cached(model, other)
    trained(model, lambda: zip(through, beside, strict=False), step)
    assert through.answered
    assert "forward" not in vars(model)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_validation_inside_of_an_epoch_is_answered_too() -> None:
    model, held = made(ResNet, "layer2"), [(X[:6] + 1, Y[:6])]
    through = fl.cached(model, [(X[:6], Y[:6]), (X[6:], Y[6:])])
    for _ in range(3):
        for x, _ in through:
            for beside, _ in fl.cached(model, held):
                model(beside)
            model(x)
    assert through.answered > 2 * len(X)
    assert "forward" not in vars(model)


def test_inputs_that_require_gradients_run_as_they_are() -> None:
    """Adversarial training was told to freeze from the beginning; a stored row gave no gradient."""

    def step(model: Any, batch: Any) -> Any:
        x = batch[0].clone().requires_grad_()
        loss = plain_loss(model, batch)
        (slope,) = torch.autograd.grad(plain_loss(model, (x, batch[1])), x)
        return loss + plain_loss(model, ((x + 0.1 * slope.sign()).detach(), batch[1]))

    batches = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    plain, model = trained(made(ResNet, "layer2"), batches, step), made(ResNet, "layer2")
    with pytest.warns(UserWarning, match="inputs require gradients: these go through the frozen"):
        trained(model, through := fl.cached(model, batches), step)
    assert through.answered == 2 * len(X)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_example_of_the_docstring() -> None:
    model, batches = made(ResNet, "layer2"), loader(Y)
    lines = [line.strip()[4:] for line in (fl.cached.__doc__ or "").splitlines()
             if line.strip().startswith((">>>", "..."))]  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    names = {"fl": fl, "model": model, "loader": batches, "optimizer": optimizer,
             "criterion": nn.CrossEntropyLoss()}  # fmt: skip
    before = model.head.weight.detach().clone()
    source = "\n".join(lines).replace("layer4", "layer2")
    exec(source, names)
    assert not torch.equal(model.head.weight, before)
    assert list(itertools.islice(lines, 1)) == ['fl.freeze(model, until="layer4")']


# --- fl.split without a graph ---------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mapped", "unet"])
def test_split_without_a_graph(case: str, tmp_path: Path) -> None:
    kind, until, _, _ = CASES[case]
    model = made(kind, until)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"torch\.fx cannot follow"):
        fl.split(model)
    parts = fl.split(model, sample=X[:5])
    expected = {"mapped": ["net/layer1"], "unet": ["down1", "down2", "down3"]}[case]
    assert [crossing.path for crossing in parts.frontier] == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(
        "forward" in vars(m) for m in model.modules() if not isinstance(m, nn.BatchNorm2d)
    )
    with torch.no_grad():
        features = parts.prefix(X)
        got = parts.suffix(*features) if isinstance(features, tuple) else parts.suffix(features)
        wanted = model(X)
    for one, other in zip(*([*each.values()] if isinstance(each, dict) else [each]
                            for each in (got, wanted)), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    data = fl.cache_features(parts.prefix, (X.numpy(), Y.numpy()), tmp_path, verbose=0)
    rows = data[7][0] if isinstance(data[7][0], tuple) else (data[7][0],)
    whole = features if isinstance(features, tuple) else (features,)
    for row, column in zip(rows, whole, strict=True):
        torch.testing.assert_close(row, column[7], rtol=1e-9, atol=1e-9)
    # Training the suffix trains the model.
    parts.suffix.train()
    assert model.training
    out = parts.suffix(*whole)
    (out["logits"] if case == "mapped" else out).sum().backward()
    trains = [p for p in model.parameters() if p.requires_grad]
    assert trains
    assert all(p.grad is not None for p in trains)


class Detector(nn.Module):
    """As YOLO: at inference what it returns is decoded by a module that never trains."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.decode = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 1, 1, bias=False)
        self.decode.requires_grad_(False)

    def forward(self, x: Any) -> Any:
        raw = self.head(self.body(x)) if float(x.detach().sum()) < 1e9 else x
        return {"raw": raw} if self.training else {"raw": raw, "decoded": self.decode(raw)}


def test_a_frozen_module_that_inference_alone_calls_runs_in_the_suffix() -> None:
    torch.manual_seed(0)
    model, x = Detector(), torch.randn(6, 3, 7, 7)
    model(x)
    fl.freeze(model, "head")
    parts = fl.split(model, sample=x)
    for training in (False, True):
        model.train(training)
        parts.suffix.train(training)
        whole, cut = model(x), parts.suffix(*parts.prefix(x))
        assert whole.keys() == cut.keys()
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value)


@pytest.mark.filterwarnings("ignore")  # of torch, about nested tensors
def test_a_nested_tensor_has_no_rows_to_store() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            return self.last(self.first(x).to_padded_tensor(0.0))

    model = Net()
    model.first.requires_grad_(False)
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(3, 3)])
    batches = iter(fl.cached(model, [x]))
    batch = next(batches)
    with pytest.raises(ModelError, match=r"nested or sparse.*padded"):
        model(batch)
    batches.close()


def test_labels_that_a_model_reads_cross_the_frontier() -> None:
    model = made(Mapped, "net/layer2")
    sample = {"pixel_values": X[:6], "labels": Y[:6]}
    parts = fl.split(model, sample=sample)
    assert [(c.path, c.computed) for c in parts.frontier] == [
        ("labels", False), ("net/layer1", True)]  # fmt: skip
    with torch.no_grad():
        got = parts.suffix.eval()(*parts.prefix(**sample))
        torch.testing.assert_close(got["loss"], model.eval()(**sample)["loss"])
    with pytest.raises(ModelError, match="by name"):
        parts.prefix(X)
    with pytest.raises(ModelError, match="comes before"):
        fl.split(model, "net/head", sample=sample)
    early = fl.split(model, "net/layer1/1", sample=sample)
    assert [c.path for c in early.frontier] == ["labels", "net/layer1/0"]


def test_a_frozen_part_that_cannot_be_read_is_cached_in_memory_only(tmp_path: Path) -> None:
    model, twin = made(ResNet, "layer2"), made(ResNet, "layer2")
    model.layer1.handle = memoryview(b"no attribute that another process could tell")
    cached = fl.cached(model, loader(Y), path=tmp_path)
    with pytest.warns(UserWarning, match="in memory only, path= has no effect.*memoryview"):
        trained(model, cached, plain_loss)
    require_same(model, trained(twin, loader(Y), plain_loss))
    assert cached.answered > len(X)
    assert all(name.startswith("private") for name in cached.memories)
    assert not any(tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # without path= there is nothing to say
        trained(model, fl.cached(model, loader(Y)), plain_loss, 1)


def test_a_step_that_calls_the_model_twice_trains_as_without_the_cache() -> None:
    """What the cache compares in between must not count as a write to what autograd has saved."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8),
        nn.Linear(8, 1),
    ).double()  # fmt: skip
    fl.freeze(plain, "3")
    x = torch.randn(32, 3, dtype=torch.float64)
    batches = [(x[:16], x[:16] - 1), (x[16:], x[16:] + 1)]
    losses = []
    for model, loader in ((copy.deepcopy(plain), batches), (plain, fl.cached(plain, batches))):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            for real, made in loader:
                loss = (
                    functional.softplus(-model(real)).mean()
                    + functional.softplus(model(made)).mean()
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert losses[:6] == pytest.approx(losses[6:], rel=1e-9)


@dataclasses.dataclass
class Pictures:
    image: Any
    label: Any
    name: str = "train"


class TakesPictures(ResNet):
    def forward(self, batch: Any) -> Any:
        return functional.cross_entropy(super().forward(batch.image), batch.label)


def test_batches_that_are_records_of_tensors() -> None:
    model, twin = (TakesPictures().double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    for each in (model, twin):
        fl.freeze(each, "layer2")
        each.train()
    batches = [Pictures(X[i : i + 7], Y[i : i + 7]) for i in (0, 7, 14)]

    def step(model: Any, batch: Any) -> Any:
        return model(batch)

    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    cached = fl.cached(model, batches)
    with Seen(first) as seen:
        trained(model, cached, step)
    require_same(model, trained(twin, batches, step))
    assert cached.answered == 2 * len(X)
    assert sum(seen.sizes) < 3 * len(X) + 5 * 7 + 2 * 7


def test_what_has_no_rows_is_told_by_its_class() -> None:
    class Graph:
        def __init__(self, x: Any) -> None:
            self.x = x

    class OfGraphs(ResNet):
        def forward(self, graph: Any) -> Any:
            return super().forward(graph.x)

    model = OfGraphs().double()
    fl.freeze(model, "layer2")
    batches = iter(fl.cached(model, [Graph(X[:7])]))
    graph = next(batches)
    with pytest.raises(ModelError, match=r"train it as it is.*Received: Graph$"):
        model(graph)


class Domains(nn.Module):
    """Normalises each domain by itself; a batch is of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Any, domain: Any) -> Any:
        return self.head(self.norms[int(domain[0])](self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("frozen", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 1])
def test_batches_that_take_other_branches(frozen: int, first: int) -> None:
    """Those of the branch that the first batch takes are cached, the others run as they are."""
    torch.manual_seed(0)
    model = Domains().double()
    fl.freeze(model, f"norms/{frozen}" if frozen < 3 else "head")
    twin = copy.deepcopy(model)
    batches = [
        (X[7 * i : 7 * i + 7], torch.full((7,), (i + first) % 2), Y[7 * i : 7 * i + 7])
        for i in range(3)
    ]

    def step(model: Any, batch: Any) -> Any:
        return functional.cross_entropy(model(batch[0], batch[1]), batch[2])

    model.train(), twin.train()
    cached = fl.cached(model, batches)
    require_same(trained(model, cached, step), trained(twin, batches, step))
    assert cached.answered > 0


def test_a_compiled_model_does_not_compile_the_cache() -> None:
    """torch.compile went through the cache's own code, and ended in an error of its own."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    fl.freeze(plain.eval(), until="3")
    model = torch.compile(plain, backend="eager")
    x = torch.randn(16, 4)
    for _ in range(2):
        for batch in fl.cached(model, [x[:8], x[8:]]):
            assert torch.allclose(model(batch), plain[3](plain[:3](batch)), atol=1e-6)


def losses_of(model: Any, batches: Any) -> list[float]:
    """Train what is not frozen for three epochs; the loss of each batch."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(learning, 0.1), []
    for _ in range(3):
        for x, y in batches:
            made = model(x)
            loss = functional.cross_entropy(getattr(made, "logits", made), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@dataclasses.dataclass
class Logits:
    logits: Any


def test_outputs_in_an_object_need_the_frozen_part() -> None:
    """It was an IndexError: no frozen module seemed to be needed."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.head = nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            return Logits(self.head(self.body(x)))

    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.arange(32) % 3
    batches = [(x[:16], y[:16]), (x[16:], y[16:])]
    model = Net()
    fl.freeze(model, "head")
    twin = copy.deepcopy(model)
    assert losses_of(model, fl.cached(model, batches)) == pytest.approx(losses_of(twin, batches))


def test_offsets_among_the_inputs_are_refused_in_words() -> None:
    """torch's own error about the offsets came through."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.norm, self.head = (
                nn.EmbeddingBag(9, 4),
                nn.BatchNorm1d(4),
                nn.Linear(4, 1),
            )

        def forward(self, offsets: Any, words: Any) -> Any:
            return self.head(self.norm(self.bag(words, offsets)))

    model = Bags()
    fl.freeze(model, "head")
    batch = torch.arange(8) * 2, torch.arange(16) % 9
    for given in fl.cached(model, [batch]):
        with pytest.raises(ModelError, match=r"in another order.*Train without the cache"):
            model(*given)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_that_is_frozen_in_part_gets_true_numbers(reentrant: bool) -> None:
    """Backward runs the block again, and what came in was skipped: losses became NaN."""

    def block(given: int) -> Any:
        return nn.Sequential(nn.Linear(given, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([block(6), block(8), block(8)])
            self.head = nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            for part in self.blocks:
                x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=reentrant)
            return self.head(x)

    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.arange(32) % 3
    batches = [(x[:16], y[:16]), (x[16:], y[16:])]
    model = Net()
    # A block that is checkpointed with reentrance learns nothing where its inputs need no gradient.
    fl.freeze(model, "blocks/1/3")
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert losses_of(model, fl.cached(model, batches)) == pytest.approx(
            losses_of(twin, batches)
        )
    torch.testing.assert_close(model.blocks[2][1].running_mean, twin.blocks[2][1].running_mean)
