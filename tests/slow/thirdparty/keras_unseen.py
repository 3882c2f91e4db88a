"""Keras programs that were written last, as people write them; see ``unseen.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .program import Program, entry

CLASSES = 4


def images(count: int = 48, side: int = 12) -> tuple[Any, Any]:
    """Far from zero mean and unit variance, with something to learn."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % CLASSES
    x = rng.normal(size=(count, side, side, 3)).astype("float32") * 0.7 + 2
    x[..., 0] += 1.5 * y[:, None, None]
    return x, y


def trained(
    make: Callable[[], Any],
    compiled: Callable[[Any], None],
    data: Any,
    *,
    epochs: int = 12,
    **more: Any,
) -> Program:
    import keras

    keras.utils.set_random_seed(0)
    model = make()
    compiled(model)
    args, kwargs = ((data,), {}) if not isinstance(data, tuple) else (data, {"batch_size": 16})
    if len(args) == 3:
        args, kwargs = args[:2], {**kwargs, "sample_weight": args[2]}
    model.fit(*args, epochs=epochs, verbose=0, **kwargs)
    return Program(model=model, batches=[data], recompile=compiled, **more)


def block(x: Any, filters: int, *, momentum: float = 0.99) -> Any:
    from keras import layers

    x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
    return layers.ReLU()(layers.BatchNormalization(momentum=momentum)(x))


def body(*, momentum: float = 0.99, side: int = 12) -> Any:
    import keras
    from keras import layers

    inputs = keras.Input((side, side, 3))
    x = block(block(inputs, 8, momentum=momentum), 8, momentum=momentum)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def sparse(model: Any) -> None:
    import keras

    model.compile(
        keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )


def classifier(**options: Any) -> Any:
    import keras
    from keras import layers

    base = body(**options)
    return keras.Model(base.input, layers.Dense(CLASSES, activation="softmax")(base.output))


@entry("Keras: two inputs, two outputs, both mappings", "keras", "unseen", framework="keras")
def _mappings() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        image, table = keras.Input((12, 12, 3), name="image"), keras.Input((4,), name="table")
        left = layers.GlobalAveragePooling2D()(block(image, 8))
        right = layers.ReLU()(layers.BatchNormalization()(layers.Dense(8)(table)))
        x = layers.Concatenate()([left, right])
        return keras.Model(
            {"image": image, "table": table},
            {"sort": layers.Dense(CLASSES, name="sort")(x), "age": layers.Dense(1, name="age")(x)},
        )

    def compiled(model: Any) -> None:
        model.compile(
            keras.optimizers.Adam(1e-2),
            {"sort": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "age": "mse"},
            loss_weights={"sort": 1.0, "age": 0.1},
            metrics={"sort": "accuracy"},
        )

    x, y = images()
    table = np.random.default_rng(1).normal(size=(48, 4)).astype("float32") * 3 + 2
    data = ({"image": x, "table": table}, {"sort": y, "age": table[:, :1]})
    return trained(make, compiled, data, lags=True)


@entry("Keras: subclass with compute_loss", "keras", "unseen", framework="keras")
def _own_step() -> Program:
    import keras
    from keras import layers, ops

    class Rotating(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body(), layers.Dense(CLASSES)
            self.consistency = keras.metrics.Mean(name="consistency")

        def call(self, x: Any, training: bool | None = None) -> Any:
            return self.head(self.body(x, training=training))

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
            training: bool = True,
        ) -> Any:  # fmt: skip
            hard = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
            soft = ops.mean(ops.square(y_pred))
            self.consistency.update_state(soft)
            return ops.mean(hard) + 0.01 * soft

    def compiled(model: Any) -> None:
        model.compile(keras.optimizers.Adam(1e-2))

    return trained(Rotating, compiled, images(), lags=True)


@entry("Keras: a loss added by add_loss, one encoder called twice", "keras", "unseen",
       framework="keras")  # fmt: skip
def _shared() -> Program:
    import keras
    from keras import layers, ops

    class Distance(layers.Layer):  # type: ignore[misc]
        def call(self, pair: Any) -> Any:
            one, two = pair
            self.add_loss(1e-2 * ops.mean(ops.square(one)))
            return ops.sum(ops.square(one - two), axis=-1, keepdims=True)

    def make() -> Any:
        one, two = keras.Input((12, 12, 3)), keras.Input((12, 12, 3))
        encoder = body()
        x = Distance()([encoder(one), encoder(two)])
        return keras.Model([one, two], layers.Dense(1, activation="sigmoid")(x))

    def compiled(model: Any) -> None:
        model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy")

    x, y = images()
    other = np.random.default_rng(2).permutation(48)
    data = ((x, x[other]), (y == y[other]).astype("float32")[:, None])
    return trained(make, compiled, data)


def pydataset() -> Any:
    import keras

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.x, self.y = images()
            self.weight = np.linspace(0.5, 1.5, 48).astype("float32")
            self.order = np.arange(48)

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            chosen = self.order[index * 14 : (index + 1) * 14]
            return self.x[chosen], self.y[chosen], self.weight[chosen]

        def on_epoch_end(self) -> None:
            self.order = np.random.default_rng(0).permutation(48)

    return Batches()


