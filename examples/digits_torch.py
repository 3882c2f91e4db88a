"""A network for handwritten digits to fine-tune (PyTorch): trained on 0 to 4, then given 5 to 9.

It makes ``net``, which was trained on the digits 0 to 4, the task ``x`` and ``y`` (digits 5 to 9,
brighter than what the network knows) and ``train``, a plain loop.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn


def digits(first: int, samples: int, brightness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of five digits from ``first`` on, shape ``(n, 1, 8, 8)``, and labels 0 to 4."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero((labels >= first) & (labels < first + 5))[:samples]
    x = torch.from_numpy(images[chosen].astype("float32") / 16 * brightness)
    return x.reshape(-1, 1, 8, 8), torch.from_numpy(labels[chosen] - first)


def block(taken: int, given: int) -> nn.Module:
    """A convolution with BN."""
    convolution = nn.Conv2d(taken, given, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(given), nn.ReLU())


def build() -> nn.Module:
    """Two blocks, and a head for five classes."""
    net = nn.Sequential()
    net.add_module("layer1", block(1, 12))
    net.add_module("layer2", block(12, 24))
    net.add_module("pool", nn.AdaptiveAvgPool2d(2))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(96, 5))
    return net


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = 6) -> None:
    """Train with Adam in batches of 32, in an order that is always the same."""
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 5e-3)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    net.eval()


with torch.random.fork_rng():
    torch.manual_seed(0)
    net = build()
    train(net, *digits(0, 600))
    nn.init.zeros_(net.head.weight)  # a new head for the new task
    x, y = digits(5, 300, brightness=1.6)
