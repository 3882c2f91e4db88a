"""Cost of a whole diagnosis in units of one ``model.evaluate`` on the same samples, and its memory.

Run with ``KERAS_BACKEND=tensorflow|jax|torch python benchmarks/bench_diagnose.py``. Networks have
random weights, frozen up to three quarters of their layers, statistics that lag, and labels at
random: there is a BN gap with causes, so every probe, the attribution and the remedies run. Each
case has a process of its own, in which ``evaluate`` comes first and the peak of the resident memory
is read after it and after the diagnosis.

``units`` is the time of a diagnosis divided by that of a warm ``evaluate``, ``units_processor`` the
same in time of the processor, which other programs on the machine change less; ``passes`` what it
would cost if nothing had to be compiled and nothing but passes took time (a derivative counts
three). The difference is what a backend compiles, and the overhead.

Prediction, written before the first run: 20 to 25 passes whatever the number of sites; 40 units on
torch, which compiles nothing, 60 on TensorFlow, over 100 on JAX, where each batch size is compiled,
for ResNet50 and EfficientNet-Lite0 on some hundred small images; units fall with the number of
samples as what is compiled does not grow. Memory 2 times that of ``evaluate``, for the derivative,
which keeps the activations of one batch.

Batches of two turned out to be what the sweep mostly costs on torch: it went from 128 to 64
samples, the derivatives from 6 passes to 4. Then most of the rest was found to be compiled: an
eager pass only to prepare the loss, what the layers do, a pass per batch size for inference, and
batch statistics at λ = 0. Expected, before the run without these: 25 units for EfficientNet-Lite0
on JAX, where it had not ended in ten minutes, and little change on TensorFlow.

Tried and given up: statistics of all sites by passes at λ = 0 until they settle, instead of stage
by stage (with random weights they drift apart instead), and batch statistics in pieces that fit a
cache (the longer trace cost more than its passes saved; on TensorFlow they come in such pieces all
the same since they are made of the sums that population moments are made of). What was measured is
in ``docs/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

CASES = ("10 BN layers", "50 BN layers", "200 BN layers", "efficientnet-lite0", "resnet50")


def network(case: str, size: int) -> Any:
    """An uncompiled network with a softmax over ten classes."""
    import keras

    keras.utils.set_random_seed(0)
    if not case.endswith("BN layers"):
        from frostline.experiments import backbones

        return backbones.build(case, image_size=size, classes=10, weights=None)
    inputs = keras.Input((size, size, 3))
    x = keras.layers.Conv2D(16, 3, strides=2, padding="same")(inputs)
    for number in range(int(case.split()[0])):
        y = keras.layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
        y = keras.layers.BatchNormalization(name=f"bn{number}")(y)
        x = keras.layers.Add()([x, keras.layers.ReLU()(y)])
        # Without it the sum of two hundred branches leaves nothing for the softmax to choose.
        x = keras.layers.Rescaling(0.9)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax", name="head")(x))


def peak() -> float:
    """Peak of the resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(case: str, samples: int, size: int, batch: int) -> dict[str, Any]:
    """One case, in this process."""
    import keras
    import numpy as np

    import frostline as fl

    model = network(case, size)
    layers = model.layers
    for layer in layers[: 3 * len(layers) // 4]:
        layer.trainable = False
    model.compile(
        keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 2.0, size=(samples, size, size, 3)).astype("float32")
    y = rng.integers(0, 10, size=samples)

    def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
        """Seconds on the clock, seconds of the processor, and what came back."""
        clock, processor = time.perf_counter(), time.process_time()
        found = run()
        return time.perf_counter() - clock, time.process_time() - processor, found

    def evaluate() -> tuple[float, float]:
        return timed(lambda: model.evaluate(x, y, batch_size=batch, verbose=0))[:2]

    first, _ = evaluate()
    rounds = [evaluate() for _ in range(3)]
    warm, warm_processor = (float(np.median(each)) for each in zip(*rounds, strict=True))
    before = peak()
    seconds, processor, report = timed(
        lambda: fl.diagnose(model, (x, y), batch_size=batch, max_samples=samples, verbose=0)
    )
    cost = report.measurement.cost
    by_kind = {
        name.removesuffix(" (passes)"): value
        for name, value in cost.items()
        if name.endswith(" (passes)")
    }
    passes = sum(by_kind.values())
    return {
        "sites": len(report.sites),
        "evaluate_first_s": first,
        "evaluate_s": warm,
        "diagnose_s": seconds,
        "units": seconds / warm,
        "units_processor": processor / warm_processor,
        "passes": passes,
        "passes_by_kind": by_kind,
        "peak_evaluate_mib": before,
        "peak_diagnose_mib": peak(),
        "memory": peak() / before,
        "causes": [cause.code for cause in report.causes],
        "seconds": {name: s for name, s in cost.items() if not name.endswith("(passes)")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.one:
        (case,) = settings.cases
        print(json.dumps(measured(case, settings.samples, settings.size, settings.batch)))
        return
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    how = {name: getattr(settings, name) for name in ("samples", "size", "batch")}
    print(f"backend {backend}, cpus {len(os.sched_getaffinity(0))}, {how}")
    print(f"{'case':20} {'sites':>5} {'evaluate':>9} {'units':>7} {'of cpu':>7} {'passes':>7} "
          f"{'memory':>7}  causes")  # fmt: skip
    figures = {}
    for case in settings.cases:
        command = [sys.executable, __file__, "--one", "--cases", case]
        command += [word for name, value in how.items() for word in (f"--{name}", str(value))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        one = figures[case] = json.loads(done.stdout.splitlines()[-1])
        print(f"{case:20} {one['sites']:5} {one['evaluate_s']:7.2f} s {one['units']:7.1f} "
              f"{one['units_processor']:7.1f} {one['passes']:7.1f} {one['memory']:7.2f}  "
              f"{', '.join(one['causes'])}", flush=True)  # fmt: skip
        if settings.json:
            content = {
                "backend": backend,
                "cpus": len(os.sched_getaffinity(0)),
                "xla_flags": os.environ.get("XLA_FLAGS", ""),
                **how,
                "figures": figures,
            }
            settings.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
