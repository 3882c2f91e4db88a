"""A ResNet-style block with our layer against the stock layer: training step and inference.

Run with ``KERAS_BACKEND=tensorflow|jax|torch python benchmarks/bench_layer.py``. Both models live
in one process and take turns, so that a busy machine hits both; the figure is the median of the
per-round time ratios ours / stock, with the quartiles beside it.

Prediction, written before the first run: training 1.02 (one select per parameter and a branch
around the moments), frozen BN 1.00 on torch and about 1.05 on TensorFlow and JAX (the step stays
able to thaw, so it computes the gradients of gamma and beta and throws them away), a wholly frozen
block on TensorFlow and JAX far above 1 for the same reason (the backward pass must reach gamma and
beta through the frozen convolutions), inference 1.00.

Since then a select has taken the branch's place, except on TensorFlow where the layer is frozen
when the step is traced (prediction there: 1.15), and ``live=False`` is for those who will not thaw
(prediction: 1.00 everywhere). What was measured: ``docs/results/bench-layer-*.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from frostline.layers import BatchNormalization

CASES = (
    "training",
    "bn frozen",
    "bn frozen, not live",
    "block frozen",
    "block frozen, not live",
    "inference",
)


def block(layer: type, channels: int, size: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size, size, channels))
    x = inputs
    for number in range(2):
        skip = x
        for half in "ab":
            name = f"{number}{half}"
            x = keras.layers.Conv2D(
                channels, 3, padding="same", use_bias=False, name=f"conv{name}"
            )(x)
            x = layer(name=f"bn{name}")(x)
            if half == "b":
                x = keras.layers.Add()([x, skip])
            x = keras.layers.ReLU()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="head")(x))


def prepare(case: str, layer: type, channels: int, size: int) -> keras.Model:
    model = block(layer, channels, size)
    for each in model.layers:
        if (case.startswith("bn frozen") and each.name.startswith("bn")) or (
            case.startswith("block frozen") and each.name != "head"
        ):
            each.trainable = False
        if case.endswith("not live") and isinstance(each, BatchNormalization):
            each.live = False
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), "mse")
    return model


def step(model: keras.Model, case: str, x: Any, y: Any) -> Callable[[], Any]:
    if case == "inference":
        return lambda: model.predict_on_batch(x)
    return lambda: float(np.asarray(model.train_on_batch(x, y)).ravel()[0])


def ratios(case: str, settings: argparse.Namespace) -> tuple[np.ndarray, float, float]:
    rng = np.random.default_rng(0)
    shape = (settings.batch, settings.size, settings.size, settings.channels)
    x, y = rng.normal(size=shape).astype("float32"), np.zeros((settings.batch, 10), "float32")
    classes = (BatchNormalization, keras.layers.BatchNormalization)
    steps = [
        step(prepare(case, each, settings.channels, settings.size), case, x, y) for each in classes
    ]
    for run in steps * 3:
        run()
    times = np.empty((settings.rounds, 2))
    for number in range(settings.rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            steps[index]()
            times[number, index] = time.perf_counter() - start
    ours, stock = np.median(times, axis=0)
    return times[:, 0] / times[:, 1], ours, stock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    settings = parser.parse_args()
    backend = keras.backend.backend()
    cpus = len(os.sched_getaffinity(0))
    print(f"backend {backend}, keras {keras.__version__}, cpus {cpus}, {settings}")
    print(f"{'case':14} {'ours/stock':>10} {'quartiles':>15} {'ours ms':>9} {'stock ms':>9}")
    figures = {}
    for case in settings.cases:
        ratio, ours, stock = ratios(case, settings)
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        figures[case] = {
            "ratio": middle,
            "quartiles": [low, high],
            "ours_s": ours,
            "stock_s": stock,
        }
        print(
            f"{case:14} {middle:10.3f}   [{low:.3f}, {high:.3f}] {ours * 1e3:9.2f} "
            f"{stock * 1e3:9.2f}",
            flush=True,
        )
    if settings.json:
        settings.json.write_text(json.dumps({"backend": backend, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
