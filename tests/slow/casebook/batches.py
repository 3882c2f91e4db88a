"""Cases 18, 22, 25, 27, 30, 32 and 35: what a batch is made of."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from .bench import (
    CLASSES,
    FILTERS,
    NORMS,
    Case,
    Scenario,
    compiled,
    digits,
    fit,
    gap,
    load_old,
    net,
    old_weights,
    outputs,
    part,
    score,
    statistics,
    stock,
    target,
)

ALL = frozenset(NORMS)
SHOWN = 256


@keras.saving.register_keras_serializable("casebook")
class BatchOnly(keras.layers.BatchNormalization):
    """Keeps no averages: normalises with the batch in every mode, as stax does."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        axes = list(range(len(inputs.shape) - 1))
        mean, variance = ops.moments(inputs, axes=axes)
        return ops.batch_normalization(
            inputs, mean, variance, -1, self.beta, self.gamma, self.epsilon
        )


@keras.saving.register_keras_serializable("casebook")
class Unbiased(keras.layers.BatchNormalization):
    """Stores the unbiased variance of a batch and normalises with the biased one, as torch does."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if not training or not self.trainable:
            return super().call(inputs, training=training, mask=mask)
        mean, variance = ops.moments(inputs, axes=[0])
        count = ops.cast(ops.shape(inputs)[0], "float32")
        for stored, new in (
            (self.moving_mean, mean),
            (self.moving_variance, variance * count / (count - 1)),
        ):
            stored.assign(stored * self.momentum + new * (1 - self.momentum))
        return ops.batch_normalization(
            inputs, mean, variance, -1, self.beta, self.gamma, self.epsilon
        )


class NeverEval(keras.Model):
    """A network that was never put into evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        blocks = range(1, len(FILTERS) + 1)
        self.convolutions = [
            keras.layers.Conv2D(FILTERS[b - 1], 3, padding="same", name=f"conv{b}") for b in blocks
        ]
        self.norms = [keras.layers.BatchNormalization(name=f"bn{b}") for b in blocks]
        self.pool = keras.layers.MaxPooling2D(name="pool")
        self.average = keras.layers.GlobalAveragePooling2D(name="gap")
        self.head = keras.layers.Dense(CLASSES, activation="softmax", name="head")
        self.evaluating = False

    def call(self, x: Any, training: Any = None) -> Any:
        for block, (convolve, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True), 1
        ):
            x = ops.relu(norm(convolve(x), training=not self.evaluating))
            x = self.pool(x) if block == 2 else x
        return self.head(self.average(x))


