"""Cost of a recalibration in units of one ``predict`` over the same data, and its memory.

Run with ``KERAS_BACKEND=tensorflow|jax|torch python benchmarks/bench_recalibrate.py``. The model is
MobileNetV2 (52 BN layers) with random weights; everything runs in one process and takes turns, so
that a busy machine hits all rows. ``first`` includes what a backend compiles, ``warm`` does not
(for the recalibrations: the difference between two data sets, one twice as long as the other, so
that what is compiled per call cancels). On a machine that others use as well, read the processor
time; on a GPU, the wall time.

Prediction, written before the first run: ``batch`` 1.2 warm on every backend (one more pass over
the input of each BN layer, in a network that is bound by memory); ``sequential`` 1.4 warm on torch,
1.5 on TensorFlow and JAX (each BN input goes to the host and back, and nothing is fused across a
BN layer). Compiling 52 small programs instead of one: 2 times as long as for ``predict`` on JAX.
The aims of the project are 1.1 and 1.5.

Since then the copies between TensorFlow and numpy from stage to stage have gone (prediction for
``sequential`` there: 1.6), and torch squares in place instead of into a second tensor (prediction:
``batch`` 1.25, ``sequential`` 1.9). Then sums and outputs on torch came to share a tensor, in
pieces for the second cache instead of the third: by the microseconds of single layers the moments
cost 0.4 of what they did, so ``batch`` 1.1. What was measured:
``docs/results/bench-recalibrate-*.json``.

Memory: before anything else the process recalibrates a stream that makes its batches one by one, 4
of them and then 16, with 32 MiB for activations; ``growth`` is by how much the peak of the process
rose from the one to the other. Prediction: below the size of two batches of the largest activation
(2 x 48 MiB), where holding the 12 further ones would take 576 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from frostline.adapters.keras.graph import sites
from frostline.adapters.keras.moments import MomentRecorder
from frostline.measure.recalibration import recalibrated


def timed(run: Callable[[], Any]) -> np.ndarray:
    """Wall and processor seconds."""
    start = time.perf_counter(), time.process_time()
    run()
    return np.array([time.perf_counter() - start[0], time.process_time() - start[1]])


def runners(model: keras.Model, batch: int) -> dict[str, Callable[[Any], Any]]:
    paths = [site.path for site in sites(model)]

    def recalibrate(x: Any, method: Any) -> None:
        recalibrated(MomentRecorder(model, paths), paths, x, method=method, batch_size=batch)

    return {
        "predict": lambda x: model.predict(x, batch_size=batch, verbose=0),
        "batch": lambda x: recalibrate(x, "batch"),
        "sequential": lambda x: recalibrate(x, "sequential"),
    }


def peak_mib() -> float:
    """Largest memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def growth_mib(model: keras.Model, batch: int, method: Any) -> float:
    """By how much the peak rises when a stream is four times as long."""
    paths = [site.path for site in sites(model)]

    def stream(batches: int) -> Iterator[Any]:
        rng = np.random.default_rng(0)
        for _ in range(batches):
            yield rng.normal(size=(batch, *model.input_shape[1:])).astype("float32")

    peaks = []
    for batches in (4, 16):
        meter = MomentRecorder(model, paths)
        recalibrated(meter, paths, stream(batches), method=method, memory_limit=32 << 20)
        peaks.append(peak_mib())
    return peaks[1] - peaks[0]


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
    growth = {name: growth_mib(model, settings.batch, name) for name in ("batch", "sequential")}
    rng = np.random.default_rng(0)
    shape = (settings.samples, settings.size, settings.size, 3)
    short = rng.normal(size=shape).astype("float32")
    long = np.concatenate([short, short])
    cpus = len(os.sched_getaffinity(0))
    print(f"backend {keras.backend.backend()}, keras {keras.__version__}, cpus {cpus}")
    print(f"{settings}, {len(sites(model))} BN layers")
    runs = runners(model, settings.batch)
    first = {name: timed(lambda run=run: run(short)) for name, run in runs.items()}
    times: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    for _ in range(settings.rounds):
        for name, run in runs.items():
            shorter, longer = timed(lambda run=run: run(short)), timed(lambda run=run: run(long))
            times[name].append(longer - shorter)
    warm = {name: np.median(values, axis=0) for name, values in times.items()}
    print(
        f"{'':12} {'first: wall s':>14} {'ratio':>6}   {'warm: wall s':>12} {'ratio':>6}   ", end=""
    )
    print(f"{'processor s':>11} {'ratio':>6}")
    for name in runs:
        ratio, early = warm[name] / warm["predict"], first[name][0] / first["predict"][0]
        print(
            f"{name:12} {first[name][0]:14.2f} {early:6.2f}   {warm[name][0]:12.2f} "
            f"{ratio[0]:6.2f}   {warm[name][1]:11.2f} {ratio[1]:6.2f}"
        )
    told = ", ".join(f"{name} {value:.0f} MiB" for name, value in growth.items())
    print(f"peak memory {peak_mib():.0f} MiB; 16 batches instead of 4 raise the peak by {told}")
    if settings.json:
        figures = {
            name: {
                "first_s": first[name].tolist(),
                "warm_s": warm[name].tolist(),
                "warm_ratio": (warm[name] / warm["predict"]).tolist(),
                "growth_mib": growth.get(name),
            }
            for name in runs
        }
        head = {
            "backend": keras.backend.backend(),
            "keras": keras.__version__,
            "cpus": cpus,
            "columns": ["wall", "processor"],
            "settings": {**vars(settings), "json": None},
        }
        result = {**head, "figures": figures, "peak_mib": peak_mib()}
        settings.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
