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


def compared(model: Any, data: Any, **ways: Any) -> None:
    fl.compare(
        model, data, validation=data, epochs=1, seeds=1, treatments=["now", "recalibrated"],
        optimizer=lambda weights: torch.optim.SGD(weights, 0.01), verbose=0, **ways,
    )  # fmt: skip


LOOKS: dict[str, Callable[..., Any]] = {
    "phases": fl.phases,
    "diagnose": lambda m, d, **ways: fl.diagnose(m, d, verbose=0, **ways),
    "watch": watched,
    "assert_frozen": not_frozen,
    "recalibrate": lambda m, d, **ways: fl.recalibrate(m, d, step=ways.get("step")).undo(),
    "compare": compared,
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


@pytest.mark.parametrize("look", LOOKS)
def test_reading_a_loader_draws_nothing(look: str) -> None:
    model, loader = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), DataLoader(Drawing(X, Y), 16)
    before = drawn()
    LOOKS[look](model, loader, **WAYS["loss"])
    assert drawn() == before


def test_an_assertion_that_holds_draws_nothing() -> None:
    model, loader = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), DataLoader(Drawing(X, Y), 16)
    fl.freeze(model, until="1")
    before = drawn()
    fl.assert_frozen(model, data=loader)
    assert drawn() == before


def drawn() -> Any:
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002 - that of old code
    return torch.get_rng_state().tolist(), random.getstate(), numpy


class Drawing(TensorDataset):  # type: ignore[misc]
    """Augments as old code does, from the generators that everybody shares."""

    def __getitem__(self, row: int) -> Any:
        x, y = super().__getitem__(row)
        return x + 0.01 * (random.random() + float(np.random.rand())), y  # noqa: NPY002


class Growing(nn.Module):
    """Registers and replaces things when it is called, the teacher in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher: Any = None
        self.features, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.register_buffer("scale", torch.ones(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        if not hasattr(self, "grid"):
            self.register_buffer("grid", torch.linspace(0, 1, x.shape[-1]), persistent=False)
            self.act = nn.ReLU()
            self.gain = nn.Parameter(torch.ones(1), requires_grad=False)
        if self.training and self.teacher is None:
            self.teacher = copy.deepcopy(nn.Sequential(self.norm, self.head)).requires_grad_(False)
        self.scale = self.scale * 1.0
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())
        return self.head(self.act(self.norm(self.features(x + self.grid)))) * self.gain


def registered(model: Any) -> Any:
    tables = ("_parameters", "_buffers", "_modules")
    return [
        [list(vars(module)), sorted(module._non_persistent_buffers_set)]
        + [[(name, id(value)) for name, value in vars(module)[t].items()] for t in tables]
        for module in model.modules()
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("look", LOOKS)
def test_what_forward_registers_is_gone_again(look: str, way: str) -> None:
    model = Growing()
    fl.freeze(model, until="norm")
    before, state = registered(model), copy.deepcopy(model.state_dict())
    LOOKS[look](model, BATCHES, **WAYS[way])
    assert registered(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Late(nn.Module):
    """Makes its first layer for the width of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Any = None
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        if self.first is None:
            self.first = nn.BatchNorm1d(x.shape[1])
        return self.head(self.norm(self.first(x)))


@pytest.mark.parametrize("look", LOOKS)
def test_bn_that_the_first_call_makes_is_asked_for(look: str) -> None:
    model = Late()
    before = registered(model)
    with pytest.raises(ModelError, match="makes 'first' when it is called"):
        LOOKS[look](model, BATCHES, **WAYS["loss"])
    assert registered(model) == before
    model(X)
    LOOKS[look](model, BATCHES, **WAYS["loss"])


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
