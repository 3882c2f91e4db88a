"""Native torch modules cut in two: against training and running the whole module."""

from __future__ import annotations

import copy
import io
import os
import pickle
import warnings
from collections import OrderedDict
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional

import frostline as fl
from frostline.adapters import prefix as prefixes
from frostline.types import ModelError


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return functional.relu(y, inplace=True)


class ResNet(nn.Module):
    """A small residual network as people write them: in place, functional, sizes read off."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.layer1 = Block(8)
        self.layer2 = Block(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)
        self.drop = drop

    def forward(self, x: Any) -> Any:
        count = x.size(0)
        x = self.pool(self.layer2(self.layer1(self.stem(x)))).view(count, -1)
        x = functional.dropout(x, self.drop, training=self.training)
        return self.fc(x)


def resnet(drop: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = ResNet(drop)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def images(count: int = 12, seed: int = 1) -> Any:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def train(model: Any, optimizer: Any, step: Any) -> None:
    model.train()
    labels = torch.arange(12) % 4
    for _ in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(step(), labels).backward()
        optimizer.step()


def together(parts: Any, x: Any) -> Any:
    features = parts.prefix(x)
    return parts.suffix(*features) if isinstance(features, tuple) else parts.suffix(features)


@pytest.mark.parametrize(
    ("until", "frontier"),
    [
        ("fc", [("dropout", (8,))]),
        ("layer2", [("layer1/relu_1", (8, 8, 8))]),
        ("layer2/conv2", [("layer1/relu_1", (8, 8, 8)), ("layer2/relu_2", (8, 8, 8))]),
    ],
)
def test_training_the_suffix_trains_the_model(until: str, frontier: Any) -> None:
    whole, cut = resnet(), resnet()
    x = images()
    for model in (whole, cut):
        fl.freeze(model, until)
    optimizer = torch.optim.SGD(cut.parameters(), 0.1, momentum=0.9)  # before the split
    parts = fl.split(cut, sample=x)
    assert [(c.path, c.shape) for c in parts.frontier] == frontier
    assert parts.bytes_per_sample == sum(4 * torch.Size(shape).numel() for _, shape in frontier)
    train(whole, torch.optim.SGD(whole.parameters(), 0.1, momentum=0.9), lambda: whole(x))
    train(parts.suffix, optimizer, lambda: together(parts, x))
    assert set(map(id, parts.suffix.parameters())) <= set(map(id, cut.parameters()))
    assert not torch.equal(cut.fc.weight, resnet().fc.weight)
    for (name, one), other in zip(
        whole.state_dict().items(), cut.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(together(parts, x), cut(x))


def test_the_phase_of_functions_is_that_of_the_model() -> None:
    model = resnet(drop=0.5)
    fl.freeze(model, "fc")
    parts = fl.split(model)
    assert any("dropout" in note for note in parts.notes)
    features = parts.prefix(images())
    for run in (parts.suffix.train, model.train):
        run()
        torch.manual_seed(3)
        one = parts.suffix(features)
        torch.manual_seed(3)
        torch.testing.assert_close(one, model.fc(functional.dropout(features, 0.5, training=True)))
    for run in (parts.suffix.eval, model.eval):
        model.train()
        run()
        assert not model.training
        torch.testing.assert_close(parts.suffix(features), model.fc(features))
    twin = copy.deepcopy(parts.suffix).eval()
    torch.testing.assert_close(twin(features), model.fc(features))


def test_a_sample_of_numbers_that_numpy_does_not_have() -> None:
    """bfloat16 ended in torch's own TypeError."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    model = model.bfloat16().eval()
    fl.freeze(model, "3")
    x = torch.randn(4, 3, 6, 6, dtype=torch.bfloat16)
    parts = fl.split(model, sample=x)
    assert torch.equal(together(parts, x), model(x))


