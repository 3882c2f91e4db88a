"""What is advised can be done, and does what the report promises."""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional

import frostline as fl

LOSS = nn.CrossEntropyLoss()


class Forced(nn.Module):
    """Normalises with the batch, whatever mode the module is in."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(16)

    def forward(self, x: Any) -> Any:
        own = self.bn
        return functional.batch_norm(
            x, own.running_mean, own.running_var, own.weight, own.bias, True, 0.1
        )


def data() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (256,), generator=generator)
    centers = 1.5 * torch.randn(4, 8, generator=generator)
    return centers[y] + torch.randn(256, 8, generator=generator) + 1, y


def network(first: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), first, nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip


def trained(model: nn.Module, *, steps: int) -> nn.Module:
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for number in range(steps):
        part = slice(32 * (number % 8), 32 * (number % 8) + 32)
        optimizer.zero_grad()
        LOSS(model(x[part]), y[part]).backward()
        optimizer.step()
    return model.eval()


def test_a_layer_that_overrides_its_phase_is_told_to_pass_it_on() -> None:
    """The remedy was model.eval(), which it had been given, and what exact statistics would do."""
    torch.manual_seed(0)
    model = trained(network(Forced()), steps=15)
    report = fl.diagnose(model, data(), loss=LOSS, verbose=0)
    first = report.causes[0]
    assert first.code == "FORCED_TRAIN"
    assert first.sites == ("1/bn",)
    assert "pass the phase on there (training=self.training)" in first.message
    lines = [remedy.python for remedy in report.remedies if remedy.python]
    assert not any("eval()" in line for line in lines)
    promised = next(r for r in report.remedies if r.name.startswith("recalibrate"))
    x, y = data()
    fl.recalibrate(model, x)
    now = fl.diagnose(model, (x, y), loss=LOSS, verbose=0)
    assert now.measurement is not None
    reached = now.measurement.probes["inference"].loss
    assert promised.after["loss"] == pytest.approx(reached, rel=0.02)


def test_a_network_whose_weights_never_arrived_is_not_recalibrated() -> None:
    torch.manual_seed(0)
    original = trained(network(nn.BatchNorm1d(16)), steps=200)
    clone = network(nn.BatchNorm1d(16))
    state = {f"module.{name}": value for name, value in original.state_dict().items()}
    clone.load_state_dict(state, strict=False)  # as a wrapper saved it: no name fits
    report = fl.diagnose(clone, data(), loss=LOSS, reference=original, verbose=0)
    assert report.causes[0].code == "LOADING"
    assert "reference's weights did not arrive" in report.verdict
    assert not report.remedies
