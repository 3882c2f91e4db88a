"""The Keras view: forward and score against Keras itself; nothing moves, everything comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.adapters import adapter_of
from frostline.adapters.keras import state as keras_state
from frostline.types import DataError, ModelError

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (10, 4)).astype("float32")
Y = RNG.normal(size=(10, 1)).astype("float32")


class AddsLoss(L.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return x


def network() -> Any:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    x = L.Dense(5, kernel_regularizer="l2", activity_regularizer="l1", name="d1")(inputs)
    x = L.BatchNormalization(gamma_regularizer="l2", name="bn")(AddsLoss(name="adds")(x))
    return keras.Model(inputs, L.Dense(1, name="head")(L.Dropout(0.5, seed=3)(x)))


def compiled(**options: Any) -> Any:
    model = network()
    options = {"optimizer": "adam", "loss": "mse", "metrics": ["mae"], **options}
    model.compile(**options)
    return model


def state(model: Any) -> list[Any]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in keras_state.variables_of(model)]


def flags(model: Any) -> list[Any]:
    layers = [model, *model._flatten_layers(include_self=False)]
    return [*(x.trainable for x in layers), *(v.trainable for v in model.variables)]


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True)
    )


# --- forward and score ----------------------------------------------------------------------------


def test_phase_0_is_predict() -> None:
    model = compiled()
    seen = adapter_of(model).forward(X.astype("float64"), training=False)
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)


def test_phase_1_uses_the_statistics_of_the_batch() -> None:
    model = keras.Sequential([keras.Input((4,)), L.BatchNormalization(epsilon=1e-3)])
    wanted = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-3)
    np.testing.assert_allclose(adapter_of(model).forward(X, training=True), wanted, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_pass_changes_nothing(training: bool) -> None:
    model = compiled()
    model.fit(X, Y, verbose=0)
    before, seen = state(model), adapter_of(model)
    seen.forward(X, training=training)
    seen.score(X, Y, training=training)
    assert same(before, state(model))


@pytest.mark.parametrize("convert", [False, True], ids=["stock", "ours"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_loss_is_that_of_evaluate(convert: bool, frozen: bool, eager: bool) -> None:
    """With weight and activity regularizers and with what layers add."""
    model = compiled(run_eagerly=eager)
    if convert:
        fl.convert(model)
    model.get_layer("bn").trainable = not frozen
    weight = np.linspace(0.5, 2, 10).astype("float32")
    _, loss = adapter_of(model).score(X, Y, weight, training=False)
    logs = model.evaluate(X, Y, sample_weight=weight, batch_size=10, verbose=0, return_dict=True)
    assert loss == pytest.approx(logs["loss"], rel=1e-5)
    plain = float(np.mean(weight * np.mean((model.predict(X, verbose=0) - Y) ** 2, axis=1)))
    assert loss > plain * 1.01  # the additional losses are in it


def test_no_loss_without_compile() -> None:
    assert adapter_of(network()).score(X, Y, training=False)[1] is None


def test_a_view_follows_the_model() -> None:
    """Weights, flags, policy and a new loss count, though steps were compiled before."""
    model = fl.convert(compiled())
    seen, site = adapter_of(model), model.get_layer("bn")
    first = seen.forward(X, training=True)
    site.trainable = False
    assert not np.allclose(first, seen.forward(X, training=True))
    site.policy = "batch"
    np.testing.assert_allclose(first, seen.forward(X, training=True), rtol=1e-5, atol=1e-6)
    model.get_layer("head").bias.assign([7.0])
    np.testing.assert_allclose(first + 7, seen.forward(X, training=True), rtol=1e-4, atol=1e-5)
    squared = seen.score(X, Y, training=False)[1]
    model.compile("sgd", "mae")
    assert seen.score(X, Y, training=False)[1] != squared
    logs = model.evaluate(X, Y, batch_size=10, verbose=0, return_dict=True)
    assert seen.score(X, Y, training=False)[1] == pytest.approx(logs["loss"], rel=1e-5)


def test_dropout_repeats_per_step_and_differs_between_steps() -> None:
    inputs = keras.Input((4,))
    seen = adapter_of(keras.Model(inputs, L.Dropout(0.5)(inputs)))
    first, again, other = (seen.forward(X, training=True, step=step) for step in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_structures_and_kinds_of_inputs() -> None:
    a, b = keras.Input((4,), name="a"), keras.Input((), dtype="int32", name="b")
    x = L.BatchNormalization()(L.Concatenate()([a, L.Embedding(7, 3)(b)]))
    outputs = {"one": L.Dense(1, name="one")(x), "two": L.Dense(2, name="two")(x)}
    model = keras.Model({"a": a, "b": b}, outputs)
    data = {"a": X.astype("float64"), "b": np.arange(10) % 7}
    seen = adapter_of(model).forward(data, training=False)
    for name, wanted in model.predict({"a": X, "b": data["b"]}, verbose=0).items():
        np.testing.assert_allclose(seen[name], wanted, rtol=1e-5, atol=1e-6)


def test_half_precision_comes_back_as_float32() -> None:
    inputs = keras.Input((4,))
    outputs = L.BatchNormalization(dtype="mixed_bfloat16")(inputs)
    assert adapter_of(keras.Model(inputs, outputs)).forward(X, training=True).dtype == np.float32


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_the_axis_of_the_channels_is_that_of_the_first_layer_that_has_one(layout: str) -> None:
    inner = keras.Sequential([L.Conv2D(2, 1, data_format=layout)])
    model = keras.Sequential([keras.Input((3, 3, 3)), L.ReLU(), inner, L.Flatten(), L.Dense(1)])
    assert adapter_of(model).channel_axis == {"channels_first": 1, "channels_last": -1}[layout]
    assert adapter_of(network()).channel_axis == -1


def test_labels_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"label shapes \(7, 3\)") as caught:
        adapter_of(compiled()).score(X, np.ones((7, 3), "float32"), training=False)
    assert "\n" not in str(caught.value)


def test_torch_modules_keep_their_buffers(backend: str) -> None:
    if backend != "torch":
        pytest.skip("TorchModuleWrapper exists on the torch backend only")
    import torch

    norm = torch.nn.BatchNorm1d(4)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, L.TorchModuleWrapper(norm, output_shape=(None, 4))(inputs))
    norm.eval()
    before, generator = norm.running_mean.clone(), torch.get_rng_state()
    adapter_of(model).forward(X, training=True)
    assert torch.equal(before, norm.running_mean)
    assert not norm.training
    assert torch.equal(generator, torch.get_rng_state())


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluate_is_the_models_own_and_leaves_metrics_alone() -> None:
    model = compiled()
    model.fit(X, Y, verbose=0)
    before, step = state(model), model.test_function
    seen = adapter_of(model).evaluate([(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])])
    assert same(before, state(model))
    assert model.test_function is step
    # Keras on JAX knows the losses of layers by id() and keeps the ids of an earlier trace: where a
    # new loss happens to get one of them, its own evaluate leaves that loss out.
    model._clear_losses()
    wanted = model.evaluate(X, Y, batch_size=4, verbose=0, return_dict=True)
    assert seen == pytest.approx(wanted, rel=1e-5)


def test_evaluate_of_a_model_that_met_no_data_builds_nothing_for_good() -> None:
    metric = keras.metrics.MeanAbsoluteError(name="given")
    model = compiled(metrics=[metric, "mse"])
    parts = (model.optimizer, model._compile_metrics, model._compile_loss)
    before = [state(model), flags(model)]
    adapter_of(model).evaluate([(X, Y)])
    assert same(before[0], state(model))
    assert flags(model) == before[1]
    assert (model.optimizer, model._compile_metrics, model._compile_loss) == parts
    assert not any(part.built for part in parts)
    assert [float(np.array(v)) for v in metric.variables] == [0.0, 0.0]
    logs = model.fit(X, Y, verbose=0).history  # and it still builds when it is used
    assert set(logs) == {"loss", "given", "mse"}


class Unbuilt(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="net")
        self.norm, self.head = L.BatchNormalization(name="bn"), L.Dense(1, name="head")

    def call(self, x: Any, training: Any = None) -> Any:
        return self.head(self.norm(x, training=training))


@pytest.mark.parametrize(
    "look",
    [
        lambda model: fl.phases(model, (X, Y)),
        lambda model: fl.diagnose(model, (X, Y), verbose=0),
        lambda model: fl.assert_frozen(model, data=X),
        lambda model: fl.assert_frozen(model, data=X, step=lambda net, batch: net(batch)),
    ],
    ids=["phases", "diagnose", "assert_frozen", "step"],
)
@pytest.mark.parametrize("compiles", [False, True])
def test_looking_does_not_build_a_model(look: Callable[[Any], Any], compiles: bool) -> None:
    model = Unbuilt()
    if compiles:
        model.compile("sgd", "mse")
    with pytest.raises(ModelError, match="call the model on one batch first"):
        look(model)
    assert not any(layer.built for layer in (model, model.norm, model.head))
    model(X)
    fl.freeze(model)
    look(model)
    fl.unfreeze(model)
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)


def test_a_model_of_built_parts_that_was_not_called_is_looked_at() -> None:
    model = Unbuilt()
    model.norm.build(X.shape)
    model.head.build(X.shape)
    fl.phases(model, (X, Y))
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)


def test_evaluate_without_compile() -> None:
    assert adapter_of(network()).evaluate([(X, Y)]) == {}


# --- preserved ------------------------------------------------------------------------------------


class Interrupts(keras.callbacks.Callback):  # type: ignore[misc]
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise KeyboardInterrupt

    on_test_batch_end = on_predict_batch_end = on_train_batch_end


def fit(model: Any) -> None:
    model.fit(X, Y, batch_size=5, verbose=0, callbacks=[Interrupts()])


def evaluate(model: Any) -> None:
    model.evaluate(X, Y, batch_size=5, verbose=0, callbacks=[Interrupts()])


def predict(model: Any) -> None:
    model.predict(X, batch_size=5, verbose=0, callbacks=[Interrupts()])


def spoil(model: Any) -> None:
    model.trainable = False
    model.get_layer("bn").momentum = 0.5
    for variable in keras_state.variables_of(model):
        variable.assign(np.zeros(variable.shape, variable.dtype))
    model.compile("sgd", "mae")
    raise KeyboardInterrupt


@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
@pytest.mark.parametrize("convert", [False, True], ids=["stock", "ours"])
@pytest.mark.parametrize("work", [fit, evaluate, predict, spoil])
def test_everything_comes_back_after_an_interrupt(
    work: Callable[[Any], None], convert: bool, fresh: bool
) -> None:
    model = compiled()
    if convert:
        fl.convert(model)
    if not fresh:
        model.fit(X, Y, verbose=0)
    model.get_layer("d1").trainable = False
    model.get_layer("bn").gamma.trainable = convert  # a flag that no layer has
    kept = [model.optimizer, model.train_function, model.test_function, model.predict_function]
    before, marks = state(model), flags(model)
    objects = [id(variable) for variable in keras_state.variables_of(model)]
    # Keras on JAX refuses to train after the flags changed: another way to be interrupted.
    with pytest.raises((KeyboardInterrupt, ValueError)), adapter_of(model).preserved():
        work(model)
    assert same(before, state(model))
    assert flags(model) == marks
    assert [id(variable) for variable in keras_state.variables_of(model)] == objects
    now = [model.optimizer, model.train_function, model.test_function, model.predict_function]
    assert all(a is b for a, b in zip(kept, now, strict=True))
    assert model.get_layer("bn").momentum == 0.99
    outputs = model.predict(X, verbose=0)
    np.testing.assert_allclose(
        outputs, adapter_of(model).forward(X, training=False), rtol=1e-4, atol=1e-5
    )


def test_training_goes_on_as_if_nothing_had_been() -> None:
    def trained(between: Callable[[Any], None]) -> list[Any]:
        model = compiled()
        model.fit(X, Y, batch_size=5, shuffle=False, verbose=0)
        with adapter_of(model).preserved():
            between(model)
        model.fit(X, Y, batch_size=5, shuffle=False, verbose=0)
        return model.get_weights()

    plain = trained(lambda model: None)
    beside = trained(lambda model: model.fit(-X, Y, epochs=2, verbose=0))
    for a, b in zip(plain, beside, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_policy_and_live_switch_come_back() -> None:
    model = fl.convert(compiled())
    site = model.get_layer("bn")
    site.trainable = False
    before = state(model)
    with adapter_of(model).preserved():
        site.trainable, site.policy, site.momentum = True, "update", 0.3
        model.fit(X, Y, verbose=0)
    assert (site.trainable, site.policy, site.momentum) == (False, "inference", 0.99)
    assert same(before, state(model))
