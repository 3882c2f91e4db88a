"""The λ-forward: its ends are the framework's own passes, between them numpy in float64 decides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import frostline as fl
from frostline.adapters import adapter_of
from frostline.adapters.keras import compile as compile_passes
from frostline.adapters.keras.blend import BlendForward
from frostline.adapters.keras.site_handle import site_handles
from frostline.adapters.protocol import Condition
from frostline.data.batch import Batch
from frostline.numerics.attribution import path_integral
from frostline.types import DataError, ModelError

L = keras.layers
COMPILED = keras.backend.backend() != "torch"
SAMPLES = 12


# --- models -----------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("frostline-tests")
class Activated(keras.layers.BatchNormalization):
    """Normalises and squashes: a `call` that Frostline does not know."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return 2 * ops.tanh(super().call(inputs, training=training, mask=mask))


@keras.saving.register_keras_serializable("frostline-tests")
class Insisting(keras.layers.BatchNormalization):
    """In training mode whatever it is told."""

    def call(self, inputs: Any) -> Any:
        return super().call(inputs, training=True)


def images(channels: int = 3) -> Any:
    rng = np.random.default_rng(0)
    gain = rng.uniform(0.5, 2, (SAMPLES, 1, 1, 1))
    return (rng.normal(0.2, 1, (SAMPLES, 5, 5, channels)) * gain).astype("float32")


def residual(layer: Any = L.BatchNormalization) -> tuple[Any, Any]:
    inputs = keras.Input((5, 5, 3))
    x = layer(name="stem_bn")(L.Conv2D(4, 3, padding="same", name="stem")(inputs))
    y = layer(name="side_bn", scale=False)(L.DepthwiseConv2D(3, padding="same")(ops.tanh(x)))
    x = L.Flatten()(L.Add()([x, y]) * 0.5)
    return keras.Model(inputs, L.Dense(2)(layer(name="flat_bn", center=False)(x))), images()


def nested() -> tuple[Any, Any]:
    inner_in = keras.Input((5, 5, 4))
    inner = keras.Model(inner_in, L.BatchNormalization(name="bn")(inner_in), name="inner")
    block = keras.Sequential([keras.Input((5, 5, 3)), L.Conv2D(4, 3, padding="same"), inner])
    inputs = keras.Input((5, 5, 3))
    x = L.BatchNormalization(name="bn")(L.Conv2D(2, 3)(ops.tanh(block(inputs, training=False))))
    return keras.Model(inputs, L.Flatten()(x)), images()


def sequential(layer: Any = L.BatchNormalization) -> tuple[Any, Any]:
    first, last = layer(name="b1"), layer(name="b2", scale=False)
    parts = [L.Dense(4), first, L.Activation("tanh"), L.Dense(3), last]
    x = np.random.default_rng(2).normal(0, 1, (SAMPLES, 4)).astype("float32")
    return keras.Sequential([keras.Input((4,)), *parts]), x


class Net(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [(L.Conv2D(3, 3), L.BatchNormalization(name=f"b{i}")) for i in range(2)]

    def call(self, x: Any, training: Any = None) -> Any:
        for conv, norm in self.blocks:
            x = ops.tanh(norm(conv(x), training=training))
        return ops.mean(x, axis=(1, 2))


def subclassed() -> tuple[Any, Any]:
    model = Net()
    model(images()[:1])
    return model, images()


def shared() -> tuple[Any, Any]:
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    norm, dense = L.BatchNormalization(name="bn"), L.Dense(4)
    x = ops.tanh(norm(dense(left))) - norm(dense(right))
    model = keras.Model({"left": left, "right": right}, {"out": norm(L.Dense(4)(x)), "mid": x})
    rng = np.random.default_rng(1)
    left_values, right_values = rng.normal(0, 1, (2, SAMPLES, 4)).astype("float32")
    return model, {"left": left_values, "right": 2 * right_values + 0.5}


def masked() -> tuple[Any, Any]:
    inputs = keras.Input((6,), dtype="int32")
    x = L.BatchNormalization(name="b1")(L.Embedding(9, 4, mask_zero=True)(inputs))
    x = L.BatchNormalization(name="b2")(L.Dense(3, activation="tanh")(x))
    tokens = np.random.default_rng(0).integers(1, 9, (SAMPLES, 6))
    lengths = np.random.default_rng(1).integers(1, 7, SAMPLES)
    model = keras.Model(inputs, L.GlobalAveragePooling1D()(x))
    return model, (tokens * (np.arange(6) < lengths[:, None])).astype("int32")


def axes() -> tuple[Any, Any]:
    inputs = keras.Input((5, 5, 3))
    x = ops.tanh(L.BatchNormalization(axis=1)(inputs))
    return keras.Model(inputs, L.BatchNormalization(axis=2)(L.Dense(2)(x))), images()


def timewise() -> tuple[Any, Any]:
    inputs = keras.Input((3, 4))
    x = ops.tanh(L.TimeDistributed(L.BatchNormalization(name="bn"))(inputs))
    x = L.BatchNormalization(name="last")(L.Flatten()(x))
    return keras.Model(inputs, x), images()[:, :3, :4, 0]


def frozen_ours(policy: Any) -> tuple[Any, Any]:
    model, x = sequential(functools.partial(fl.layers.BatchNormalization, policy=policy))
    for layer in norms(model):
        layer.trainable = False
    return model, x


def half() -> tuple[Any, Any]:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return sequential()
    finally:
        keras.config.set_dtype_policy("float32")


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "residual": residual,
    "nested": nested,
    "subclassed": subclassed,
    "shared": shared,
    "masked": masked,
    "axes": axes,
    "timewise": timewise,
    "ours-inference": lambda: frozen_ours("inference"),
    "ours-batch": lambda: frozen_ours("batch"),
    "own-call": lambda: sequential(Activated),
    "half": half,
}


