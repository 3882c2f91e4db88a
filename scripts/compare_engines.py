"""Run the frozen prefix of many networks on every engine, and print what each one is worth.

    KERAS_BACKEND=jax python scripts/compare_engines.py --json docs/results/engines-jax.json

Random weights, the network cut at its usual boundary. Per engine: the largest difference from
``model.predict`` as a share of the largest output, and how many times as many images per second
it computes, the median of interleaved rounds; or why it falls back. The file keeps what other
calls put there and is rewritten after each network, so an interrupted run can go on with
``--models``.

With ``--lower`` every engine that has it runs in bfloat16 as well, in the same rounds: how many
times as many images per second as in float32. Prediction for that, written before the first run,
two cores with AMX at 224²: 2 to 3 for ResNet50 on OpenVINO and on torch, whose convolutions are
large; 1 to 1.5 for EfficientNet-Lite0, whose convolutions by channel move more numbers than they
multiply; errors from 5e-3 to 5e-2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MODELS = (
    "resnet50", "efficientnet-lite0", "mobilenetv2", "mobilenetv3small", "mobilenetv3large",
    "densenet121", "inceptionv3", "xception", "efficientnetv2b0", "convnexttiny", "vgg16",
)  # fmt: skip


def prefix_of(name: str, size: int) -> Any:
    """Return the frozen part of a network with random weights, up to its usual boundary."""
    import keras

    import frostline as fl
    from frostline.experiments import backbones
    from frostline.experiments.overfit import default_boundary

    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    model = backbones.build(name, image_size=size, classes=2, weights=None)
    fl.freeze(model, until=default_boundary(name))
    return fl.split(model).prefix


def compare(name: str, size: int, batch: int, rounds: int, *, lower: bool) -> dict[str, Any]:
    """Run one network on every engine, beside ``predict``."""
    from frostline import engines
    from frostline.numerics.compare import relative_difference
    from frostline.types import FrostlineError

    prefix = prefix_of(name, size)
    x = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype("float32")

    def predict() -> list[Any]:
        outputs = prefix.predict(x, batch_size=batch, verbose=0)
        return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]

    expected = predict()
    runs: dict[str, Callable[[], Any]] = {"predict": predict}
    found: dict[str, dict[str, Any]] = {}
    ways = {(engine, "float32"): engine for engine in engines.NAMES}
    if lower:
        ways |= {(engine, "bfloat16"): f"{engine} in bfloat16" for engine in engines.NAMES}
    for (engine, precision), title in ways.items():
        try:
            chosen = engines.choose(prefix, x, engine=engine, precision=precision)
        except FrostlineError as problem:
            reason = str(problem).removeprefix(f"engine {engine} cannot run this prefix: ")
            found[title] = {"reason": reason}
            continue
        found[title] = {"error": relative_difference(chosen.run(x), expected)}
        runs[title] = lambda chosen=chosen: chosen.run(x)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {each: [] for each in runs}
    for _ in range(rounds):
        for each, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[each].append(time.perf_counter() - started)
    for each in seconds:
        if each in found:
            pairs = zip(seconds["predict"], seconds[each], strict=True)
            found[each]["ratio"] = statistics.median(one / other for one, other in pairs)
        plain = each.removesuffix(" in bfloat16")
        if plain != each and plain in seconds:
            pairs = zip(seconds[plain], seconds[each], strict=True)
            found[each]["over_float32"] = sorted(one / other for one, other in pairs)
    return {"model": name, "image_size": size, "batch_size": batch, "rounds": rounds,
            "predict_per_second": batch / statistics.median(seconds["predict"]),
            "engines": found}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print one line per network and engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lower", action="store_true", help="in bfloat16 as well")
    parser.add_argument("--json", type=Path, help="also put what was found into this file")
    given = parser.parse_args(arguments)
    from frostline import environment

    environment.quiet_frameworks()
    backend = environment.choose_backend()
    rows: list[dict[str, Any]] = []
    if given.json and given.json.exists():
        rows = json.loads(given.json.read_text())["rows"]
    for name in given.models:
        row = compare(name, given.image_size, given.batch_size, given.rounds, lower=given.lower)
        for engine, found in row["engines"].items():
            shown = found.get("reason") or f"{found['ratio']:.2f}x  error {found['error']:.1e}"
            print(f"{backend}  {name} at {given.image_size}  {engine}: {shown}", flush=True)
        rows = [each for each in rows if which(each) != which(row)] + [row]
        if given.json:
            rows.sort(key=which)
            facts = {**environment.facts(), "threads": os.environ.get("OMP_NUM_THREADS")}
            content = {"backend": backend, "environment": facts, "rows": rows}
            given.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def which(row: dict[str, Any]) -> tuple[str, int, int]:
    """What a row measured."""
    return row["model"], row["image_size"], row["batch_size"]


if __name__ == "__main__":
    sys.exit(main())
