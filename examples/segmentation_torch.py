"""A small network that marks bright squares, pixel by pixel, in batches of two images (PyTorch).

It makes ``net`` with its ``encoder`` and ``decoder``, images ``x``, masks ``y`` and ``train``, a
loop with the batch size that memory often forces on segmentation and detection.
"""

from __future__ import annotations

import torch
from torch import nn


def squares(samples: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy images ``(n, 3, size, size)``, each with a square, and its mask."""
    masks = torch.zeros(samples, size, size, dtype=torch.long)
    for mask, row, column in zip(masks, *torch.randint(size - 6, (2, samples)), strict=True):
        mask[row : row + 6, column : column + 6] = 1
    level = 1 + 2 * torch.rand(samples, 1, 1, 1)
    return level + torch.randn(samples, 3, size, size) + 1.5 * masks[:, None], masks


def block(taken: int, given: int) -> nn.Module:
    """A convolution with BN whose average is slow, as in many backbones."""
    convolution = nn.Conv2d(taken, given, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(given, momentum=0.01), nn.ReLU())


def build() -> nn.Module:
    """An encoder, and a decoder that gives two numbers per pixel."""
    net = nn.Sequential()
    net.add_module("encoder", nn.Sequential(block(3, 8), block(8, 8)))
    net.add_module("decoder", nn.Sequential(block(8, 8), nn.Conv2d(8, 2, 1)))
    return net


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = 3) -> None:
    """Train in batches of two."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    net.train()
    for _ in range(epochs):
        for batch in torch.arange(len(x)).split(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    net.eval()


with torch.random.fork_rng():
    torch.manual_seed(0)
    x, y = squares(64)
    net = build()
    train(net, x, y)