def build(name: str) -> tuple[Any, Any]:
    """Model and batch; statistics, scales and offsets are far from their initial values."""
    keras.utils.set_random_seed(1)
    model, x = BUILDERS[name]()
    for layer in norms(model):
        size = layer.moving_mean.shape[0]
        layer.moving_mean.assign(np.linspace(-0.3, 0.4, size))
        layer.moving_variance.assign(np.linspace(0.4, 0.9, size))
        for variable in (layer.gamma, layer.beta):
            if variable is not None:
                variable.assign(np.linspace(0.5, 1.5, size))
    return model, x


def norms(model: Any) -> list[Any]:
    found = [x for x in model._flatten_layers() if isinstance(x, L.BatchNormalization)]
    return list({id(layer): layer for layer in found}.values())


def by_path(model: Any) -> dict[str, Any]:
    return {path: handle.owner for path, handle in site_handles(model).items()}


# --- oracles ----------------------------------------------------------------------------------


@contextmanager
def spied(model: Any) -> Iterator[dict[int, list[tuple[Any, Any]]]]:
    """Inputs and masks of every BN layer in eager passes."""
    seen: dict[int, list[tuple[Any, Any]]] = {}

    def spy(layer: Any, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        kept = None if kwargs.get("mask") is None else ops.convert_to_numpy(kwargs["mask"])
        seen.setdefault(id(layer), []).append((ops.convert_to_numpy(x), kept))
        return call(x, *args, **kwargs)

    for layer in norms(model):
        vars(layer)["call"] = functools.partial(spy, layer, layer.call)
    try:
        yield seen
    finally:
        for layer in norms(model):
            del vars(layer)["call"]


@contextmanager
def exact_moments(model: Any) -> Iterator[None]:
    """Torch: Keras forms E[x²] − E[x]² there, which is wrong by more than the tests allow."""
    layers = [] if COMPILED else norms(model)

    def moments(layer: Any, stock: Any, x: Any, mask: Any) -> Any:
        if mask is not None:
            return stock(x, mask)
        import torch

        variance, mean = torch.var_mean(x, dim=layer._reduction_axes, correction=0)
        return mean, variance

    for layer in layers:
        vars(layer)["_moments"] = functools.partial(moments, layer, layer._moments)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["_moments"]


def arrays(structure: Any) -> list[Any]:
    return [np.asarray(ops.convert_to_numpy(leaf)) for leaf in keras.tree.flatten(structure)]


def assert_outputs(found: Any, wanted: Any, tolerance: float) -> None:
    for one, other in zip(arrays(found), arrays(wanted), strict=True):
        assert one.shape == other.shape
        scale = np.abs(other.astype(np.float64)).max()
        assert np.abs(one.astype(np.float64) - other).max() <= tolerance * scale


def assert_moments(model: Any, found: Any, seen: Any, tolerance: float) -> None:
    layers = by_path(model)
    assert found.keys() == layers.keys()
    for path, layer in layers.items():
        rows = []
        for values, mask in seen[id(layer)]:
            values = np.moveaxis(values.astype(np.float64), layer.axis, -1)
            flat = values.reshape(-1, values.shape[-1])
            rows.append(flat if mask is None else flat[mask.reshape(-1)])
        every = np.concatenate(rows)
        moments = found[path]
        assert moments.count == len(every)
        atol = tolerance * every.std(0).max()
        np.testing.assert_allclose(moments.mean, every.mean(0), rtol=tolerance, atol=atol)
        np.testing.assert_allclose(moments.variance, every.var(0), rtol=tolerance)


def state(model: Any) -> Any:
    """All that a pass might leave behind: bits of variables, attributes, flags."""
    layers = list(model._flatten_layers())
    return (
        [ops.convert_to_numpy(variable).tobytes() for variable in model.variables],
        [sorted(vars(layer)) for layer in layers],
        [layer.trainable for layer in layers],
        [getattr(layer, "training", None) for layer in layers],
        [len(layer._losses) for layer in layers],
    )


# --- the two ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_ends_are_the_plain_passes_and_moments_are_those_of_the_inputs(name: str) -> None:
    model, x = build(name)
    tolerance = 2e-3 if name == "half" else 1e-6  # float16 has 11 bits
    forward = BlendForward(model)
    for phase in (0, 1):
        before = state(model)
        outputs, moments = forward.outputs(Batch(x), Condition(phase, record=True))
        assert state(model) == before
        flags = [layer.trainable for layer in norms(model)]
        with spied(model) as seen, exact_moments(model), keras.StatelessScope():
            for layer in norms(model):
                layer.trainable = True
            wanted = model(x, training=bool(phase))
        for layer, flag in zip(norms(model), flags, strict=True):
            layer.trainable = flag
        assert_outputs(outputs, wanted, tolerance)
        assert_moments(model, moments, seen, max(tolerance, 1e-5))
    assert forward.traces == (1 if COMPILED else 0)


def test_outputs_are_not_those_of_the_other_end() -> None:
    model, x = build("residual")
    forward = BlendForward(model)
    zero, one = (
        forward.outputs(Batch(x), Condition(0)),
        forward.outputs(Batch(x), Condition(blend=[1, 1, 1])),
    )
    assert np.abs(zero - one).max() > 0.1 * np.abs(zero).max()
    assert zero.dtype == np.float32


def test_renorm_is_left_out() -> None:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, L.BatchNormalization(renorm=True, center=False)(inputs))
    x = np.random.default_rng(0).normal(3, 2, (SAMPLES, 3)).astype("float32")
    plain = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
    np.testing.assert_allclose(
        BlendForward(model).outputs(Batch(x), Condition(1)), plain, atol=1e-5
    )


