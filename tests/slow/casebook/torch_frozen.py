"""Cases 1, 2, 4, 5, 7, 9 and 10 in native torch: what people call frozen there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import frostline as fl

from .scenario import CLASSES, NORMS, Case, Scenario, target
from .torch_bench import (
    Net,
    both,
    fit,
    gap,
    images,
    no_gap,
    old_state,
    outputs,
    pretrained,
    statistics,
    without_grad,
)

PREFIX = NORMS[:3]
ALL = frozenset(NORMS)
SHOWN = 256


def in_eval(model: Any) -> Any:
    """The usual freeze(): no gradients, and ``eval()`` of the BN layers."""
    for name in PREFIX:
        model.get_submodule(name).eval()
    return model


def new_data(count: int = 320) -> tuple[Any, Any]:
    x, y = images("new")
    return target(x[:count]), y[:count]


def case_7(seed: int) -> Scenario:
    """freeze() is called once; every epoch begins with train(); then freeze() once more."""
    model = in_eval(without_grad(pretrained(seed, head=False)))
    x, y = new_data()
    fit(model, x, y, epochs=8, lr=1e-2)
    kept = [old_state()[f"{name}.running_mean"] for name in PREFIX]
    now = [model.get_submodule(name).running_mean for name in PREFIX]
    moved = float(max((a - b).abs().max() for a, b in zip(kept, now, strict=True)))
    assert moved > 0.01
    model = in_eval(model.train())  # its status says frozen
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), shown={"moved": moved, **both(model, x, y)})


def case_7b(seed: int) -> Scenario:
    """The same with BN1d in a network of fully connected layers."""
    torch.manual_seed(seed)
    x, y = images("new")
    x = x[:, 0, ::2, ::2].flatten(1)
    layers: list[Any] = []
    for index, size in enumerate((64, 32)):
        layers += [nn.Linear(size, 32), nn.BatchNorm1d(32), nn.ReLU()]
        layers[3 * index].requires_grad_(index > 0)
    model = nn.Sequential(*layers, nn.Linear(32, CLASSES))
    fit(model, x[:320], y[:320], epochs=15)
    model.train()
    model[1].requires_grad_(False).eval()
    before = model[1].running_mean.clone()
    fit(model, 2 * x[320:640] + 1, y[320:640], epochs=2)
    moved = float((model[1].running_mean - before).abs().max())
    assert moved > 0.1
    model.train()[1].eval()
    return Scenario(model=model, data=(2 * x[320:576] + 1, y[320:576]), shown={"moved": moved})


def case_5(seed: int) -> Scenario:
    model = pretrained(seed).requires_grad_(False).train()
    before = pretrained(seed)
    x, y = (values[:SHOWN] for values in images("new"))
    first = outputs(model, x, training=False)
    with torch.no_grad():
        model(torch.zeros(16, 1, 16, 16))
    change = float((outputs(model, x, training=False) - first).abs().max())
    assert change > 0.01
    return Scenario(
        model=model, data=(x, y), options={"reference": before}, shown={"change": change}
    )


def case_4(seed: int) -> Scenario:
    model = without_grad(pretrained(seed, head=False))
    x, y = new_data()
    fit(model, x, y, epochs=1, lr=1e-2)
    moved = np.abs(statistics(model, PREFIX) - statistics(pretrained(seed), PREFIX)).mean()
    x, y = x[:SHOWN], y[:SHOWN]
    shown = {**gap(model, x, y, at_least=0.05), "moved": float(moved)}
    assert moved > 0.01, shown
    return Scenario(
        model=model,
        data=(x, y),
        options={"reference": pretrained(seed).state_dict()},
        closable=True,
        shown=shown,
    )


def case_9(seed: int) -> Scenario:
    """BackboneFinetuning(train_bn=False): BN of the frozen backbone is in the optimizer."""
    model = pretrained(seed, head=False, momentum=0.01)
    for block in range(1, 5):
        model.get_submodule(f"conv{block}").requires_grad_(False)
    before = pretrained(seed)
    x, y = new_data()
    fit(model, x, y, epochs=5)
    x, y = x[:SHOWN], y[:SHOWN]
    with torch.no_grad():
        gammas = [
            float((model.get_submodule(n).weight - before.get_submodule(n).weight).abs().max())
            for n in NORMS
        ]
    shown = {**gap(model, x, y, at_least=0.1), "gamma moved": min(gammas)}
    assert min(gammas) > 1e-3, shown
    return Scenario(
        model=model, data=(x, y), options={"reference": before}, closable=True, shown=shown
    )


def case_10(seed: int) -> Scenario:
    model = without_grad(pretrained(seed, head=False))
    for name in PREFIX:
        model.get_submodule(name).track_running_stats = False
    x, y = new_data()
    fit(model, x, y, epochs=10, lr=1e-2)
    still = np.abs(statistics(model, PREFIX) - statistics(pretrained(seed), PREFIX)).max()
    assert still == 0
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.2))


def case_2(seed: int) -> Scenario:
    """The canary: everything frozen by flags, labels are its own predictions."""
    model = pretrained(seed).requires_grad_(False).train()
    for name in NORMS:
        model.get_submodule(name).track_running_stats = False
    x, _ = images("new")
    x = x[:SHOWN]
    y = outputs(model, x, training=False)
    worst = float((outputs(model, x, training=True) - y).square().mean())
    assert worst > 1e-4, worst
    options = {"loss": nn.MSELoss()}
    return Scenario(model=model, data=(x, y), options=options, shown={"train loss": worst})


def case_h13(seed: int) -> Scenario:
    """The canary of a freeze that holds."""
    model = pretrained(seed).train()
    fl.freeze(model)
    x = new_data(SHOWN)[0]
    y = outputs(model, x, training=False)
    worst = float((outputs(model, x, training=True) - y).square().mean())
    assert worst < 1e-10, worst
    options = {"loss": nn.MSELoss()}
    return Scenario(model=model, data=(x, y), options=options, shown={"train loss": worst})


def case_h15(seed: int) -> Scenario:
    """Locked, trained through train() and validation, averages of the rest settled."""
    model: Net = pretrained(seed, head=False)
    x, y = images("new")
    fl.freeze(model, until="conv4")
    fit(model, x[:320], y[:320], epochs=12, lr=3e-3)
    fit(model, x[:320], y[:320], epochs=6, lr=1e-4)
    assert np.array_equal(statistics(model, PREFIX), statistics(pretrained(seed), PREFIX))
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), shown=no_gap(model, x, y, at_most=0.05))


CASES = (
    Case(
        number="T7",
        title="eval() by hand, which the next train() undoes",
        expected=("MODE_RESET",),
        sites=frozenset(PREFIX),
        build=case_7,
    ),
    Case(
        number="T7b",
        title="the same with BN1d",
        expected=("MODE_RESET",),
        sites=frozenset({"1"}),
        build=case_7b,
    ),
    Case(
        number="T5",
        title="requires_grad off everywhere, one training-mode pass of zeros",
        expected=("FROZEN_DRIFT",),
        sites=ALL,
        build=case_5,
    ),
    Case(
        number="T4",
        title="requires_grad off in the backbone, one epoch on other data",
        expected=("FROZEN_DRIFT",),
        sites=frozenset(PREFIX),
        build=case_4,
    ),
    Case(
        number="T9",
        title="backbone frozen but for its BN, which the optimizer has",
        expected=("FROZEN_DRIFT",),
        sites=ALL,
        build=case_9,
    ),
    Case(
        number="T10",
        title="track_running_stats=False used as a freeze",
        expected=("FROZEN_BATCH_STATS",),
        sites=frozenset(PREFIX),
        build=case_10,
    ),
    Case(
        number="T2",
        title="canary: frozen by flags, labels are its own predictions",
        expected=("FROZEN_BATCH_STATS",),
        sites=ALL,
        build=case_2,
    ),
    Case(number="TH13", title="canary of fl.freeze", expected=("NONE",), build=case_h13),
    Case(
        number="TH15",
        title="healthy: locked backbone, trained head",
        expected=("NONE",),
        build=case_h15,
    ),
)
