"""Shares of a gap so steep that a quadrature of few nodes misses most of it."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn

import frostline as fl


class Block(nn.Module):
    """Two convolutions and a shortcut, as in torchvision's ResNet18."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(
            nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Any) -> Any:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.shortcut(x)).relu()


def few_steps() -> tuple[Any, Any, Any]:
    """A residual network from scratch after 12 steps at momentum 0.1, with its data."""
    torch.manual_seed(0)
    y = torch.arange(64) % 10
    x = torch.randn(10, 3, 16, 16)[y] + torch.randn(64, 3, 16, 16)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1),
        Block(32, 64, 2), Block(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    optimizer = torch.optim.Adam(model.parameters(), 4e-2)
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, x, y


def test_the_shares_of_a_steep_gap_add_up() -> None:
    model, x, y = few_steps()
    with torch.no_grad():
        twins = [copy.deepcopy(model).train(mode) for mode in (True, False)]
        gap = [float(nn.functional.cross_entropy(twin(x), y)) for twin in twins]
    assert gap[1] - gap[0] > 100, gap
    report = fl.diagnose(model, (x, y), loss=nn.functional.cross_entropy, batch_size=16, verbose=0)
    found = report.measurement.attribution
    assert found is not None
    assert found.residual <= 0.05
    assert found.complete
    assert found.gap == pytest.approx(found.shares.sum(), rel=0.05)