def test_a_call_that_insists_on_training_mode_obeys() -> None:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Insisting(name="bn")(inputs))
    model.layers[-1].moving_mean.assign([1.0, 2.0, 3.0])
    x = np.random.default_rng(0).normal(3, 2, (SAMPLES, 3)).astype("float32")
    found = BlendForward(model).outputs(Batch(x), Condition(0))
    np.testing.assert_allclose(found, (x - [1, 2, 3]) / np.sqrt(1 + 1e-3), rtol=1e-5, atol=1e-6)


# --- between the ends -------------------------------------------------------------------------


def dense_model() -> tuple[Any, Any, Any]:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    x = inputs
    for i in range(3):
        x = L.Activation("tanh")(L.BatchNormalization(name=f"b{i}")(L.Dense(5, name=f"d{i}")(x)))
    model = keras.Model(inputs, L.Dense(3, name="head")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    rng = np.random.default_rng(4)
    x = rng.normal(0.5, 1.5, (SAMPLES, 4)).astype("float32")
    return model, x, rng.integers(0, 3, SAMPLES)


def numpy_losses(model: Any, x: Any, y: Any, blend: Any) -> Any:
    """Float64, straight from the definition."""
    h = x.astype(np.float64)
    for i, weight in enumerate(blend):
        kernel, bias = (w.astype(np.float64) for w in model.get_layer(f"d{i}").get_weights())
        h = h @ kernel + bias
        layer = model.get_layer(f"b{i}")
        gamma, beta, mean, var = (w.astype(np.float64) for w in layer.get_weights())
        mean = (1 - weight) * mean + weight * h.mean(0)
        var = (1 - weight) * var + weight * h.var(0)
        h = np.tanh((h - mean) / np.sqrt(var + layer.epsilon) * gamma + beta)
    kernel, bias = (w.astype(np.float64) for w in model.get_layer("head").get_weights())
    logits = h @ kernel + bias
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]


def test_losses_and_gradient_equal_numpy_in_float64() -> None:
    model, x, y = dense_model()
    forward = BlendForward(model)
    for blend in ([0.3, 0.8, 0.5], [0, 0, 0], [1, 1, 1]):
        losses, slope = forward.gradient(Batch(x, y), Condition(blend))
        np.testing.assert_allclose(losses, numpy_losses(model, x, y, blend), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(losses.shape, (SAMPLES,))
        wanted = []
        for unit in np.eye(3):
            above, below = (
                numpy_losses(model, x, y, blend + sign * 1e-5 * unit) for sign in (1, -1)
            )
            wanted.append((above - below).mean() / 2e-5)
        np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        forward.outcome(Batch(x, y), Condition(blend)).losses, losses, rtol=1e-6
    )
    gap = np.mean(numpy_losses(model, x, y, np.ones(3)) - numpy_losses(model, x, y, np.zeros(3)))
    found = path_integral(lambda t: forward.gradient(Batch(x, y), Condition(t))[1], gap)
    np.testing.assert_allclose(found.shares.sum(), gap, rtol=0.05)
    assert forward.traces == (2 if COMPILED else 0)


