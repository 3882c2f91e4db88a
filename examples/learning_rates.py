"""Fine-tune a backbone at a tenth of the head's learning rate, with a BN momentum to match.

Keras has one learning rate per optimizer; `MultiOptimizer` (Keras 3.15 and later) gives groups of
layers an optimizer each. Statistics that should keep moving, but as slowly as the weights below
them, get a longer average: `fl.suggest_momentum(steps, learning_rate_ratio)`::

    python examples/learning_rates.py --epochs 10
"""

from __future__ import annotations

import argparse
from typing import Any

import keras
import numpy as np

import frostline as fl

L = keras.layers


def build() -> Any:
    """A backbone of two blocks, to be pretrained elsewhere, and a head."""
    backbone = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *(
                layer
                for number in (1, 2)
                for layer in (
                    L.Conv2D(8, 3, use_bias=False, name=f"conv{number}"),
                    fl.layers.BatchNormalization(name=f"bn{number}"),
                    L.ReLU(),
                )
            ),
            L.GlobalAveragePooling2D(),
        ],
        name="backbone",
    )
    return keras.Sequential([keras.Input((8, 8, 1)), backbone, L.Dense(10, name="head")])


def prepare(model: Any, steps: int, rate: float = 1e-2, ratio: float = 0.1) -> fl.Change:
    """Compile with `ratio` times the rate in the backbone; set the momentum of its BN layers.

    Args:
        model: From :func:`build`.
        steps: Training steps that are planned.
        rate: Learning rate of the head.
        ratio: Rate of the backbone divided by it.
    """
    backbone = model.get_layer("backbone")
    slow = keras.optimizers.Adam(rate * ratio)
    rates = keras.optimizers.OptimizerMap(keras.optimizers.Adam(rate))
    for variable in backbone.trainable_variables:
        rates[variable.path] = slow
    model.compile(
        keras.optimizers.MultiOptimizer(rates),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    momentum = fl.suggest_momentum(steps, learning_rate_ratio=ratio)
    return fl.set_momentum(model, momentum, sites="backbone/*")


def main() -> None:
    """Train on scikit-learn's digits and print what was set."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    keras.utils.set_random_seed(0)
    digits = load_digits()
    x, y = (digits.images[..., None] / 16).astype("float32"), digits.target
    model = build()
    print(prepare(model, steps=epochs * int(np.ceil(len(x) / 32))))
    model.fit(x, y, epochs=epochs, verbose=2)


if __name__ == "__main__":
    main()
