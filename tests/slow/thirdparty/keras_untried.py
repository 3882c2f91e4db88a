"""Keras programs that nobody had tried; see ``untried.py``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import frostline as fl

from .keras_unseen import CLASSES, block, body, classifier, images, sparse, trained
from .program import Program, entry


def series(length: int, width: int = 3) -> tuple[Any, Any]:
    """Sequences, far from zero mean, and class numbers to learn."""
    y = np.arange(48) % CLASSES
    x = np.random.default_rng(0).normal(size=(48, length, width)) + 2 + y[:, None, None]
    return x.astype("float32"), y


@entry("Keras: distillation, the teacher in compute_loss", "keras", "untried", framework="keras")
def _distilled() -> Program:
    import keras
    from keras import losses, ops

    class Distiller(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = classifier(), classifier()
            self.teacher.trainable = False

        def call(self, x: Any, training: bool | None = None) -> Any:
            return self.student(x, training=training)

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
            training: bool = True,
        ) -> Any:  # fmt: skip
            soft = ops.mean(losses.kl_divergence(self.teacher(x, training=False), y_pred))
            return ops.mean(losses.sparse_categorical_crossentropy(y, y_pred)) + 0.3 * soft

    def make() -> Any:
        model = Distiller()
        model(images()[0][:2])
        return model

    program = trained(make, lambda model: model.compile(keras.optimizers.Adam(1e-2)), images())
    student = f"{program.model.student.name}/"
    paths = [site.path for site in fl.sites(program.model) if site.path.startswith(student)]
    return replace(program, until=paths[-1])  # behind it comes the teacher, which never trains


@entry("Keras: one base for two inputs", "keras", "untried", framework="keras")
def _two_inputs() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        base = body()
        inputs = {name: keras.Input((12, 12, 3), name=name) for name in "ab"}
        x = layers.Concatenate()([base(each) for each in inputs.values()])
        x = layers.BatchNormalization()(layers.Dense(8)(x))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    x, y = images()
    return trained(make, sparse, ({"a": x, "b": x * 0.5 - 1}, y))


@entry("Keras: PyDataset with targets and weights in mappings", "keras", "untried",
       framework="keras")  # fmt: skip
def _weighted() -> Program:
    import keras
    from keras import layers

    x, y = images()
    weight = np.linspace(0.5, 1.5, 48).astype("float32")

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            rows = slice(12 * index, 12 * index + 12)
            targets = {"kind": y[rows], "age": y[rows].astype("float32")[:, None]}
            return x[rows], targets, {"kind": weight[rows], "age": 2 - weight[rows]}

    def make() -> Any:
        base = body()
        kind = layers.Dense(CLASSES, activation="softmax", name="kind")(base.output)
        age = layers.Dense(1, name="age")(base.output)
        return keras.Model(base.input, {"kind": kind, "age": age})

    def compiled(model: Any) -> None:
        model.compile(
            keras.optimizers.Adam(1e-2),
            loss={"kind": "sparse_categorical_crossentropy", "age": keras.losses.Huber()},
            loss_weights={"kind": 1.0, "age": 0.3},
            metrics={"kind": ["accuracy"]},
        )

    return trained(make, compiled, Batches())


@entry("Keras: folds: separable, depthwise, grouped, transposed, shared", "keras", "untried",
       framework="keras")  # fmt: skip
def _folds() -> Program:
    import keras
    from keras import layers

    def norm(x: Any, **options: Any) -> Any:
        return layers.BatchNormalization(momentum=0.9, **options)(x)

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = layers.SeparableConv2D(8, 3, padding="same")(norm(inputs))
        x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, depth_multiplier=2)(
            layers.ReLU()(norm(x))
        )
        x = layers.Conv2D(8, 3, groups=4, padding="same")(layers.ReLU()(norm(x, scale=False)))
        x = layers.Conv2DTranspose(8, 3, strides=2, padding="same")(
            layers.ReLU()(norm(x, center=False))
        )
        x, shared = layers.ReLU()(norm(x)), layers.Conv2D(8, 1)
        x = layers.Conv2D(8, 3)(layers.Add()([norm(shared(x)), norm(shared(-x))]))
        x = layers.GlobalAveragePooling2D()(layers.Add()([norm(x), x]))
        x = norm(x, center=False, scale=False)
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    return trained(make, sparse, images())


@entry("Keras: token ids with mask_zero, attention and BN", "keras", "untried", framework="keras")
def _tokens() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((9,), dtype="int32")
        x = layers.BatchNormalization()(layers.Embedding(30, 8, mask_zero=True)(inputs))
        x = layers.Dense(8)(layers.Add()([x, layers.MultiHeadAttention(2, 4)(x, x)]))
        x = layers.GlobalAveragePooling1D()(layers.BatchNormalization()(x))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    y = np.arange(48) % CLASSES
    ids = np.random.default_rng(0).integers(1, 30, (48, 9))
    ids[:, 0] = 1 + y
    ids[np.arange(9)[None] >= 4 + np.arange(48)[:, None] % 6] = 0
    return trained(make, sparse, (ids.astype("int32"), y), own_ways=True)


@entry("Keras: BN in an RNN cell of one's own", "keras", "untried", framework="keras")
def _cell() -> Program:
    import keras
    from keras import layers, ops

    class Cell(layers.Layer):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.state_size = 6
            self.given, self.hidden = layers.Dense(6, use_bias=False), layers.Dense(6)
            self.norm = layers.BatchNormalization()

        def build(self, shape: Any) -> None:
            self.given.build(shape)
            self.hidden.build((None, 6))
            self.norm.build((None, 6))
            self.built = True

        def call(self, x: Any, states: Any, training: bool | None = None) -> Any:
            x = ops.tanh(self.norm(self.given(x), training=training) + self.hidden(states[0]))
            return x, [x]

    def make() -> Any:
        inputs = keras.Input((5, 3))
        x = layers.RNN(Cell(), unroll=True)(layers.BatchNormalization()(inputs))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    return trained(make, sparse, series(5))


@entry("Keras: a subclass in a subclass, outputs in a mapping", "keras", "untried",
       framework="keras")  # fmt: skip
def _nested() -> Program:
    import keras
    from keras import layers, ops

    class Encoder(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = layers.Conv2D(8, 3), layers.BatchNormalization()
            self.pool = layers.GlobalAveragePooling2D()

        def call(self, x: Any, training: bool | None = None) -> Any:
            return self.pool(ops.relu(self.norm(self.conv(x), training=training)))

    class Net(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.norm = Encoder(), layers.BatchNormalization()
            self.kind = layers.Dense(CLASSES, activation="softmax")
            self.age = layers.Dense(1)

        def call(self, x: Any, training: bool | None = None) -> Any:
            x = self.norm(self.encoder(x, training=training), training=training)
            return {"kind": self.kind(x), "age": self.age(x)}

    def make() -> Any:
        model = Net()
        model(images()[0][:2])
        return model

    def compiled(model: Any) -> None:
        loss = {"kind": "sparse_categorical_crossentropy", "age": "mse"}
        model.compile(keras.optimizers.Adam(1e-2), loss=loss)

    x, y = images()
    return trained(make, compiled, (x, {"kind": y, "age": y.astype("float32")[:, None]}))


@entry("Keras: synchronized=True, BN axis 1, label smoothing", "keras", "untried",
       framework="keras")  # fmt: skip
def _synchronized() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        inputs = keras.Input((16, 3))
        several = keras.backend.backend() == "tensorflow"  # alone has it
        x = layers.BatchNormalization(synchronized=several)(layers.Conv1D(8, 3)(inputs))
        x = layers.BatchNormalization(axis=1)(layers.Permute((2, 1))(layers.ReLU()(x)))
        x = layers.GlobalMaxPooling1D()(layers.Permute((2, 1))(x))
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    def compiled(model: Any) -> None:
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
        model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])

    x, y = series(16)
    return trained(make, compiled, (x, np.eye(CLASSES, dtype="float32")[y]))


@entry("Keras: Sequential in Sequential, float16, two losses in a list", "keras", "untried",
       framework="keras")  # fmt: skip
def _float16() -> Program:
    import keras
    from keras import layers

    def make() -> Any:
        policy = keras.dtype_policies.DTypePolicy("mixed_float16")

        def block() -> list[Any]:
            kinds: tuple[tuple[Any, tuple[int, ...]], ...] = (
                (layers.Conv3D, (6, 3)), (layers.BatchNormalization, ()), (layers.ReLU, ())
            )  # fmt: skip
            return [kind(*given, dtype=policy) for kind, given in kinds]

        inputs = keras.Input((6, 6, 6, 1))
        encoder = keras.Sequential(
            [*block(), keras.Sequential(block()), layers.GlobalAveragePooling3D(dtype=policy)]
        )
        x = encoder(inputs)
        kind = layers.Dense(CLASSES, activation="softmax", dtype="float32")(x)
        return keras.Model(inputs, [kind, layers.Dense(1, dtype="float32")(x)])

    def compiled(model: Any) -> None:
        model.compile(keras.optimizers.Adam(1e-2), ["sparse_categorical_crossentropy", "mae"])

    x, y = series(36, 6)
    targets = [y, y.astype("float32")[:, None]]
    return trained(make, compiled, (x.reshape(48, 6, 6, 6, 1), targets), own_ways=True)


@entry("Keras: own train_step with mixup, an ordinal loss", "keras", "untried", framework="keras")
def _mixup() -> Program:
    import keras
    from keras import layers, ops

    class Net(keras.Model):  # type: ignore[misc]
        def train_step(self, *given: Any) -> Any:  # on JAX a state comes first
            x, y = given[-1][:2]
            x = ops.cast(x, "float32")
            x = 0.9 * x + 0.1 * ops.flip(x, axis=0)
            return super().train_step(*given[:-1], (x, y))

    def ordinal(y: Any, out: Any) -> Any:
        above = ops.reshape(y, (-1, 1)) > ops.arange(CLASSES - 1)
        found = keras.losses.binary_crossentropy(ops.cast(above, "float32"), out, from_logits=True)
        return ops.mean(found)

    def make() -> Any:
        base = body()
        return Net(base.input, layers.Dense(CLASSES - 1)(base.output))

    x, y = images()
    return trained(
        make, lambda model: model.compile(keras.optimizers.Adam(1e-2), ordinal),
        (x, y.astype("int32")),
    )  # fmt: skip


@entry("Keras: stochastic depth by hand, BN in the branches", "keras", "untried",
       framework="keras")  # fmt: skip
def _depth() -> Program:
    import keras
    from keras import layers, ops

    class Drop(layers.Layer):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.seed = keras.random.SeedGenerator(1)

        def call(self, x: Any, training: bool | None = None) -> Any:
            if not training:
                return x
            kept = keras.random.uniform((ops.shape(x)[0], 1, 1, 1), seed=self.seed) > 0.3
            return x * ops.cast(kept, x.dtype) / 0.7

    def make() -> Any:
        inputs = keras.Input((12, 12, 3))
        x = block(inputs, 8)
        for _ in range(2):
            x = layers.Add()([x, Drop()(block(x, 8))])
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))

    return trained(make, sparse, images())