@pytest.mark.parametrize("name", ["subclassed", "shared", "masked", "own-call"])
def test_gradient_equals_central_differences(name: str) -> None:
    model, x = build(name)
    forward = BlendForward(model, loss=lambda y, outputs: ops.mean(ops.square(outputs), axis=-1))
    if name == "shared":
        loss = {"out": "mse", "mid": None}
        forward = BlendForward(model, loss=loss)
    count = len(forward.paths)
    y = keras.tree.map_structure(np.zeros_like, forward.outputs(Batch(x), Condition(0)))
    blend = np.linspace(0.3, 0.6, count)
    _, slope = forward.gradient(Batch(x, y), Condition(blend))
    step = 5e-3
    wanted = [
        np.mean(
            forward.outcome(Batch(x, y), Condition(blend=blend + step * unit)).losses
            - forward.outcome(Batch(x, y), Condition(blend=blend - step * unit)).losses
        )
        / (2 * step)
        for unit in np.eye(count)
    ]
    np.testing.assert_allclose(slope, wanted, rtol=5e-3, atol=2e-4 * np.abs(wanted).max())
    assert np.abs(slope).min() > 0


def test_a_site_that_the_loss_does_not_see_has_no_gradient() -> None:
    inputs = keras.Input((3,))
    aside = L.BatchNormalization(name="aside")(inputs)
    model = keras.Model(inputs, [L.BatchNormalization(name="on")(inputs), aside])
    x = np.random.default_rng(0).normal(1, 1, (SAMPLES, 3)).astype("float32")
    forward = BlendForward(model, loss=["mae", None])
    _, slope = forward.gradient(Batch(x, [x, x]), Condition(0.5))
    assert dict(zip(forward.paths, slope != 0, strict=True)) == {"on": True, "aside": False}
    only = BlendForward(model, ["aside"], loss=["mae", None])
    np.testing.assert_array_equal(only.gradient(Batch(x, [x, x]), Condition(0.5))[1], [0.0])


def test_a_model_without_sites() -> None:
    model = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    x = np.ones((SAMPLES, 3), "float32")
    forward = BlendForward(model, loss="mse")
    np.testing.assert_allclose(
        forward.outputs(Batch(x), Condition(1)), arrays(model(x))[0], rtol=1e-6
    )
    assert forward.gradient(Batch(x, x[:, :2]), Condition(0.5))[1].shape == (0,)


# --- arguments --------------------------------------------------------------------------------


def test_statistics_are_used_as_if_they_were_stored() -> None:
    model, x = build("residual")
    forward = BlendForward(model)
    blend = [0.2, 0.0, 0.7]
    first = forward.outputs(Batch(x), Condition(blend))
    layer = by_path(model)["side_bn"]
    given = (np.linspace(-1, 1, 4), np.linspace(1, 2, 4))
    other = forward.outputs(Batch(x), Condition(blend, statistics={"side_bn": given}))
    assert np.abs(first - other).max() > 1e-2
    layer.moving_mean.assign(given[0])
    layer.moving_variance.assign(given[1])
    np.testing.assert_array_equal(forward.outputs(Batch(x), Condition(blend)), other)
    for variable in model.get_layer("stem").weights:  # weights are read, too, when a pass runs
        variable.assign(0 * variable)
    assert np.abs(forward.outputs(Batch(x), Condition(blend)) - other).max() > 1e-2
    assert forward.traces == (1 if COMPILED else 0)


def test_one_trace_per_answer_and_on_jax_per_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = dense_model()
    returned: list[None] = []
    monkeypatch.setattr(compile_passes, "return_memory", lambda: returned.append(None))
    forward = BlendForward(model)
    rng = np.random.default_rng(0)
    for rows in (SAMPLES, 5, SAMPLES, 5):
        forward.outcome(Batch(x[:rows], y[:rows]), Condition(blend=rng.uniform(size=3)))
        forward.outputs(Batch(x[:rows]), Condition(blend=rng.uniform(size=3)))
    wanted = {"tensorflow": 2, "jax": 4, "torch": 0}
    assert forward.traces == wanted[keras.backend.backend()]
    # What XLA has freed goes back to the system each time it has compiled something.
    assert len(returned) == (4 if keras.backend.backend() == "jax" else 0)


