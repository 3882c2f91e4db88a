"""Keras programs of the last round; see ``later.py``."""

from __future__ import annotations

from typing import Any

import numpy as np

from .keras_unseen import CLASSES, body, images, sparse, trained
from .program import Program, entry


@entry("Keras: VAE with add_loss, drawn in training only", "keras", "later", framework="keras")
def _vae() -> Program:
    import keras
    from keras import layers, ops

    class Drawn(layers.Layer):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.seed = keras.random.SeedGenerator(0)

        def call(self, both: Any, training: bool | None = None) -> Any:
            mean, spread = both
            kl = -0.5 * ops.mean(1 + spread - ops.square(mean) - ops.exp(spread))
            self.add_loss(0.01 * kl)
            if not training:
                return mean
            return mean + ops.exp(spread / 2) * keras.random.normal(ops.shape(mean), seed=self.seed)

    def make() -> Any:
        inputs = keras.Input((16,))
        x = layers.ReLU()(layers.BatchNormalization()(layers.Dense(12)(inputs)))
        z = Drawn()([layers.Dense(3)(x), layers.Dense(3)(x)])
        x = layers.ReLU()(layers.BatchNormalization()(layers.Dense(12)(z)))
        return keras.Model(inputs, layers.Dense(16)(x))

    def compiled(model: Any) -> None:
        model.compile(keras.optimizers.Adam(1e-2), "mse")

    x = images()[0].reshape(48, -1)[:, :16]
    return trained(make, compiled, (x, x), lags=True, own_ways=True)


@entry("Keras: a loss of the whole batch in compute_loss (NT-Xent)", "keras", "later",
       framework="keras")  # fmt: skip
def _contrastive() -> Program:
    import keras
    from keras import layers, ops

    class Contrastive(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body(), layers.Dense(8)

        def call(self, views: Any, training: bool | None = None) -> Any:
            one, other = views
            z = [self.head(self.body(v, training=training)) for v in (one, other)]
            return ops.concatenate(z, axis=1)

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
            training: bool = True,
        ) -> Any:  # fmt: skip
            a, b = ops.split(y_pred, 2, axis=1)
            a, b = (v / ops.sqrt(ops.sum(v * v, 1, keepdims=True) + 1e-6) for v in (a, b))
            logits = a @ ops.transpose(b) / 0.2
            labels = ops.arange(ops.shape(logits)[0])
            return ops.mean(
                keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            )

    def compiled(model: Any) -> None:
        model.compile(keras.optimizers.Adam(1e-2))

    x, y = images()
    noise = np.random.default_rng(1).normal(size=x.shape).astype("float32") * 0.3
    return trained(Contrastive, compiled, ((x, x + noise), y), lags=True)


@entry("Keras: auxiliary output with loss_weights, BN axis 1", "keras", "later", framework="keras")
def _auxiliary() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((6, 4))
        x = layers.Conv1D(8, 3, padding="same")(
            layers.Permute((2, 1))(layers.Permute((2, 1))(inputs))
        )
        x = layers.ReLU()(layers.BatchNormalization()(x))
        side = layers.Dense(CLASSES, activation="softmax", name="side")(
            layers.GlobalMaxPooling1D()(x)
        )
        x = layers.Permute((2, 1))(layers.Conv1D(8, 3, padding="same")(x))
        x = layers.Flatten()(layers.ReLU()(layers.BatchNormalization(axis=1)(x)))
        return keras.Model(
            inputs, [layers.Dense(CLASSES, activation="softmax", name="main")(x), side]
        )

    def compiled(model: Any) -> None:
        kind = "sparse_categorical_crossentropy"
        model.compile(keras.optimizers.Adam(1e-2), [kind, kind], loss_weights=[1.0, 0.3])

    x, y = images()
    return trained(make, compiled, (x[:, :6, :4, 0] * 2, [y, y]), lags=True)


@entry("healthy Keras: augmentation first, base(x, training=False), dropout", "keras", "later",
       framework="keras")  # fmt: skip
def _recipe() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        base = body(momentum=0.9)
        base.compile(keras.optimizers.Adam(1e-2), "mse")
        x, _ = images()
        base.fit(x, np.zeros((48, 8), "float32"), epochs=3, verbose=0)
        base.trainable = False
        inputs = keras.Input((12, 12, 3))
        x = layers.RandomFlip("horizontal")(inputs)
        x = layers.Dropout(0.1)(base(x, training=False))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    return trained(make, sparse, images(), healthy=True)


@entry("Keras: GAN with an own train_step", "keras", "later", framework="keras")
def _gan() -> Program:
    import keras
    from keras import layers

    class Generator(keras.Model):  # type: ignore[misc]
        """The generator, judged by a frozen discriminator in compute_loss."""

        def __init__(self) -> None:
            super().__init__()
            self.make = keras.Sequential([
                layers.Dense(16), layers.BatchNormalization(), layers.ReLU(),
                layers.Dense(16), layers.BatchNormalization(), layers.ReLU(), layers.Dense(8),
            ])  # fmt: skip
            self.critic = keras.Sequential([layers.Dense(8, "relu"), layers.Dense(1)])
            self.critic.trainable = False

        def call(self, noise: Any, training: bool | None = None) -> Any:
            return self.make(noise, training=training)

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
            training: bool = True,
        ) -> Any:  # fmt: skip
            told = self.critic(y_pred)
            return keras.ops.mean(keras.ops.softplus(-told)) + 0.1 * keras.ops.mean(
                keras.ops.square(y_pred - y)
            )

    def compiled(model: Any) -> None:
        model.compile(keras.optimizers.Adam(1e-2))

    rng = np.random.default_rng(0)
    noise = rng.normal(size=(48, 5)).astype("float32") * 3 + 1
    return trained(Generator, compiled, (noise, rng.normal(size=(48, 8)).astype("float32") + 2),
                   lags=False)  # fmt: skip
