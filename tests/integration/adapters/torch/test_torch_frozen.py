"""``fl.freeze`` on native torch: every kind of BN, and all that undoes a freeze elsewhere."""

from __future__ import annotations

import copy
import io
import os
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
