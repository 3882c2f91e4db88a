"""The Keras guide's transfer learning, augmentation and all, with ``fl.fit(..., views=8)``.

Run with ``KERAS_BACKEND=tensorflow|jax|torch python benchmarks/bench_guide_recipe.py --data DIR``.
The model is that of https://keras.io/guides/transfer_learning: ``RandomFlip``, ``RandomRotation``,
``Rescaling``, a frozen base called with ``training=False``, pooling, dropout, one output. Only the
call differs: ``model.fit(...)`` or ``fl.fit(model, ..., views=8)``.

- ``stock / ours``: seconds of an epoch after those in which views are computed.
- ``ours / limit``: ours / an epoch of what is behind the base, on features in memory.
- ``whole``: stock / ours over all epochs, the views included.
- Accuracy on the validation images after the last epoch, for each seed, of both.

Seconds are those that the process spent on processors, all threads together. Prediction, written
before the first run: an epoch 20 times as fast or more (the base is all the work), whole 1 to 1.5
at 10 epochs with 8 views, accuracies within the spread of the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import frostline as fl
from frostline.data import image_sets
from frostline.experiments import backbones


def build(settings: argparse.Namespace, seed: int) -> Any:
    """The guide's model on an EfficientNet-Lite0, whose weights are read as trained."""
    keras.utils.set_random_seed(seed)
    whole = backbones.build(
        "efficientnet-lite0", image_size=settings.size, classes=2, weights=settings.weights
    )
    base = keras.Model(whole.input, whole.get_layer("head").input, name="base")
    base.trainable = False
    inputs = keras.Input((settings.size, settings.size, 3))
    x = layers.RandomFlip("horizontal")(inputs)
    x = layers.RandomRotation(0.1)(x)
    x = layers.Rescaling(1 / 127.5, offset=-1)(x)
    x = base(x, training=False)
    x = layers.GlobalAveragePooling2D()(x) if len(x.shape) == 4 else x
    x = layers.Dropout(0.2)(x)
    model = keras.Model(inputs, layers.Dense(1, name="top")(x))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=[keras.metrics.BinaryAccuracy()])
    return model


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Processor seconds of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = [time.process_time()]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras'
        """Start the clock."""
        if not epoch:
            self.marks = [time.process_time()]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Note the time."""
        self.marks.append(time.process_time())

    @property
    def typical(self) -> float:
        """The median epoch, without the first one, which compiles."""
        return float(np.median(np.diff(self.marks)[1:]))


def images(settings: argparse.Namespace, split: str, count: int) -> tuple[Any, Any]:
    found = image_sets.load(
        settings.data, split=split, classes=("cat", "dog"), per_class=count,
        image_size=settings.size, seed=0,
    )  # fmt: skip
    return found.images.astype("float32"), found.labels.astype("float32")[:, None]


def trained(settings: argparse.Namespace, seed: int, data: Any, *, ours: bool) -> dict[str, Any]:
    """One training: seconds of an epoch and of all, and the accuracy at the end."""
    (x, y), held = data
    model, clock = build(settings, seed), Clock()
    ways = {"epochs": settings.epochs, "batch_size": settings.batch, "verbose": 0,
            "validation_data": held, "callbacks": [clock]}  # fmt: skip
    began = time.process_time()
    if ours:
        with tempfile.TemporaryDirectory() as folder:
            history = fl.fit(model, x, y, cache=folder, views=8, engine=settings.engine, **ways)
    else:
        history = model.fit(x, y, **ways)
    whole = time.process_time() - began
    accuracy = float(history.history["val_binary_accuracy"][-1])
    return {"epoch": clock.typical, "whole": whole, "accuracy": accuracy}


def limit(settings: argparse.Namespace, data: Any) -> float:
    """Seconds of an epoch of what is behind the base, on features in memory."""
    (x, y), (xv, yv) = data
    model, clock = build(settings, 0), Clock()
    base = model.get_layer("base")
    few = base.predict(x[: settings.batch], verbose=0)
    features = np.resize(few, (len(x), *few.shape[1:]))
    held = np.resize(few, (len(xv), *few.shape[1:]))
    inputs = h = keras.Input(few.shape[1:])
    for layer in model.layers[model.layers.index(base) + 1 :]:
        h = layer(h)
    rest = keras.Model(inputs, h)
    rest.compile(model.optimizer.__class__(1e-3), model.loss, metrics=["binary_accuracy"])
    rest.fit(features, y, validation_data=(held, yv), epochs=settings.epochs, verbose=0,
             batch_size=settings.batch, callbacks=[clock])  # fmt: skip
    return clock.typical


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="../shared/data", help="cats and dogs of CIFAR-10")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--engine", default="auto")
    for name, full in (("size", 128), ("train", 500), ("validation", 250), ("batch", 32),
                       ("epochs", 10), ("seeds", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=full)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    settings = parser.parse_args()
    settings.weights = None if settings.weights == "none" else settings.weights
    data = (images(settings, "train", settings.train),
            images(settings, "test", settings.validation))  # fmt: skip
    runs: dict[str, list[dict[str, Any]]] = {"stock": [], "ours": []}
    for seed in range(settings.seeds):
        for name in ("ours", "stock")[:: 1 - seed % 2 * 2]:
            runs[name].append(trained(settings, seed, data, ours=name == "ours"))
            print(f"seed {seed}, {name}: {json.dumps(runs[name][-1])}", flush=True)
    lowest = limit(settings, data)
    pairs = list(zip(runs["stock"], runs["ours"], strict=True))
    figures = {
        "backend": keras.backend.backend(),
        "load": os.getloadavg()[0],
        "settings": {k: v for k, v in vars(settings).items() if k not in ("json", "data")},
        "stock / ours, epoch": float(np.median([s["epoch"] / o["epoch"] for s, o in pairs])),
        "ours / limit, epoch": float(np.median([o["epoch"] / lowest for _, o in pairs])),
        "stock / ours, whole": float(np.median([s["whole"] / o["whole"] for s, o in pairs])),
        "accuracy": {name: [run["accuracy"] for run in each] for name, each in runs.items()},
    }
    print(json.dumps(figures, indent=1))
    if settings.json:
        settings.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
