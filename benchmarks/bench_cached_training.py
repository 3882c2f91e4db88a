"""Cached training against stock Keras: the essay's schedule, the head alone, one epoch, the prefix.

Run with ``KERAS_BACKEND=tensorflow|jax|torch python benchmarks/bench_cached_training.py``
(``--quick``: small images and few of them, minutes on two cores; ``--train 96 --validation 32
--rounds 1``: the essay's images, under eight minutes on two cores). What is compared lives in one
process and takes turns, so that a busy machine hits both; figures are medians of the per-round
ratios, with the smallest and largest beside them. Compilation counts, building the cache counts.
How far it is, it says on standard error.

- ``schedule``: head epochs, then fine-tuning epochs, with validation: stock ``fit`` / ``fl.fit``,
  whose first call keeps the features of the second on the way (``thaw_later``);
  and ``head``: the first part of it, the head alone, which keeps nothing for later.
- ``schedule / limit``, ``head / limit``: ``fl.fit`` / what it cannot go below, measured in the same
  round: one pass of the engine that ``auto`` takes over the frozen part, features in memory, and
  the training of the rest on them, compiling included (DESIGN: close to the limit).
- ``epoch``: a cached epoch / training the suffix on features in memory (the physical limit).
- ``prefix``: ``predict`` / the engine that ``auto`` takes, seconds for the same batch.
- ``memory``: peak memory of building a cache of 4 n samples / of n samples, in processes of their
  own, data made batch by batch.

Prediction, written before the first run, full size (ResNet50 at 224², boundary 140, 10 + 5 epochs):
schedule 6, head 25, epoch 1.05, memory 1.0; prefix 1.7 on TensorFlow, 2.6 on JAX, 3 on torch for
ResNet50, from the images per second in the issue and ONNX Runtime's 44 to 50. ``--quick`` has few
samples, so compilation dominates: schedule 1.5, head 2.5.

Prediction before the engines were wired in, two cores, full size: what stock ``fit`` and the
suffix alone need (issue: 20, 10.7, 11 and 51, 27, 44 images per second on TensorFlow, JAX, torch)
bounds the schedule at 5.1, 5.1 and 7.5 whatever the cache does, and the head at 18, 26 and 31 with
a prefix of 44 images per second. With 96 images instead of 512, compiling weighs four times as
much: schedule 3, 3 and 5, head 6, 5 and 9.

Prediction after one pass serves both calls and fixed costs were cut, two quiet cores, full size.
What bounds the head is ten passes of stock ``fit`` over one pass of the engine, 10 x (engine /
stock): 16 to 29 with 44 images per second; with some ten seconds for everything beside the pass,
the head is 12, 14 and 17. The schedule: stock 390, 650 and 700 s, ours 90, 140 and 100 s: 4.3, 4.6
and 7.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import frostline as fl
from frostline import engines
from frostline.experiments import backbones
from frostline.experiments.overfit import default_boundary

CASES = ("schedule", "epoch", "prefix", "memory")

Fit = Callable[..., Any]


class Made(keras.utils.PyDataset):
    """Images made from their number, batch by batch: nothing is held in memory."""

    def __init__(self, samples: int, size: int, batch: int) -> None:
        super().__init__()
        self.samples, self.size, self.batch = samples, size, batch

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def __getitem__(self, index: int) -> Any:
        count = min(self.batch, self.samples - index * self.batch)
        return (images(count, self.size, seed=index), np.zeros(count, "int32"))


def images(count: int, size: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype("float32")


def labelled(count: int, settings: argparse.Namespace, seed: int) -> Any:
    labels = np.random.default_rng(seed).integers(0, settings.classes, count).astype("int32")
    return images(count, settings.size, seed), labels


def build(settings: argparse.Namespace) -> Any:
    keras.utils.set_random_seed(0)
    return backbones.build(
        settings.backbone, image_size=settings.size, classes=settings.classes, weights=None
    )


def compiled(model: Any, optimizer: Any) -> Any:
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def schedule(
    settings: argparse.Namespace, fit: Fit, *, head_only: bool = False, **first: Any
) -> tuple[float, float]:
    """Seconds of the head's epochs alone, and with the fine-tuning behind them.

    Args:
        settings: Sizes.
        fit: Stock ``fit`` or ours.
        head_only: Leave the fine-tuning out.
        **first: Further arguments of the first call.
    """
    model = build(settings)
    (x, y), held = labelled(settings.train, settings, 1), labelled(settings.validation, settings, 2)
    fl.freeze(model, "head")
    started = time.perf_counter()
    ways = {"batch_size": settings.batch, "validation_data": held, "verbose": 0}
    first |= {"epochs": settings.head_epochs, **ways}
    fit(compiled(model, keras.optimizers.RMSprop(1e-3)), x, y, **first)
    head = time.perf_counter() - started
    if head_only:
        return head, head
    fl.unfreeze(model, since=default_boundary(settings.backbone))
    sgd = keras.optimizers.SGD(1e-4, momentum=0.9)
    fit(compiled(model, sgd), x, y, epochs=settings.epochs, **ways)
    return head, time.perf_counter() - started


def stock_fit(model: Any, *data: Any, **ways: Any) -> None:
    model.fit(*data, **ways)


def stock(settings: argparse.Namespace) -> tuple[float, float]:
    """Seconds of stock ``fit``: the head alone, and the whole schedule."""
    return schedule(settings, stock_fit)


def ours(settings: argparse.Namespace) -> tuple[float, float]:
    """The same of ``fl.fit``, each with an empty cache at the start.

    Whoever trains the head alone does not ask for the features of a later boundary; in the schedule
    one pass makes both.
    """
    seconds = []
    for head_only in (True, False):
        first = {} if head_only else {"thaw_later": default_boundary(settings.backbone)}
        with tempfile.TemporaryDirectory() as folder:

            def cached(model: Any, *data: Any, folder: str = folder, **ways: Any) -> None:
                fl.fit(model, *data, cache=folder, engine=settings.engine, **ways)

            seconds.append(schedule(settings, cached, head_only=head_only, **first))
    return seconds[0][0], seconds[1][1]


def limit(settings: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the head alone and of the whole schedule, with nothing but the work itself.

    The engine is chosen before the clock starts; features never touch a disk.
    """
    model = build(settings)
    (x, y), (xv, yv) = (
        labelled(settings.train, settings, 1),
        labelled(settings.validation, settings, 2),
    )
    since = default_boundary(settings.backbone)
    fl.freeze(model, since)
    early = fl.split(model)
    fl.freeze(model, "head")
    between = fl.split(early.suffix)
    engine = engines.choose(early.prefix, x[: settings.batch], engine=settings.engine)
    started = time.perf_counter()
    at_boundary = [passed(engine.run, each, settings.batch) for each in (x, xv)]
    ways = {"batch_size": settings.batch, "verbose": 0}

    def fit(suffix: Any, optimizer: Any, epochs: int, features: Any) -> None:
        (mine, held), loss = features, "sparse_categorical_crossentropy"
        suffix.compile(optimizer, loss=loss, metrics=["accuracy"])
        suffix.fit(mine, y, validation_data=(held, yv), epochs=epochs, **ways)

    at_head = [between.prefix.predict(each, **ways) for each in at_boundary]
    fit(between.suffix, keras.optimizers.RMSprop(1e-3), settings.head_epochs, at_head)
    head = time.perf_counter() - started
    fl.unfreeze(model, since=since)
    sgd = keras.optimizers.SGD(1e-4, momentum=0.9)
    fit(early.suffix, sgd, settings.epochs, at_boundary)
    return head, time.perf_counter() - started


