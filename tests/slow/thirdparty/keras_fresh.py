"""Keras programs that nobody had tried, of other kinds; see ``untried.py``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .keras_unseen import CLASSES, block, body, images, sparse, trained
from .keras_untried import series
from .program import Program, entry


@entry("Keras: LoRA on dense layers, BN between them", "keras", "fresh", framework="keras")
def _lora() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((432,))
        x = layers.BatchNormalization()(layers.Dense(16, name="first")(inputs))
        x = layers.BatchNormalization()(layers.Dense(16, activation="relu", name="second")(x))
        model = keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))
        for name in ("first", "second"):
            model.get_layer(name).enable_lora(2)
        return model

    x, y = images()
    return trained(make, sparse, (x.reshape(48, -1), y))


@entry("Keras: dense layers quantized to int8 after the training", "keras", "fresh",
       framework="keras")  # fmt: skip
def _quantized() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = block(block(inputs, 8), 8)
        x = layers.BatchNormalization()(layers.Dense(16)(layers.GlobalAveragePooling2D()(x)))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    program = trained(make, sparse, images())
    program.model.quantize("int8")
    sparse(program.model)
    return program


@entry("Keras: run_eagerly, BN of float64", "keras", "fresh", framework="keras")
def _eager() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = layers.Conv2D(8, 3, dtype="float64")(inputs)
        x = layers.ReLU(dtype="float64")(layers.BatchNormalization(dtype="float64")(x))
        x = layers.GlobalAveragePooling2D(dtype="float64")(x)
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    def compiled(model: Any) -> None:
        model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)

    return trained(make, compiled, images())


@entry("Keras: ConvLSTM2D on videos, BN over time", "keras", "fresh",
       framework="keras")  # fmt: skip
def _video() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((4, 8, 8, 3))
        x = layers.BatchNormalization()(layers.ConvLSTM2D(4, 3, return_sequences=True)(inputs))
        x = layers.TimeDistributed(layers.GlobalAveragePooling2D())(x)
        x = layers.BatchNormalization()(layers.GRU(8)(x))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    y = np.arange(48) % CLASSES
    x = np.random.default_rng(0).normal(size=(48, 4, 8, 8, 3)) + 1 + y[:, None, None, None, None]
    return trained(make, sparse, (x.astype("float32"), y))


@entry("healthy Keras: Pipeline of augmentation and scaling first", "keras", "fresh",
       framework="keras")  # fmt: skip
def _pipeline() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        first = layers.Pipeline([layers.RandomFlip(), layers.RandomTranslation(0.1, 0.1)])
        x = layers.Rescaling(0.5, offset=-1)(first(inputs))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(
            body(momentum=0.7)(x)))  # fmt: skip

    return trained(make, sparse, images(), epochs=30, lags=False, healthy=True)


@entry("Keras: U-Net with skips, pixels of one class count nothing", "keras", "fresh",
       framework="keras")  # fmt: skip
def _segmented() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        one = block(inputs, 8)
        two = block(layers.MaxPooling2D()(one), 16)
        x = layers.Concatenate()([one, layers.UpSampling2D(interpolation="bilinear")(two)])
        return keras.Model(inputs, layers.Conv2D(CLASSES, 1)(block(x, 8)))

    def compiled(model: Any) -> None:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
        model.compile(keras.optimizers.Adam(1e-2), loss)

    x, y = images()
    kinds = (np.arange(144).reshape(12, 12) // 24 + y[:, None, None]) % CLASSES
    return trained(make, compiled, (x + kinds[..., None] * 0.5, kinds))


@entry("Keras: a loss that couples the samples, compiled as a function", "keras", "fresh",
       framework="keras")  # fmt: skip
def _coupled() -> Program:
    import keras
    from keras import layers, ops

    def correlation(y: Any, found: Any) -> Any:
        y, found = (each - ops.mean(each) for each in (ops.cast(y, "float32"), found))
        both = ops.sqrt(ops.sum(ops.square(y)) * ops.sum(ops.square(found)) + 1e-6)
        return 1 - ops.sum(y * found) / both

    def make() -> Any:
        backbone = body()
        return keras.Model(backbone.input, layers.Dense(1)(backbone.output))

    x, y = images()
    return trained(make, lambda model: model.compile("adam", correlation),
                   (x, y.astype("float32")[:, None]), lags=False)  # fmt: skip


@entry("Keras: two views without labels, an own train_step (VICReg)", "keras", "fresh",
       framework="keras")  # fmt: skip
def _views() -> Program:
    import keras
    from keras import layers, ops

    class Views(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            backbone = body()
            self.encoder = keras.Model(backbone.input, layers.Dense(8)(backbone.output))

        def call(self, pair: Any, training: bool | None = None) -> Any:
            return [self.encoder(each, training=training) for each in pair]

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
            training: bool = True,
        ) -> Any:  # fmt: skip
            one, two = y_pred
            spread = sum(ops.mean(ops.relu(1 - ops.std(each, axis=0))) for each in y_pred)
            return ops.mean(ops.square(one - two)) + spread

    def make() -> Any:
        model = Views()
        model([images()[0][:2]] * 2)
        return model

    x = images()[0]
    other = x + np.random.default_rng(1).normal(size=x.shape).astype("float32") * 0.3
    return trained(make, lambda model: model.compile("adam"), ((x, other),), lags=False)


@entry("Keras: Normalization adapted first, BN behind it", "keras", "fresh", framework="keras")
def _adapted() -> Program:
    import keras
    from keras import layers

    x, y = images()

    def make() -> Any:
        inputs, first = keras.Input((12, 12, 3)), layers.Normalization()
        first.adapt(x)
        x_ = layers.GlobalAveragePooling2D()(block(block(first(inputs), 8), 8))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x_))

    return trained(make, sparse, (x, y))


@entry("Keras: BN in layers that build() makes, saved and loaded", "keras", "fresh",
       framework="keras")  # fmt: skip
def _loaded() -> Program:
    import keras
    from keras import layers

    @keras.saving.register_keras_serializable(package="fresh")
    class Residual(layers.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.conv = layers.Conv2D(shape[-1], 3, padding="same", name="conv")
            self.norm = layers.BatchNormalization(name="norm")
            self.conv.build(shape)
            self.norm.build(shape)

        def call(self, x: Any, training: bool | None = None) -> Any:
            return x + self.norm(self.conv(x), training=training)

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = Residual()(Residual()(layers.Conv2D(8, 3)(inputs)))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(
            layers.GlobalAveragePooling2D()(x)))  # fmt: skip

    program = trained(make, sparse, images())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.keras"
        program.model.save(path)
        model = keras.models.load_model(path, compile=False)
    sparse(model)
    return Program(model=model, batches=program.batches, recompile=sparse)


@entry("Keras: CTC on sequences", "keras", "fresh", framework="keras")
def _ctc() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((12, 3))
        x = layers.BatchNormalization()(layers.Conv1D(8, 3, padding="same")(inputs))
        x = layers.BatchNormalization()(
            layers.Bidirectional(layers.GRU(6, return_sequences=True))(x)
        )
        return keras.Model(inputs, layers.Dense(CLASSES + 1)(x))

    x, y = series(12)
    labels = np.stack([y % CLASSES + 1 - (y == CLASSES), (y + 1) % CLASSES + 1], 1)
    return trained(make, lambda model: model.compile("adam", keras.losses.CTC()),
                   (x, np.clip(labels, 1, CLASSES)), lags=False)  # fmt: skip


@entry("Keras: outputs in a list, BN without gamma and beta, weighted pixels", "keras", "fresh",
       framework="keras")  # fmt: skip
def _bare() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = layers.BatchNormalization(center=False, scale=False)(layers.Conv2D(8, 3)(inputs))
        x = layers.BatchNormalization(renorm=False)(layers.DepthwiseConv2D(3)(layers.ReLU()(x)))
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, [layers.Dense(CLASSES, activation="softmax")(x),
                                    layers.Dense(1)(x)])  # fmt: skip

    def compiled(model: Any) -> None:
        model.compile("adam", ["sparse_categorical_crossentropy", keras.losses.Huber()],
                      loss_weights=[1.0, 0.2])  # fmt: skip

    x, y = images()
    return trained(make, compiled, (x, [y, y.astype("float32")[:, None]]))


@entry("healthy Keras: group and layer normalization beside BN, dropout", "keras", "fresh",
       framework="keras")  # fmt: skip
def _others() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = layers.GroupNormalization(4)(block(inputs, 8, momentum=0.7))
        x = layers.SpatialDropout2D(0.1)(block(x, 8, momentum=0.7))
        x = layers.LayerNormalization()(layers.GlobalAveragePooling2D()(x))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(
            layers.GaussianNoise(0.05)(layers.Dropout(0.1)(x))))  # fmt: skip

    return trained(make, sparse, images(), epochs=30, lags=False, healthy=True)
