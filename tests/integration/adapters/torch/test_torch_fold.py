"""Folded torch modules against the modules themselves, in float64 and float32."""

from __future__ import annotations

import copy
import io
import os
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn

import frostline as fl
from frostline.adapters.torch import samples
from frostline.adapters.torch.adapter import TorchView
from frostline.adapters.torch.forward_pass import tensors
from frostline.adapters.torch.prefix import to_onnx
from frostline.types import ModelError


def settled(model: Any) -> Any:
    """Random statistics, gamma and beta, so that nothing folds by luck."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, -1, 1)
    return model


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Any) -> Any:
        return self.bn(self.conv(self.bn(self.conv(x)))) + x


CASES: list[tuple[Any, tuple[int, ...], int]] = [
    (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), (3, 8, 8), 1),
    (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (4, 8, 8), 1),
    (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6)), (4, 5, 5), 1),
    (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, affine=False)), (3, 9), 1),
    (nn.Sequential(nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 3, 3, 3), 1),
    (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), (5,), 1),
    (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), (3, 4, 4), 0),
    (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(5)), (5,), 0),
    (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(5)), (5, 7), 0),
    (Shared(), (3, 8, 8), 0),
]


@pytest.mark.parametrize(("model", "shape", "absorbed"), CASES)
def test_outputs_are_the_same(model: Any, shape: tuple[int, ...], absorbed: int) -> None:
    model = settled(copy.deepcopy(model))
    x = torch.randn(6, *shape)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folded = TorchView(model).fold()
    assert len(folded.absorbed) == absorbed
    assert len(folded.absorbed) + len(folded.replaced) >= 1
    assert TorchView(folded.model).sites() == ()
    with torch.no_grad():
        wanted = copy.deepcopy(model).double().eval()(x.double())
        found = folded.model(x).double()
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_a_folded_module_is_saved_without_frostline() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    fl.freeze(model)
    folded = fl.fold(model)
    exported = torch.export.export(folded, (torch.randn(2, 3, 8, 8),))
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    stream.seek(0)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(stream).module()(x), model.eval()(x))


class Activated(nn.BatchNorm2d):
    """A subclass with an activation inside, as timm's BatchNormAct2d."""

    def forward(self, x: Any) -> Any:
        return torch.relu(super().forward(x))


class Renamed(nn.BatchNorm2d):
    """A subclass that adds nothing."""


class FrozenActivated(nn.Module):
    """Parameters that are buffers and an activation, as timm's FrozenBatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)
        self.eps = 1e-5

    def forward(self, x: Any) -> Any:
        stored = self.running_mean, self.running_var, self.weight, self.bias
        return torch.relu(nn.functional.batch_norm(x, *stored, False, 0.0, self.eps))


class Undecided(nn.Module):
    """Nothing that torch.fx can follow; what is inside of its children it can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        return self.bn(x) if x.sum() > -1e9 else x


class Peeking(Undecided):
    """Reads the convolution's output before the BN layer: folding that pair would be wrong."""

    def forward(self, x: Any) -> Any:
        early = self.stem[0](x)
        return (early, self.bn(self.stem(x))) if x.sum() > -1e9 else x


def agree(model: Any, folded: Any, *shape: int) -> None:
    x = torch.randn(5, *shape)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Activated, FrozenActivated])
def test_an_activation_inside_a_class_is_kept(kind: Any) -> None:
    model = settled(
        nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )
    with pytest.warns(UserWarning, match="'1' is a BN class of its own, which does more"):
        folded = fl.fold(model)
    assert [type(each).__name__ for each in folded.children()] == [
        "Conv2d",
        kind.__name__,
        "Conv2d",
    ]
    agree(model, folded, 3, 9, 9)


def test_a_subclass_that_only_normalises_is_folded() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), Renamed(4)))
    folded = fl.fold(model)
    assert len(list(folded.children())) == 1
    agree(model, folded, 3, 8, 8)


def test_pairs_inside_what_cannot_be_followed_are_folded_in_place() -> None:
    model = settled(Undecided())
    folded = fl.fold(model)
    assert isinstance(folded.stem[1], nn.Identity)
    assert not isinstance(folded.bn, nn.BatchNorm2d)  # behind no layer of its own: it scales
    assert isinstance(model.stem[1], nn.BatchNorm2d)
    agree(model, folded, 3, 8, 8)