def passed(run: Callable[[Any], Any], x: Any, batch: int) -> Any:
    """Features of all samples, in memory."""
    parts = [run(x[i : i + batch]) for i in range(0, len(x), batch)]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return columns[0] if len(columns) == 1 else columns


def against_stock(settings: argparse.Namespace, number: int) -> dict[str, tuple[float, float]]:
    """Seconds of head and whole schedule: stock ``fit``, ``fl.fit``, and the limit.

    Of the first two the one that comes first is the other one in every other round.
    """
    seconds = {}
    compared = (ours,) if settings.without_stock else (stock, ours)[:: 1 - number % 2 * 2]
    for way in (*compared, limit):
        head, whole = seconds[way.__name__] = way(settings)
        tell(f"round {number + 1}, {way.__name__}: head {head:.1f} s, schedule {whole:.1f} s")
    return seconds


def tell(text: str) -> None:
    """Say how far it is, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def one_epoch(settings: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of one cached epoch, and of one epoch of the suffix on arrays in memory."""
    model = build(settings)
    fl.freeze(model, default_boundary(settings.backbone))
    parts = fl.split(model)
    x, y = labelled(settings.train, settings, 1)
    features = engines.choose(parts.prefix, x[: settings.batch], engine=settings.engine)
    batches = [features.run(x[i : i + settings.batch]) for i in range(0, len(x), settings.batch)]
    held = [np.concatenate([each[k] for each in batches]) for k in range(len(batches[0]))]
    inside = held[0] if len(held) == 1 else held
    compiled(parts.suffix, keras.optimizers.SGD(1e-4, momentum=0.9))
    compiled(model, keras.optimizers.SGD(1e-4, momentum=0.9))

    def seconds(fit: Callable[..., Any], *data: Any) -> float:
        """The better of two epochs; the one before them compiles."""
        marks: list[float] = []
        mark = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_: marks.append(time.perf_counter())
        )
        fit(*data, batch_size=settings.batch, verbose=0, epochs=3, callbacks=[mark])
        return min(np.diff(marks))

    with tempfile.TemporaryDirectory() as folder:

        def cached(*data: Any, **ways: Any) -> None:
            fl.fit(model, *data, cache=folder, engine=settings.engine, **ways)

        return [
            (seconds(cached, x, y), seconds(parts.suffix.fit, inside, y))
            for _ in range(settings.rounds * 3)
        ]


