"""Native PyTorch: compute the frozen part once, train the rest in your own loop.

Run it as::

python examples/torch_cached.py --epochs 10
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import frostline as fl


def build() -> Any:
    """A backbone of two blocks, to be pretrained elsewhere, and a head."""
    blocks = [
        nn.Sequential(nn.Conv2d(taken, given, 3, 2, 1), nn.BatchNorm2d(given), nn.ReLU())
        for taken, given in ((3, 16), (16, 32))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def main() -> None:
    """Train the last block and the head on features of the first block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    settings = parser.parse_args()
    torch.manual_seed(0)
    model = build()
    dataset = TensorDataset(torch.randn(64, 3, 32, 32), torch.arange(64) % 4)

    fl.freeze(model, 1)
    parts = fl.split(model, sample=dataset[:2][0])
    print(parts)
    optimizer = torch.optim.SGD(parts.suffix.parameters(), 0.05, momentum=0.9)
    loss = nn.CrossEntropyLoss()
    with tempfile.TemporaryDirectory() as folder:
        features = fl.cache_features(parts.prefix, dataset, folder)
        loader = DataLoader(features, batch_size=16, shuffle=True)
        for epoch in range(settings.epochs):
            parts.suffix.train()
            for x, y in loader:
                optimizer.zero_grad()
                value = loss(parts.suffix(x), y)
                value.backward()
                optimizer.step()
            print(f"epoch {epoch}: loss {value.item():.3f}")
    fl.assert_frozen(model, 1)
    model.eval()  # the whole model is trained: the suffix is its own modules


if __name__ == "__main__":
    main()
