"""The network of the README: 100% right in training mode, at chance at inference (native PyTorch).

Its BN layers have the momentum of networks that came from TensorFlow, 0.01, and it trains for 32
steps: the moving averages keep most of what they started from, mean 0 and variance 1. Run it as::

    python examples/symptom_torch.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import frostline as fl


def stripes(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of vertical (class 1) and horizontal (class 0) stripes, of any phase."""
    labels = torch.arange(samples) % 2
    images = 1.9 + 0.6 * torch.randn(samples, 3, 16, 16)
    for image, label, start in zip(images, labels, torch.randint(4, (samples,)), strict=True):
        lines = image.transpose(1, 2) if label else image
        lines[:, start::4] += 0.6
    return images, labels


def build() -> nn.Module:
    """Two convolutions with BN, and a head."""
    blocks = [
        nn.Sequential(
            nn.Conv2d(taken, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8, momentum=0.01),
            nn.ReLU(),
        )
        for taken in (3, 8)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Four epochs of a plain loop."""
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    net.train()
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()


with torch.random.fork_rng():
    torch.manual_seed(0)
    x, y = stripes(256)
    net = build()
    train(net, x, y)

if __name__ == "__main__":
    print(fl.phases(net, (x, y), loss=F.cross_entropy))
    print(fl.diagnose(net, (x, y), loss=F.cross_entropy))
