"""The winner of ``fl.compare`` beside that of full trainings of all treatments, on three data sets.

    python scripts/compare_treatments.py --epochs 5 --json docs/results/compare-treatments.json

Each data set has a source, on which a small network is trained, and a target, on which its later
half is fine-tuned behind a frozen first half:

- ``cifar10``: cats, deer, dogs and horses, after the other six classes;
- ``digits`` of scikit-learn: 5 to 9, darker and noisy, after 0 to 4;
- ``folder``: four drawn shapes as PNG files in a folder per class, coloured, after black on white.

``fl.compare`` uses its cache and gives up what cannot win. Beside it every treatment is trained in
full by a plain loop: a copy of the model, the line that the row gives, and the same seeds; no
cache, no early stopping, nothing of ``fl.compare``. "Same": both name the same winner, or none, and
the leader of each is the other's or is not told from it.

Prediction, written before the first run: no winner on most of them, since some hundred validation
images do not tell treatments apart that differ by a few points; the same on all three; one
treatment in three is given up.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import frostline as fl
from frostline.data import image_sets
from frostline.numerics import ranking

SIZE, BATCH, RATE = 32, 32, 0.02
SHAPES = ("circle", "cross", "square", "triangle")


def network(classes: int) -> Any:
    """Four convolutions with BN; the first two are what is frozen later."""
    torch.manual_seed(0)
    layers: list[Any] = []
    for before, width, stride in ((3, 16, 2), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
                   nn.ReLU()]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def sgd(parameters: Any) -> Any:
    """The optimizer of every training."""
    return torch.optim.SGD(parameters, RATE, momentum=0.9)


def trained(model: Any, data: Any, epochs: int, seed: int, each_step: str = "") -> int:
    """A plain training; the number of steps."""
    rows = TensorDataset(*map(torch.as_tensor, data))
    optimizer, step = sgd([p for p in model.parameters() if p.requires_grad]), 0
    torch.manual_seed(seed)
    loader = DataLoader(rows, BATCH, shuffle=True)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            step += 1
            exec(each_step, {"fl": fl, "model": model, "step": step})
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return step


def hits(model: Any, data: Any) -> Any:
    """1 for each sample that the model has right, else 0."""
    x, y = data
    with torch.no_grad():
        return (model.eval()(torch.as_tensor(x)).argmax(1).numpy() == y).astype(float)


def channels_first(images: Any) -> Any:
    """Images of 0 to 255 as PyTorch takes them, from -1 to 1."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(images, np.float32) / 127.5 - 1, -1, 1))


# --- the data sets: source, training and validation data of the target -------------------------


def cifar10(folder: str) -> Any:
    """Classes of CIFAR-10."""
    target = ("cat", "deer", "dog", "horse")
    source = ("airplane", "automobile", "bird", "frog", "ship", "truck")

    def read(split: Any, classes: tuple[str, ...], count: int) -> Any:
        found = image_sets.load(
            folder, split=split, classes=classes, per_class=count, image_size=SIZE, seed=0
        )
        return channels_first(found.images), found.labels.astype(np.int64)

    return read("train", source, 200), read("train", target, 100), read("test", target, 75)


def digits() -> Any:
    """Digits of scikit-learn, as three channels of 32²."""
    from sklearn.datasets import load_digits

    found = load_digits()
    rng = np.random.default_rng(0)
    images = np.repeat(np.repeat(found.images, 4, 1), 4, 2)[..., None].repeat(3, -1) * 255 / 16
    late = found.target >= 5
    dark = np.clip(images * 0.4 + rng.normal(0, 25, images.shape), 0, 255)
    order = rng.permutation(np.flatnonzero(late))
    parts = (np.flatnonzero(~late), order[:300], order[300:600])
    sets = zip((images, dark, dark), parts, (0, 5, 5), strict=True)
    return tuple(
        (channels_first(each[rows]), (found.target[rows] - first).astype(np.int64))
        for each, rows, first in sets
    )


