"""Layers that a module calls in a loop, which no graph shows: each use apart, against hooks."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional

import frostline as fl


class Frames(nn.Module):
    """One norm for three frames, another for their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        seen = [self.norm(x[:, t]).tanh() for t in range(x.shape[1])]
        return self.head(self.last(torch.stack(seen).mean(0)))


def test_the_uses_of_a_layer_in_a_loop_are_told_apart() -> None:
    torch.manual_seed(0)
    model = Frames()
    x = torch.randn(64, 3, 4) + 5 * torch.arange(3.0)[:, None]
    y = torch.randint(0, 3, (64,))
    report = fl.diagnose(model, (x, y), loss=functional.cross_entropy, batch_size=16, verbose=0)
    sites = report.measurement.sites
    assert sites["last"].uses == ()
    assert len(sites["norm"].uses) == 3
    assert (sites["norm"].values, sites["last"].values) == (1, 1)
    for t, (mean, variance) in enumerate(sites["norm"].uses):
        np.testing.assert_allclose(mean, x[:, t].double().mean(0), rtol=1e-6)
        np.testing.assert_allclose(variance, x[:, t].double().var(0, correction=0), rtol=1e-5)