def test_sites_that_are_not_chosen_use_what_they_have_stored() -> None:
    model, x = build("residual")
    layers = by_path(model)
    forward = BlendForward(model, ["flat_bn"])
    whole = BlendForward(model)
    wanted = whole.outputs(
        Batch(x), Condition(blend=[float(path == "flat_bn") for path in whole.paths])
    )
    for dropout in (False, True):  # there is none: only the phase differs
        found = forward.outputs(Batch(x), Condition(1, dropout=dropout))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert layers.keys() == {"stem_bn", "side_bn", "flat_bn"}


def test_flag_of_our_layer_is_followed() -> None:
    model, x = build("ours-inference")
    forward = BlendForward(model)
    frozen = forward.outputs(Batch(x), Condition(0))
    for layer in norms(model):
        layer.trainable = True
    np.testing.assert_allclose(
        forward.outputs(Batch(x), Condition(0)), frozen, rtol=1e-6, atol=1e-7
    )
    for layer in norms(model):
        if layer.beta is not None:
            layer.beta.assign(layer.beta + 1)
    moved = forward.outputs(Batch(x), Condition(0))
    assert np.abs(moved - frozen).max() > 1e-2
    np.testing.assert_allclose(moved, arrays(model(x, training=False))[0], rtol=1e-5, atol=1e-6)


def test_dropout_is_that_of_a_training_step() -> None:
    inputs = keras.Input((8,))
    x = L.BatchNormalization(name="bn", trainable=False)(inputs)
    model = keras.Model(inputs, L.Dropout(0.5)(x))
    data = np.random.default_rng(0).normal(0, 1, (SAMPLES, 8)).astype("float32")
    forward = BlendForward(model)
    for step in (0, 3):
        wanted = adapter_of(model).forward(data, training=True, step=step)
        found = forward.outputs(Batch(data), Condition(0, dropout=True, number=step))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert 0.2 < np.mean(found == 0) < 0.8
    other = forward.outputs(Batch(data), Condition(0, dropout=True, number=1))
    assert (other != found).any()


# --- numbers ----------------------------------------------------------------------------------


def test_channels_far_from_zero() -> None:
    inputs = keras.Input((8, 8, 2))
    model = keras.Model(inputs, L.BatchNormalization(name="bn")(inputs))
    x = np.random.default_rng(0).normal([1e4, -1e4], 1, (SAMPLES, 8, 8, 2)).astype("float32")
    _, moments = BlendForward(model).outputs(Batch(x), Condition(0.5, record=True))
    exact = x.astype(np.float64).reshape(-1, 2)
    np.testing.assert_allclose(moments["bn"].mean, exact.mean(0), rtol=3e-7)
    np.testing.assert_allclose(moments["bn"].variance, exact.var(0), rtol=1e-5)


def test_what_has_no_share_counts_nothing() -> None:
    model, x = build("own-call")
    forward = BlendForward(model)
    poisoned = x.copy()
    poisoned[3] = np.inf
    clean, found = (
        forward.outputs(Batch(x), Condition(0)),
        forward.outputs(Batch(poisoned), Condition(0)),
    )
    rest = np.arange(SAMPLES) != 3
    np.testing.assert_array_equal(found[rest], clean[rest])
    wanted = forward.outputs(Batch(x), Condition(1))
    nan = {path: (np.full(k, np.nan),) * 2 for path, k in zip(forward.paths, (4, 3), strict=True)}
    np.testing.assert_array_equal(forward.outputs(Batch(x), Condition(1, statistics=nan)), wanted)


# --- losses -----------------------------------------------------------------------------------


def test_mean_of_the_losses_is_the_compiled_loss() -> None:
    model, x = build("shared")
    rng = np.random.default_rng(0)
    y = {"out": rng.normal(size=(SAMPLES, 4)), "mid": rng.normal(size=(SAMPLES, 4))}
    weight = rng.uniform(size=SAMPLES)
    model.compile("sgd", {"out": "mse", "mid": "mae"}, loss_weights={"out": 0.3, "mid": 2.0})
    forward = BlendForward(model)
    found = forward.outcome(Batch(x, y, {"out": weight, "mid": 1 - weight}), Condition(0)).losses
    assert not model._compile_loss.built
    wanted = model.test_on_batch(x, y, {"out": weight, "mid": 1 - weight}, return_dict=True)
    assert found.shape == (SAMPLES,)
    np.testing.assert_allclose(found.mean(), wanted["loss"], rtol=1e-5)


def test_masked_steps_do_not_count_in_the_loss() -> None:
    inputs = keras.Input((6,), dtype="int32")
    x = L.BatchNormalization()(L.Embedding(9, 4, mask_zero=True)(inputs))
    model = keras.Model(inputs, x)
    model.compile("sgd", "mse")
    _, tokens = masked()
    y = np.ones((SAMPLES, 6, 4), "float32")
    found = BlendForward(model).outcome(Batch(tokens, y), Condition(0)).losses
    np.testing.assert_allclose(found.mean(), model.test_on_batch(tokens, y), rtol=1e-5)