def sorted_by_class(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(y, kind="stable")
    return x[order], y[order]


def case_18(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = load_old(net(stock(momentum=0.1)))  # torch's 0.1 in Keras
    x, y = sorted_by_class(*(values[:160] for values in part("new")))
    level = np.random.default_rng(seed).uniform(-1, 1, CLASSES).astype("float32")
    x = x + level[y][:, None, None, None]  # each class before its own background
    fit(model, x, y, epochs=3, batch_size=4, lr=1e-3, shuffle=False)
    shown = gap(model, x, y, at_least=0.3, batch_size=4)
    first = outputs(model, x, training=False)
    kept = model.get_weights()
    model(x[:4], training=True)  # one more batch, of the first class
    shown["change by one batch"] = float(np.abs(outputs(model, x, training=False) - first).max())
    model.set_weights(kept)
    assert shown["change by one batch"] > 0.2, shown
    return Scenario(model=model, data=(x, y), options={"batch_size": 4}, closable=True, shown=shown)


def case_22(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = net(lambda name: BatchOnly(name=name))
    x, y = part("new")
    fit(model, x[:320], y[:320], epochs=8)
    x, y = (values[:SHOWN] for values in part("new"))
    by_size = {
        f"accuracy in batches of {size}": score(
            model, x, y, training=False, batch_size=size
        ).accuracy
        for size in (1, 8, 256)
    }
    assert by_size["accuracy in batches of 256"] > 0.2 + by_size["accuracy in batches of 1"]
    return Scenario(model=model, data=(x, y), shown=by_size)


def case_25(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    x = digits()[0][:640, ::2, ::2, 0].reshape(640, 64)
    x = x[:, x.std(0) > 0.2]  # the pixels that are not nearly always empty
    model = keras.Sequential(
        [keras.Input((x.shape[1],))]
        + [Unbiased(momentum=0.99, epsilon=1e-5, name=f"bn{i:02}") for i in range(20)]
    )
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, x, batch_size=64, epochs=60, verbose=0)  # only the averages move
    inference, training = (outputs(model, x, training=t, batch_size=64) for t in (False, True))
    ratio = float((training * inference).sum() / (inference**2).sum())
    assert abs(ratio - 1.1706) < 0.02, ratio  # (64 / 63) ** 10
    return Scenario(
        model=model,
        data=(x, training),
        options={"batch_size": 64},
        closable=True,
        shown={"training / inference": ratio},
    )


def case_27(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    x, y = part("new")
    x = x[:400, ::2, ::2]
    rng = np.random.default_rng(seed)  # heterogeneous: each image has its own contrast and level
    x = x * rng.uniform(0.2, 1, (400, 1, 1, 1)) + rng.uniform(-1, 1, (400, 1, 1, 1))
    x = x.astype("float32")
    model = net(side=8)
    fit(model, x, y[:400], epochs=2, batch_size=1, lr=3e-3)
    x, y = x[:128], y[:128]
    shown = gap(model, x, y, at_least=0.3, batch_size=1)
    return Scenario(model=model, data=(x, y), options={"batch_size": 1}, shown=shown)


def case_30(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = NeverEval()
    x, y = (values[:320] for values in part("new"))
    x = target(x)
    model(x[:2])
    for layer in (*model.convolutions, *model.norms, model.head):
        layer.set_weights(old_weights()[layer.name])
    compiled(model)
    rows = np.concatenate(  # balanced batches: two of each class
        [np.flatnonzero(y == label)[:20] for label in range(CLASSES)]
    ).reshape(CLASSES, 10, 2)
    order = rows.transpose(1, 0, 2).ravel()
    x, y = x[order], y[order]
    good = score(model, x, y, training=False, batch_size=20).accuracy
    model.evaluating = True
    true = score(model, x, y, training=False, batch_size=20).accuracy
    model.evaluating = False
    assert good > true + 0.3, (good, true)  # too good
    return Scenario(
        model=model,
        data=(x, y),
        options={"batch_size": 20},
        shown={"accuracy": good, "accuracy in eval mode": true},
    )


def case_32(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    real, _ = part("new")
    real = real[:320]
    smooth = (real + np.roll(real, 1, 1) + np.roll(real, 1, 2) + np.roll(real, (1, 1), (1, 2))) / 4
    fake = np.clip(smooth + 0.2 * rng.normal(size=real.shape), 0, 1).astype("float32")
    model = net(head=[keras.layers.Dense(1, activation="sigmoid", name="head")])
    model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy")
    for _ in range(160):
        rows = rng.choice(len(real), 32, replace=False)
        model.train_on_batch(real[rows], np.ones((32, 1), "float32"))
        model.train_on_batch(fake[rows], np.zeros((32, 1), "float32"))
    x = np.concatenate([real[:128], fake[:128]])
    y = np.repeat([1.0, 0.0], 128).astype("float32")[:, None]
    shown = gap(model, x, y, at_least=0.3, batch_size=32)  # in pure batches, as it was trained
    assert shown["training accuracy"] > 0.95, shown
    return Scenario(model=model, data=(x, y), options={"batch_size": 32}, shown=shown)


def case_35(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    x, y = part("new")
    shards = (x[:320], y[:320]), (target(x[320:640]), y[320:640])
    mixed = [  # batches of one shard each, in turns
        np.stack([shard[i].reshape(10, 32, *shard[i].shape[1:]) for shard in shards], axis=1)
        for i in (0, 1)
    ]
    mixed = [values.reshape(640, *values.shape[3:]) for values in mixed]
    trained = load_old(net(stock(0.9)))
    fit(trained, *mixed, epochs=4, shuffle=False)
    ranks = []
    for shard in shards:
        model = net(stock(0.9))
        model.set_weights(trained.get_weights())
        model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
        model.fit(*shard, batch_size=32, epochs=4, verbose=0)  # averages only
        ranks.append(compiled(model))
    first, second = ranks
    x, y = (np.concatenate([shard[i][:128] for shard in shards]) for i in (0, 1))
    shown = {
        **gap(first, x, y, at_least=0.2),
        "difference": float(np.abs(statistics(first) - statistics(second)).max()),
        "accuracy of the other": score(second, x, y, training=False).accuracy,
    }
    assert shown["difference"] > 0.2, shown
    return Scenario(model=first, data=(x, y), options={"reference": second}, shown=shown)


CASES = (
    Case(
        number="18",
        title="momentum copied from torch, small sorted batches",
        expected=("MOMENTUM_CONVENTION",),
        also=("EMA_NOISE",),
        sites=ALL,
        build=case_18,
    ),
    Case(
        number="22",
        title="no moving averages: test batches normalise themselves",
        expected=("FORCED_TRAIN",),
        sites=ALL,
        build=case_22,
        everywhere=True,
    ),
    Case(
        number="25",
        title="twenty stacked layers with unbiased variances",
        expected=("BESSEL",),
        sites=frozenset(f"bn{i:02}" for i in range(20)),
        build=case_25,
    ),
    Case(
        number="27",
        title="trained with batches of one small, heterogeneous image",
        expected=("SMALL_BATCH",),
        sites=ALL,
        build=case_27,
    ),
    Case(
        number="30",
        title="tested in training mode with balanced batches: too good",
        expected=("FORCED_TRAIN",),
        sites=None,  # a list of layers: their paths are the framework's affair
        build=case_30,
    ),
    Case(
        number="32",
        title="discriminator trained on pure batches of real and fake",
        expected=("MIXED_SOURCES",),
        sites=ALL,
        build=case_32,
        everywhere=True,
    ),
    Case(
        number="35",
        title="ranks with different statistics",
        expected=("RANK_DIVERGENCE",),
        sites=ALL,
        build=case_35,
    ),
)
