"""A network for handwritten digits to fine-tune (Keras): trained on 0 to 4, then given 5 to 9.

It makes ``model``, which was trained on the digits 0 to 4, and the task ``x`` and ``y``: digits 5
to 9, brighter than what the network knows.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

L = keras.layers


def digits(first: int, samples: int, brightness: float = 1.0) -> tuple[Any, Any]:
    """Return images of five digits from ``first`` on, shape ``(n, 8, 8, 1)``, and labels 0 to 4."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero((labels >= first) & (labels < first + 5))[:samples]
    x = images[chosen].astype("float32") / 16 * brightness
    return x.reshape(-1, 8, 8, 1), labels[chosen] - first


def build() -> Any:
    """Two blocks, and a head for five classes."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for number, channels in ((1, 12), (2, 24)):
        model.add(L.Conv2D(channels, 3, padding="same", use_bias=False, name=f"conv{number}"))
        model.add(L.BatchNormalization(momentum=0.9, name=f"bn{number}"))
        model.add(L.ReLU())
    model.add(L.AveragePooling2D(4))
    model.add(L.Flatten())
    model.add(L.Dense(5, "softmax", name="head"))
    return model


def compiled(model: Any) -> Any:
    """Compile anew: with a new optimizer, and with the flags of now."""
    adam = keras.optimizers.Adam(5e-3)
    model.compile(adam, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


model = compiled(build())
model.fit(*digits(0, 600), epochs=6, batch_size=32, shuffle=False, verbose=0)
kernel, bias = model.get_layer("head").weights
kernel.assign(np.zeros(kernel.shape))  # a new head for the new task
x, y = digits(5, 300, brightness=1.6)
