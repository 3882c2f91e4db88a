"""Causes on native torch modules that were trained for the purpose."""

from __future__ import annotations

import os
from typing import Any

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


SETTINGS: dict[str, Any] = {
    "loss": nn.functional.cross_entropy, "max_samples": 256, "verbose": 0
}  # fmt: skip


def served(seed: int, *, shift: float, head: bool = False) -> tuple[Any, Any]:
    """A trained net as it is served: no gradients, in eval(); and data of another camera."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(512, 1, 8, 8, generator=generator) * 0.5
    y = torch.randint(0, 4, (512,), generator=generator)
    for label in range(4):
        x[y == label, :, 2 * label : 2 * label + 2] += 0.5
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(10):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - epoch / 10)
        for rows in torch.randperm(512, generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    model[-1].requires_grad_(head)
    return model, (x * (1 - shift) + shift, y)


def test_a_served_module_without_gradients_is_told_as_one_with_them() -> None:
    """It was "no cause found" before, without a remedy, and FL302 called it frozen."""
    model, data = served(0, shift=0.6)
    found = fl.diagnose(model, data, **SETTINGS)
    with_gradients = fl.diagnose(model.requires_grad_(True), data, **SETTINGS)
    assert found.causes[0].code in ("DOMAIN_STATS", "STALE_AFTER_WEIGHT_EDIT")
    assert found.causes[0].certainty == "may"
    assert [cause.code for cause in found.causes] == [c.code for c in with_gradients.causes]
    assert [f.code for f in found.findings if f.code in ("FL103", "FL302")] == []
    best = found.remedies[0]
    assert best.recommended
    assert best.fix == "recalibrate"


def test_a_served_module_on_its_own_data_is_not_blamed() -> None:
    model, data = served(0, shift=0.0)
    found = fl.diagnose(model, data, **SETTINGS)
    assert [cause.code for cause in found.causes] == ["NONE"]


def test_a_head_that_trains_still_makes_the_rest_frozen() -> None:
    model, data = served(0, shift=0.6, head=True)
    found = fl.diagnose(model, data, **SETTINGS)
    assert found.causes[0].code == "FROZEN_DRIFT"


class Beheaded(nn.Module):
    """An encoder of three stages, of which two are called, as in a U-Net of small depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1 if i == 0 else 4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            for i in range(3)
        )
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Any) -> Any:
        return self.head(self.stages[1](self.stages[0](x)))


def test_stages_that_no_pass_comes_to_are_said_to_be_left_out() -> None:
    """They were named in SMALL_BATCH, with 0 values per channel, and had errors of FL204."""
    torch.manual_seed(0)
    model, x = Beheaded(), torch.rand(16, 1, 8, 8)
    x = x * 0.3 + torch.rand(16, 1, 1, 1)
    y = (x[:, :, 2:-2, 2:-2] > x.mean((2, 3), keepdim=True)).float()
    optimizer, loss = torch.optim.Adam(model.parameters(), 1e-2), nn.MSELoss()
    for _ in range(6):
        for row in range(16):
            optimizer.zero_grad()
            loss(model(x[row : row + 1]), y[row : row + 1]).backward()
            optimizer.step()
    report = fl.diagnose(model, (x, y), loss=loss, batch_size=1, verbose=0)
    blamed = {site for cause in report.causes for site in cause.sites}
    blamed |= {site for finding in report.findings for site in finding.sites}
    assert not any(site.startswith("stages/2") for site in blamed)
    assert "stages/2/1" in report.measurement.skipped["sites without a pass"]
    assert "0 values" not in str(report)
    assert "FL204" in {finding.code for finding in fl.lint(model).findings}


class Domains(nn.Module):
    """One BN per domain; in evaluation mode the first one serves all where ``wrong``."""

    def __init__(self, *, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong
        self.conv = nn.Conv2d(1, 6, 3)
        self.bns = nn.ModuleDict({name: nn.BatchNorm2d(6) for name in ("day", "night")})
        self.head = nn.Linear(6, 2)

    def forward(self, x: Any, domain: str) -> Any:
        name = "day" if self.wrong and not self.training else domain
        return self.head(self.bns[name](self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("both", [False, True])
def test_inference_that_takes_the_bn_of_another_domain(both: bool) -> None:
    """It was BATCH_LEAK or STALE_AFTER_WEIGHT_EDIT, and a recalibration was recommended."""
    generator = torch.Generator().manual_seed(0)
    day = torch.rand(256, 1, 8, 8, generator=generator)
    y = torch.randint(0, 2, (256,), generator=generator)
    day[y == 1, :, 2:5, 2:5] += 1.0
    night = 2 - 0.5 * day
    torch.manual_seed(0)
    model, loss = Domains(wrong=True), nn.functional.cross_entropy
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(12):
        for rows in torch.randperm(256, generator=generator).split(32):
            optimizer.zero_grad()
            value = loss(model(day[rows], "day"), y[rows])
            (value + loss(model(night[rows], "night"), y[rows])).backward()
            optimizer.step()

    def step(net: Any, batch: Any) -> Any:
        found = loss(net(batch[1], "night"), batch[2])
        return found + loss(net(batch[0], "day"), batch[2]) if both else found

    batches = [(day[i : i + 32], night[i : i + 32], y[i : i + 32]) for i in range(0, 256, 32)]
    report = fl.diagnose(model, batches, step=step, verbose=0)
    assert [cause.code for cause in report.causes] == ["DOMAIN_STATS"]
    assert "training uses 'bns/night' and inference 'bns/day'" in report.verdict
    assert not any(remedy.recommended for remedy in report.remedies)
    assert "FL304" not in {finding.code for finding in report.findings}
    model.wrong = False
    assert "in its place" not in str(fl.diagnose(model, batches, step=step, verbose=0))
