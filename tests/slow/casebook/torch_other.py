"""Cases N1 to N8 and healthy ones in native torch: not BN's fault, mostly in nets with BN."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .scenario import CLASSES, Case, Scenario, digits
from .torch_bench import (
    FILTERS,
    both,
    fit,
    images,
    net,
    no_gap,
    pretrained,
    score,
    without_grad,
)

SHOWN = 256


def case_n1(seed: int) -> Scenario:
    model = pretrained(seed)
    x, y = (values[:SHOWN] for values in images("new"))
    right, wrong = (score(model, inputs, y, training=False) for inputs in (x, 255 * x))
    assert right.accuracy > wrong.accuracy + 0.3
    return Scenario(
        model=model, data=(255 * x, y), closable=True, shown={"accuracy": wrong.accuracy}
    )


def case_h6(seed: int) -> Scenario:
    """Trained on RGB, asked about BGR; channels are axis 1."""
    x, y = (values[:320] for values in images("new"))
    orange, blue = torch.tensor([1.0, 0.5, 0.1]), torch.tensor([0.0, 0.05, 0.4])
    x = x * orange[:, None, None] + (1 - x) * blue[:, None, None]
    model = net(seed, channels=3)
    history = fit(model, x, y, epochs=15)
    x, y = x[:SHOWN], y[:SHOWN]
    right, wrong = (score(model, i, y, training=False) for i in (x, x.flip(1)))
    shown = {"accuracy": wrong.accuracy, "accuracy in RGB": right.accuracy}
    assert right.accuracy > wrong.accuracy + 0.3, shown
    return Scenario(model=model, data=(x.flip(1), y), options={"history": history}, shown=shown)


def case_n3(seed: int) -> Scenario:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(392, CLASSES)
    )
    x, y = images("new")
    history = fit(model, x, y, epochs=1)
    now = score(model, x, y, training=False)
    shown = {"logged loss": history["loss"][-1], "loss now": now.loss}
    assert history["loss"][-1] > now.loss + 0.3, shown
    return Scenario(
        model=model, data=(x[:SHOWN], y[:SHOWN]), options={"history": history}, shown=shown
    )


def case_n4(seed: int) -> Scenario:
    model = pretrained(seed)
    x, y = (values[:320] for values in images("new"))
    history = fit(model, x, y, epochs=5, lr=1e-3)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
    right, wrong = (score(model, x, labels, training=False) for labels in (y, y[order]))
    assert right.accuracy > wrong.accuracy + 0.7
    history["accuracy"] = [right.accuracy]
    shown = {"accuracy": wrong.accuracy, "accuracy in order": right.accuracy}
    return Scenario(model=model, data=(x, y[order]), options={"history": history}, shown=shown)


def case_n6(seed: int) -> Scenario:
    def head() -> Any:
        return nn.Sequential(
            nn.Linear(FILTERS[-1], 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, CLASSES)
        )

    model = pretrained(seed, make_head=head)
    x, y = (values[:320] for values in images("new"))
    history = fit(model, x, y, epochs=8, lr=1e-3)
    shown = both(model, x, y)
    assert shown["training loss"] > shown["inference loss"] + 0.05, shown
    return Scenario(
        model=model,
        data=(x[:SHOWN], y[:SHOWN]),
        options={"history": history, "validation": images("held out")},
        shown=shown,
    )


def case_n8(seed: int) -> Scenario:
    import frostline as fl

    def head() -> Any:
        return nn.Sequential(nn.Linear(FILTERS[-1], 256), nn.ReLU(), nn.Linear(256, CLASSES))

    model = without_grad(pretrained(seed, make_head=head), 4)
    fl.freeze(model, until="head")
    x = digits()[0].transpose(0, 3, 1, 2)
    x = np.clip(x + 0.4 * np.random.default_rng(seed).normal(size=x.shape), 0, 1)
    x, y = torch.from_numpy(x.astype("float32")), torch.from_numpy(digits()[1]).long()
    fit(model, x[:100], y[:100], epochs=60, lr=1e-2)
    validation = (x[1200:1456], y[1200:1456])
    shown = no_gap(model, x[:100], y[:100])
    shown["validation accuracy"] = score(model, *validation, training=False).accuracy
    assert shown["inference accuracy"] > shown["validation accuracy"] + 0.2, shown
    return Scenario(
        model=model, data=(x[:100], y[:100]), options={"validation": validation}, shown=shown
    )


def case_h7(seed: int) -> Scenario:
    model = pretrained(seed)
    x, y = (values[:320] for values in images("new"))
    fit(model, x, y, epochs=8, lr=1e-3)
    renamed = torch.from_numpy(np.random.default_rng(seed).permutation(CLASSES))[y]
    right, wrong = (score(model, x, labels, training=False) for labels in (y, renamed))
    assert right.accuracy > wrong.accuracy + 0.6
    return Scenario(
        model=model, data=(x[:SHOWN], renamed[:SHOWN]), shown={"accuracy": wrong.accuracy}
    )


def case_h11(seed: int) -> Scenario:
    model = pretrained(seed)
    x, y = (values[:320] for values in images("new"))
    fit(model, x, y, epochs=8, lr=1e-3)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), shown=no_gap(model, x, y, at_most=0.05))


def case_h16(seed: int) -> Scenario:
    """Healthy and only served: eval(), no gradients, data of its own domain."""
    model = pretrained(seed)
    x, y = (values[:320] for values in images("old"))
    fit(model, x, y, epochs=8, lr=5e-4)
    model.eval().requires_grad_(False)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), shown=no_gap(model, x, y, at_most=0.05))


CASES = (
    Case(number="TN1", title="evaluated on pixels from 0 to 255",
         expected=("PREPROCESS",), build=case_n1),
    Case(number="TN3", title="logged loss is an average over the epoch, no BN",
         expected=("EPOCH_AVERAGE",), build=case_n3),
    Case(number="TN4", title="labels in another order than the samples",
         expected=("LABEL_ORDER",), build=case_n4),
    Case(number="TN6", title="dropout only",
         expected=("DROPOUT",), build=case_n6),
    Case(number="TN8", title="big head on a hundred images, BN locked",
         expected=("OVERFIT",), build=case_n8),
    Case(number="TH6", title="RGB and BGR", expected=("PREPROCESS",), build=case_h6),
    Case(number="TH7", title="classes renumbered", expected=("LABEL_ORDER",), build=case_h7),
    Case(number="TH11", title="healthy", expected=("NONE",), build=case_h11),
    Case(number="TH16", title="healthy, only served", expected=("NONE",), build=case_h16),
)  # fmt: skip
