"""The network of the README: 100% right in training mode, at chance at inference (Keras).

It trains for 40 steps with the default momentum of Keras, 0.99: the moving averages keep most of
what they started from, mean 0 and variance 1. Run it as::

    KERAS_BACKEND=torch python examples/symptom_keras.py
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import frostline as fl


def stripes(samples: int) -> tuple[Any, Any]:
    """Noisy images of vertical (class 1) and horizontal (class 0) stripes, of any phase."""
    random = np.random.default_rng(0)
    labels = np.arange(samples) % 2
    images = random.normal(1.9, 0.6, (samples, 16, 16, 3)).astype("float32")
    for image, label, start in zip(images, labels, random.integers(4, size=samples), strict=True):
        lines = image.swapaxes(0, 1) if label else image
        lines[start::4] += 0.6
    return images, labels


def build() -> Any:
    """Two convolutions with BN, and a head."""
    model = keras.Sequential([keras.Input((16, 16, 3))])
    for number in (1, 2):
        initializer = keras.initializers.GlorotUniform(seed=number)
        model.add(
            keras.layers.Conv2D(
                8, 3, padding="same", use_bias=False, kernel_initializer=initializer,
                name=f"conv{number}",
            )
        )  # fmt: skip
        model.add(keras.layers.BatchNormalization(name=f"bn{number}"))
        model.add(keras.layers.ReLU())
    model.add(keras.layers.GlobalAveragePooling2D())
    initializer = keras.initializers.GlorotUniform(seed=3)
    model.add(keras.layers.Dense(2, "softmax", kernel_initializer=initializer))
    adam = keras.optimizers.Adam(0.02)
    model.compile(adam, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


x, y = stripes(256)
model = build()
model.fit(x, y, epochs=5, batch_size=32, shuffle=False, verbose=0)

if __name__ == "__main__":
    print(fl.phases(model, (x, y)))
    print(fl.diagnose(model, (x, y)))
