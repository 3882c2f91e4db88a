"""Layers of a user's own that normalise in plain arithmetic: named, and BN is not acquitted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import frostline as fl  # noqa: E402

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(64, 4)) * 3 + 2).astype("float32")
Y = RNG.integers(0, 3, 64)


class ByHand(keras.layers.Layer):  # type: ignore[misc]
    """BN whose statistics have names that say nothing."""

    def build(self, shape: Any) -> None:
        self.a = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)
        self.b = self.add_weight(shape=(shape[-1],), initializer="ones", trainable=False)

    def call(self, x: Any, training: Any = None) -> Any:
        mean, variance = self.a + 0.0, self.b + 0.0
        if training:
            mean, variance = keras.ops.moments(x, axes=[0])
            self.a.assign(0.9 * self.a + 0.1 * mean)
            self.b.assign(0.9 * self.b + 0.1 * variance)
        return keras.ops.batch_normalization(x, mean, variance, axis=-1)


class Counted(keras.layers.Layer):  # type: ignore[misc]
    """Keeps one number of its own, which is no statistic."""

    def build(self, _: Any) -> None:
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any, training: Any = None) -> Any:
        if training:
            self.seen.assign(self.seen + 1)
        return x


def network(layer: Any) -> Any:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8), layer, keras.layers.ReLU()]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def test_bn_is_not_acquitted_where_a_layer_computes_by_hand() -> None:
    model = network(ByHand(name="own"))
    before = model.get_weights()
    report = fl.diagnose(model, (X, Y), verbose=0)
    assert "not BN" not in report.verdict
    assert "'own' (ByHand) keeps running statistics" in report.verdict
    assert "'own' (ByHand)" in fl.lint(model).verdict
    assert all(map(np.array_equal, before, model.get_weights()))


def test_what_freezing_does_not_hold_is_said_and_seen() -> None:
    model = network(ByHand(name="own"))
    assert "'own' (ByHand)" in str(fl.freeze(model))
    with pytest.raises(fl.NotFrozenError, match="data= shows whether they move"):
        fl.assert_frozen(model)
    with pytest.raises(fl.NotFrozenError, match=r"'own'.*whatever its flags say.*No flag reaches"):
        fl.assert_frozen(model, data=(X, Y))


@pytest.mark.parametrize("layer", [Counted, keras.layers.Normalization, keras.layers.Dropout])
def test_layers_that_keep_something_else_are_not_named(layer: Any) -> None:
    made = layer(0.1) if layer is keras.layers.Dropout else layer()
    report = fl.diagnose(network(made), (X, Y), verbose=0)
    assert "by hand" not in report.verdict