def drawn_folder() -> Any:
    """Shapes that are drawn, written as PNG files and read again by the folder reader."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(0)

    def draw(shape: str, *, plain: bool) -> Any:
        ground, ink = (
            ((255,) * 3, (0,) * 3)
            if plain
            else (tuple(map(int, rng.integers(0, 160, 3))) for _ in "ab")
        )
        image = Image.new("RGB", (SIZE, SIZE), ground)
        pen, size = ImageDraw.Draw(image), int(rng.integers(8, 18))
        x, y = (int(each) for each in rng.integers(0, SIZE - size, 2))
        box = (x, y, x + size, y + size)
        if shape == "circle":
            pen.ellipse(box, fill=ink)
        elif shape == "square":
            pen.rectangle(box, fill=ink)
        elif shape == "triangle":
            pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=ink)
        else:
            pen.line(box, fill=ink, width=3)
            pen.line((x + size, y, x, y + size), fill=ink, width=3)
        noisy = np.asarray(image) + rng.normal(0, 5 if plain else 20, (SIZE, SIZE, 3))
        return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))

    def written(count: int, *, plain: bool) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            for shape in SHAPES:
                (Path(folder) / shape).mkdir()
                for number in range(count):
                    draw(shape, plain=plain).save(Path(folder) / shape / f"{number}.png")
            found = image_sets.load(folder, split="all", image_size=SIZE, seed=0)
            return channels_first(found.images), found.labels.astype(np.int64)

    return written(200, plain=True), written(75, plain=False), written(75, plain=False)


# --- both ways ---------------------------------------------------------------------------------


def by_hand(model: Any, row: Any, data: Any, epochs: int, seed: int) -> Any:
    """Right answers after a training under one treatment, by the line that its row gives."""
    model = copy.deepcopy(model)
    line, _, each_step = row.line.partition("# before each step, counted from 1:\n")
    exec(line, {"fl": fl, "model": model, "data": data[0]})
    trained(model, data[0], epochs, seed, each_step)
    return hits(model, data[1])


def judged(name: str, sets: Any, epochs: int, seeds: int) -> dict[str, Any]:
    """Both answers for one data set, and the seconds of the processor for both."""
    source, target, held = sets
    model = network(len(np.unique(source[1])))
    trained(model, source, 6, 0)
    model[-1] = nn.Linear(64, len(np.unique(target[1])))
    fl.freeze(model, until="6")  # the first two convolutions with their BN
    model.train()
    begin = time.process_time()
    found = fl.compare(
        model, target, validation=held, loss=nn.CrossEntropyLoss(), optimizer=sgd, epochs=epochs,
        batch_size=BATCH, seeds=seeds, metric="accuracy", verbose=0,
    )  # fmt: skip
    compared = time.process_time() - begin
    begin = time.process_time()
    full = {
        row.name: np.stack([
            by_hand(model, row, (target, held), epochs, seed) for seed in range(seeds)
        ])
        for row in found.rows
    }  # fmt: skip
    by_loop = time.process_time() - begin
    standing = ranking.standing(full, higher=True)
    leader = found.rows[0].name
    same = (
        found.winner == standing.winner
        and standing.order[0] in (leader, *found.tied)
        and leader in (standing.order[0], *standing.tied)
    )
    result = {
        "data": name,
        "train": len(target[1]),
        "validation": len(held[1]),
        "verdict": found.verdict,
        "compare": {"leader": leader, "winner": found.winner, "tied": list(found.tied),
                    "given up": [row.name for row in found.rows if row.stopped is not None],
                    "accuracy": {row.name: row.value.estimate for row in found.rows}},
        "full": {"leader": standing.order[0], "winner": standing.winner,
                 "tied": list(standing.tied),
                 "accuracy": {key: float(value.mean()) for key, value in full.items()}},
        "same": same,
        "processor_s": {"compare": compared, "full": by_loop},
    }  # fmt: skip
    print(f"{name}: {found.verdict}\n  full trainings: {json.dumps(result['full'])}\n  "
          f"{'same' if same else 'NOT the same'}, {compared:.0f} s against {by_loop:.0f} s",
          flush=True)  # fmt: skip
    return result


def main() -> int:
    """Run and print; 1 where the two do not say the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="../shared/data", help="CIFAR-10")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=["digits", "folder", "cifar10"],
                        choices=["digits", "folder", "cifar10"])  # fmt: skip
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    makers: dict[str, Callable[[], Any]] = {
        "digits": digits,
        "folder": drawn_folder,
        "cifar10": lambda: cifar10(settings.data),
    }
    sets: list[dict[str, Any]] = []
    for name in settings.sets:
        sets.append(judged(name, makers[name](), settings.epochs, settings.seeds))
        if settings.json:
            content = {
                "epochs": settings.epochs,
                "seeds": settings.seeds,
                "torch": torch.__version__,
                "load": os.getloadavg()[0],
                "sets": sets,
            }
            settings.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(each["same"] for each in sets) else 1


if __name__ == "__main__":
    raise SystemExit(main())