def test_a_pair_that_is_read_in_between_is_folded_apart() -> None:
    model = settled(Peeking())
    folded, x = fl.fold(model), torch.randn(5, 3, 8, 8)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        for one, other in zip(folded(x), model.eval()(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Reading(Undecided):
    """Reads what its BN layer has stored: without that layer it fails."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) + self.bn.running_mean.sum()


class Drifting(nn.Module):
    """As a momentum encoder in ``forward``: each call moves parameters, those of BN as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Any, more: Any) -> Any:
        for parameter in self.parameters():
            parameter.data = parameter.data * 0.5 + 1
        return self.norm(self.conv(x + more)) if x.sum() > -1e9 else x


def test_a_fold_that_would_be_wrong_is_refused() -> None:
    with pytest.raises(ModelError, match="fails where the model does not"):
        fl.fold(settled(Reading()))
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match="changes its parameters while it is called"):
        fl.fold(settled(Drifting()), sample=(x, x))


class ByTask(nn.Module):
    """Two arguments, one of them no tensor: inputs cannot be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)})

    def forward(self, x: Any, *, task: str) -> Any:
        return self.norms[task](self.conv(x)).relu()


def test_a_sample_lets_fold_what_cannot_be_followed() -> None:
    model, x = settled(ByTask()), torch.randn(4, 3, 8, 8)
    with pytest.raises(ModelError, match="pass sample="):
        fl.fold(model)
    folded = fl.fold(model, sample={"x": x, "task": "a"})
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for task, norm in model.eval().norms.items():  # by the formula
        y = model.conv(x)
        mean, variance = norm.running_mean, norm.running_var
        wanted = (y - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + norm.eps).sqrt()
        wanted = wanted * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        torch.testing.assert_close(folded(x, task=task), wanted.relu(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="the model fails on the sample"):
        fl.fold(model, sample={"x": x, "task": "c"})


class WithModules(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: what follows is a module that the class holds."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.LeakyReLU(0.2)

    def forward(self, x: Any) -> Any:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("seen", [True, False])
def test_modules_that_a_class_applies_stay_behind_the_fold(seen: bool) -> None:
    class Hidden(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return super().forward(x) if x.sum() > -1e9 else x

    layers = [nn.Conv2d(3, 4, 3), WithModules(4), nn.ReLU(), WithModules(4)]
    model = settled(nn.Sequential(*layers) if seen else Hidden(*layers))
    result = TorchView(model).fold()
    assert (len(result.absorbed), len(result.replaced)) == ((1, 1) if seen else (0, 2))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())
    agree(model, result.model, 3, 8, 8)


def test_what_is_saved_names_no_class_of_frostline() -> None:
    stream = io.BytesIO()
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    fl.freeze(model)
    torch.save(fl.fold(model), stream)
    assert b"frostline" not in stream.getvalue()
    stream.seek(0)
    agree(model, torch.load(stream, weights_only=False), 3, 8, 8)


def test_what_is_refused_is_named() -> None:
    for model, message in (
        (nn.Sequential(nn.Conv2d(3, 3, 1), Activated(3)), "'1' is a BN class of its own"),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "'0' keeps no statistics"),
        (nn.Sequential(nn.Linear(2, 2)), "no BN layer"),
    ):
        with pytest.raises(ModelError, match=message):
            fl.fold(model)


def test_a_linear_layer_is_folded_for_two_axes_only() -> None:
    """Of three axes BatchNorm1d takes the second for the channels, and here both have length 4."""
    model = settled(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    folded = fl.fold(model)
    with torch.no_grad(), pytest.raises(AssertionError, match=r"of shape .* sample="):
        folded(torch.randn(2, 4, 5))


class Mixer(nn.Module):
    """A Linear over time with a BN over channels, of one size, and a convolution with its BN."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.conv, self.last = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Any) -> Any:
        return self.last(self.conv(self.norm(self.time(x))))


def test_a_sample_of_three_axes_keeps_a_linear_layer_as_it_is() -> None:
    model = settled(Mixer())
    made = fl.fold(model, sample=torch.randn(3, 4, 4))
    agree(model, made, 4, 4)
    torch.testing.assert_close(made.time.weight, model.time.weight)
    assert not torch.equal(made.conv.weight, model.conv.weight)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in made.modules())