def test_features_that_are_nan_are_compared_like_others() -> None:
    """A poisoned layer ended in torch's error about a negative tolerance."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    model[1].running_mean[1] = float("nan")
    fl.freeze(model.eval(), "3")
    parts = fl.split(model, sample=torch.randn(4, 3, 6, 6))
    assert [crossing.shape for crossing in parts.frontier] == [(64,)]


class Mixing(nn.Module):
    """Mixes channels by a constant matrix that is stored in a layout of its own."""

    def __init__(self, matrix: Any) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.features, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        mixed = torch.sparse.mm(self.matrix, self.features(x).t()).t()
        return self.head(self.norm(mixed))


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "sparse_csc"])
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_a_sparse_buffer(layout: str) -> None:
    dense = torch.eye(8).roll(1, 0)
    model = Mixing(dense.to_sparse(layout=getattr(torch, layout)))
    fl.freeze(model, until="head")
    x, y = torch.randn(24, 6), torch.arange(24) % 3
    parts = fl.split(model, sample=x)
    assert torch.allclose(together(parts, x), model(x), atol=1e-6)
    assert torch.allclose(fl.fold(model, sample=x)(x), model.eval()(x), atol=1e-5)
    model.train()
    wanted = model(x).detach()
    for batch, _ in fl.cached(model, [(x, y)]):
        assert torch.allclose(model(batch), wanted, atol=1e-6)
    fl.compare(
        model, (x, y), validation=(x, y), loss=functional.cross_entropy, epochs=1, seeds=1,
        optimizer=lambda weights: torch.optim.SGD(weights, 0.01), verbose=0,
    )  # fmt: skip
    assert torch.equal(model.matrix.to_dense(), dense)


class Keeping(nn.Module):
    """Keeps what it computes; makes a buffer, and a layer, when it is first called."""

    def __init__(self, *, early: bool) -> None:
        super().__init__()
        self.features, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.early, self.calls, self.last, self.first = early, 0, None, None

    def forward(self, x: Any) -> Any:
        if self.early and self.first is None:
            self.first = nn.BatchNorm1d(x.shape[1])
        if not hasattr(self, "grid"):
            self.register_buffer("grid", torch.linspace(0, 1, x.shape[1]))
        self.calls += 1
        x = (self.first(x) if self.early else x) + self.grid
        self.last = self.norm(self.features(x)) + torch.ones(8)
        return self.head(self.last)


@pytest.mark.parametrize("early", [False, True])
def test_what_forward_keeps_while_it_is_traced_is_gone_again(early: bool) -> None:
    model, x = Keeping(early=early), torch.randn(12, 6)
    fl.freeze(model, until="head")
    kept = {name: list(vars(model)[name]) for name in ("_buffers", "_modules")}, list(vars(model))
    fl.fold(model, sample=x)
    if early:  # it trains, and stands before what is frozen
        with pytest.raises(ModelError, match="no frozen module returns the same"):
            fl.split(model, sample=x)
    else:
        parts = fl.split(model, sample=x)
        assert torch.allclose(together(parts, x), copy.deepcopy(model)(x), atol=1e-6)
    assert (model.calls, model.last, model.first) == (0, None, None)
    assert kept == ({name: list(vars(model)[name]) for name in kept[0]}, list(vars(model)))


class Centred(nn.Module):
    def forward(self, x: Any) -> Any:
        return x - x.mean(0)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        if self.training:
            self.seen += 1
        return x


class Noisy(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + torch.rand_like(x) if self.training else x


def sequence(*middle: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), *middle, nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("middle", "at", "match"),
    [
        (nn.BatchNorm1d(6), None, "'1' is frozen, but in training it normalises with"),
        (nn.BatchNorm1d(6, track_running_stats=False), None, "'1' is frozen, but in training"),
        (Centred(), None, "depends on the other samples"),
        (
            nn.Dropout(0.5),
            2,
            r"'1' is before .* not pure: it is random in training; freeze\(dropout=True\)",
        ),
        (Noisy(), 2, "'1' is before the boundary '2' but not pure: it calls other things"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), None, "'1' .* training step"),
        (
            Counting(),
            2,
            "'1' is before the boundary '2' but not pure: it changes its buffer '1.seen'",
        ),
    ],
)
def test_what_is_not_pure_is_refused_by_name(middle: Any, at: Any, match: str) -> None:
    model = sequence(middle, nn.ReLU())
    model[:2].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=match):
        fl.split(model, at)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_cut_at_all() -> None:
    with pytest.raises(ModelError, match=r"nothing is frozen.*'0' comes first"):
        fl.split(sequence())
    with pytest.raises(ModelError, match="everything is frozen"):
        fl.split(sequence().requires_grad_(False))
    model = sequence()
    with pytest.raises(ModelError, match="'0' is before the boundary '1' but not pure"):
        fl.split(model, 1)
    model[0].requires_grad_(False)
    with pytest.raises(ModelError, match="at least two rows"):
        fl.split(model, sample=torch.zeros(1, 6))
    with pytest.raises(ModelError, match="end of the model"):
        fl.split(model, 1.0)


class Choosing(nn.Module):
    """Decides by values: nothing that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        return self.body(x) if bool((x < 1e9).all()) else x


