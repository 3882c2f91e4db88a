"""Native PyTorch: a frozen prefix on engines, cached training, and what freezing costs a step.

Run with ``python benchmarks/bench_torch_prefix.py`` (``--quick``: small images). What is compared
lives in one process and takes turns, so that a busy machine hits both; figures are medians of the
per-round ratios, with the smallest and largest beside them. Networks have random weights.

- ``prefix``: eager ``forward`` of the frozen prefix (``inference_mode``) / each engine, seconds for
  one batch: ResNet50 up to its last stage, and EfficientNet-Lite0 up to its 12th block.
- ``training``: the head of a ResNet50 alone, all epochs: a plain loop over the whole model / a loop
  over cached features; building the cache counts. ``training / limit``: that loop / what it cannot
  go below: one pass of the engine that ``auto`` took before the clock began, and the same training
  on features in memory. ``training bfloat16``, where the processor has it: the plain loop / the one
  over features in bfloat16.
- ``schedule``: ten epochs of the head of a ResNet50, or with ``--backbone efficientnet-lite0`` of
  that, then five of its last stage (blocks from the 12th on) too, with validation, as
  ``bench_cached_training.py`` has it for Keras: the plain loop / loops over cached features of both
  boundaries. ``schedule / limit``: those / the same with the engine chosen before
  the clock began and features in memory. Not among the cases that run by default; with
  ``--without-plain`` only the limit is measured.
- ``step``: a training step with the trunk frozen by ``fl.freeze`` / by hand (``requires_grad``,
  ``eval``).

Prediction, written before the first run, 2 cores at 224²: prefix on the best engine 2 times eager
for ResNet50 (bound by arithmetic that eager torch does well) and 4 times for EfficientNet-Lite0
(many small depthwise layers); the native engine 1.3; training 8 with 10 epochs; step 1.00. Before
the limit was measured: 1.2 with 64 images, since the graph is exported and engines are tried; a
training in bfloat16 1.3 times as fast as in float32 there. What was measured:
``docs/results/bench-torch-prefix.json``. Before the schedule was: with 256 and 64 images ten
seconds of splitting, exporting and trying engines beside eighty of work, so 1.15; the plain loop 5.
It was 1.34 for both networks, that of EfficientNet-Lite0 without a prediction. Since the graph is
written without a fold that torch repeats, engines are tried on eight images, and a short second cut
on none: 1.15 for ResNet50 and 1.12 for EfficientNet-Lite0 are expected.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils import data as torch_data

import frostline as fl
from frostline import engines, environment

CASES = ("prefix", "training", "step", "schedule")


class Bottleneck(nn.Module):
    """He et al. 2015 (arXiv 1512.03385), figure 5; the stride is in the 3x3 convolution."""

    def __init__(self, taken: int, width: int, stride: int) -> None:
        super().__init__()
        given = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(taken, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, given, 1, bias=False), nn.BatchNorm2d(given)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential()
        if stride > 1 or taken != given:
            shortcut = nn.Conv2d(taken, given, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(given))

    def forward(self, x: Any) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        y += self.downsample(x)
        return self.relu(y)


class ResNet50(nn.Module):
    """ResNet50 as torchvision has it, names included."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        taken = 64
        for number, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
            blocks = []
            for block in range(count):
                blocks.append(Bottleneck(taken, width, 2 if number > 1 and block == 0 else 1))
                taken = 4 * width
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(taken, classes)

    def forward(self, x: Any) -> Any:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet50() -> tuple[Any, str]:
    torch.manual_seed(0)
    return ResNet50().train(), "layer4"


def lite0() -> tuple[Any, str]:
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    model = EfficientNet.from_name("efficientnet-lite0")
    # Dropping paths in the frozen part would make it random in training.
    model._global_params = model._global_params._replace(drop_connect_rate=0.0)
    return model.train(), "_blocks/11"


def images(count: int, settings: argparse.Namespace, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 3, settings.size, settings.size)).astype(np.float32)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def figure(pairs: list[tuple[float, float]], **more: Any) -> dict[str, Any]:
    ratios = np.array([one / other for one, other in pairs])
    first, second = np.median(np.array(pairs), axis=0)
    return {
        "ratio": float(np.median(ratios)),
        "range": [float(ratios.min()), float(ratios.max())],
        "rounds": len(pairs),
        "first": float(first),
        "second": float(second),
        **more,
    }


