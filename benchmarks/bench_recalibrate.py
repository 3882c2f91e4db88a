"""Cost of a recalibration in units of one ``predict`` over the same data, and its memory.

Run with ``KERAS_BACKEND=tensorflow|jax|torch python benchmarks/bench_recalibrate.py``. The model is
MobileNetV2 (52 BN layers) with random weights; everything runs in one process and takes turns, so
that a busy machine hits all rows. ``first`` includes what a backend compiles, ``warm`` does not
(for the recalibrations: the difference between two data sets, one twice as long as the other, so
that what is compiled per call cancels).

Prediction, written before the first run: ``batch`` 1.2 warm on every backend (one more pass over
the input of each BN layer, in a network that is bound by memory); ``sequential`` 1.4 warm on torch,
1.5 on TensorFlow and JAX (each BN input goes to the host and back, and nothing is fused across a
BN layer). Compiling 52 small programs instead of one: 2 times as long as for ``predict`` on JAX.
The aims of the project are 1.1 and 1.5.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from frostline.models.keras_graph import sites
from frostline.models.keras_moments import KerasMoments
from frostline.recalibration import recalibrated


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def runners(model: keras.Model, batch: int) -> dict[str, Callable[[Any], Any]]:
    paths = [site.path for site in sites(model)]

    def recalibrate(x: Any, method: Any) -> None:
        recalibrated(KerasMoments(model, paths), paths, x, method=method, batch_size=batch)

    return {
        "predict": lambda x: model.predict(x, batch_size=batch, verbose=0),
        "batch": lambda x: recalibrate(x, "batch"),
        "sequential": lambda x: recalibrate(x, "sequential"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256, help="of the shorter data set")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    settings = parser.parse_args()
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2(
        (settings.size, settings.size, 3), weights=None, classes=10
    )
    rng = np.random.default_rng(0)
    shape = (settings.samples, settings.size, settings.size, 3)
    short = rng.normal(size=shape).astype("float32")
    long = np.concatenate([short, short])
    print(f"backend {keras.backend.backend()}, keras {keras.__version__}, cpus {os.cpu_count()}")
    print(f"{settings}, {len(sites(model))} BN layers")
    runs = runners(model, settings.batch)
    first = {name: timed(lambda run=run: run(short)) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(settings.rounds):
        for name, run in runs.items():
            shorter, longer = timed(lambda run=run: run(short)), timed(lambda run=run: run(long))
            times[name].append(longer - shorter)
    print(f"{'':12} {'first s':>8} {'ratio':>6} {'warm s':>8} {'ratio':>6}")
    warm = {name: float(np.median(values)) for name, values in times.items()}
    for name in runs:
        print(
            f"{name:12} {first[name]:8.2f} {first[name] / first['predict']:6.2f} "
            f"{warm[name]:8.2f} {warm[name] / warm['predict']:6.2f}"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MiB")
    if settings.json:
        figures = {"backend": keras.backend.backend(), "first_s": first, "warm_s": warm}
        settings.json.write_text(json.dumps({**figures, "peak_mib": peak}, indent=1))


if __name__ == "__main__":
    main()