def test_a_module_that_cannot_be_followed_is_kept_whole() -> None:
    model = sequence(Choosing(), nn.ReLU(), Choosing())
    model[:2].requires_grad_(False)
    x = torch.randn(5, 6)
    parts = fl.split(model)
    assert [type(layer).__name__ for layer in parts.prefix.layers] == ["Linear", "Choosing", "ReLU"]
    torch.testing.assert_close(together(parts, x), model(x))


def test_a_model_that_cannot_be_followed_itself_is_refused() -> None:
    for at in (None, "body"):
        with pytest.raises(ModelError, match=r"cannot follow Choosing\.forward .*control flow"):
            fl.split(Choosing(), at)


@pytest.mark.parametrize("wrap", ["compile", "parallel"])
def test_wrappers_are_taken_off(wrap: str) -> None:
    model = resnet()
    fl.freeze(model, "fc")
    wrapped = torch.compile(model, backend="eager") if wrap == "compile" else nn.DataParallel(model)
    parts = fl.split(wrapped)
    assert parts.suffix.fc is model.fc
    assert "wrap the suffix" in parts.notes[-1]


def test_an_exception_in_the_middle_leaves_the_model_as_it_was(monkeypatch: Any) -> None:
    model = resnet().train()
    fl.freeze(model, "fc")
    model.layer2.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    calls: list[Any] = []

    def failing(x: Any) -> Any:
        calls.append(x)
        if len(calls) == 2:
            raise RuntimeError("in the middle")
        return nn.Conv2d.forward(model.layer2.conv1, x)

    monkeypatch.setattr(model.layer2.conv1, "forward", failing)
    with pytest.raises(ModelError, match=r"at 'layer2.conv1'.*in the middle") as raised:
        fl.split(model, sample=images())
    assert isinstance(raised.value.__cause__.problem, RuntimeError)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Auxiliary(nn.Module):
    """A second head that only training uses, before or behind the main one."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Conv2d(4, 4, 3)
        self.aux = nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 2)
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        aux = self.aux(x) if self.training and self.early else None
        x = self.body(x)
        if self.training and not self.early:
            aux = self.aux(x)
        x = self.head(x.mean((2, 3)))
        return (x, aux) if self.training else x


@pytest.mark.parametrize("early", [True, False])
def test_an_auxiliary_head_of_training_is_kept_in_training(early: bool) -> None:
    model = Auxiliary(early)
    fl.freeze(model, "body")
    x = images()
    parts = fl.split(model, sample=x)
    assert [c.path for c in parts.frontier] == ["stem/2"]
    assert parts.suffix.aux[0] is model.aux[0]
    twin = copy.deepcopy(model).train()
    for one, other in zip(together(parts, x), twin(x), strict=True):
        torch.testing.assert_close(one, other)
    assert int(model.aux[0].num_batches_tracked) == 1
    assert not hasattr(parts.suffix, "unused")
    model.eval()
    torch.testing.assert_close(together(parts, x), model(x))
    alone = copy.deepcopy(parts.suffix)
    assert torch.is_tensor(alone(parts.prefix(x)))
    assert len(alone.train()(parts.prefix(x))) == 2
    assert not model.training
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.save(parts.suffix, io.BytesIO())
    assert "another graph than inference" in str(found[0].message)


def test_what_no_pass_uses_does_not_count_as_what_trains() -> None:
    model = Auxiliary(early=True)
    fl.freeze(model)
    model.unused.requires_grad_(True)
    with pytest.raises(ModelError, match="everything is frozen"):
        fl.split(model, sample=images())


class Twice(nn.Module):
    """A backbone that training calls once more: on other views, or on what it has made."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.again = nn.ModuleDict({"same": self.body})
        self.head = nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        found = self.body(x)
        if self.training and self.how == "in a row":
            found = self.body(found)
        elif self.training:
            body = self.again["same"] if self.how == "by another name" else self.body
            found = (found + body(x.flip(3))) / 2
        return self.head(found.mean((2, 3)))


