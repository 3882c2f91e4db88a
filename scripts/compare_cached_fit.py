"""Train a backbone with ``model.fit`` and with ``fl.fit``, same seed, and print the differences.

    KERAS_BACKEND=tensorflow python scripts/compare_cached_fit.py --json cached-fit.json

Random weights, the backbone's usual boundary (ResNet50: 140 layers, as in the essay), shuffling,
validation, SGD and Adam at the essay's step size, three epochs.

"Same" means that weights differ by at most 1e-5 and the history by at most 1e-4. With ``--dtype
float64`` that is all: what differs there is the method. In float32 BN on small batches amplifies
rounding: ``model.fit`` itself gives other weights when its inputs are one rounding (``nextafter``,
up or down) away. So that is measured beside, and allowed twice. Exit code 1 when something is not
the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

#: Step size of fine-tuning in the essay, §2.5.
RATE = 1e-4
#: Differences that are nothing, of weights and of the history.
LIMITS = {"weights": 1e-5, "history": 1e-4}


def compiled(backbone: str, size: int, optimizer: str) -> Any:
    """Return a backbone with a head, frozen up to its boundary and compiled."""
    import keras

    import frostline as fl
    from frostline.experiments import backbones
    from frostline.experiments.overfit import default_boundary

    keras.utils.set_random_seed(1)
    model = backbones.build(backbone, image_size=size, classes=2, weights=None, dropout=0.2)
    # Fresh statistics (0 and 1) let activations of a random network grow from layer to layer.
    images = np.random.default_rng(2).normal(size=(32, size, size, 3)).astype(keras.config.floatx())
    fl.recalibrate(model, images)
    fl.freeze(model, until=default_boundary(backbone))
    chosen = {
        "sgd": keras.optimizers.SGD(RATE, momentum=0.9),
        "adam": keras.optimizers.Adam(RATE),
    }[optimizer]
    model.compile(chosen, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def compare(backbone: str, size: int, samples: int, optimizer: str, engine: str) -> dict[str, Any]:
    """Train twice; return the largest differences."""
    import keras

    import frostline as fl

    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, size, size, 3)).astype(keras.config.floatx())
    y = rng.integers(0, 2, samples)
    held = max(2, samples // 3)
    options: dict[str, Any] = {"epochs": 3, "batch_size": 8, "verbose": 0,
               "validation_data": (x[:held] + 1, y[:held])}  # fmt: skip
    start: list[Any] = []

    def trained(way: str | None, inputs: Any) -> tuple[list[Any], dict[str, list[float]]]:
        model = compiled(backbone, size, optimizer)
        start[:] = [np.array(w) for w in model.get_weights()]
        keras.utils.set_random_seed(3)
        if way is None:
            history = model.fit(inputs, y, **options)
        else:
            history = fl.fit(model, inputs, y, engine=way, **options)
        return [np.array(w) for w in model.get_weights()], history.history

    plain = trained(None, x)
    ours = difference(plain, trained(engine, x))
    rounded = [0.0, 0.0]
    if x.dtype == np.float32:
        up, down = (np.nextafter(x, np.float32(end)) for end in (np.inf, -np.inf))
        rounded = np.max([difference(plain, trained(None, near)) for near in (up, down)], axis=0)
    return {
        "dtype": x.dtype.name,
        "backend": keras.backend.backend(),
        "backbone": backbone,
        "image_size": size,
        "samples": samples,
        "batch_size": options["batch_size"],
        "optimizer": optimizer,
        "engine": engine,
        "weights": ours[0],
        "history": ours[1],
        "weights_one_rounding": float(rounded[0]),
        "history_one_rounding": float(rounded[1]),
        "moved": max(float(np.abs(a - b).max()) for a, b in zip(plain[0], start, strict=True)),
    }


def difference(one: Any, other: Any) -> tuple[float, float]:
    """Largest differences of weights and of the history."""
    (weights, history), (others, another) = one, other
    return (
        max(float(np.abs(a - b).max()) for a, b in zip(weights, others, strict=True)),
        max(
            abs(a - b)
            for name in history
            for a, b in zip(history[name], another[name], strict=True)
        ),
    )


def which(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row compared."""
    names = ("dtype", "backend", "backbone", "optimizer", "engine", "image_size")
    return tuple(row[name] for name in names)


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print one line of JSON per comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", nargs="+", default=["efficientnet-lite0", "resnet50"])
    parser.add_argument("--optimizer", nargs="+", default=["sgd", "adam"])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--engine", nargs="+", default=["native"])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--json", type=Path, help="also put what was found into this file")
    given = parser.parse_args(arguments)
    os.environ["JAX_ENABLE_X64"] = str(int(given.dtype == "float64"))
    import keras

    keras.config.set_floatx(given.dtype)
    rows: list[dict[str, Any]] = []
    kept = json.loads(given.json.read_text()) if given.json and given.json.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FROSTLINE_CACHE_DIR"] = str(Path(folder))
        for backbone, optimizer, engine in itertools.product(
            given.backbone, given.optimizer, given.engine
        ):
            found = compare(backbone, given.image_size, given.samples, optimizer, engine)
            same = all(
                found[name] <= max(limit, 2 * found[f"{name}_one_rounding"])
                for name, limit in LIMITS.items()
            )
            rows.append({**found, "same": same})
            print(json.dumps(rows[-1]), flush=True)
            if given.json:
                kept = [row for row in kept if which(row) != which(found)] + [rows[-1]]
                given.json.write_text(json.dumps(sorted(kept, key=which), indent=1) + "\n")
    return int(not all(row["same"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