def test_words_for_bad_input() -> None:
    model, x, y = dense_model()
    forward = BlendForward(model)
    with pytest.raises(DataError, match=r"between 0 and 1.*Received: 1.5"):
        forward.outputs(Batch(x), Condition(1.5))
    with pytest.raises(DataError, match="between 0 and 1"):
        forward.outputs(Batch(x), Condition(blend=float("nan")))
    with pytest.raises(DataError, match=r"shape \(3,\).*Received: shape \(2,\)"):
        forward.outputs(Batch(x), Condition(blend=[0, 1]))
    with pytest.raises(ModelError, match="Received: 'head'"):
        forward.outputs(Batch(x), Condition(0, statistics={"head": (0, 1)}))
    with pytest.raises(DataError, match=r"'b1' must have shape \(5,\).*\(2,\)"):
        forward.outputs(Batch(x), Condition(0, statistics={"b1": (np.zeros(2), np.ones(2))}))
    with pytest.raises(DataError, match=r"does not take these labels.*\(12, 7\)"):
        forward.outcome(Batch(x, np.zeros((SAMPLES, 7))), Condition(0))
    with pytest.raises(ModelError, match=r"no BN layer has this path.*'head'"):
        BlendForward(model, ["head"])
    with pytest.raises(ModelError, match="once"):
        BlendForward(model, ["b1", "b1"])
    bare = keras.Sequential([keras.Input((4,)), L.BatchNormalization()])
    with pytest.raises(ModelError, match="pass loss="):
        BlendForward(bare).outcome(Batch(x, y), Condition(0))
    with pytest.raises(ModelError, match="not built yet"):
        BlendForward(keras.Sequential([L.BatchNormalization()]))


class Cell(L.Layer):
    def __init__(self) -> None:
        super().__init__(name="cell")
        self.state_size = self.output_size = 3
        self.norm = L.BatchNormalization(name="bn")

    def build(self, shape: Any) -> None:
        self.norm.build(shape)

    def call(self, inputs: Any, states: Any, training: Any = None) -> Any:
        state = ops.tanh(self.norm(inputs + states[0], training=training))
        return state, [state]


def test_a_site_inside_a_recurrent_layer_is_blended_and_recorded_step_by_step() -> None:
    inputs = keras.Input((2, 3))
    model = keras.Model(inputs, L.RNN(Cell(), name="rnn")(inputs))
    x = np.random.default_rng(0).normal(1, 2, (SAMPLES, 2, 3)).astype("float32")

    def step(values: Any) -> Any:
        return np.tanh((values - values.mean(0)) / np.sqrt(values.var(0) + 1e-3))

    forward = BlendForward(model)
    first, second = x[:, 0].astype(np.float64), x[:, 1] + step(x[:, 0].astype(np.float64))
    wanted = step(second)
    np.testing.assert_allclose(
        forward.outputs(Batch(x), Condition(1)), wanted, rtol=1e-5, atol=1e-6
    )
    found, moments = forward.outputs(Batch(x), Condition(1, record=True))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    seen = moments["rnn/cell/bn"]
    assert (seen.count, forward.calls["rnn/cell/bn"]) == (2 * SAMPLES, 2)
    both = np.concatenate([first, second])
    np.testing.assert_allclose(seen.mean, both.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.variance, both.var(0), rtol=1e-5)
    assert not model.get_layer("rnn").unroll
    behaviour = adapter_of(model).behaviour([(x,)])["rnn/cell/bn"]
    assert (behaviour.inference, behaviour.training, behaviour.moves) == (0.0, 1.0, True)