@entry("Keras: PyDataset with weights, a short last batch", "keras", "unseen", framework="keras")
def _pydataset() -> Program:
    return trained(classifier, sparse, pydataset(), lags=True, sample=images()[0][:8])


@entry("healthy Keras: tf.data with sample weights", "keras", "unseen", framework="keras")
def _tf_data() -> Program:
    import tensorflow as tf

    x, y = images(192)
    weight = np.where(y == 0, 2.0, 0.7).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(96).prefetch(1)
    program = trained(lambda: classifier(momentum=0.9), sparse, data, sample=x[:8], healthy=True)
    program.model.optimizer.learning_rate = 1e-6
    program.model.fit(data, epochs=40, verbose=0)

    return program


@entry("Keras: optimizer with use_ema and accumulated gradients", "keras", "unseen",
       framework="keras")  # fmt: skip
def _averaged() -> Program:
    import keras

    def compiled(model: Any) -> None:
        optimizer = keras.optimizers.Adam(1e-2, use_ema=True, gradient_accumulation_steps=2)
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])

    return trained(classifier, compiled, images(), lags=True)


@entry("healthy Keras: mixed precision", "keras", "unseen", framework="keras")
def _precision() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
        inputs, x = keras.Input((12, 12, 3)), None
        for filters in (8, 8):
            x = layers.Conv2D(filters, 3, dtype=policy)(inputs if x is None else x)
            x = layers.BatchNormalization(momentum=0.9, dtype=policy)(x)
            x = layers.Activation("relu", dtype=policy)(x)
        x = layers.GlobalAveragePooling2D(dtype=policy)(x)
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax", dtype="float32")(x))

    x, y = images(96)
    program = trained(make, sparse, (x, y), healthy=True)
    program.model.optimizer.learning_rate = 1e-6
    program.model.fit(x, y, batch_size=96, epochs=60, verbose=0)
    return program


@entry("Keras: SpectralNormalization around convolutions", "keras", "unseen", framework="keras")
def _spectral() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = layers.SpectralNormalization(layers.Conv2D(8, 3))(inputs)
        x = layers.LeakyReLU()(layers.BatchNormalization()(x))
        x = layers.SpectralNormalization(layers.Conv2D(8, 3))(x)
        x = layers.LeakyReLU()(layers.BatchNormalization()(x))
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    return trained(make, sparse, images(), lags=True)


@entry("Keras: own residual layer, BN inside, training passed on", "keras", "unseen",
       framework="keras")  # fmt: skip
def _residual() -> Program:
    import keras
    from keras import layers

    class Residual(layers.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.conv = layers.Conv2D(shape[-1], 3, padding="same")
            self.norm, self.drop = layers.BatchNormalization(), layers.Dropout(0.1)
            self.conv.build(shape)
            self.norm.build(shape)
            super().build(shape)

        def call(self, x: Any, training: bool | None = None) -> Any:
            y = self.norm(self.conv(x), training=training)
            return x + self.drop(keras.ops.relu(y), training=training)

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = Residual()(Residual()(layers.Conv2D(8, 1)(inputs)))
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    return trained(make, sparse, images(), lags=True)


@entry("Keras: padded sequences, Masking before BN and LSTM", "keras", "unseen", framework="keras")
def _masking() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((9, 3))
        x = layers.BatchNormalization()(layers.Masking()(inputs))
        x = layers.Bidirectional(layers.LSTM(8))(x)
        x = layers.BatchNormalization()(x)
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    rng = np.random.default_rng(0)
    y = np.arange(48) % CLASSES
    x = rng.normal(size=(48, 9, 3)).astype("float32") + 2 + y[:, None, None]
    x[np.arange(9)[None] >= (4 + np.arange(48) % 6)[:, None]] = 0
    return trained(make, sparse, (x.astype("float32"), y), lags=True, own_ways=True)


@entry("healthy Keras: auto-encoder, targets are the inputs", "keras", "unseen", framework="keras")
def _encoder() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = layers.Conv2D(8, 3, 2, "same")(inputs)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x = layers.GaussianNoise(0.05)(x)
        x = layers.Conv2DTranspose(8, 3, 2, "same")(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        return keras.Model(inputs, layers.Conv2D(3, 1)(x))

    def compiled(model: Any) -> None:
        model.compile(keras.optimizers.Adam(1e-2), "mae")

    x, _ = images(96)
    program = trained(make, compiled, (x, x), healthy=True)
    program.model.optimizer.learning_rate = 1e-6
    program.model.fit(x, x, batch_size=96, epochs=60, verbose=0)
    return program


@entry("keras-hub DenseNet classifier, logits, own compile", "keras-hub", "unseen",
       framework="keras")  # fmt: skip
def _hub() -> Program:
    import keras
    import keras_hub

    def make() -> Any:
        backbone = keras_hub.models.DenseNetBackbone(
            stackwise_num_repeats=[2, 2], compression_ratio=0.5, growth_rate=8,
            image_shape=(32, 32, 3),
        )  # fmt: skip
        return keras_hub.models.ImageClassifier(backbone=backbone, num_classes=CLASSES)

    def compiled(model: Any) -> None:
        model.compile(
            keras.optimizers.SGD(1e-2),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )

    x, y = images(32, 32)
    return trained(make, compiled, (x, y), epochs=4, lags=True)