class Forecaster(nn.Module):
    """A mapping of a class of its own, and a loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)
        self.last, self.head = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, values: Any, labels: Any = None) -> Any:
        x = self.head(self.last(self.norm(self.conv(values)).relu().mean(2)))
        found = OrderedDict(prediction=x)
        if labels is not None:
            found["loss"] = (x[:, 0] - labels).square().mean()
        return found


def test_a_folded_module_takes_and_returns_what_the_module_does() -> None:
    torch.manual_seed(0)
    model, x, y = Forecaster(), torch.randn(8, 2, 9) + 1, torch.randn(8)
    model.train()(x)
    folded = fl.fold(model.eval())
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())
    for given in ({"values": x}, {"values": x, "labels": y}):
        one, other = model(**given), folded(**given)
        assert type(other) is OrderedDict
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5)
    stream = io.BytesIO()
    torch.save(folded, stream)
    assert b"frostline" not in stream.getvalue()


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        if float(x.sum()) > 1e9:
            raise ValueError("too bright")
        return self.norm(self.conv(x).relu())


def test_bn_that_stands_behind_no_linear_layer_is_exchanged_where_nothing_can_be_followed() -> None:
    model, x = Untraceable(), torch.rand(8, 3, 9, 9)
    model.train()(x)
    folded = fl.fold(model.eval())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    stream = io.BytesIO()
    torch.save(folded.conv, stream)
    torch.save(folded.norm, stream)
    assert b"frostline" not in stream.getvalue()


@pytest.mark.filterwarnings("ignore")  # of torch, about its own future
def test_bn_inside_of_a_quantisation_aware_module_is_left_to_torch() -> None:
    import torch.ao.quantization as quantization

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: Any) -> Any:
            return self.relu(self.bn(self.conv(x)))

    model = Net().train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.fuse_modules_qat(model, [["conv", "bn", "relu"]], inplace=True)
    quantization.prepare_qat(model, inplace=True)
    with pytest.raises(ModelError, match=r"ConvBnReLU2d.*torch\.ao\.quantization\.convert"):
        fl.fold(model)


def test_volumes_are_tried_at_a_size_that_ends() -> None:
    model = settled(nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU())).eval()
    x = torch.randn(2, 1, 8, 8, 8)
    torch.testing.assert_close(fl.fold(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_batches_are_guessed_until_one_is_taken() -> None:
    """All guesses for a layer of 1,024 channels would be gigabytes."""
    drawn: list[tuple[int, ...]] = []

    class Seen(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            drawn.append(tuple(x.shape))
            return super().forward(x)

    model = nn.Sequential(Seen(2, 2, 1), nn.BatchNorm2d(2)).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            samples, "tensors", lambda rows, root: drawn.append(rows.shape) or tensors(rows, root)
        )
        fl.fold(model)
    assert drawn[0] == (6, 2, 64, 64)
    assert set(drawn) == {drawn[0]}


def test_an_engine_s_graph_is_made_from_a_few_rows() -> None:
    """A fold that guesses its sample, and a trace of a whole batch, took longer than the engine."""
    pytest.importorskip("onnx")
    rows: list[int] = []

    class Counted(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            rows.append(len(x))
            return super().forward(x)

    model = nn.Sequential(Counted(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    assert to_onnx(model, np.ones((32, 3, 8, 8), np.float32))
    assert rows
    assert max(rows) <= samples.ROWS


def test_a_lazy_module_that_has_seen_no_data_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(fl.ModelError, match="lazy and has seen no data yet"):
        fl.fold(model)


class Terse(nn.Module):
    """Its ``train`` returns nothing, as one of a user's own may."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def train(self, mode: bool = True) -> Any:
        super().train(mode)

    def forward(self, x: Any) -> Any:
        return self.features(x)


