"""Looking changes nothing of what a model keeps beside its weights, nor of BN unknown to it."""

from __future__ import annotations

import copy
import os
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import frostline as fl
from frostline.types import ModelError

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
BATCHES = list(zip(X.split(16), Y.split(16), strict=True))


class Schedule(nn.Module):
    """Anneals, counts, keeps a log, and draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.heat, self.log, self.counts = 1.0, [0], {"calls": 0}
        self.last: deque[Any] = deque([1, 2], maxlen=2)
        self.noise = torch.Generator().manual_seed(1)
        self.arrays, self.older = np.random.default_rng(2), np.random.RandomState(3)
        self.python = random.Random(4)

    def forward(self, x: Any) -> Any:
        self.heat *= 0.9
        self.log.append(len(x))
        self.last.append(len(x))
        self.counts["calls"] += 1
        self.seen = x
        shift = self.arrays.normal() + self.older.normal() + self.python.random()
        x = x + 0.01 * shift + 0.1 * torch.randn(x.shape, generator=self.noise)
        return self.head(functional.relu(self.norm(self.features(x)))) / self.heat

    def state(self) -> Any:
        drawn = (self.arrays.bit_generator.state, self.older.get_state()[1].tolist())
        others = (self.noise.get_state().tolist(), self.python.getstate(), hasattr(self, "seen"))
        return copy.deepcopy((self.heat, self.log, self.counts, list(self.last), drawn, others))


def loss_of(model: Any, batch: Any) -> Any:
    model.zero_grad()
    return functional.cross_entropy(model(batch[0]), batch[1])


def watched(model: Any, data: Any, **ways: Any) -> None:
    with fl.watch(model, data, **ways) as watch:
        watch.check()


def not_frozen(model: Any, data: Any, **ways: Any) -> None:
    with pytest.raises(fl.NotFrozenError):
        fl.assert_frozen(model, data=data, step=ways.get("step"))


LOOKS: dict[str, Callable[..., Any]] = {
    "phases": fl.phases,
    "diagnose": lambda m, d, **ways: fl.diagnose(m, d, verbose=0, **ways),
    "watch": watched,
    "assert_frozen": not_frozen,
    "recalibrate": lambda m, d, **ways: fl.recalibrate(m, d, step=ways.get("step")).undo(),
}
WAYS = {"loss": {"loss": functional.cross_entropy}, "step": {"step": loss_of}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("look", LOOKS)
def test_what_a_model_keeps_is_as_it_was(look: str, way: str) -> None:
    model = Schedule()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    before, held = model.state(), (model.log, model.counts, model.last)
    LOOKS[look](model, BATCHES, **WAYS[way])
    assert model.state() == before
    assert all(a is b for a, b in zip((model.log, model.counts, model.last), held, strict=True))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.ones_like(parameter))


@pytest.mark.parametrize("look", LOOKS)
def test_the_generator_of_a_loader_is_as_it_was(look: str) -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=generator)
    before = generator.get_state()
    LOOKS[look](nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), loader, **WAYS["loss"])
    assert torch.equal(generator.get_state(), before)


class Unregistered(nn.Module):
    """BN in a plain list, which train(), eval() and state_dict() do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.norms = nn.Linear(6, 8), [nn.BatchNorm1d(8)]
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.head(functional.relu(self.norms[0](self.norm(self.features(x)))))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("look", LOOKS)
def test_the_statistics_of_bn_in_a_plain_list_stay(look: str, way: str) -> None:
    model = Unregistered()
    model(X)
    before = {name: value.clone() for name, value in model.norms[0].state_dict().items()}
    LOOKS[look](model, BATCHES, **WAYS[way])
    for name, value in model.norms[0].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bn_in_a_plain_list_is_named() -> None:
    model = Unregistered()
    for _ in range(200):
        model(X)
    told = fl.lint(model).verdict
    assert "'norms/0' (BatchNorm1d in no nn.ModuleList" in told
    assert "BN is not ruled out" in told
    report = fl.diagnose(model, BATCHES, loss=functional.cross_entropy, verbose=0)
    assert "although no BN layer uses the batch" not in str(report)
    fl.freeze(model)
    with pytest.raises(fl.NotFrozenError, match="norms/0"):
        fl.assert_frozen(model)
    with pytest.raises(fl.NotFrozenError, match="norms/0"):
        fl.assert_frozen(model, data=BATCHES)
    before = model.norms[0].running_mean.clone()
    for refused in (lambda: fl.split(model, sample=X), lambda: fl.cached(model, BATCHES)):
        with pytest.raises(ModelError, match="'norms/0' is in a plain list"):
            refused()
    assert torch.equal(model.norms[0].running_mean, before)


def test_a_teacher_that_is_hidden_in_a_list_is_no_stranger() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model.teacher = [copy.deepcopy(model).eval()]
    assert "not ruled out" not in fl.lint(model).verdict
    fl.freeze(model, until="2")
    fl.split(model, sample=X)