@pytest.mark.parametrize(
    ("how", "crossing"),
    [
        ("by the same name", ["x", "body/2"]),
        ("by another name", ["x", "body/2"]),
        ("in a row", ["body/2"]),
    ],
)
def test_a_frozen_part_that_training_calls_once_more_is_followed(
    how: str, crossing: list[str]
) -> None:
    model = Twice(how)
    fl.freeze(model, "head")
    x = images()
    parts = fl.split(model, sample=x)
    assert [c.path for c in parts.frontier] == crossing

    def both(x: Any) -> Any:
        features = parts.prefix(x)
        return parts.suffix(*features) if len(crossing) > 1 else parts.suffix(features)

    for training in (True, False):
        model.train(training)
        made = {}
        for way in (model, both):
            model.zero_grad()
            out = way(x)
            out.square().sum().backward()
            made[way] = [out, *(p.grad.clone() for p in model.head.parameters())]
        torch.testing.assert_close(made[both], made[model])


class Mapped(nn.Module):
    """Arguments by name with defaults, a mapping as output, as Hugging Face models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet()

    def forward(self, pixel_values: Any = None, labels: Any = None) -> Any:
        found = OrderedDict(logits=self.net(pixel_values))
        if labels is not None:
            found["loss"] = functional.cross_entropy(found["logits"], labels)
        return found


@pytest.mark.parametrize("named", [True, False, None])
def test_arguments_with_defaults(named: bool | None) -> None:
    model = Mapped()
    fl.freeze(model, "net/layer2")
    x = images()
    parts = fl.split(model, sample={"pixel_values": x} if named else None if named is None else x)
    assert [c.path for c in parts.frontier] == ["net/layer1/relu_1"]
    found = parts.suffix.eval()(parts.prefix(pixel_values=x))
    torch.testing.assert_close(found["logits"], model(pixel_values=x)["logits"])


def test_modes_stay() -> None:
    model = resnet().train()
    model.requires_grad_(False)
    model.stem[1].eval()
    for layer in (model.layer1, model.layer2):
        layer.bn1.eval()
        layer.bn2.eval()
    model.fc.requires_grad_(True)
    before = [module.training for module in model.modules()]
    fl.split(model, sample=images())
    assert [module.training for module in model.modules()] == before


def stochastic_depth(x: Any, p: float, training: bool) -> Any:
    keep = torch.rand(len(x), 1, 1, 1) > p
    return x * keep if training else x


torch.fx.wrap("stochastic_depth")


class Told(nn.Module):
    def forward(self, x: Any) -> Any:
        return stochastic_depth(x, 0.2, self.training)


def test_a_function_that_is_told_the_phase_ends_the_prefix() -> None:
    last = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Told(), last)
    model[0].requires_grad_(False)
    parts = fl.split(model, sample=images())
    assert [c.path for c in parts.frontier] == ["0"]
    assert "acts otherwise in training" in parts.notes[0]


def test_saved_parts_are_plain_torch() -> None:
    model = resnet(drop=0.5)
    fl.freeze(model, "layer2/bn1")
    x = images()
    parts = fl.split(model, at="layer2/bn1", sample=x)
    loaded = []
    for part in (parts.prefix, parts.suffix):
        stream = io.BytesIO()
        torch.save(part, stream)
        assert b"frostline" not in stream.getvalue()
        stream.seek(0)
        loaded.append(torch.load(stream, weights_only=False))
        assert set(loaded[-1].state_dict()) <= set(model.state_dict())
    features = loaded[0].train()(x)  # the prefix is the same function in every mode
    for one, other in zip(features, parts.prefix(x), strict=True):
        torch.testing.assert_close(one, other)
    model.eval()
    torch.testing.assert_close(loaded[1].eval()(*features), model(x))
    one, other = (loaded[1].train()(*features) for _ in range(2))
    assert not torch.equal(one, other)  # dropout has kept its mode


class OwnNames(nn.Module):
    """Modules by the names that a part uses itself."""

    def __init__(self, followed: bool) -> None:
        super().__init__()
        self.followed = followed
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.inputs, self.plan = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        if not self.followed and float(x.mean()) > 1e9:
            raise ValueError
        return self.plan(self.inputs(self.layers(x)).mean((2, 3)))


@pytest.mark.parametrize("followed", [True, False])
def test_a_model_may_name_its_modules_as_a_part_names_things(followed: bool) -> None:
    model = OwnNames(followed)
    fl.freeze(model, "plan")
    x = images()
    parts = fl.split(model, sample=x)
    assert "layers" in str(parts)
    assert parts.suffix.get_submodule("plan") is model.plan
    torch.testing.assert_close(together(parts, x), model.eval()(x))
    copied = copy.deepcopy(parts.suffix)
    torch.testing.assert_close(copied(parts.prefix(x)), model(x))


def test_a_saved_suffix_is_known_to_normalise_with_what_it_has_stored() -> None:
    """Its frozen BN layers are calls of batch_norm, which no mode changes."""
    model = resnet()
    fl.freeze(model, "layer2/bn2")
    features = (parts := fl.split(model, at="layer1", sample=images())).prefix(images())
    stream = io.BytesIO()
    torch.save(parts.suffix, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False).train()
    policies = {site.path: site.policy for site in fl.sites(loaded)}
    assert policies.pop("layer2/bn2") == "update"
    assert policies == dict.fromkeys(["layer1/bn1", "layer1/bn2", "layer2/bn1"], "inference")
    fl.assert_frozen(loaded, "layer2/bn2", data=features)
    assert "FL103" not in str(fl.lint(loaded))
    with pytest.raises(ModelError, match="'layer1/bn1' normalises with stored statistics"):
        fl.unfreeze(loaded)
    fl.freeze(loaded)
    fl.assert_frozen(loaded, data=features)

    class Dual(torch.fx.GraphModule):
        """Like torchvision's, it may run another graph in another mode."""

        def train(self, mode: bool = True) -> Any:
            return super().train(mode)

    called = [s for s in fl.sites(Dual(loaded, loaded.graph)) if s.kind == "Module"]
    assert [site.policy for site in called] == ["update"] * 3