def prefixes(settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Eager ``forward`` against each engine that agrees with it."""
    found: dict[str, dict[str, Any]] = {}
    for name, made in (("resnet50", resnet50), ("efficientnet-lite0", lite0)):
        model, until = made()
        fl.freeze(model.to(settings.device), until)
        x = images(settings.batch, settings)
        part = fl.split(model, sample=x[:2]).prefix
        eager = torch.from_numpy(x)

        def forward(part: Any = part, eager: Any = eager) -> None:
            with torch.inference_mode():
                part(eager.to(settings.device)).cpu()

        runs = {}
        for engine in engines.NAMES:
            try:
                runs[engine] = engines.choose(part, x, engine=engine).run
            except fl.FrostlineError as problem:
                print(f"{name}: {problem}", file=sys.stderr)
        chosen = engines.choose(part, x).name
        forward()
        for run in runs.values():
            run(x)
        seconds: dict[str, list[tuple[float, float]]] = {engine: [] for engine in runs}
        for _ in range(settings.rounds):
            for engine, run in runs.items():
                seconds[engine].append((timed(forward), timed(lambda run=run, x=x: run(x))))
        for engine, pairs in seconds.items():
            rates = [settings.batch / each for each in np.median(np.array(pairs), axis=0)]
            found[f"prefix {name} {engine}"] = figure(
                pairs, images_per_second=[float(rate) for rate in rates], auto=engine == chosen
            )
    return found


def trained(run: Any, modules: Any, head: Any, loader: Any, epochs: int) -> None:
    device = head.weight.device
    optimizer = torch.optim.SGD(head.parameters(), 0.01, momentum=0.9)
    for _ in range(epochs):
        modules.train()
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(run(x.to(device)), y.to(device)).backward()
            optimizer.step()


def training(settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    x = torch.from_numpy(images(settings.train, settings))
    dataset = torch_data.TensorDataset(x, torch.arange(len(x)) % 10)

    def plain() -> None:
        model, _ = resnet50()
        fl.freeze(model.to(settings.device), "fc")
        loader = torch_data.DataLoader(dataset, settings.batch, shuffle=True)
        trained(model, model, model.fc, loader, settings.epochs)

    def cached(precision: str = "float32") -> None:
        model, _ = resnet50()
        fl.freeze(model.to(settings.device), "fc")
        parts = fl.split(model, sample=x[:2])
        with tempfile.TemporaryDirectory() as folder:
            features = fl.cache_features(
                parts.prefix, dataset, folder, precision=precision, verbose=0
            )
            loader = torch_data.DataLoader(features, settings.batch, shuffle=True)
            trained(parts.suffix, parts.suffix, model.fc, loader, settings.epochs)

    def limit() -> float:
        model, _ = resnet50()
        fl.freeze(model.to(settings.device), "fc")
        parts = fl.split(model, sample=x[:2])
        batches = [part.numpy() for part in x.split(settings.batch)]
        run = engines.choose(parts.prefix, batches[0]).run

        def all_of_it() -> None:
            held = torch.from_numpy(np.concatenate([run(batch)[0] for batch in batches]))
            features = torch_data.TensorDataset(held, dataset.tensors[1])
            loader = torch_data.DataLoader(features, settings.batch, shuffle=True)
            trained(parts.suffix, parts.suffix, model.fc, loader, settings.epochs)

        return timed(all_of_it)

    ways: dict[str, Callable[[], float]] = {
        "plain": lambda: timed(plain), "ours": lambda: timed(cached), "limit": limit
    }  # fmt: skip
    if environment.has_bfloat16() and settings.device == "cpu":
        ways["lower"] = lambda: timed(lambda: cached("bfloat16"))
    rounds = [
        {way: run() for way, run in ways.items()} for _ in range(max(1, settings.rounds // 5))
    ]
    found = {
        "training": figure([(each["plain"], each["ours"]) for each in rounds]),
        "training / limit": figure([(each["ours"], each["limit"]) for each in rounds]),
    }
    if "lower" in ways:
        found["training bfloat16"] = figure([(each["plain"], each["lower"]) for each in rounds])
    return found


def schedule(settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The head alone, then the last stage with it."""
    made, top = {"resnet50": (resnet50, "fc"), "efficientnet-lite0": (lite0, "_fc")}[
        settings.backbone
    ]
    since = made()[1]
    data = [
        torch_data.TensorDataset(
            torch.from_numpy(images(count, settings, seed)), torch.arange(count) % 10
        )
        for seed, count in enumerate((settings.train, settings.validation))
    ]

    def both(model: Any, runs: list[Any], held: list[list[Any]]) -> None:
        """Train the live part of the first run on its data, thaw, and train that of the second."""
        phases = ((1e-2, settings.epochs), (1e-4, settings.epochs // 2))
        for run, (mine, others), (rate, epochs) in zip(runs, held, phases, strict=True):
            if epochs < settings.epochs:
                fl.unfreeze(model, since=since)
            live = [parameter for parameter in run.parameters() if parameter.requires_grad]
            optimizer = torch.optim.SGD(live, rate, momentum=0.9)
            for _ in range(epochs):
                run.train()
                for x, y in torch_data.DataLoader(mine, settings.batch, shuffle=True):
                    optimizer.zero_grad()
                    functional.cross_entropy(run(x), y).backward()
                    optimizer.step()
                run.eval()
                with torch.no_grad():
                    for x, y in torch_data.DataLoader(others, settings.batch):
                        functional.cross_entropy(run(x), y)

    def plain() -> None:
        model, _ = made()
        fl.freeze(model, top)
        both(model, [model, model], [data, data])

    def parts() -> tuple[Any, Any, Any]:
        model, _ = made()
        x = data[0].tensors[0][:2]
        fl.freeze(model, since)
        early = fl.split(model, sample=x)
        fl.freeze(model, top)
        with torch.no_grad():
            between = fl.split(early.suffix, sample=early.prefix(x))
        return model, early, between

    def cached() -> None:
        with tempfile.TemporaryDirectory() as folder:
            model, early, between = parts()
            late = [fl.cache_features(early.prefix, each, folder, verbose=0) for each in data]
            head = [fl.cache_features(between.prefix, each, folder, verbose=0) for each in late]
            both(model, [between.suffix, early.suffix], [head, late])

    def limit() -> float:
        model, early, between = parts()
        first = data[0].tensors[0][: settings.batch].numpy()
        run = engines.choose(early.prefix, first).run

        def all_of_it() -> None:
            late, head = [], []
            for each in data:
                x, y = each.tensors
                passed = [run(part.numpy())[0] for part in x.split(settings.batch)]
                with torch.no_grad():
                    features = torch.from_numpy(np.concatenate(passed))
                    inner = [between.prefix(part) for part in features.split(settings.batch)]
                late.append(torch_data.TensorDataset(features, y))
                head.append(torch_data.TensorDataset(torch.cat(inner), y))
            both(model, [between.suffix, early.suffix], [head, late])

        return timed(all_of_it)

    ways: dict[str, Callable[[], float]] = {"ours": lambda: timed(cached), "limit": limit}
    if not settings.without_plain:
        ways["plain"] = lambda: timed(plain)
    rounds = [
        {way: run() for way, run in ways.items()} for _ in range(max(1, settings.rounds // 5))
    ]
    found = {"schedule / limit": figure([(each["ours"], each["limit"]) for each in rounds])}
    if not settings.without_plain:
        found["schedule"] = figure([(each["plain"], each["ours"]) for each in rounds])
    return found


def steps(settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A step with the trunk frozen by us and by hand, in turn; whoever begins changes."""
    made = []
    for ours in (True, False):
        model, until = resnet50()
        model.to(settings.device)
        if ours:
            fl.freeze(model, until)
            frozen: list[Any] = []
        else:
            children = list(model.named_children())
            position = [name for name, _ in children].index(until)
            frozen = [module for _, module in children[:position]]
            for module in frozen:
                module.requires_grad_(False)
        made.append((model, frozen))
    x = torch.from_numpy(images(settings.step_batch, settings)).to(settings.device)
    y = torch.arange(len(x), device=settings.device) % 10

    def step(model: Any, frozen: list[Any]) -> None:
        model.train()
        for module in frozen:
            module.eval()
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        if settings.device != "cpu":
            torch.cuda.synchronize()

    for each in made:
        step(*each)
    pairs = []
    for number in range(3 * settings.rounds):
        pair = [0.0, 0.0]
        for index in (0, 1) if number % 2 else (1, 0):
            pair[index] = timed(lambda each=made[index]: step(*each))
        pairs.append((pair[0], pair[1]))
    return {"step": figure(pairs)}


def read_settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small images and few of them")
    parser.add_argument("--cases", nargs="+", default=list(CASES[:3]), choices=CASES)
    parser.add_argument("--without-plain", action="store_true", help="leave the plain loop out")
    parser.add_argument(
        "--backbone", default="resnet50", choices=("resnet50", "efficientnet-lite0"),
        help="schedule: the network",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    for name, full in (
        ("size", 224), ("batch", 32), ("train", 64), ("validation", 16), ("epochs", 10),
        ("rounds", 5), ("step-batch", 8),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=full)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    if "--quick" in sys.argv:
        parser.set_defaults(size=64, train=32, epochs=3, rounds=2, batch=8)
    return parser.parse_args()


def main() -> None:
    settings = read_settings()
    torch.set_num_threads(settings.threads)
    # A process' first optimizer imports torch's compiler, a second that would be ours alone.
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # what the engines read
    print(f"torch {torch.__version__}, cpus {len(os.sched_getaffinity(0))}, {settings}")
    print(f"{'case':38} {'ratio':>7} {'range':>16} {'first':>12} {'second':>12}")
    figures: dict[str, dict[str, Any]] = {}
    measured = {"prefix": prefixes, "training": training, "step": steps, "schedule": schedule}
    for case in settings.cases:
        for name, each in measured[case](settings).items():
            figures[name] = each
            low, high = each["range"]
            print(
                f"{name:38} {each['ratio']:7.2f} [{low:6.2f}, {high:6.2f}] {each['first']:12.4g} "
                f"{each['second']:12.4g} {'auto' if each.get('auto') else ''}",
                flush=True,
            )
        if settings.json:  # after each case: a run that is cut short keeps what it has
            kept = {key: value for key, value in vars(settings).items() if key != "json"}
            content = {
                "torch": torch.__version__,
                "device": "cpu" if settings.device == "cpu" else torch.cuda.get_device_name(),
                "cpus": len(os.sched_getaffinity(0)),
                "settings": kept,
            }
            settings.json.write_text(json.dumps({**content, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
