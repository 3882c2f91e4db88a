"""Causes on native torch modules that were trained for the purpose."""

from __future__ import annotations

import os

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn

import frostline as fl


def test_another_epsilon_is_measured_and_both_repairs_are_tried() -> None:
    """It had a share of None before, beside averages that were blamed for its part of the gap."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(384, 6, generator=generator) * 0.02
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 48), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 2),
    )  # fmt: skip
    optimizer, loss = torch.optim.Adam(model.parameters(), 3e-3), nn.CrossEntropyLoss()
    for _ in range(400):
        chosen = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        loss(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    model[0].eps = 1e-2
    report = fl.diagnose(model, (x, y), loss=loss, verbose=0)
    assert report.causes[0].code == "EPS_MISMATCH"
    assert report.causes[0].sites == ("0",)
    assert report.causes[0].share > 0.5
    names = {remedy.name for remedy in report.remedies if remedy.recommended}
    assert names == {"epsilon 1e-05", "recalibrate unfrozen"}
    model[0].eps = 1e-5
    with torch.no_grad():  # what the probe computes is what the model does with that epsilon
        right = float(loss(model.eval()(x), y))
    assert report.measurement.probes["epsilon"].loss == pytest.approx(right, rel=1e-4)