def test_a_module_whose_train_returns_nothing_is_folded() -> None:
    model, x = Terse(), torch.randn(4, 3, 8, 8)
    model(x)
    model.eval()
    for sample in (None, x):
        torch.testing.assert_close(fl.fold(model, sample=sample)(x), model(x))
    assert to_onnx(model, np.ones((2, 3, 8, 8), np.float32))


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    for ask in (fl.freeze, fl.fold, fl.split, lambda m: fl.split(m, sample=torch.ones(2, 3, 8, 8))):
        with pytest.raises(fl.ModelError, match="on the 'meta' device"):
            ask(model)


class Picks(nn.Module):
    """Returns scores, best first, and the places of the best, of which many are alike."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.wrong = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), wrong

    def forward(self, x: Any) -> Any:
        between = self.conv(x)
        scores = self.norm(between).mean((1, 2, 3))
        if x.sum() > 1e9:  # torch.fx cannot follow this
            return scores
        alike = scores.repeat_interleave(8) * (1 + 1e-9 * torch.randn(8 * len(x)).to(x.dtype))
        best = alike.sort(descending=True)
        places = best.indices.to(x.dtype)
        return best.values, 100 * between.mean() + places if self.wrong else places


@pytest.mark.parametrize("wrong", [False, True])
def test_what_a_model_picks_among_scores_that_are_alike_is_not_compared(wrong: bool) -> None:
    torch.manual_seed(0)
    model, x = Picks(wrong), torch.randn(4, 3, 6, 6)
    for _ in range(3):
        model(x)
    folded = fl.fold(model, sample=x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        found, wanted = folded.eval()(x), model.eval()(x)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].sort().values, wanted[1].sort().values)


class KeepsLast(nn.Module):
    """Keeps features of its last pass, in an attribute and in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Any) -> Any:
        self.last = self.seen["conv"] = self.conv(x)
        return self.bn(self.last)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("kind", ["weight_norm", "keeps its last features"])
def test_tensors_that_torch_copies_for_nobody(kind: str) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if kind == "weight_norm":
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    else:
        model = KeepsLast()
        model(x)  # the features have a gradient
    nn.init.uniform_(next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_var)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    made = fl.fold(model, sample=x).eval()
    torch.testing.assert_close(made(x), model.eval()(x))


def test_what_nobody_copies_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"cannot be copied \(.*lock.*Received: Sequential"):
        fl.fold(model)


class Switched(nn.Module):
    """More than BN, by hand, with buffers of the usual names: torch.fx goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("running_var", torch.rand(1, 3, 1, 1) + 0.5)

    def forward(self, x: Any) -> Any:
        mean = 0.5 * self.running_mean + 0.5 * x.mean((2, 3), keepdim=True)
        return (x - mean) / (self.running_var + 1e-5).sqrt()


def test_a_norm_by_hand_that_a_trace_takes_apart_is_no_bn() -> None:
    """What torch.fx keeps its buffers in was taken for one of an exported graph: a KeyError."""
    torch.manual_seed(0)
    model = settled(nn.Sequential(Switched(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 3, 6, 6)
    folded = fl.fold(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_read_beside_its_call_stays_and_the_others_fold() -> None:
    """It was refused whole: the folded module had no statistics to read."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.out, self.target = nn.Linear(8, 2), nn.BatchNorm1d(2)

        def forward(self, x: Any) -> Any:
            found = self.out(self.body(x))
            return self.target(found) + found * self.target.running_var + self.target.running_mean

    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(16, 4)
    for _ in range(3):
        model(x)
    model.eval()
    with pytest.warns(UserWarning, match="'target' is read by the model beside being called"):
        folded = fl.fold(model, sample=x)
    kinds = [type(module) for module in folded.modules()]
    assert kinds.count(nn.BatchNorm1d) == 1
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_hooks_are_no_class_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    model[1].register_forward_hook(lambda _module, _inputs, output: output * 0.9)
    with pytest.raises(ModelError, match="'1' has hooks that change"):
        fl.fold(model, sample=torch.randn(8, 4))


class InSingle(nn.BatchNorm1d):
    """Normalises in single precision, whatever comes in."""

    def forward(self, x: Any) -> Any:
        return super().forward(x.float()).to(x.dtype)


def test_a_class_that_casts_its_input_is_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), InSingle(6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(32, 5)
    model.train()(x)
    model.eval()
    folded = fl.fold(model, sample=x)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())
    np.testing.assert_allclose(folded(x).detach(), model(x).detach(), atol=1e-6)
