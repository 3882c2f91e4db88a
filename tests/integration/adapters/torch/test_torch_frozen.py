"""``fl.freeze`` on native torch: every kind of BN, and all that undoes a freeze elsewhere."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from typing import Any

import pytest

import frostline as fl
from frostline.types import ModelError

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNormAct(nn.BatchNorm2d):
    """A subclass with behaviour of its own, as timm has it."""

    def forward(self, x: Any) -> Any:
        return torch.relu(super().forward(x))


KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3, eps=1e-3, momentum=0.3), (6, 3)),
    "1d in time": (lambda: nn.BatchNorm1d(3, momentum=None), (6, 3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3, affine=False), (6, 3, 4, 4)),
    "3d": (lambda: nn.BatchNorm3d(3, momentum=0.0), (6, 3, 2, 2, 2)),
    "sync": (lambda: nn.SyncBatchNorm(3), (6, 3, 4, 4)),
    "lazy": (lambda: nn.LazyBatchNorm2d(), (6, 3, 4, 4)),
    "subclass": (lambda: BatchNormAct(3), (6, 3, 4, 4)),
}


def trained(kind: str) -> tuple[Any, Any]:
    """A network around one layer that has seen two batches, and inputs."""
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    x = torch.randn(shape) * 2 + 1
    # SyncBatchNorm trains on accelerators only: its statistics come from a twin.
    norm = make()
    if kind == "sync":
        twin = nn.BatchNorm2d(3)
        twin(x), twin(x)
        norm.load_state_dict(twin.state_dict())
    else:
        norm(x), norm(x + 1)
    return nn.Sequential(norm, nn.Flatten(), nn.LazyLinear(2)), x


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bn_survives_what_undoes_a_freeze(kind: str) -> None:
    model, x = trained(kind)
    with torch.no_grad():
        wanted = model.eval()(x)
    norm = model.train()[0]
    before, looks, settings = type(norm), repr(norm), (norm.eps, norm.momentum)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, 0.1, weight_decay=0.1)
    state = copy.deepcopy(norm.state_dict())
    change = fl.freeze(model, until=2)
    assert model[0] is norm
    assert isinstance(norm, _BatchNorm)
    assert isinstance(norm, before)
    assert type(norm).__name__ == before.__name__
    assert repr(norm) == looks.removesuffix(")") + ", locked)"
    assert (norm.eps, norm.momentum) == settings
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    fl.assert_frozen(model, 2)

    stream = io.BytesIO()
    torch.save(model, stream)  # our own file, so that it may be unpickled
    stream.seek(0)
    saved = torch.load(stream, weights_only=False)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for one in (model, copy.deepcopy(model), saved, compiled):
            torch.testing.assert_close(one.train()(x), wanted)
    model(x).sum().backward()
    optimizer.step()
    for name, value in state.items():
        for one in (model, saved):
            assert torch.equal(one[0].state_dict()[name], value), name  # the count of batches too
    assert not torch.equal(model[2].weight, saved[2].weight)  # the optimizer still has the rest

    plain, _ = trained(kind)
    plain(x)
    plain.load_state_dict(model.state_dict())  # no key more or less
    assert type(plain[0]) is before
    change.undo()
    assert type(norm) is before
    assert repr(norm) == looks
    fl.freeze(model, until=2)
    fl.unfreeze(model)
    assert type(norm) is before
    if kind != "sync":
        model.train()(x)
        assert any(not torch.equal(norm.state_dict()[n], v) for n, v in state.items())


@pytest.mark.parametrize("problem", [None, RuntimeError, KeyboardInterrupt])
def test_frozen_for_a_block(problem: Any) -> None:
    model, x = trained("2d")
    model.train()(x)
    norm = model[0]
    looks, state = repr(norm), copy.deepcopy(norm.state_dict())

    def block() -> None:
        with fl.frozen(norm):
            model.train()(x + 3)
            assert repr(norm).endswith("locked)")
            if problem is not None:
                raise problem

    if problem is None:
        block()
    else:
        with pytest.raises(problem):
            block()
    assert repr(norm) == looks
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in state.items())
    model(x)
    assert int(norm.num_batches_tracked) == int(state["num_batches_tracked"]) + 1


def test_a_layer_that_keeps_no_statistics_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = [(type(m), m.training) for m in model.modules()]
    with pytest.raises(ModelError, match=r"'1' keeps no statistics \(track_running_stats=False\)"):
        fl.freeze(model)
    assert [(type(m), m.training) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


class Scriptable(nn.Module):
    """What can be scripted and fused: three modules in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x)))


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def frozen_block() -> tuple[Any, Any, Any]:
    """A frozen block, a batch, and what the block made of it before it was frozen."""
    torch.manual_seed(0)
    model, x = Scriptable(), torch.randn(4, 3, 8, 8)
    model(x), model(x * 2)
    with torch.no_grad():
        wanted = model.eval()(x)
    torch.jit.script(model)  # TorchScript must not take the program of the block as it was
    fl.freeze(model)
    return model.train(), x, wanted