def test_a_forward_with_keywords_of_all_kinds_is_cut_by_replay() -> None:
    class Open(OwnNames):
        def forward(self, x: Any, **kwargs: Any) -> Any:
            return super().forward(x)

    model = Open(followed=True)
    fl.freeze(model, "plan")
    parts = fl.split(model, sample=images())
    torch.testing.assert_close(together(parts, images()), model.eval()(images()))


class Steps(nn.Module):
    """As many steps as the longest sequence of the batch, each with a BN of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norms = nn.Linear(3, 4), nn.ModuleList(nn.BatchNorm1d(4) for _ in range(5))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Any, lengths: Any) -> Any:
        state = x.new_zeros(len(x), 4)
        for step in range(int(lengths.max())):
            found = torch.tanh(self.norms[step](self.into(x[:, step])) + state)
            state = torch.where((lengths > step).unsqueeze(1), found, state)
        return self.head(state)


@pytest.mark.parametrize("longest", [0, 7])
def test_features_of_samples_for_which_a_model_takes_fewer_steps(
    longest: int, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    model = Steps()
    fl.freeze(model, "head")
    x, lengths = torch.randn(40, 5, 3), torch.full((40,), 2)
    lengths[[longest, 9]] = 5  # of the sample, one is left out in the check of the split
    sample = x[:10], lengths[:10]
    prefix, suffix = (parts := fl.split(model, sample=sample)).prefix, parts.suffix.eval()
    for _ in range(2):  # in batches of 32, the second time a few rows are computed again
        features = fl.cache_features(prefix, [((x, lengths), None)], tmp_path, verbose=0)
        for rows in (torch.arange(40), torch.arange(20, 30), torch.tensor([3])):
            known = [torch.stack(c) for c in zip(*map(features.__getitem__, rows), strict=True)]
            torch.testing.assert_close(suffix(*known), model(x[rows], lengths[rows]))
    with pytest.raises(ModelError, match=r"shapes of that sample.* \(2, 4, 3\), \(2,\)"):
        prefix(x[20:22, :4], lengths[20:22])


@pytest.mark.parametrize("training", [True, False])
def test_more_steps_than_the_sample_had_are_refused_in_both_phases(training: bool) -> None:
    """At inference they were computed from placeholders: NaN."""
    model = Steps()
    fl.freeze(model, "head")
    x, lengths = torch.randn(4, 5, 3), torch.tensor([4, 4, 5, 2])
    parts = fl.split(model, sample=(x, lengths.clamp(max=4)))
    model.train(training)
    with pytest.raises(ModelError, match="'into' is called for this batch and was not"):
        parts.suffix(*parts.prefix(x, lengths))


def test_a_sample_that_the_model_does_not_take_is_refused_with_the_way_out() -> None:
    """A detector's list of images taken for its arguments, for example."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, images: Any, targets: Any = None) -> Any:
            found = self.head(self.body(torch.stack(list(images))))
            return found if targets is None else found.mean() + targets["boxes"].mean()

    model = Detector()
    fl.freeze(model, "head")
    modes = [module.training for module in model.modules()]
    images = list(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ModelError, match=r"fails on the sample.*Pass sample=.*Received: .*list"):
        fl.split(model, sample=images)
    assert [module.training for module in model.modules()] == modes


