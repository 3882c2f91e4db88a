"""Cases 11, 12, 14, 15, 17, 20, 21, 24, 33, 38 and N14: averages too slow, or never updated."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from .bench import (
    NORMS,
    Case,
    Scenario,
    both,
    compiled,
    fit,
    gap,
    load_old,
    net,
    part,
    statistics,
    stock,
    target,
)

ALL = frozenset(NORMS)
SHOWN = 256


@keras.saving.register_keras_serializable("casebook")
class MeanOnly(keras.layers.BatchNormalization):
    """Forgets to assign the moving variance, as an early Keras 3 did."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        kept = self.moving_variance + 0.0
        result = super().call(inputs, training=training, mask=mask)
        self.moving_variance.assign(kept)
        return result


class WithoutTraining(keras.Model):
    """A training loop that calls the net without ``training=True``."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def call(self, x: Any, training: Any = None) -> Any:
        return self.inner(x, training=False)


def scratch(seed: int, momentum: float = 0.99) -> Any:
    keras.utils.set_random_seed(seed)
    return net(stock(momentum))


def case_11(seed: int) -> Scenario:
    model = scratch(seed)
    x, y = part("new")
    rows = [int(np.flatnonzero(y == label)[0]) for label in (0, 1, 2)]
    x, y = x[rows], y[rows]
    fit(model, x, y, epochs=5, batch_size=3, lr=1e-2)
    shown = gap(model, x, y, at_least=0.5, batch_size=3)
    assert shown["training accuracy"] == 1, shown
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_12(seed: int) -> Scenario:
    model = scratch(seed)
    x, y = (values[:128] for values in part("new"))
    fit(model, x, y, epochs=100, batch_size=128, lr=1e-2)
    shown = gap(model, x, y, at_least=0.2, batch_size=128)
    return Scenario(
        model=model, data=(x, y), options={"batch_size": 128}, closable=True, shown=shown
    )


def case_14(seed: int) -> Scenario:
    model = scratch(seed)
    x, y = part("new")
    rows = np.flatnonzero(y < 2)[:40]
    x, y = x[rows], y[rows]
    history = fit(model, x, y, epochs=12, batch_size=10, lr=3e-3, validation_data=(x, y))
    shown = gap(model, x, y, at_least=0.2, batch_size=10)
    return Scenario(
        model=model,
        data=(x, y),
        options={"batch_size": 10, "history": history},
        closable=True,
        shown=shown,
    )


def case_15(seed: int) -> Scenario:
    model = scratch(seed, momentum=0.999)
    x, y = (values[:320] for values in part("new"))
    fit(model, x, y, epochs=30, batch_size=32)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.5))


def case_17(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = load_old(net(stock(1.0)))
    before = statistics(model)
    x, y = part("new")
    x, y = target(x[:320]), y[:320]
    fit(model, x, y, epochs=6)
    np.testing.assert_array_equal(statistics(model), before)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.5))


def case_20(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = net(lambda name: MeanOnly(momentum=0.9, name=name))
    x, y = part("new")
    x, y = x[:320], y[:320]
    fit(model, x, y, epochs=8)
    for name in NORMS:
        np.testing.assert_array_equal(model.get_layer(name).get_weights()[3], 1.0)
        assert np.all(model.get_layer(name).get_weights()[2] != 0)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.3))


def case_21(seed: int) -> Scenario:
    model = scratch(seed)
    x, y = part("new")
    x, y = x[y < 2], y[y < 2]  # without normalisation it learns slowly
    history = fit(WithoutTraining(model), x, y, epochs=15, lr=1e-2)
    stored = statistics(model)
    assert set(np.unique(stored)) == {0.0, 1.0}
    compiled(model)
    inference, training = both(model, x, y)
    shown = {
        "first loss": history["loss"][0],
        "inference loss": inference.loss,
        "training loss": training.loss,
    }
    assert inference.loss < 0.5 * history["loss"][0], shown  # it learned, with 0 and 1
    return Scenario(model=model, data=(x, y), shown=shown)


def case_21b(seed: int) -> Scenario:
    model = scratch(seed)
    x, y = part("new")
    x, y = x[:320], y[:320]
    fit(model, x, y, epochs=8)
    for name in NORMS:  # as if the update ops had never run: training does not read them
        gamma, beta, mean, variance = model.get_layer(name).get_weights()
        model.get_layer(name).set_weights([gamma, beta, 0 * mean, 0 * variance + 1])
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.3))


def case_24(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = compiled(net(stock(moving_variance_initializer="zeros")))
    x, y = (values[:SHOWN] for values in part("new"))
    shown = gap(model, x, y, at_least=1)
    return Scenario(model=model, data=(x, y), shown=shown)


def case_24b(seed: int) -> Scenario:
    model = compiled(load_old(scratch(seed)))
    for name in NORMS:
        gamma, beta, mean, _ = model.get_layer(name).get_weights()
        with np.errstate(invalid="ignore"):
            none = np.zeros_like(mean) / np.float32(0)  # 0 / (1 - momentum**0)
        model.get_layer(name).set_weights([gamma, beta, none, none])
    x, y = (values[:SHOWN] for values in part("new"))
    assert np.isnan(model.predict(x, verbose=0)).all()
    return Scenario(model=model, data=(x, y), closable=True)


def case_33(seed: int) -> Scenario:
    keras.utils.set_random_seed(seed)
    model = load_old(net(stock(0.9)), head=False)
    x, y = part("new")
    x, y = target(x[:320]), y[:320]
    fit(model, x, y, epochs=3, lr=1e-2)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.1))


def case_38(seed: int) -> Scenario:
    model = scratch(seed, momentum=0.9)
    model(np.zeros((1, 16, 16, 1), "float32"), training=True)
    start = statistics(model)
    x, y = part("new")
    fit(model, x[:320], y[:320], epochs=13)
    fit(model, x[:320], y[:320], epochs=3, lr=2e-4)  # small steps: no lag of its own
    assert np.abs(start - np.repeat(0.5, len(start))).max() > 0
    inference, training = both(model, x[:SHOWN], y[:SHOWN])
    shown = {"inference loss": inference.loss, "training loss": training.loss}
    assert inference.loss < training.loss + 0.03, shown  # a long run forgets it
    return Scenario(model=model, data=(x[:SHOWN], y[:SHOWN]), shown=shown)


def case_n14(seed: int) -> Scenario:
    model = scratch(seed)
    x, y = part("new")
    validation = tuple(values[:128] for values in part("held out"))
    history = fit(model, x[:320], y[:320], epochs=6, lr=1e-2, validation_data=validation)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(
        model=model,
        data=(x, y),
        options={"validation": validation, "history": history},
        closable=True,
        shown=gap(model, x, y, at_least=0.3),
    )


CASES = (
    Case(
        number="11",
        title="three images, five steps at 0.99",
        expected=("EMA_LAG",),
        sites=ALL,
        build=case_11,
        everywhere=True,
    ),
    Case(
        number="12",
        title="one batch of 128, a hundred steps: weights faster than the average",
        expected=("EMA_LAG",),
        sites=ALL,
        build=case_12,
    ),
    Case(
        number="14",
        title="forty images, 48 steps",
        expected=("EMA_LAG",),
        sites=ALL,
        build=case_14,
        everywhere=True,
    ),
    Case(
        number="15",
        title="momentum 0.999, 300 steps",
        expected=("EMA_LAG",),
        sites=ALL,
        build=case_15,
    ),
    Case(
        number="17",
        title="ported with torch's momentum 0: statistics never move",
        expected=("STATS_NEVER_UPDATED",),
        sites=ALL,
        build=case_17,
        everywhere=True,
    ),
    Case(
        number="20",
        title="layer that updates the mean only",
        expected=("STATS_NEVER_UPDATED",),
        sites=ALL,
        build=case_20,
    ),
    Case(
        number="21",
        title="loop without training=True: statistics at 0 and 1, no gap in the loop",
        expected=("STATS_NEVER_UPDATED",),
        sites=ALL,
        build=case_21,
    ),
    Case(
        number="21b",
        title="loop with batch statistics whose updates are dropped",
        expected=("STATS_NEVER_UPDATED",),
        sites=ALL,
        build=case_21b,
        everywhere=True,
    ),
    Case(
        number="24",
        title="inference before any update, variance starts at 0",
        expected=("STATS_NEVER_UPDATED",),
        also=("POISONED",),
        sites=ALL,
        build=case_24,
    ),
    Case(
        number="24b",
        title="inference before any update, debiased by 0/0",
        expected=("POISONED",),
        also=("STATS_NEVER_UPDATED",),
        sites=ALL,
        build=case_24b,
    ),
    Case(
        number="33",
        title="pretrained, thirty steps on a new domain",
        expected=("EMA_LAG",),
        also=("DOMAIN_STATS",),
        sites=ALL,
        build=case_33,
    ),
    Case(
        number="38",
        title="one dummy pass of zeros before a long training",
        expected=("NONE",),
        build=case_38,
    ),
    Case(
        number="N14",
        title="looks like dropout and averaging, is a slow average",
        expected=("EMA_LAG",),
        sites=ALL,
        build=case_n14,
    ),
)