def prefix(settings: argparse.Namespace, backbone: str) -> tuple[list[tuple[float, float]], str]:
    """Seconds of ``predict`` and of the engine for one batch."""
    keras.utils.set_random_seed(0)
    model = backbones.build(backbone, image_size=settings.size, classes=2, weights=None)
    fl.freeze(model, default_boundary(backbone))
    part = fl.split(model).prefix
    x = images(settings.batch, settings.size, 3)
    engine = engines.choose(part, x, engine=settings.engine)
    runs = (
        lambda: part.predict(x, batch_size=settings.batch, verbose=0),
        lambda: engine.run(x),
    )
    for run in runs:
        run()
    seconds = []
    for number in range(settings.rounds * 3):
        pair = [0.0, 0.0]
        for index in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            runs[index]()
            pair[index] = time.perf_counter() - started
        seconds.append((pair[0], pair[1]))
    return seconds, engine.name


def peak(settings: argparse.Namespace, samples: int) -> float:
    """Peak memory, in bytes, of a process that builds a cache of so many samples."""
    words = [sys.executable, __file__, "--cache-samples", str(samples)]
    for name in ("size", "backbone", "batch", "engine"):
        words += [f"--{name}", str(getattr(settings, name))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def build_cache(settings: argparse.Namespace) -> None:
    """What the process for the memory case does."""
    model = build(settings)
    fl.freeze(model, default_boundary(settings.backbone))
    data = Made(settings.cache_samples, settings.size, settings.batch)
    with tempfile.TemporaryDirectory() as folder:
        fl.cache_features(fl.split(model).prefix, data, folder, engine=settings.engine, verbose=0)
    print(own_peak())


def own_peak() -> int:
    """Peak of this program's resident memory, in bytes.

    Not ``ru_maxrss``: Linux hands a process the peak of the one that started it, so two children of
    a large parent show the same figure, the parent's (``fs/exec.c``, ``setmax_mm_hiwater_rss``).
    """
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def figure(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = np.array([one / other for one, other in pairs])
    first, second = np.median(np.array(pairs), axis=0)
    return {
        "ratio": float(np.median(ratios)),
        "range": [float(ratios.min()), float(ratios.max())],
        "rounds": len(pairs),
        "first": float(first),
        "second": float(second),
    }


def measured(case: str, settings: argparse.Namespace) -> Iterator[dict[str, dict[str, Any]]]:
    """The figures of a case, again whenever there is more to say: an interrupted run keeps them."""
    if case == "schedule":
        rounds = []
        for number in range(settings.rounds):
            rounds.append(against_stock(settings, number))
            yield {
                name + suffix: figure([(each[one][place], each[other][place]) for each in rounds])
                for suffix, one, other in (("", "stock", "ours"), (" / limit", "ours", "limit"))
                if one in rounds[0]
                for place, name in ((1, "schedule"), (0, "head"))
            }
    if case == "epoch":
        yield {case: figure(one_epoch(settings))}
    if case == "memory":
        small = max(2 * settings.batch, settings.train // 2)
        yield {case: figure([(peak(settings, 4 * small), peak(settings, small))])}
    if case == "prefix":
        for backbone in dict.fromkeys((settings.backbone, "efficientnet-lite0")):
            pairs, engine = prefix(settings, backbone)
            yield {f"prefix {backbone}": {**figure(pairs), "engine": engine}}


def read_settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--engine", default="auto")
    parser.add_argument(
        "--without-stock", action="store_true", help="schedule: ours and the limit only, for size"
    )
    parser.add_argument("--classes", type=int, default=10)
    for name, full in (
        ("size", 224), ("train", 512), ("validation", 128), ("batch", 32), ("head-epochs", 10),
        ("epochs", 5), ("rounds", 3), ("cache-samples", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=full)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    if "--quick" in sys.argv:
        parser.set_defaults(size=96, train=64, validation=32, head_epochs=5, epochs=2, rounds=1)
    return parser.parse_args()


def main() -> None:
    settings = read_settings()
    if settings.cache_samples:
        build_cache(settings)
        return
    backend = keras.backend.backend()
    cpus = len(os.sched_getaffinity(0))
    print(f"backend {backend}, keras {keras.__version__}, cpus {cpus}, {settings}")
    print(f"{'case':27} {'ratio':>7} {'range':>16} {'first':>12} {'second':>12}")
    figures: dict[str, dict[str, Any]] = {}
    for case in settings.cases:
        tell(f"case {case}")
        done: dict[str, dict[str, Any]] = {}
        for found in measured(case, settings):
            done |= found
            figures |= found
            if settings.json:
                write(settings, figures)
        for name, each in done.items():
            low, high = each["range"]
            print(
                f"{name:27} {each['ratio']:7.2f} [{low:6.2f}, {high:6.2f}] {each['first']:12.4g} "
                f"{each['second']:12.4g} {each.get('engine', '')}",
                flush=True,
            )


def write(settings: argparse.Namespace, figures: dict[str, dict[str, Any]]) -> None:
    """Write what is known so far to the file of ``--json``."""
    content = {
        "backend": keras.backend.backend(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "settings": {key: value for key, value in vars(settings).items() if key != "json"},
        "figures": figures,
    }
    settings.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