class OneSize(nn.Module):
    """Behind its convolution it takes images of one side."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.last = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4 * (side - 2) ** 2, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.last(self.body(x)).flatten(1))


def one_size(side: int) -> Any:
    torch.manual_seed(0)
    model = OneSize(side).eval()
    fl.freeze(model, "head")
    return model


def test_a_size_that_only_the_rest_refuses_is_told_in_our_words() -> None:
    """The frozen part takes any size, so the trial of it alone shows nothing."""
    with pytest.raises(ModelError, match=r"cannot be read off its layers.*sample=None"):
        fl.split(one_size(9))
    with pytest.raises(ModelError, match=r"fails on the sample.*shape \(4, 3, 8, 8\) for OneSize"):
        fl.split(one_size(9), sample=torch.zeros(4, 3, 8, 8))
    assert fl.split(one_size(9), sample=torch.zeros(4, 3, 9, 9)).frontier
    guessed = fl.split(one_size(32))  # one of the sizes that are tried, though not the first
    assert "3x32x32" in guessed.notes[-1]


def test_a_prefix_is_known_again_in_another_process() -> None:
    """Unpickling puts the modules of a graph into the order of their use."""
    prefix = fl.split(one_size(32)).prefix
    with prefixes.exactly(prefix):
        copied = pickle.loads(pickle.dumps(prefix))  # our own bytes
    assert list(copied._modules) != list(prefix._modules)
    assert prefixes.identity(copied) == prefixes.identity(prefix)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Any) -> Any:
        return OrderedDict(out=self.head(self.base(x)))


def test_a_mapping_stays_of_its_class() -> None:
    model, x = Named(), torch.rand(4, 3, 8, 8)
    fl.freeze(model, until="head")
    parts = fl.split(model, sample=x)
    found = parts.suffix(parts.prefix(x))
    assert type(found) is OrderedDict
    torch.testing.assert_close(found["out"], model.eval()(x)["out"])


def test_a_list_that_forward_has_no_places_for_is_one_argument() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, images: Any) -> Any:
            if any(i.shape[1] < 3 for i in images):
                raise ValueError
            return self.head(self.body(torch.stack(images)))

    model = Pictures()
    fl.freeze(model, "head")
    images = list(torch.randn(4, 3, 8, 8))
    parts = fl.split(model, sample=images)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(parts.suffix.eval()(parts.prefix.eval()(images)), model(images))


def test_a_model_without_a_graph_names_the_sample_that_would_help() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.ModuleDict({"a": nn.BatchNorm1d(3)})
            self.head = nn.Linear(3, 1)

        def forward(self, x: Any, name: Any) -> Any:
            return self.head(self.norm[name](x))

    model = ByName()
    fl.freeze(model, "head")
    with pytest.raises(ModelError, match=r"Or pass sample=.*PyG, cannot.*Received: ByName"):
        fl.split(model)


def test_what_modules_tell_each_other_beside_their_outputs_is_named() -> None:
    # As the blocks of fastai, which hang a layer's input on its output.
    class Hung(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), Reads()

        def forward(self, x: Any) -> Any:
            y = self.norm(self.first(x))
            y.origin = x
            return self.last(y)

    class Reads(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)

        def forward(self, x: Any) -> Any:
            return super().forward(x + x.origin if hasattr(x, "shape") and x.dim() else x.origin)

    model = Hung()
    fl.freeze(model, until="last")
    with pytest.raises(fl.FrostlineError, match="beside their inputs and outputs"):
        fl.split(model, sample=torch.randn(4, 3))


def test_a_norm_without_parameters_behind_the_frozen_part_ends_it() -> None:
    """The advice was to freeze what comes before it, and that was frozen."""

    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)
            self.shift, self.head = nn.Embedding(2, 4), nn.Linear(4, 2)

        def forward(self, x: Any, y: Any) -> Any:
            return self.head(self.norm(self.first(x)) + self.shift(y))

    model = Conditional()
    sample = torch.randn(6, 3), torch.arange(6) % 2
    fl.freeze(model, "norm")
    parts = fl.split(model, sample=sample)
    assert "first" in [crossing.path for crossing in parts.frontier]
    assert any("'norm'" in note and "statistics of the batch" in note for note in parts.notes)
    model.eval()
    features = parts.prefix(*sample)
    torch.testing.assert_close(parts.suffix(*features), model(*sample))


class Answer:
    """Outputs in an object that is no structure to torch."""

    def __init__(self, logits: Any) -> None:
        self.logits, self.itself = logits, self


@pytest.mark.parametrize(
    "wrap", [Answer, lambda logits: torch.distributions.Categorical(logits=logits)]
)
def test_outputs_inside_of_objects_count(wrap: Any) -> None:
    """No frozen module was needed for them, so that the parts had nothing to cross."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
            self.head = nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            return wrap(self.head(self.body(x)) * len(x))

    model, x = Net(), torch.randn(6, 3)
    fl.freeze(model, "head")
    parts = fl.split(model, sample=x)
    assert [crossing.path for crossing in parts.frontier] == ["body"]
    model.eval()
    found = parts.suffix(parts.prefix(x)).logits
    torch.testing.assert_close(found, model(x).logits)