def _scripted(model: Any, x: Any) -> Any:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(model), stream)
    stream.seek(0)
    return torch.jit.load(stream)


def _compiled(model: Any, x: Any) -> Any:
    model.compile(backend="eager", fullgraph=True)
    return model


def _fused(model: Any, x: Any) -> Any:
    fused = torch.ao.quantization.fuse_modules(model.eval(), [["conv", "bn", "relu"]])
    assert isinstance(fused.bn, nn.Identity)
    return fused


def _fused_by_fx(model: Any, x: Any) -> Any:
    from torch.fx.experimental.optimization import fuse

    fused = fuse(model.eval())
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())
    return fused


@pytest.mark.parametrize(
    "tool",
    [
        _scripted,
        lambda model, x: torch.jit.trace(model, x),
        _compiled,
        _fused,
        _fused_by_fx,
        lambda model, x: torch.export.export(model, (x,)).module(),
        lambda model, x: nn.SyncBatchNorm.convert_sync_batchnorm(model),
    ],
    ids=["script", "trace", "compile", "fuse", "fx", "export", "sync"],
)
def test_other_tools_take_a_frozen_model(tool: Any, frozen_block: Any) -> None:
    """Each sees torch's own class, and what it makes normalises with the stored statistics."""
    model, x, wanted = frozen_block
    made = tool(model, x)
    if not isinstance(made, torch.fx.GraphModule):  # an exported program has no modes
        made.train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_quantisation_sees_the_pair(frozen_block: Any) -> None:
    """Post-training quantisation by FX fuses the locked BN layer; training-aware fusion refuses."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, x, wanted = frozen_block
    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping(), (x,))
    prepared(x)
    quantised = convert_fx(prepared)
    assert not any(isinstance(module, _BatchNorm) for module in quantised.modules())
    torch.testing.assert_close(quantised(x), wanted, rtol=0, atol=0.1)
    with pytest.raises(AssertionError, match="same mode"):
        torch.ao.quantization.fuse_modules_qat(model.train(), [["conv", "bn", "relu"]])


def test_a_saved_frozen_model_names_no_frostline() -> None:
    """It loads where Frostline is not installed, and its statistics do not move there."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    model(torch.randn(4, 3, 5, 5))
    fl.freeze(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    assert b"frostline." not in stream.getvalue()
    stream.seek(0)
    # Without Frostline the methods that it adds are not there: these are torch's alone.
    loaded = torch.load(stream, weights_only=False)
    before = loaded[0].running_mean.clone()
    loaded.train()
    loaded[0].training = True  # by force
    loaded(torch.randn(4, 3, 5, 5) + 3)
    loaded.double()(torch.randn(4, 3, 5, 5).double())
    assert torch.equal(loaded[0].running_mean, before.double())
    assert fl.sites(loaded)[0].stats_frozen
    fl.unfreeze(loaded)
    loaded.train()(torch.randn(4, 3, 5, 5).double() + 3)
    assert not torch.equal(loaded[0].running_mean, before.double())


def test_a_forward_of_the_instance_survives_the_lock() -> None:
    """What another library hung on the module runs while it is locked, and after."""
    norm = nn.BatchNorm1d(3)
    calls: list[bool] = []

    def forward(x: Any) -> Any:
        calls.append(norm.training)
        return nn.BatchNorm1d.forward(norm, x)

    norm.forward = forward
    with fl.frozen(norm):
        norm.training = True
        norm(torch.randn(4, 3))
    assert norm.forward is forward
    assert calls == [False]
    assert int(norm.num_batches_tracked) == 0


def test_importing_changes_nothing_of_torch() -> None:
    code = (
        "import torch; before = torch.nn.SyncBatchNorm.__dict__['convert_sync_batchnorm'];"
        "hooks = torch.nn.modules.module._global_module_registration_hooks; import frostline as fl;"
        "fl.sites(torch.nn.Sequential(torch.nn.BatchNorm1d(2)));"
        "assert torch.nn.SyncBatchNorm.__dict__['convert_sync_batchnorm'] is before;"
        "assert not hooks"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


class WithToken(nn.Module):
    """A model that holds a parameter itself, as a vision transformer holds its token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.dense = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.dense(x + self.token)))


def test_parameters_of_the_model_itself_are_frozen_with_all_of_it() -> None:
    model = WithToken()
    change = fl.freeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert "42 parameters" in str(change)
    change.undo()
    with fl.frozen(model):
        assert not model.token.requires_grad
    assert model.token.requires_grad
    fl.freeze(model, "head")  # a boundary: the model itself is around it
    assert model.token.requires_grad


def test_complex_weights_are_frozen_as_others_are() -> None:
    """They stayed trainable without a word: they are no floating numbers to torch."""
    linear = nn.Linear(4, 4, dtype=torch.complex64)
    model = nn.ModuleDict({"linear": linear, "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 2)})
    change = fl.freeze(model, "head")
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad
    change.undo()
    assert linear.weight.requires_grad
    fl.freeze(model)
    fl.unfreeze(model)
    assert linear.bias.requires_grad
