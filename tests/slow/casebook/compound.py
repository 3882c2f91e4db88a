"""Cases C1 and C3: two causes at once, both to be named."""

from __future__ import annotations

from typing import Any

import keras

import frostline as fl

from .bench import (
    NORMS,
    Case,
    Scenario,
    fit,
    freeze_blocks,
    gap,
    in_blocks,
    load_old,
    net,
    part,
    score,
    stock,
    target,
)

SHOWN = 256


def for_bytes(model: Any) -> Any:
    """Turn the pretrained net into one that was pretrained on pixels from 0 to 255.

    The same kernels on inputs that are 255 times larger: bias and statistics behind them grow.
    """
    kernel, bias = model.get_layer("conv1").get_weights()
    model.get_layer("conv1").set_weights([kernel, 255 * bias])
    gamma, beta, mean, variance = model.get_layer("bn1").get_weights()
    model.get_layer("bn1").set_weights([gamma, beta, 255 * mean, 255.0**2 * variance])
    return model


def case_c1(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    legacy = in_blocks(
        NORMS[:3],
        lambda name: fl.layers.BatchNormalization(policy="batch", name=name),
        stock(0.9),
    )
    model = freeze_blocks(for_bytes(load_old(net(legacy), head=False)))
    x, y = part("new")
    x, y = target(x[:320]), y[:320]  # rescaled by 1/255, which the backbone does not expect
    fit(model, x, y, epochs=10, lr=1e-2)
    x, y = x[:SHOWN], y[:SHOWN]
    shown = gap(model, x, y, at_least=0.5)
    shown["inference loss on bytes"] = score(model, 255 * x, y, training=False).loss
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_c3(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = net(before=[keras.layers.Rescaling(1 / 255, name="rescale")])
    load_old(model, head=False)
    x, y = part("new")
    x, y = x[:320], y[:320]  # between 0 and 1 already, and the model divides by 255 again
    right = score(load_old(net()), x, y, training=False)
    fit(model, x, y, epochs=5, lr=1e-2)
    x, y = x[:SHOWN], y[:SHOWN]
    shown = gap(model, x, y, at_least=0.3)
    shown["accuracy before, on bytes"] = right.accuracy
    return Scenario(model=model, data=(x, y), shown=shown)


CASES = (
    Case(
        number="C1",
        title="frozen layers on batch statistics and the wrong input scale",
        expected=("FROZEN_BATCH_STATS", "PREPROCESS"),
        sites=frozenset(NORMS[:3]),
        build=case_c1,
        everywhere=True,
    ),
    Case(
        number="C3",
        title="scaled twice, all BN thawed, few steps",
        expected=("EMA_LAG", "PREPROCESS"),
        sites=frozenset(NORMS),
        build=case_c3,
    ),
)