def test_rows_that_are_tied_together_are_told_as_such() -> None:
    """The advice was to pass a sample, and one was passed."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Any, edges: Any) -> Any:
            return self.head(edges @ self.norm(self.first(x)))

    model = Graph()
    fl.freeze(model, "head")
    with pytest.raises(ModelError, match="rows are tied together"):
        fl.split(model, sample=(torch.randn(8, 3), torch.eye(8)))
    with pytest.raises(ModelError, match="fails on the sample"):
        fl.split(model, sample=(torch.randn(8, 3), torch.eye(7)))


def test_a_model_that_a_freeze_breaks_at_inference_is_refused() -> None:
    """torch's own RuntimeError came through."""

    class Members(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            one = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
            self.members = nn.ModuleList(one)

        def forward(self, x: Any) -> Any:
            if self.training:
                return torch.stack([member(x) for member in self.members])
            states = torch.func.stack_module_state(list(self.members))

            def called(parameters: Any, buffers: Any) -> Any:
                return torch.func.functional_call(self.members[0], (parameters, buffers), (x,))

            return torch.vmap(called)(*states)

    model = Members()
    fl.freeze(model, "members/1")
    with pytest.raises(ModelError, match="at inference"):
        fl.split(model, sample=torch.randn(6, 3))


@pytest.mark.parametrize("verb", [fl.split, fl.fold])
def test_a_container_without_a_forward_is_told_to_hand_over_its_parts(verb: Any) -> None:
    """It was asked for a sample, which cannot help."""
    parts = nn.ModuleDict({"made": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))})
    fl.freeze(parts)
    with pytest.raises(ModelError, match=r"ModuleDict has no forward.*pass the part.*'made'"):
        verb(parts)
    with pytest.raises(ModelError, match="no forward"):
        verb(parts, sample=torch.ones(4, 3))
    parts.forward = lambda x: parts["made"](x)
    verb(parts, sample=torch.ones(4, 3)) if verb is fl.fold else None