@pytest.mark.skipif(COMPILED, reason="torch modules run on the torch backend only")
def test_bn_inside_a_torch_module_is_blended_and_recorded() -> None:
    import torch

    torch.manual_seed(0)
    inputs = keras.Input((4, 5))
    norms = [torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4, track_running_stats=False)]
    module = torch.nn.Sequential(norms[0], torch.nn.Dropout(0.5), torch.nn.Tanh(), norms[1])
    with torch.no_grad():
        norms[0].running_mean += torch.arange(4)
        norms[0].running_var *= 3
        norms[0].weight += 1
    inner = L.TorchModuleWrapper(module, name="wrapped", output_shape=(None, 4, 5))
    model = keras.Model(inputs, L.BatchNormalization(name="bn")(inner(inputs)))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(1, 2, (SAMPLES, 4, 5)).astype("float32")
    forward = BlendForward(model)
    assert forward.paths == ("wrapped/0", "bn")
    wanted = arrays(model(x, training=False))[0]
    before = [(p.clone(), m.training) for m in inner.module.modules() for p in m.buffers()]

    assert_outputs(forward.outputs(Batch(x), Condition(0)), wanted, 1e-6)
    own = adapter_of(model).forward(x, training=True, step=3)  # with dropout, by torch's own code
    found, moments = forward.outputs(Batch(x), Condition(1, dropout=True, number=3, record=True))
    assert_outputs(found, own, 1e-6)
    np.testing.assert_allclose(moments["wrapped/0"].mean, x.mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(moments["wrapped/0"].variance, x.var((0, 2)), rtol=1e-5)

    y = np.random.default_rng(1).normal(size=x.shape).astype("float32")
    slope = forward.gradient(Batch(x, y), Condition(blend=[0.5, 0.0]))[1]
    low, high = (
        forward.outcome(Batch(x, y), Condition(blend=[b, 0.0])).losses.mean() for b in (0.49, 0.51)
    )
    assert slope[0] == pytest.approx((high - low) / 0.02, rel=0.02)
    with pytest.raises(ModelError, match="'wrapped/3' keeps no statistics"):
        BlendForward(model, ["wrapped/3"])
    assert "forward" not in vars(norms[0])
    after = [(p, m.training) for m in inner.module.modules() for p in m.buffers()]
    for (old, mode), (new, now) in zip(before, after, strict=True):
        assert torch.equal(old, new)
        assert mode == now


# --- nothing is left behind -------------------------------------------------------------------


@keras.saving.register_keras_serializable("frostline-tests")
class Bomb(keras.layers.Layer):
    fuse: Any = None

    def call(self, inputs: Any) -> Any:
        if self.fuse is not None:
            raise self.fuse
        return inputs


def bombed() -> tuple[Any, Any, Any, Any]:
    keras.utils.set_random_seed(5)
    inputs = keras.Input((4,))
    x = L.Dense(5, kernel_regularizer="l2", activity_regularizer="l2")(inputs)
    x = Activated(name="own")(L.BatchNormalization(name="stock")(x))
    bomb = Bomb()
    x = fl.layers.BatchNormalization(name="ours")(bomb(x))
    model = keras.Model(inputs, L.Dense(1)(L.Dropout(0.2, seed=1)(x)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    rng = np.random.default_rng(6)
    x = rng.normal(1, 1, (SAMPLES, 4)).astype("float32")
    return model, bomb, x, rng.normal(0, 1, (SAMPLES, 1)).astype("float32")


@pytest.mark.parametrize("fuse", [RuntimeError("bang"), KeyboardInterrupt()], ids=repr)
def test_an_exception_leaves_the_model_as_it_was(fuse: BaseException) -> None:
    model, bomb, x, y = bombed()
    before = state(model)
    forward = BlendForward(model)
    for kind in ("outputs", "outcome", "gradient"):
        bomb.fuse = fuse
        before_fused = state(model)
        with pytest.raises(type(fuse)):
            getattr(forward, kind)(Batch(x, y), Condition(0.5))
        assert state(model) == before_fused
        del bomb.fuse
        assert state(model) == before
    np.testing.assert_allclose(
        forward.outputs(Batch(x), Condition(0)),
        arrays(model(x, training=False))[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_training_afterwards_is_as_before() -> None:
    model, _, x, y = bombed()
    twin, _, _, _ = bombed()
    forward = BlendForward(model)
    before = state(model)
    forward.outputs(Batch(x), Condition(1, record=True, dropout=True))
    forward.gradient(Batch(x, y), Condition(0.5))
    assert state(model) == before
    for one in (model, twin):
        one.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    for ours, wanted in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(model.predict(x, verbose=0), twin.predict(x, verbose=0))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.function")
@pytest.mark.parametrize("traced_before", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_a_tf_function_inside_the_model(traced_before: bool, eager: bool) -> None:
    import tensorflow as tf

    class Inner(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = L.BatchNormalization(name="bn")

        @tf.function
        def normalised(self, x: Any, training: bool) -> Any:
            return self.norm(x, training=training)

        def call(self, x: Any, training: Any = None) -> Any:
            return self.normalised(x, training=bool(training))

    model = Inner()
    x = np.random.default_rng(0).normal(1, 2, (SAMPLES, 3)).astype("float32")
    model.norm.build(x.shape)
    model.built = True
    if traced_before:
        model(x, training=False)
    model.compile("sgd", "mse", run_eagerly=eager)
    forward = BlendForward(model)
    stored = x / np.sqrt(1 + 1e-3)
    batch = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
    for blend, wanted in ((1, batch), (0, stored), (1, batch)):
        np.testing.assert_allclose(
            forward.outputs(Batch(x), Condition(blend)), wanted, rtol=1e-5, atol=1e-6
        )
    assert forward.gradient(Batch(x, x), Condition(0.5))[1].item() != 0
    assert not tf.config.functions_run_eagerly()
    np.testing.assert_allclose(model(x, training=False), stored, rtol=1e-5)


@pytest.mark.skipif(COMPILED, reason="Keras itself cannot train such a model on the others")
def test_gradient_of_a_rematerialised_model() -> None:
    def make() -> Any:
        keras.utils.set_random_seed(3)
        inputs = keras.Input((6,))
        x = L.BatchNormalization()(L.Dense(5)(inputs))
        x = L.BatchNormalization()(L.Dense(4, activation="tanh")(x))
        return keras.Model(inputs, L.Dense(1)(x))

    plain = make()
    with keras.RematScope(mode="full"):
        remat = make()
    x = np.random.default_rng(0).normal(1, 2, (SAMPLES, 6)).astype("float32")
    y = np.random.default_rng(1).normal(0, 1, (SAMPLES, 1)).astype("float32")
    found, wanted = (
        BlendForward(model, loss="mse").gradient(Batch(x, y), Condition(0.5))[1]
        for model in (remat, plain)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_model_that_runs_eagerly_is_not_compiled() -> None:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, L.BatchNormalization(name="bn")(inputs))
    model.compile("sgd", "mse", run_eagerly=True)
    x = np.random.default_rng(0).normal(1, 2, (SAMPLES, 3)).astype("float32")
    forward = BlendForward(model)
    found, slope = forward.gradient(Batch(x, np.zeros_like(x)), Condition(0.5))
    assert forward.traces == 0
    model.compile("sgd", "mse")
    wanted, other = forward.gradient(Batch(x, np.zeros_like(x)), Condition(0.5))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(slope, other, rtol=1e-5)
    assert forward.traces == (1 if COMPILED else 0)


# --- outputs and losses together, and the model's own passes ------------------------------------


def test_an_outcome_is_outputs_losses_and_moments_of_one_pass() -> None:
    model, x, y = dense_model()
    forward = BlendForward(model)
    blend = [0.3, 0.8, 0.5]
    outcome = forward.outcome(Batch(x, y), Condition(blend, record=True))
    np.testing.assert_allclose(outcome.losses, numpy_losses(model, x, y, blend), rtol=1e-5)
    outputs, moments = forward.outputs(Batch(x), Condition(blend, record=True))
    np.testing.assert_allclose(outcome.outputs, outputs, rtol=1e-6)
    for path, each in moments.items():
        np.testing.assert_allclose(outcome.moments[path].mean, each.mean, rtol=1e-6)
    assert forward.outcome(Batch(x, y), Condition(blend)).moments == {}


@pytest.mark.parametrize("name", ["residual", "nested", "ours-batch", "ours-inference", "own-call"])
@pytest.mark.parametrize("training", [False, True])
def test_own_passes_are_those_of_the_model(name: str, training: bool) -> None:
    model, x = build(name)
    before = state(model)
    loss = {"class_name": "MeanSquaredError", "config": {}}
    zeros = np.zeros_like(arrays(model(x))[0])
    outcome = BlendForward(model, loss=loss).own(Batch(x, zeros), training=training)
    assert state(model) == before
    with keras.StatelessScope(), exact_moments(model):
        wanted = model(x, training=training)
    # Torch: Keras' own variance is E[x²] − E[x]².
    assert_outputs(outcome.outputs, wanted, 1e-6 if COMPILED or not training else 1e-5)
    losses = np.square(outcome.outputs.astype(np.float64)).reshape(SAMPLES, -1).mean(1)
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-5)


def test_own_passes_follow_the_flags() -> None:
    model, x = build("residual")
    forward = BlendForward(model, loss="mse")
    zeros = np.zeros_like(arrays(model(x))[0])
    inference = forward.own(Batch(x, zeros), training=False)
    thawed = forward.own(Batch(x, zeros), training=True)
    model.trainable = False
    frozen = forward.own(Batch(x, zeros), training=True)
    np.testing.assert_allclose(frozen.losses, inference.losses, rtol=1e-6)
    assert np.abs(thawed.losses - frozen.losses).max() > 1e-3


def test_an_output_in_a_list_of_one_has_the_loss_of_evaluate() -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    features = keras.layers.BatchNormalization()(inputs)
    outputs = keras.layers.Dense(4, activation="softmax")(features)
    x, y = np.random.default_rng(0).normal(size=(64, 8)).astype("float32"), np.arange(64) % 4
    for given in (outputs, [outputs], (outputs,)):
        model = keras.Model(inputs, given)
        model.compile("sgd", "sparse_categorical_crossentropy")
        found = BlendForward(model).outcome(Batch(x, y), Condition(0.0))
        assert found.unit == "sample"
        np.testing.assert_allclose(found.losses.mean(), model.evaluate(x, y, verbose=0), rtol=1e-5)
