"""Cases N1 to N13: a gap or a bad score that is not BN's fault, mostly in nets with BN."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from .bench import (
    CLASSES,
    Case,
    Scenario,
    both,
    compiled,
    digits,
    fit,
    freeze_blocks,
    load_old,
    net,
    old_weights,
    part,
    score,
    stock,
)

SHOWN = 256


@keras.saving.register_keras_serializable("casebook")
class Faulty(keras.layers.Layer):
    """A kernel that is wrong for one batch size: the second half of the rows comes out as 0."""

    def __init__(self, size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size

    def call(self, x: Any) -> Any:
        count = ops.shape(x)[0]
        rows = ops.reshape(ops.arange(count), [-1] + [1] * (len(x.shape) - 1))
        right = ops.logical_or(ops.not_equal(count, self.size), rows < count // 2)
        return ops.where(right, x, ops.zeros_like(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size}


def pretrained(seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    return compiled(load_old(net()))


def no_gap(model: Any, x: Any, y: Any, *, at_most: float = 0.1, **options: Any) -> dict[str, float]:
    """Assert that inference is not worse than training mode; the numbers."""
    inference, training = both(model, x, y, **options)
    shown = {
        "inference loss": inference.loss,
        "training loss": training.loss,
        "inference accuracy": inference.accuracy,
        "training accuracy": training.accuracy,
    }
    assert inference.loss - training.loss < at_most, shown
    return shown


def case_n1(seed: int) -> Scenario:
    model = pretrained(seed)
    x, y = (values[:SHOWN] for values in part("new"))
    right, wrong = (score(model, inputs, y, training=False) for inputs in (x, 255 * x))
    shown = {"accuracy": wrong.accuracy, "accuracy as trained": right.accuracy}
    assert right.accuracy > wrong.accuracy + 0.3, shown
    return Scenario(model=model, data=(255 * x, y), closable=True, shown=shown)


def case_n1b(seed: int) -> Scenario:
    model = pretrained(seed)
    x, y = (values[:SHOWN] for values in part("old"))
    other, labels = part("held out")
    wrong = score(model, 255 * other, labels, training=False)
    shown = {**no_gap(model, x, y), "validation accuracy": wrong.accuracy}
    assert shown["inference accuracy"] > wrong.accuracy + 0.3, shown
    return Scenario(
        model=model, data=(x, y), options={"validation": (255 * other, labels)}, shown=shown
    )


def case_n3(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    x, y = part("new")
    history = fit(model, x, y, epochs=1, lr=3e-3)
    now = score(model, x, y, training=False)
    shown = {"logged loss": history["loss"][-1], "loss now": now.loss}
    assert history["loss"][-1] > now.loss + 0.3, shown
    return Scenario(
        model=model, data=(x[:SHOWN], y[:SHOWN]), options={"history": history}, shown=shown
    )


def case_n4(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = load_old(net(stock(0.9)))
    x, y = part("new")
    x, y = x[:320], y[:320]
    validation = part("held out")
    history = fit(model, x, y, epochs=5, lr=1e-3, validation_data=validation)
    order = np.random.default_rng(seed).permutation(len(y))
    right, wrong = (score(model, x, labels, training=False) for labels in (y, y[order]))
    shown = {"accuracy": wrong.accuracy, "accuracy in order": right.accuracy}
    assert right.accuracy > wrong.accuracy + 0.7, shown
    return Scenario(model=model, data=(x, y[order]), options={"history": history}, shown=shown)


def case_n5(seed: int) -> Scenario:
    old = pretrained(seed)
    base = keras.Model(old.inputs, old.get_layer("gap").output)
    x, y = part("new")
    x, y = x[:640], y[:640]
    order = np.random.default_rng(seed).permutation(len(y))
    features = base.predict(x[order], verbose=0)  # a shuffled generator
    model = keras.Sequential(
        [
            keras.Input(features.shape[1:]),
            keras.layers.Dense(32, name="hidden"),
            keras.layers.BatchNormalization(name="bn", momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.Dense(CLASSES, activation="softmax", name="head"),
        ]
    )
    held_out = part("held out")
    validation = (base.predict(held_out[0], verbose=0), held_out[1])
    history = fit(model, features, y, epochs=8, validation_data=validation)
    shown = no_gap(model, features, y)
    assert shown["inference accuracy"] < 0.4, shown
    return Scenario(
        model=model,
        data=(features, y),
        options={"history": history, "validation": validation},
        shown=shown,
    )


def case_n6(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    head = [
        keras.layers.Dense(64, activation="relu", name="hidden"),
        keras.layers.Dropout(0.5, name="dropout"),
        keras.layers.Dense(CLASSES, activation="softmax", name="head"),
    ]
    weights = old_weights()
    model = net(stock(0.9), head=head)
    for layer in model.layers:
        if layer.name in weights and layer.name != "head":
            layer.set_weights(weights[layer.name])
    x, y = part("new")
    x, y = x[:320], y[:320]
    validation = part("held out")
    history = fit(model, x, y, epochs=6, lr=1e-3, validation_data=validation)
    inference, training = both(model, x, y)
    shown = {
        "inference loss": inference.loss,
        "training loss": training.loss,
        "logged accuracy": history["accuracy"][-1],
        "validation accuracy": history["val_accuracy"][-1],
    }
    assert training.loss > inference.loss + 0.1, shown
    return Scenario(
        model=model,
        data=(x[:SHOWN], y[:SHOWN]),
        options={"history": history, "validation": validation},
        shown=shown,
    )


def case_n8(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = net(
        head=[
            keras.layers.Dense(256, activation="relu", name="hidden"),
            keras.layers.Dense(CLASSES, activation="softmax", name="head"),
        ]
    )
    weights = old_weights()
    for layer in model.layers:
        if layer.name in weights and layer.name != "head":
            layer.set_weights(weights[layer.name])
    freeze_blocks(model, 4)
    rng = np.random.default_rng(seed)
    x, y = digits()
    x = np.clip(x + 0.4 * rng.normal(size=x.shape), 0, 1).astype("float32")
    fit(model, x[:100], y[:100], epochs=60, lr=1e-2)
    validation = (x[1200:1456], y[1200:1456])
    shown = no_gap(model, x[:100], y[:100])
    shown["validation accuracy"] = score(model, *validation, training=False).accuracy
    assert shown["inference accuracy"] > shown["validation accuracy"] + 0.2, shown
    return Scenario(
        model=model, data=(x[:100], y[:100]), options={"validation": validation}, shown=shown
    )


def case_n10(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)

    def network(interpolation: str) -> Any:
        enlarge = keras.layers.UpSampling2D(4, interpolation=interpolation, name="up")
        return net(stock(0.9), side=4, before=[enlarge])

    x, y = (values[:320] for values in part("new"))
    x = x.reshape(320, 4, 4, 4, 4, 1).mean((2, 4))  # 4x4 pixels are left
    before = load_old(network("bilinear"))
    fit(before, x, y, epochs=8, lr=1e-3)
    loaded = compiled(network("nearest"))
    loaded.set_weights(before.get_weights())
    inference = (score(model, x, y, training=False) for model in (before, loaded))
    right, wrong = inference
    shown = {"loss": wrong.loss, "loss before": right.loss}
    assert wrong.loss > right.loss + 0.2, shown
    return Scenario(
        model=loaded, data=(x[:SHOWN], y[:SHOWN]), options={"reference": before}, shown=shown
    )


def case_n11(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = compiled(load_old(net(side=None)))
    x, y = (values[:SHOWN] for values in part("old"))
    large = x.repeat(2, axis=1).repeat(2, axis=2)
    right = score(model, x, y, training=False)
    inference, training = both(model, large, y)
    shown = {
        "accuracy at 16": right.accuracy,
        "accuracy at 32": inference.accuracy,
        "training accuracy at 32": training.accuracy,
    }
    assert right.accuracy > max(inference.accuracy, training.accuracy) + 0.2, shown
    history = {"accuracy": [0.9, right.accuracy], "val_accuracy": [0.85, 0.95]}  # its model card
    return Scenario(model=model, data=(large, y), options={"history": history}, shown=shown)


def case_n13(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = net(side=16, head=[Faulty(64, name="faulty"), *head()])
    model = compiled(load_old(model))
    x, y = (values[:512] for values in part("old"))
    bad, good = (score(model, x, y, training=False, batch_size=size) for size in (64, 32))
    shown = {"accuracy in batches of 64": bad.accuracy, "in batches of 32": good.accuracy}
    assert good.accuracy > bad.accuracy + 0.3, shown
    return Scenario(model=model, data=(x, y), options={"batch_size": 64}, shown=shown)


def head() -> list[Any]:
    return [keras.layers.Dense(CLASSES, activation="softmax", name="head")]


CASES = (
    Case(
        number="N1",
        title="evaluated on pixels from 0 to 255",
        expected=("PREPROCESS",),
        build=case_n1,
        everywhere=True,
    ),
    Case(
        number="N1b",
        title="validation pixels from 0 to 255",
        expected=("PREPROCESS",),
        build=case_n1b,
    ),
    Case(
        number="N3",
        title="logged loss is an average over the epoch, no BN",
        expected=("EPOCH_AVERAGE",),
        build=case_n3,
        everywhere=True,
    ),
    Case(
        number="N4",
        title="labels in another order than the predictions",
        expected=("LABEL_ORDER",),
        build=case_n4,
    ),
    Case(
        number="N5",
        title="cached features shuffled against their labels",
        expected=("LABEL_ORDER",),
        build=case_n5,
    ),
    Case(
        number="N6",
        title="dropout: validation better than training",
        expected=("DROPOUT",),
        build=case_n6,
        everywhere=True,
    ),
    Case(
        number="N8",
        title="big head on a hundred images, BN locked",
        expected=("OVERFIT",),
        build=case_n8,
        everywhere=True,
    ),
    Case(
        number="N10",
        title="an upsampling layer loads with another interpolation",
        expected=("LOADING",),
        build=case_n10,
    ),
    Case(
        number="N11",
        title="evaluated at another resolution",
        expected=("PREPROCESS",),
        build=case_n11,
    ),
    Case(
        number="N13",
        title="wrong for one batch size",
        expected=("KERNEL_BUG",),
        build=case_n13,
    ),
)
