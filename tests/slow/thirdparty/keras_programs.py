"""Programs in Keras, on whatever backend runs: applications, keras-hub, own training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .program import Program, entry

CLASSES = 4


def data(side: int = 64) -> tuple[Any, Any]:
    """Images whose statistics differ from one sample to the next, and class numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, side, side, 3)).astype("float32")
    return x * (0.5 + np.arange(16).reshape(-1, 1, 1, 1) / 16).astype("float32"), np.arange(
        16
    ) % CLASSES


def trained(model: Any, x: Any, y: Any) -> Program:
    """One epoch, so that statistics and optimizer are in use."""
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    return Program(model=model, batches=[(x, y)])


def _application(name: str, side: int = 64, **options: Any) -> None:
    @entry(f"keras.applications {name}", "keras", "classification", framework="keras")
    def build() -> Program:
        import keras

        keras.utils.set_random_seed(0)
        make: Callable[..., Any] = getattr(keras.applications, name)
        model = make(weights=None, classes=CLASSES, input_shape=(side, side, 3), **options)
        model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
        return trained(model, *data(side))


for _name in ("MobileNetV2", "ResNet50", "EfficientNetB0", "DenseNet121"):
    _application(_name)
_application("Xception", side=71)  # it takes no smaller images


@entry("Keras guide: base(x, training=False)", "keras", "transfer", framework="keras")
def _guide() -> Program:
    import keras

    keras.utils.set_random_seed(0)
    base = keras.applications.MobileNetV2(
        weights=None, include_top=False, input_shape=(64, 64, 3), alpha=0.35
    )
    base.trainable = False
    inputs = keras.Input((64, 64, 3))
    x = keras.layers.RandomFlip("horizontal")(inputs)
    x = keras.layers.Rescaling(1 / 2.0)(x)
    x = base(x, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, activation="softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return trained(model, *data())


@entry("keras-hub ResNet classifier", "keras-hub", "classification", framework="keras")
def _hub() -> Program:
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64], input_conv_kernel_sizes=[7], stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2], block_type="basic_block",
        image_shape=(64, 64, 3),
    )  # fmt: skip
    model = keras_hub.models.ImageClassifier(
        backbone=backbone, num_classes=CLASSES, activation="softmax"
    )
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return trained(model, *data())


@entry("Keras TimeDistributed backbone", "keras", "video", framework="keras")
def _frames() -> Program:
    import keras

    keras.utils.set_random_seed(0)
    frame = keras.Sequential(
        [
            keras.Input((16, 16, 3)), keras.layers.Conv2D(8, 3), keras.layers.BatchNormalization(),
            keras.layers.ReLU(), keras.layers.GlobalAveragePooling2D(),
        ]
    )  # fmt: skip
    inputs = keras.Input((3, 16, 16, 3))
    x = keras.layers.TimeDistributed(frame)(inputs)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, activation="softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = data(16)
    return trained(model, np.stack([x, 2 * x, x + 1], axis=1), y)
