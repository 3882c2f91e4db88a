"""Fold every architecture of ``keras.applications``, and print how far the outputs move.

    KERAS_BACKEND=tensorflow python scripts/compare_folds.py --json docs/results/fold.json

Random kernels, gammas of both signs, betas and biases; the statistics are those of a batch of
noise, so that activations stay in range. Everything is frozen and folded. Per network: the largest
difference between the logits before and after as a share of the largest logit, on images of that
batch; where the BN layers went; and (in float32) the same difference for the saved file in a
process that cannot import Frostline. ``one rounding`` is how far the unfolded network moves when
every weight moves by its last bit, up or down at random: what any other way of writing the same
network costs. The file keeps what other calls put there and is rewritten after each network, so an
interrupted run goes on: what is there is left out, unless ``--again``.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 10
#: Sides that are tried, smallest first: the constructors refuse what is too small for them.
SIZES = (32, 71, 75, 96, 224)
LITE0 = "efficientnet-lite0"
OWN = (LITE0, "nested", "shared")

LOADS_ALONE = """
import sys
sys.modules["frostline"] = None  # any import of it fails
import keras, numpy as np
model = keras.saving.load_model("folded.keras")
np.save("received.npy", np.asarray(keras.ops.convert_to_numpy(model(np.load("x.npy")))))
"""


def constructors() -> dict[str, Callable[..., Any]]:
    """Every function of ``keras.applications`` that builds a network, by name."""
    import keras

    return {
        name: made
        for name, made in sorted(vars(keras.applications).items())
        if inspect.isfunction(made) and "weights" in inspect.signature(made).parameters
    }


def application(name: str) -> Any:
    """Build one without weights, with logits, at the smallest size that it takes."""
    made = constructors()[name]
    settings = {"weights": None, "classes": CLASSES, "classifier_activation": None}
    known = inspect.signature(made).parameters
    given = {key: value for key, value in settings.items() if key in known}
    problem: Exception = ValueError(f"no size fits. Received: {name}")
    for size in SIZES:
        try:
            return made(input_shape=(size, size, 3), **given)
        except ValueError as error:  # "Input size must be at least 71x71"
            problem = error
    raise problem


def nested() -> Any:
    """Two networks inside a third, which has BN layers of its own."""
    import keras

    layers = keras.layers
    inner = keras.applications.MobileNetV2(
        input_shape=(32, 32, 3), alpha=0.35, weights=None, include_top=False, pooling="avg"
    )
    other = keras.Sequential(
        [keras.Input((32, 32, 3)), layers.Conv2D(8, 3, name="conv"),
         layers.BatchNormalization(name="bn"), layers.GlobalMaxPooling2D()],
        name="other",
    )  # fmt: skip
    inputs = keras.Input((32, 32, 3))
    x = layers.Concatenate()([inner(inputs), other(inputs)])
    x = layers.BatchNormalization(name="bn")(layers.Dense(16, use_bias=False)(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.ReLU()(x)))


def shared() -> Any:
    """One network that looks at the image and at its mirror image."""
    import keras

    layers = keras.layers
    inner = keras.applications.MobileNetV2(
        input_shape=(32, 32, 3), alpha=0.35, weights=None, include_top=False, pooling="avg"
    )
    project, norm = layers.Dense(16, use_bias=False), layers.BatchNormalization(name="bn")
    inputs = keras.Input((32, 32, 3))
    sides = [norm(project(inner(x))) for x in (inputs, keras.ops.flip(inputs, axis=2))]
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Subtract()(sides)))


def build(name: str) -> Any:
    """Build a network by its name; all but EfficientNet-Lite0 get random numbers."""
    from frostline.experiments import backbones

    if name == LITE0:
        return backbones.build(name, image_size=64, include_top=True)
    own = {"nested": nested, "shared": shared}
    return speaking(own[name]() if name in own else application(name))


def speaking(model: Any) -> Any:
    """Give gammas, betas and biases numbers, and the statistics those of noise; in place."""
    import frostline as fl
    from frostline.adapters.keras.graph import is_site, walk

    rng = np.random.default_rng(0)
    for place in walk(model):
        layer = place.layer
        if is_site(layer) and layer.gamma is not None:
            size = layer.gamma.shape
            layer.gamma.assign(rng.uniform(0.5, 1.5, size) * rng.choice([-1, 1], size))
        if is_site(layer) and layer.beta is not None:
            layer.beta.assign(rng.normal(0, 0.3, layer.beta.shape))
        if getattr(layer, "bias", None) is not None and place.leaf:
            layer.bias.assign(rng.normal(0, 0.1, layer.bias.shape))
    if fl.sites(model):
        fl.recalibrate(model, noise(model, 32), sites="all", method="batch")
    return model


def noise(model: Any, count: int) -> Any:
    """Images of independent pixels, shape ``(count, height, width, 3)``; more begin with fewer.

    From 0 to 255: many of the networks begin with a rescaling of pixels. EfficientNet-Lite0, which
    has its own statistics, wants them from -1 to 1.
    """
    low, high = (-1, 1) if model.name == "efficientnet_lite0" else (0, 255)
    pixels = np.random.default_rng(1).uniform(low, high, (count, *model.input_shape[1:]))
    return pixels.astype(model.inputs[0].dtype)


def compare(name: str) -> dict[str, Any]:
    """Fold one network and compare."""
    import keras

    import frostline as fl
    from frostline.adapters import adapter_of
    from frostline.adapters.keras.graph import is_site, walk
    from frostline.types import FrostlineError

    keras.utils.clear_session()
    gc.collect()
    keras.utils.set_random_seed(1)
    model = build(name)
    kinds = [place for place in walk(model) if place.leaf]
    row: dict[str, Any] = {
        "model": name,
        "backend": keras.backend.backend(),
        "dtype": keras.config.floatx(),
        "image_size": model.input_shape[1],
        "parameters": model.count_params(),
        "sites": sum(is_site(place.layer) for place in kinds),
    }
    fl.freeze(model)
    try:
        folded = adapter_of(model).fold()
    except FrostlineError as problem:
        return {**row, "refused": str(problem)}
    x = noise(model, 4)
    before, after = outputs(model, x), outputs(folded.model, x)
    file = {}
    if keras.config.floatx() == "float32":
        file["file"] = relative(before, from_file(folded.model, x))
    return {
        **row,
        **file,
        "left": sum(is_site(place.layer) for place in walk(folded.model)),
        "absorbed": len(folded.absorbed),
        "replaced": len(folded.replaced),
        "largest": float(np.abs(before).max()),
        "difference": relative(before, after),
        "one rounding": relative(before, outputs(rounded(model), x)),
    }


def rounded(model: Any) -> Any:
    """Move every weight to the number above or below it, in place."""
    rng = np.random.default_rng(3)
    model.set_weights(
        [
            np.nextafter(w, rng.choice([-np.inf, np.inf], w.shape).astype(w.dtype))
            if w.dtype.kind == "f"
            else w
            for w in model.get_weights()
        ]
    )
    return model


def outputs(model: Any, x: Any) -> Any:
    """Logits at inference, float64."""
    import keras

    found = keras.ops.convert_to_numpy(model(x, training=False))
    if not np.isfinite(found).all():
        raise ValueError(f"{model.name} gives values that are not finite")
    return found.astype(np.float64)


def relative(expected: Any, received: Any) -> float:
    """Largest difference as a share of the largest expected value."""
    return float(np.abs(received - expected).max() / np.abs(expected).max())


def from_file(model: Any, x: Any) -> Any:
    """Logits of the saved model in a process of its own, which has Keras alone."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "folded.keras")
        np.save(Path(folder) / "x.npy", x)
        done = subprocess.run(
            [sys.executable, "-c", LOADS_ALONE],
            cwd=folder, check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{model.name}: the file does not load:\n{done.stderr[-2000:]}")
        return np.load(Path(folder) / "received.npy")


def told(row: dict[str, Any]) -> str:
    """One line about a row."""
    head = f"{row['backend']}  {row['model']} at {row['image_size']}, {row['sites']} BN"
    if "refused" in row:
        return f"{head}: refused: {row['refused']}"
    file = f", file {row['file']:.1e}" if "file" in row else ""
    return (
        f"{head}: {row['absorbed']} absorbed, {row['replaced']} replaced, {row['left']} left; "
        f"difference {row['difference']:.1e}, one rounding {row['one rounding']:.1e}{file}, "
        f"largest {row['largest']:.3g}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print one line per network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", help="names; all that are not in the file yet")
    parser.add_argument("--again", action="store_true", help="also those in the file already")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--json", type=Path, help="also put what was found into this file")
    given = parser.parse_args(arguments)
    from frostline import environment

    environment.quiet_frameworks()
    backend = environment.choose_backend()
    import keras

    keras.config.set_floatx(given.dtype)
    rows: list[dict[str, Any]] = []
    if given.json and given.json.exists():
        rows = json.loads(given.json.read_text())["rows"]
    known = {which(row) for row in rows}
    for name in given.models or (*constructors(), *OWN):
        if (name, backend, given.dtype) in known and not given.again:
            continue
        row = compare(name)
        print(told(row), flush=True)
        if given.json:
            if given.json.exists():  # another call may have written in the meantime
                rows = json.loads(given.json.read_text())["rows"]
            rows = sorted([r for r in rows if which(r) != which(row)] + [row], key=which)
            facts = environment.facts()
            del facts["backend"]  # each row has its own
            content = {"environment": facts, "rows": rows}
            given.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def which(row: dict[str, Any]) -> tuple[str, str, str]:
    """What a row measured."""
    return row["model"], row["backend"], row["dtype"]


if __name__ == "__main__":
    sys.exit(main())
