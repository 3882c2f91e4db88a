"""Average two networks that were trained apart, and give the average its own statistics (PyTorch).

Hidden units of two networks have no common order, so the second network is permuted first: weight
matching solves one linear assignment per layer (Ainsworth, Hayase and Srinivasa 2022). The average
of aligned weights is still bad, since the variance of its activations has collapsed; BN statistics
that are measured anew repair that (Jordan et al. 2022, REPAIR). ``fl.recalibrate`` measures them.

    python examples/merge_weights.py                                   # digits, an MLP: seconds
    python examples/merge_weights.py --data ../shared/data --epochs 8  # CIFAR-10, a ResNet20

Smaller than published: REPAIR's networks are wider and trained for longer.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import frostline as fl

#: A group of units that are permuted together: (name of a tensor, axis) of each place they occur.
Places = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Merged:
    """Test accuracy of both networks, of their average, and of the average with its statistics."""

    first: float
    second: float
    averaged: float
    aligned: float
    recalibrated: float

    def __str__(self) -> str:
        return (
            f"two networks: {self.first:.1%} and {self.second:.1%}\n"
            f"averaged as they are: {self.averaged:.1%}\n"
            f"aligned and averaged: {self.aligned:.1%}\n"
            f"the same after fl.recalibrate: {self.recalibrated:.1%}"
        )


def mlp(inputs: int = 64, width: int = 64, depth: int = 8, classes: int = 10) -> nn.Module:
    """Linear layers with BN: ``0`` linear, ``1`` BN, ``2`` ReLU, ``3`` linear, and so on."""
    layers: list[nn.Module] = []
    for taken in [inputs] + [width] * (depth - 1):
        layers += [nn.Linear(taken, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def mlp_groups(net: nn.Module) -> list[Places]:
    """The hidden units of each layer: rows of its weights, its BN, columns of the next weights."""
    linear = [int(name) for name, layer in net.named_children() if isinstance(layer, nn.Linear)]
    return [
        [(f"{at}.weight", 0), (f"{at}.bias", 0), *_norm(f"{at + 1}"), (f"{behind}.weight", 1)]
        for at, behind in itertools.pairwise(linear)
    ]


class Block(nn.Module):
    """Two convolutions with BN beside a shortcut."""

    def __init__(self, taken: int, given: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(taken, given, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(given)
        self.conv2 = nn.Conv2d(given, given, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(given)
        self.shortcut = nn.Identity() if taken == given else nn.Conv2d(taken, given, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both ways."""
        inside = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inside + self.shortcut(x)).relu()


