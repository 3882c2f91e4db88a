"""Flipping ``trainable`` between two training steps, without ``compile``.

The oracle is a run with the *stock* layer that is recompiled at that point with the same flags, and
whose optimizer keeps its state: what the user would have got by doing it by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from frostline.layers import BatchNormalization

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd-momentum": lambda: keras.optimizers.SGD(0.02, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(5e-3),
    "adamw": lambda: keras.optimizers.AdamW(5e-3, weight_decay=0.1),
}
FLIPPED = ("bn1", "bn2")
STEPS = 4


class CountTraces(keras.layers.Layer):
    """Counts how often its ``call`` runs in Python: once per trace in compiled backends."""

    traces = 0

    def call(self, inputs: Any) -> Any:
        CountTraces.traces += 1
        return inputs


def build(layer_class: type, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(7)
    layers = keras.layers
    # No biases in front of BN: their true gradient is 0, and Adam would amplify its rounding error.
    # Smooth activations: a ReLU kink would amplify rounding as well.
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, use_bias=False, name="c1")(inputs)
    x = layer_class(momentum=0.9, name="bn1", **options)(x)
    x = layers.Activation("tanh")(x)
    x = layers.Conv2D(6, 3, use_bias=False, name="c2")(x)
    x = layer_class(name="bn2", **options)(x)
    x = layers.Activation("tanh")(x)
    x = layers.Conv2D(6, 3, use_bias=False, name="c3")(x)
    x = layer_class(name="bn3", **options)(x)
    x = layers.GlobalAveragePooling2D()(CountTraces()(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def batches() -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(11)
    x = rng.normal(1.0, 2.0, (2 * STEPS, 16, 8, 8, 3)).astype("float32")
    y = rng.normal(0.0, 1.0, (2 * STEPS, 16, 3)).astype("float32")
    return list(zip(x, y, strict=True))


def set_trainable(model: keras.Model, value: bool) -> None:
    for name in FLIPPED:
        model.get_layer(name).trainable = value


def recompile_keeping_state(model: keras.Model) -> None:
    """Compile anew for the present flags; every variable keeps its optimizer slots."""
    old = model.optimizer
    slots = {variable.path: keras.ops.convert_to_numpy(variable) for variable in old.variables}
    new = type(old).from_config(old.get_config())
    model.compile(new, "mse")
    new.build(model.trainable_variables)
    for variable in new.variables:
        if variable.path in slots:
            variable.assign(slots[variable.path])


def train(model: keras.Model, data: list[tuple[Any, Any]]) -> None:
    for x, y in data:
        model.train_on_batch(x, y)


def weights(model: keras.Model) -> dict[str, Any]:
    return {
        f"{layer.name}/{index}": keras.ops.convert_to_numpy(weight)
        for layer in model.layers
        for index, weight in enumerate(layer.weights)
    }


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("start", [True, False], ids=["freeze", "thaw"])
def test_flip_equals_recompiling(optimizer: str, start: bool) -> None:
    data = batches()
    stock, ours = build(keras.layers.BatchNormalization), build(BatchNormalization)
    ours.set_weights(stock.get_weights())
    for model in (stock, ours):
        set_trainable(model, start)
        model.compile(OPTIMIZERS[optimizer](), "mse")

    train(stock, data[:STEPS])
    set_trainable(stock, not start)
    recompile_keeping_state(stock)
    train(stock, data[STEPS:])

    train(ours, data[:1])
    traced, step = CountTraces.traces, ours.train_function
    train(ours, data[1:STEPS])
    before = weights(ours)
    set_trainable(ours, not start)
    train(ours, data[STEPS:])

    for (name, expected), received in zip(
        weights(stock).items(), weights(ours).values(), strict=True
    ):
        np.testing.assert_allclose(received, expected, atol=1e-6, rtol=1e-6, err_msg=name)
    frozen_in_second_half = start
    for name, value in weights(ours).items():
        if name.split("/")[0] in FLIPPED:
            assert np.array_equal(value, before[name]) == frozen_in_second_half, name
    assert ours.train_function is step
    if keras.backend.backend() != "torch":  # torch runs eagerly: nothing is ever traced
        assert CountTraces.traces == traced


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_there_and_back(optimizer: str) -> None:
    """Train, freeze, train, thaw, train: bits stay while frozen and move again after."""
    model = build(BatchNormalization)
    model.compile(OPTIMIZERS[optimizer](), "mse")
    data = batches()
    train(model, data[:2])
    traced = CountTraces.traces
    for value in (False, True, False, True):
        set_trainable(model, value)
        before = weights(model)
        train(model, data[2:4])
        for name, weight in weights(model).items():
            moved = not np.array_equal(weight, before[name])
            assert moved == (value or name.split("/")[0] not in FLIPPED), (value, name)
    if keras.backend.backend() != "torch":
        assert CountTraces.traces == traced


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
@pytest.mark.parametrize("eagerly", [True, False], ids=["eager", "compiled"])
def test_flip_in_every_execution_mode(eagerly: bool, jit: bool) -> None:
    if eagerly and jit:
        pytest.skip("Keras refuses run_eagerly together with jit_compile")
    if jit and keras.backend.backend() == "torch":
        pytest.skip(
            "torch.compile needs a C++ toolchain; its Python guards re-specialise by design"
        )
    model = build(BatchNormalization)
    model.compile(OPTIMIZERS["adamw"](), "mse", run_eagerly=eagerly, jit_compile=jit)
    data = batches()
    train(model, data[:2])
    for value in (False, True):
        set_trainable(model, value)
        before = weights(model)
        train(model, data[2:4])
        for name, weight in weights(model).items():
            moved = not np.array_equal(weight, before[name])
            assert moved == (value or name.split("/")[0] not in FLIPPED), (value, name)


def test_flip_inside_fit() -> None:
    """A callback flips the flag in the middle of an epoch; the next step obeys."""
    seen: list[dict[str, Any]] = []

    class Flip(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            model = self.model
            seen.append(weights(model))
            set_trainable(model, batch not in (1, 2))

    model = build(BatchNormalization)
    model.compile(OPTIMIZERS["adam"](), "mse")
    x, y = (np.concatenate(part) for part in zip(*batches(), strict=True))
    model.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0, callbacks=[Flip()])
    for step in range(1, len(seen)):
        same = np.array_equal(seen[step]["bn1/2"], seen[step - 1]["bn1/2"])
        assert same == (step in (2, 3)), step
        assert np.array_equal(seen[step]["bn1/0"], seen[step - 1]["bn1/0"]) == same


def test_momentum_is_live() -> None:
    model = build(BatchNormalization)
    model.compile(OPTIMIZERS["sgd-momentum"](), "mse")
    data = batches()
    train(model, data[:1])
    traced = CountTraces.traces
    bn = model.get_layer("bn1")
    bn.momentum = 1.0
    before = keras.ops.convert_to_numpy(bn.moving_mean)
    train(model, data[1:3])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(bn.moving_mean), before)
    inputs_of_bn = keras.Model(model.inputs, model.get_layer("c1").output)
    features = inputs_of_bn.predict(data[3][0], verbose=0)
    traced_after_predict = CountTraces.traces
    bn.momentum = 0.0
    train(model, data[3:4])
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(bn.moving_mean), features.mean((0, 1, 2)), atol=1e-5
    )
    assert bn.get_config()["momentum"] == 0.0
    if keras.backend.backend() != "torch":
        assert CountTraces.traces == traced == traced_after_predict


def test_assigning_weights_while_frozen() -> None:
    """What is set while frozen is what the layer computes with, keeps, and thaws with."""
    model = build(BatchNormalization)
    model.compile(OPTIMIZERS["adamw"](), "mse")
    data = batches()
    train(model, data[:1])
    bn = model.get_layer("bn1")
    bn.trainable = False
    new = [np.full(6, value, "float32") for value in (2.0, -1.0, 0.5, 3.0)]
    bn.set_weights(new)
    train(model, data[1:3])
    for weight, expected in zip(bn.get_weights(), new, strict=True):
        np.testing.assert_array_equal(weight, expected)
    x = data[0][0][..., :1].repeat(6, -1)
    expected = (x - 0.5) / np.sqrt(3.0 + bn.epsilon) * 2.0 - 1.0
    np.testing.assert_allclose(keras.ops.convert_to_numpy(bn(x)), expected, atol=1e-5)
    bn.trainable = True
    for weight, expected in zip(bn.get_weights(), new, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_regularizer_counts_only_while_trainable() -> None:
    penalty = keras.regularizers.L2(0.5)
    stock = build(keras.layers.BatchNormalization, gamma_regularizer=penalty)
    ours = build(BatchNormalization, gamma_regularizer=penalty)
    ours.set_weights(stock.get_weights())
    x, y = batches()[0]
    for model in (stock, ours):
        model.compile(keras.optimizers.SGD(0.0), "mse")
    for value in (True, False, True):
        for model in (stock, ours):
            set_trainable(model, value)
        stock.compile(keras.optimizers.SGD(0.0), "mse")
        expected = stock.train_on_batch(x, y)
        ours.reset_metrics()
        np.testing.assert_allclose(ours.train_on_batch(x, y), expected, rtol=1e-5)


@pytest.mark.parametrize("start", [True, False], ids=["freeze", "thaw"])
def test_not_live_is_the_stock_layer(start: bool) -> None:
    """With ``live=False`` the optimizer gets the stock lists and a flip needs ``compile``."""
    data = batches()
    stock, ours = build(keras.layers.BatchNormalization), build(BatchNormalization, live=False)
    ours.set_weights(stock.get_weights())
    for model in (stock, ours):
        for value in (start, not start):
            set_trainable(model, value)
            model.compile(OPTIMIZERS["adamw"](), "mse")
            train(model, data[:STEPS])
    names = [[w.path for w in model.trainable_variables] for model in (stock, ours)]
    assert names[0] == names[1]
    for received, expected in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, atol=1e-6, rtol=1e-6)


def test_switching_live_keeps_what_the_layer_computes() -> None:
    layer = BatchNormalization()
    x = np.ones((2, 3), "float32")
    layer(x)
    layer.trainable = False
    for live, value in ((False, 2.0), (True, 3.0), (False, 4.0)):
        layer.set_weights([np.full(3, value + 1, "float32")] * 4)
        layer.live = live
        for weight in layer.get_weights():
            np.testing.assert_array_equal(weight, np.full(3, value + 1, "float32"))
    layer.trainable = True
    np.testing.assert_array_equal(layer.get_weights()[0], np.full(3, 5.0, "float32"))


def test_canary_own_predictions_as_labels() -> None:
    """keras#9522: all frozen, targets = own predictions; the training-mode loss must be 0."""
    model = build(BatchNormalization)
    data = batches()
    model.compile(OPTIMIZERS["adam"](), "mse")
    train(model, data[:3])
    for layer in model.layers:
        if layer.name != "head":
            layer.trainable = False
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = data[4][0]
    assert model.train_on_batch(x, model.predict(x, verbose=0)) <= 1e-6


def test_a_ramp_starts_at_the_stored_statistics_even_if_those_of_the_batch_are_nan() -> None:
    layer = BatchNormalization()
    layer.build((None, 2))
    layer.reserve_ramp()
    layer.start_ramp(4)
    x = np.array([[1.0, 2.0], [3.0, np.nan]], "float32")
    received = keras.ops.convert_to_numpy(layer(x, training=True))
    expected = x / np.sqrt(1.0 + layer.epsilon)
    np.testing.assert_allclose(received, expected, rtol=1e-6)