class Rounded(nn.Module):
    """It computes under autocast; ``scale`` is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet()

    def forward(self, x: Any, scale: float = 1.0) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x) / scale


@pytest.mark.parametrize("given", [{"x": images(4)}, {"x": images(4), "scale": 0.5}])
def test_a_forward_under_autocast_and_with_a_number_is_split_by_record_and_replay(
    given: Any,
) -> None:
    model = Rounded()
    fl.freeze(model, "net/layer2")
    with pytest.raises(ModelError, match="computes under autocast"):
        fl.split(model)
    cut = fl.split(model, sample=given)
    with torch.no_grad():
        found = cut.suffix.eval()(cut.prefix.eval()(**given))
        torch.testing.assert_close(found, model.eval()(**given))


def test_a_list_of_pictures_of_two_sizes_is_one_argument() -> None:
    class Crops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet()

        def forward(self, crops: Any) -> Any:
            return torch.cat([self.net(torch.cat(crops[:2])), self.net(crops[2])])

    model, crops = Crops().eval(), [images(4), images(4, 2), images(4, 3)[..., :9, :9]]
    fl.freeze(model, "net/layer2")
    cut = fl.split(model, sample=crops)
    with torch.no_grad():
        features = cut.prefix.eval()(crops)
        found = cut.suffix.eval()(*(features if isinstance(features, tuple) else (features,)))
        torch.testing.assert_close(found, model(crops))