class ResNet20(nn.Module):
    """The ResNet20 of CIFAR-10, with ``width`` channels in its first stage."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        pairs = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                Block(taken, given, stride), Block(given, given, 1), Block(given, given, 1)
            )
            for taken, given, stride in pairs
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.bn(self.stem(x)).relu()
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def resnet_groups(net: ResNet20) -> list[Places]:
    """Units inside each block, and for each stage those of the stream that its blocks add to."""
    stages = range(len(net.stages))
    inside = [
        [(f"stages.{s}.{b}.conv1.weight", 0), *_norm(f"stages.{s}.{b}.bn1"),
         (f"stages.{s}.{b}.conv2.weight", 1)]
        for s in stages for b in range(3)
    ]  # fmt: skip
    streams = []
    for s in stages:
        places: list[tuple[str, int]] = []
        if s == 0:
            places += [("stem.weight", 0), *_norm("bn")]
        else:
            shortcut = f"stages.{s}.0.shortcut"
            places += [(f"{shortcut}.weight", 0), (f"{shortcut}.bias", 0)]
        for b in range(3):
            places += [(f"stages.{s}.{b}.conv2.weight", 0), *_norm(f"stages.{s}.{b}.bn2")]
            if s == 0 or b > 0:
                places.append((f"stages.{s}.{b}.conv1.weight", 1))
        if s < 2:
            behind = f"stages.{s + 1}.0"
            places += [(f"{behind}.conv1.weight", 1), (f"{behind}.shortcut.weight", 1)]
        else:
            places.append(("head.weight", 1))
        streams.append(places)
    return [*inside, *streams]


def _norm(name: str) -> Places:
    return [(f"{name}.{part}", 0) for part in ("weight", "bias", "running_mean", "running_var")]


def aligned(
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    groups: Sequence[Places],
    rounds: int = 20,
) -> dict[str, torch.Tensor]:
    """Return the second network with its units in the order that fits the first one's best.

    Each group is assigned in turn, with the others as they are, until nothing moves any more; every
    step lowers the distance of the weights, so that it ends.
    """
    state = {name: value.clone() for name, value in second.items()}
    for _ in range(rounds):
        moved = False
        for places in groups:
            similar = 0.0
            for name, axis in places:
                if "running" not in name:
                    one, other = (
                        each[name].movedim(axis, 0).flatten(1) if each[name].ndim > 1
                        else each[name][:, None] for each in (first, state)
                    )  # fmt: skip
                    similar = similar + (one @ other.T).double().numpy()
            _, order = linear_sum_assignment(similar, maximize=True)
            if not np.array_equal(order, np.arange(len(order))):
                moved = True
                for name, axis in places:
                    state[name] = state[name].index_select(axis, torch.from_numpy(order))
        if not moved:
            break
    return state


def averaged(
    net: nn.Module, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
) -> nn.Module:
    """Return a copy of a network with the mean of two states."""
    made = copy.deepcopy(net)
    made.load_state_dict(
        {
            name: (value + second[name]) / 2 if value.is_floating_point() else value
            for name, value in first.items()
        }
    )
    return made.eval()


def trained(net: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epochs: int, seed: int) -> Any:
    """Train with SGD, a cosine schedule and batches of 128."""
    order = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(x) // 128)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        answers = torch.cat([net(part).argmax(1) for part in x.split(500)])
    return float((answers == y).double().mean())


def merge(
    build: Any,
    groups_of: Any,
    train: Any,
    test: Any,
    *,
    epochs: int,
    seeds: tuple[int, int] = (1, 2),
) -> Merged:
    """Train two networks from different starts, average them in each way, and test all of them."""
    nets = []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(trained(build(), *train, epochs=epochs, seed=seed))
    first, second = (net.state_dict() for net in nets)
    plain = averaged(nets[0], first, second)
    merged = averaged(nets[0], first, aligned(first, second, groups_of(nets[0])))
    before = accuracy(merged, *test)
    fl.recalibrate(merged, train[0])
    return Merged(
        *(accuracy(net, *test) for net in nets), accuracy(plain, *test), before,
        accuracy(merged, *test),
    )  # fmt: skip


def digits() -> tuple[Any, Any]:
    """scikit-learn's digits, every fourth image for the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images.astype("float32") / 16), torch.from_numpy(labels)
    test = torch.arange(len(x)) % 4 == 0
    return (x[~test], y[~test]), (x[test], y[test])


def cifar10(folder: str, per_class: int) -> tuple[Any, Any]:
    """CIFAR-10 from parquet files."""
    from frostline.data import image_sets

    parts = []
    for split, most in (("train", per_class), ("test", per_class // 5)):
        found = image_sets.load(folder, split=split, per_class=most, image_size=32, seed=0)
        x = torch.from_numpy(np.asarray(found.images, "float32")).movedim(3, 1) / 127.5 - 1
        parts.append((x.contiguous(), torch.from_numpy(found.labels.astype("int64"))))
    return parts[0], parts[1]


def main() -> None:
    """Merge networks for the digits, and for CIFAR-10 where its files are given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder with CIFAR-10 as parquet files")
    parser.add_argument("--epochs", type=int, default=8, help="of the ResNet20")
    parser.add_argument("--per-class", type=int, default=1000, help="CIFAR-10 images per class")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    found = {"MLP with BN, digits": merge(mlp, mlp_groups, *digits(), epochs=20)}
    if options.data is not None:
        data, wide = cifar10(options.data, options.per_class), options.width
        found["ResNet20, CIFAR-10"] = merge(
            lambda: ResNet20(wide), resnet_groups, *data, epochs=options.epochs
        )
    for name, merged in found.items():
        print(f"{name}\n{merged}\n")
    if options.json is not None:
        rows = [{"name": name, **asdict(merged)} for name, merged in found.items()]
        settings = {key: getattr(options, key) for key in ("epochs", "per_class", "width")}
        result = {"resnet20": settings, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
