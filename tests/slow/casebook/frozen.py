"""Cases 1, 2, 4, 5, 9, 10, 28 and 36: layers that were meant to be frozen."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

import frostline as fl

from .bench import (
    NORMS,
    Case,
    Scenario,
    compiled,
    fit,
    freeze_blocks,
    gap,
    in_blocks,
    load_old,
    net,
    outputs,
    part,
    statistics,
    stock,
    target,
)

PREFIX = NORMS[:3]
SHOWN = 256


def legacy(policy: str) -> Any:
    """Our layer that behaves as an old release's."""
    return lambda name: fl.layers.BatchNormalization(policy=policy, name=name)


@keras.saving.register_keras_serializable("casebook")
class WithoutTracking(keras.layers.BatchNormalization):
    """torch's ``track_running_stats=False`` set on a trained layer, as some use it to freeze."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if not training:
            return super().call(inputs, training=False, mask=mask)
        axes = list(range(len(inputs.shape) - 1))
        mean, variance = ops.moments(inputs, axes=axes)
        return ops.batch_normalization(
            inputs, mean, variance, -1, self.beta, self.gamma, self.epsilon
        )


def tuned(seed: int, norm: Any, *, epochs: int) -> Any:
    """The pretrained net with a new head, blocks 1 to 3 frozen, fine-tuned on the target.

    The thawed block's average has time to settle, so that the frozen ones are the only trouble.
    """
    keras.utils.set_random_seed(seed)
    model = load_old(net(in_blocks(PREFIX, norm, stock(0.9))), head=False)
    freeze_blocks(model)
    x, y = part("new")
    x, y = target(x[:320]), y[:320]
    fit(model, x, y, epochs=epochs, lr=1e-2)
    return model, x[:SHOWN], y[:SHOWN]


def case_1(seed: int) -> Scenario:
    model, x, y = tuned(seed, legacy("batch"), epochs=10)
    shown = gap(model, x, y, at_least=0.2)
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_2(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = freeze_blocks(load_old(net(legacy("batch"))), 4)
    model.get_layer("head").trainable = False
    compiled(model, loss="mse")
    x, _ = part("new")
    x = x[:SHOWN]
    y = model.predict(x, verbose=0)
    inference, training = (outputs(model, x, training=mode) for mode in (False, True))
    shown = {
        "test loss": float(np.mean((inference - y) ** 2)),
        "train loss": float(np.mean((training - y) ** 2)),
    }
    assert shown["test loss"] < 1e-10 < 1e-5 < shown["train loss"], shown
    return Scenario(model=model, data=(x, y), shown=shown)


def case_4(seed: int) -> Scenario:
    model, x, y = tuned(seed, legacy("update"), epochs=5)
    before = load_old(net())
    moved = np.abs(statistics(model, PREFIX) - statistics(before, PREFIX)).mean()
    shown = {**gap(model, x, y, at_least=0.1), "moved": float(moved)}
    assert moved > 0.01, shown
    return Scenario(
        model=model, data=(x, y), options={"reference": before}, closable=True, shown=shown
    )


def case_5(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = compiled(load_old(net(stock(0.9))))
    for variable in model.trainable_variables:
        variable.trainable = False  # requires_grad = False
    before = compiled(load_old(net(stock(0.9))))
    x, y = part("new")
    x, y = x[:SHOWN], y[:SHOWN]
    first = model.predict(x, verbose=0)
    model(np.zeros((16, 16, 16, 1), "float32"), training=True)
    change = float(np.abs(model.predict(x, verbose=0) - first).max())
    assert change > 0.01
    return Scenario(
        model=model, data=(x, y), options={"reference": before}, shown={"change": change}
    )


def case_9(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = freeze_blocks(load_old(net(), head=False), 4, norms=False)
    before = load_old(net())
    x, y = part("new")
    fit(model, target(x[:320]), y[:320], epochs=5)
    x, y = target(x[:SHOWN]), y[:SHOWN]
    gammas = [
        np.abs(a.get_weights()[0] - b.get_weights()[0]).max()
        for a, b in ((model.get_layer(name), before.get_layer(name)) for name in NORMS)
    ]
    shown = {**gap(model, x, y, at_least=0.1), "gamma moved": float(min(gammas))}
    assert min(gammas) > 1e-3, shown
    return Scenario(
        model=model, data=(x, y), options={"reference": before}, closable=True, shown=shown
    )


def case_10(seed: int) -> Scenario:
    model, x, y = tuned(seed, lambda name: WithoutTracking(name=name), epochs=10)
    still = np.abs(statistics(model, PREFIX) - statistics(load_old(net()), PREFIX)).max()
    assert still == 0
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.2))


def case_28(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((16, 16, 1))
    features = inputs
    for block, filters in ((1, 8), (2, 8)):
        features = keras.layers.Conv2D(filters, 3, padding="same", name=f"conv{block}")(features)
        features = keras.layers.BatchNormalization(name=f"bn{block}")(features)
        features = keras.layers.ReLU(name=f"relu{block}")(features)
    mask = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="decoder")(features)
    mask = keras.layers.Conv2D(1, 1, activation="sigmoid", name="mask")(mask)
    model = freeze_blocks(load_old(keras.Model(inputs, mask)), 2, norms=False)
    x, _ = part("new")
    y = (x > 0.9).astype("float32")  # few pixels are foreground
    fit(model, target(x[:320]), y[:320], epochs=4, lr=1e-2, loss="binary_crossentropy")
    x, y = target(x[:SHOWN]), y[:SHOWN]
    inference, training = (
        np.clip(outputs(model, x, training=mode), 1e-7, 1 - 1e-7) for mode in (False, True)
    )
    losses = [
        float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()) for p in (inference, training)
    ]
    shown = dict(zip(("inference loss", "training loss"), losses, strict=True))
    assert losses[0] - losses[1] > 0.02, shown
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_36(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = load_old(net())
    x, y = part("new")
    x, y = target(x[:320]), y[:320]
    fit(model, x, y, epochs=1)
    for name in PREFIX:
        model.get_layer(name).trainable = False
    before = statistics(model, PREFIX)
    model.fit(x, y, batch_size=32, epochs=3, verbose=0)
    moved = float(np.abs(statistics(model, PREFIX) - before).max())
    assert moved > 0.01  # they say frozen, and moved
    return Scenario(model=model, data=(x[:SHOWN], y[:SHOWN]), shown={"moved": moved})


CASES = (
    Case(
        number="1",
        title="Keras 2.1.3-2.2.4: frozen blocks normalise with the batch",
        expected=("FROZEN_BATCH_STATS",),
        sites=frozenset(PREFIX),
        build=case_1,
        everywhere=True,
    ),
    Case(
        number="2",
        title="canary: everything frozen, labels are its own predictions",
        expected=("FROZEN_BATCH_STATS",),
        sites=frozenset(NORMS),
        build=case_2,
        everywhere=True,
    ),
    Case(
        number="4",
        title="Keras < 2.1.3: statistics of frozen layers move",
        expected=("FROZEN_DRIFT",),
        sites=frozenset(PREFIX),
        build=case_4,
        everywhere=True,
    ),
    Case(
        number="5",
        title="no gradient, one training-mode pass of zeros",
        expected=("FROZEN_DRIFT",),
        sites=frozenset(NORMS),
        build=case_5,
    ),
    Case(
        number="9",
        title="frozen backbone whose BN trains on (affine part too)",
        expected=("FROZEN_DRIFT",),
        sites=frozenset(NORMS),
        build=case_9,
    ),
    Case(
        number="10",
        title="track_running_stats=False used as a freeze",
        expected=("FROZEN_BATCH_STATS",),
        sites=frozenset(PREFIX),
        build=case_10,
    ),
    Case(
        number="28",
        title="segmentation, encoder frozen but for its BN, few steps",
        expected=("FROZEN_DRIFT",),
        also=("EMA_LAG",),
        sites=frozenset({"bn1", "bn2"}),
        build=case_28,
    ),
    Case(
        number="36",
        title="trainable flipped after compile",
        expected=("STALE_SWITCH",),
        sites=frozenset(PREFIX),
        build=case_36,
        backends=("tensorflow",),  # JAX refuses to train on, torch complies
    ),
)
