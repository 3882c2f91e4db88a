"""``recalibrate`` and ``set_momentum`` on Keras models.

The oracle taps the inputs of BN layers with a subclass of the stock layer, runs the whole model
eagerly on the whole data set once per site, and takes numpy's moments in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import frostline as fl
from frostline.adapters.keras import moments as keras_moments, statistics as keras_statistics
from frostline.adapters.keras.moments import MomentRecorder
from frostline.adapters.spool import Workspace
from frostline.types import DataError, ModelError

L = keras.layers
SAMPLES = 45
TAPPED: dict[int, list[tuple[Any, Any]]] | None = None


@keras.saving.register_keras_serializable("frostline-tests")
class Tap(keras.layers.BatchNormalization):
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if TAPPED is not None:
            kept = None if mask is None else ops.convert_to_numpy(mask)
            TAPPED.setdefault(id(self), []).append((ops.convert_to_numpy(inputs), kept))
        return super().call(inputs, training=training, mask=mask)


class Ours(fl.layers.BatchNormalization):
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if TAPPED is not None:
            TAPPED.setdefault(id(self), []).append((ops.convert_to_numpy(inputs), None))
        return super().call(inputs, training=training, mask=mask)


def tapped(model: Any, x: Any, *, training: bool = False) -> dict[int, list[tuple[Any, Any]]]:
    global TAPPED
    TAPPED = {}
    try:
        model(x, training=training)
        return TAPPED
    finally:
        TAPPED = None


def moments(layer: Any, entries: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    rows = []
    for values, mask in entries:
        values = np.moveaxis(values.astype(np.float64), layer.axis, -1)
        flat = values.reshape(-1, values.shape[-1])
        if mask is not None:
            flat = flat[np.broadcast_to(mask, values.shape[:-1]).reshape(-1)]
        rows.append(flat)
    every = np.concatenate(rows)
    return every.mean(0), every.var(0)


def sites_of(model: Any) -> dict[str, Any]:
    return MomentRecorder(model, [site.path for site in fl.sites(model)]).layers


def statistics(model: Any) -> dict[str, tuple[Any, Any]]:
    return {
        path: (
            ops.convert_to_numpy(layer.moving_mean).astype(np.float64),
            ops.convert_to_numpy(layer.moving_variance).astype(np.float64),
        )
        for path, layer in sites_of(model).items()
    }


def brute_force(model: Any, x: Any, paths: Any = None) -> dict[str, tuple[Any, Any]]:
    """Site by site, each with all earlier ones at their new values; leaves them there."""
    for path, layer in sites_of(model).items():
        if paths is None or path in paths:
            mean, variance = moments(layer, tapped(model, x)[id(layer)])
            layer.moving_mean.assign(mean)
            layer.moving_variance.assign(variance)
    return statistics(model)


def assert_agree(found: Any, wanted: Any, rtol: float = 1e-6) -> None:
    """Means relative to the standard deviation (or to themselves), variances to themselves."""
    assert found.keys() == wanted.keys()
    for path, (mean, variance) in wanted.items():
        scale = np.maximum(np.sqrt(variance), np.abs(mean)).max()
        np.testing.assert_allclose(found[path][0], mean, rtol=0, atol=rtol * scale, err_msg=path)
        np.testing.assert_allclose(found[path][1], variance, rtol=2 * rtol, atol=1e-9, err_msg=path)


def bits(model: Any) -> list[bytes]:
    return [ops.convert_to_numpy(variable).tobytes() for variable in model.variables]


def images(channels: int = 3, size: int = 8, samples: int = SAMPLES) -> Any:
    rng = np.random.default_rng(0)
    gain = rng.uniform(0.5, 3, (samples, 1, 1, 1))  # batches differ: the between-batch part counts
    return (rng.normal(1, 1, (samples, size, size, channels)) * gain).astype("float32")


def conv_bn(x: Any, filters: int, name: str, *, layer: Any = Tap, stride: int = 1) -> Any:
    x = L.Conv2D(filters, 3, stride, padding="same", use_bias=False, name=f"{name}_conv")(x)
    return L.ReLU(max_value=6.0, name=f"{name}_relu")(layer(name=f"{name}_bn")(x))


def residual(layer: Any = Tap) -> tuple[Any, Any]:
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, 6, "stem", layer=layer)
    skip = x
    x = L.DepthwiseConv2D(3, padding="same", name="dw")(x)
    x = layer(name="dw_bn", scale=False)(x)
    x = L.Dropout(0.5, name="drop")(L.Add(name="add")([x, skip]) * 0.5)  # a bare operation too
    left, right = (conv_bn(x, 4, side, layer=layer, stride=2) for side in ("left", "right"))
    x = L.Concatenate(name="cat")([left, right])
    x = layer(name="flat_bn", center=False)(L.GlobalAveragePooling2D(name="gap")(x))
    return keras.Model(inputs, L.Dense(2, name="head")(x)), images()


def nested() -> tuple[Any, Any]:
    inner_in = keras.Input((8, 8, 4))
    inner = keras.Model(inner_in, conv_bn(inner_in, 4, "deep"), name="inner")
    mid_in = keras.Input((8, 8, 3))
    mid = keras.Model(
        mid_in, [conv_bn(mid_in, 4, "a"), inner(conv_bn(mid_in, 4, "b"))], name="backbone"
    )
    block = keras.Sequential(
        [keras.Input((8, 8, 4)), L.Conv2D(3, 3, name="c"), Tap(name="bn"), L.ReLU()], name="block"
    )
    inputs = keras.Input((8, 8, 3))
    first, second = mid(inputs, training=False)
    x = block(L.Add()([first, second]))
    x = Tap(name="bn")(L.Dense(3)(L.Flatten()(x)))
    return keras.Model(inputs, x), images()


def sequential_model() -> tuple[Any, Any]:
    parts = [keras.Input((8, 8, 3)), L.Conv2D(4, 3), Tap(name="b1"), L.Conv2D(4, 3), Tap(name="b2")]
    return keras.Sequential([*parts, L.Dropout(0.5), L.Flatten(), L.Dense(2)]), images()


def siamese() -> tuple[Any, Any]:
    tower_in = keras.Input((8, 8, 3))
    tower = keras.Model(tower_in, conv_bn(conv_bn(tower_in, 4, "one"), 3, "two"), name="tower")
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    x = L.Subtract()([tower(left), tower(right)])
    x = Tap(name="top")(L.GlobalAveragePooling2D()(x))
    model = keras.Model({"left": left, "right": right}, x)
    return model, {"left": images(), "right": 3 * images()[::-1] + 1}


def composite() -> tuple[Any, Any]:
    class Block(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__(name="block")
            self.conv, self.bn1, self.bn2 = L.Conv2D(4, 3), Tap(name="bn1"), Tap(name="bn2")

        def call(self, x: Any, training: Any = None) -> Any:
            x = self.bn1(self.conv(x), training=training)
            return self.bn2(ops.relu(x) * 2, training=training)

    inputs = keras.Input((8, 8, 3))
    x = Block()(conv_bn(inputs, 4, "before"))
    return keras.Model(inputs, conv_bn(x, 4, "after")), images()


def subclassed() -> tuple[Any, Any]:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.b1 = L.Conv2D(4, 3), Tap(name="b1")
            self.c2, self.b2 = L.Conv2D(4, 3), Tap(name="b2")
            self.drop = L.Dropout(0.5)

        def call(self, x: Any, training: Any = None) -> Any:
            x = ops.relu(self.b1(self.c1(x), training=training))
            return self.b2(self.c2(self.drop(x, training=training)), training=training)

    model = Net()
    model(images()[:1])
    return model, images()


def masked() -> tuple[Any, Any]:
    inputs = keras.Input((7,), dtype="int32")
    x = L.Embedding(20, 4, mask_zero=True)(inputs)
    x = Tap(name="b2")(L.Dense(3, name="d")(Tap(name="b1")(x)))
    x = L.GlobalAveragePooling1D()(x)
    tokens = np.random.default_rng(0).integers(1, 20, (SAMPLES, 7))
    lengths = np.random.default_rng(1).integers(1, 8, SAMPLES)
    return keras.Model(inputs, x), tokens * (np.arange(7) < lengths[:, None])


def axes() -> tuple[Any, Any]:
    inputs = keras.Input((5, 6, 3))
    x = Tap(axis=1, name="b1")(inputs)
    x = L.Reshape((5, 6, 3, 1))(L.Dense(3)(x))
    x = Tap(axis=2, name="b2")(x)
    x = Tap(name="b3")(L.Reshape((90,))(x))
    rng = np.random.default_rng(0)
    return keras.Model(inputs, x), rng.normal(2, 1, (SAMPLES, 5, 6, 3)).astype("float32")


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "residual": residual,
    "nested": nested,
    "sequential": sequential_model,
    "siamese": siamese,
    "composite": composite,
    "subclassed": subclassed,
    "masked": masked,
    "axes": axes,
    "ours": lambda: residual(Ours),
}


def build(name: str) -> tuple[Any, Any]:
    """Model and data; the statistics are far from those of the data."""
    keras.utils.set_random_seed(1)
    model, x = BUILDERS[name]()
    for layer in sites_of(model).values():
        shape = layer.moving_mean.shape
        layer.moving_mean.assign(np.linspace(-0.5, 0.5, shape[0]))
        layer.moving_variance.assign(np.full(shape, 0.3))
        for variable in (layer.gamma, layer.beta):
            if variable is not None:
                variable.assign(np.linspace(0.5, 1.5, shape[0]))
    return model, x


@pytest.mark.parametrize("name", BUILDERS)
def test_sequential_equals_brute_force(name: str) -> None:
    model, x = build(name)
    twin, _ = build(name)
    change = fl.recalibrate(model, x, batch_size=7)
    assert_agree(statistics(model), brute_force(twin, x))
    assert f"on {SAMPLES} samples in 7 batches" in change.text


@pytest.mark.parametrize("name", ["residual", "nested", "siamese", "subclassed"])
def test_all_but_the_statistics_of_the_sites_keeps_its_bits(name: str) -> None:
    model, x = build(name)
    model.compile("adam", "mse")
    moved = {
        id(variable)
        for layer in sites_of(model).values()
        for variable in (layer.moving_mean, layer.moving_variance)
    }
    still = [variable for variable in model.variables if id(variable) not in moved]
    before = [ops.convert_to_numpy(variable).tobytes() for variable in still]
    settings = [layer.get_config() for layer in sites_of(model).values()]
    fl.recalibrate(model, x)
    fl.recalibrate(model, x, method="batch")
    assert [ops.convert_to_numpy(variable).tobytes() for variable in still] == before
    assert [layer.get_config() for layer in sites_of(model).values()] == settings
    assert not any("call" in vars(layer) for layer in sites_of(model).values())
    assert len(model.losses) == 0


def test_batch_sizes_agree_and_a_second_run_changes_nothing() -> None:
    model, x = build("residual")
    found = {}
    start = model.get_weights()
    for size in (7, 32, SAMPLES):
        model.set_weights(start)
        fl.recalibrate(model, x, batch_size=size)
        found[size] = statistics(model)
    assert_agree(found[7], found[SAMPLES])
    assert_agree(found[32], found[SAMPLES])
    before = bits(model)
    fl.recalibrate(model, x, batch_size=SAMPLES)
    assert bits(model) == before


@pytest.mark.parametrize("name", ["residual", "nested", "siamese", "subclassed", "masked", "ours"])
def test_batch_equals_numpy_on_what_a_training_step_sees(name: str) -> None:
    model, x = build(name)
    twin, _ = build(name)
    for layer in twin._flatten_layers():
        if isinstance(layer, L.Dropout):
            layer.rate = 0.0  # ours must be without; the stock training step is the oracle
    seen: dict[int, list[Any]] = {}
    for rows in (slice(0, 20), slice(20, 40), slice(40, SAMPLES)):
        piece = {key: value[rows] for key, value in x.items()} if isinstance(x, dict) else x[rows]
        for key, entries in tapped(twin, piece, training=True).items():
            seen.setdefault(key, []).extend(entries)
    wanted = {path: moments(layer, seen[id(layer)]) for path, layer in sites_of(twin).items()}
    fl.recalibrate(model, x, method="batch", batch_size=20)
    assert_agree(statistics(model), wanted, rtol=2e-6)


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_channels_far_from_zero(method: Any) -> None:
    inputs = keras.Input((16, 16, 3))
    model = keras.Model(inputs, Tap(name="bn")(inputs))
    x = images(size=16) / 3 + np.array([1e4, -1e4, 0], "float32")
    x = x.astype("float32")
    fl.recalibrate(model, x, method=method)
    exact = x.astype(np.float64).reshape(-1, 3)
    mean, variance = statistics(model)["bn"]
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var(0), rtol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        (3, 2),
        (3, 1, 2),
        (3, 5, 2),
        (2, 997, 2),
        (2, 1024, 2),
        (2, 40, 30, 2),
        (3, 2, 3, 5, 2),
        (1, 3, 509, 2),
        (3, 64, 256, 2),  # so large that TensorFlow cuts it into blocks
        (1, 4, 4, 2048),  # fewer chunks than blocks
        (5, 64, 512, 8),  # so large that torch adds up piece by piece, and the last one is shorter
    ],
    ids=str,
)
def test_sums_in_chunks_are_exact(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(100, 1, shape).astype("float32")
    entry = keras_statistics.chunk_sums(ops.convert_to_tensor(x), -1, None)
    found = keras_moments._add_up(*entry)
    flat = x.astype(np.float64).reshape(-1, shape[-1])
    assert found.count == len(flat)
    np.testing.assert_allclose(found.mean, flat.mean(0), rtol=1e-8)
    np.testing.assert_allclose(found.variance, flat.var(0), rtol=1e-6)
    assert len(entry[2]) * keras_statistics._chunk(shape[1:-1]) == len(flat)
    assert keras_statistics._chunk(shape[1:-1]) <= keras_statistics.CHUNK


def test_a_layer_behind_itself_reproduces_its_statistics() -> None:
    keras.utils.set_random_seed(2)
    norm, conv = Tap(name="bn"), L.Conv2D(3, 3, padding="same")
    inputs = keras.Input((8, 8, 3))
    x = Tap(name="first")(inputs)
    for _ in range(3):
        x = L.ReLU()(norm(conv(x)))
    model = keras.Model(inputs, Tap(name="last")(x))
    change = fl.recalibrate(model, images())
    assert any("passes over a part of the model" in note for note in change.notes)
    seen = tapped(model, images())
    wanted = {path: moments(layer, seen[id(layer)]) for path, layer in sites_of(model).items()}
    assert_agree(statistics(model), wanted, rtol=5e-6)


# --- which sites ------------------------------------------------------------------------------


def test_frozen_sites_are_left_alone_unless_asked_for() -> None:
    """AIMET and update_bn fail here: the one keeps frozen layers as they are without a word when
    they are asked for, the other resets them without being asked."""
    model, x = build("residual")
    layers = sites_of(model)
    for path in ("stem_bn", "dw_bn"):
        layers[path].trainable = False
    start = statistics(model)
    change = fl.recalibrate(model, x)
    assert change.text.startswith("recalibrated 3 sites (sequential)")
    found = statistics(model)
    for path in layers:
        same = all(np.array_equal(a, b) for a, b in zip(start[path], found[path], strict=True))
        assert same == (path in ("stem_bn", "dw_bn")), path
    twin, _ = build("residual")
    assert_agree(found, brute_force(twin, x, {"left_bn", "right_bn", "flat_bn"}))
    change = fl.recalibrate(model, x, sites="frozen", method="batch")
    assert change.text.startswith("recalibrated 2 sites (batch)")
    assert [layer.trainable for layer in layers.values()] == [False, False, True, True, True]


def test_one_site_in_a_nested_model_by_pattern() -> None:
    model, x = build("nested")
    fl.recalibrate(model, x, sites="backbone/inner/*")
    twin, _ = build("nested")
    assert_agree(statistics(model), brute_force(twin, x, {"backbone/inner/deep_bn"}))


def test_models_without_what_is_needed() -> None:
    plain = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    with pytest.raises(ModelError, match="no BN layer"):
        fl.recalibrate(plain, np.zeros((4, 4)))
    unbuilt = keras.Sequential([L.BatchNormalization(name="bn")])
    with pytest.raises(ModelError, match="'bn' is not built yet"):
        fl.recalibrate(unbuilt, np.zeros((4, 4)))


def test_data_that_do_not_fit_change_nothing() -> None:
    model, _ = build("residual")
    before = bits(model)
    with pytest.raises(DataError, match="do not fit the model's inputs"):
        fl.recalibrate(model, np.zeros((4, 8), "float32"))
    assert bits(model) == before


# --- data -------------------------------------------------------------------------------------


def test_iterators_go_once_through_a_graph_and_not_at_all_without() -> None:
    def stream(x: Any) -> Iterator[Any]:
        return ((x[start : start + 10], None) for start in range(0, SAMPLES, 10))

    model, x = build("sequential")
    fl.recalibrate(model, stream(x))
    twin, _ = build("sequential")
    fl.recalibrate(twin, x, batch_size=10)
    assert bits(model) == bits(twin)
    model, x = build("subclassed")
    before = bits(model)
    with pytest.raises(DataError, match=r"method='sequential'.*more than once"):
        fl.recalibrate(model, stream(x))
    assert bits(model) == before
    fl.recalibrate(model, stream(x), method="batch")
    assert bits(model) != before


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_a_batch_with_nan_is_skipped_and_named(method: Any) -> None:
    model, x = build("sequential")
    twin, _ = build("sequential")
    broken = x.copy()
    broken[12, 3, 3, 0] = np.nan
    change = fl.recalibrate(model, broken, method=method, batch_size=9)
    assert any(note.startswith("skipped 1 of 5 batches (batch 1:") for note in change.notes)
    fl.recalibrate(twin, np.delete(x, range(9, 18), axis=0), method=method, batch_size=9)
    assert bits(model) == bits(twin)


def test_half_precision_activations_survive_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = inputs
    for number in range(3):
        x = L.Conv2D(4, 3, dtype="mixed_bfloat16", name=f"c{number}")(x)
        x = L.BatchNormalization(dtype="mixed_bfloat16", name=f"b{number}")(x)
    model = keras.Model(inputs, x)
    start = model.get_weights()
    fl.recalibrate(model, images())
    wanted = bits(model)
    model.set_weights(start)
    monkeypatch.setattr(Workspace, "__init__", _no_memory(Workspace.__init__))
    fl.recalibrate(model, images())
    assert bits(model) == wanted


def _no_memory(original: Any) -> Any:
    return lambda self, limit: original(self, 0)


# --- shadows of the statistics ----------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [L.BatchNormalization, fl.layers.BatchNormalization], ids=["stock", "ours"]
)
def test_renorm_does_not_bring_the_old_variance_back(layer: Any) -> None:
    model = keras.Sequential([keras.Input((3,)), layer(renorm=True, momentum=0.99, name="bn")])
    x = (np.random.default_rng(0).normal(5, 4, (64, 3))).astype("float32")
    fl.recalibrate(model, x)
    bn = model.layers[0]
    deviation = np.sqrt(x.var(0) + bn.epsilon)
    for name, wanted in (
        ("moving_mean", x.mean(0)),
        ("moving_variance", x.var(0)),
        ("moving_stddev", deviation),
        ("renorm_mean", x.mean(0)),
        ("renorm_stddev", deviation),
    ):
        found = ops.convert_to_numpy(getattr(bn, name))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)
    model(x, training=True)  # one update on the same data: nothing to move to
    np.testing.assert_allclose(ops.convert_to_numpy(bn.moving_variance), x.var(0), rtol=1e-4)


def test_a_debiased_average_goes_on_from_the_new_statistics() -> None:
    model = keras.Sequential(
        [keras.Input((3,)), fl.layers.BatchNormalization(debias=True, momentum=0.9, name="bn")]
    )
    rng = np.random.default_rng(0)
    x, later = (rng.normal(mean, 2, (64, 3)).astype("float32") for mean in (5, -1))
    change = fl.recalibrate(model, x)
    model(later, training=True)
    mean, variance = statistics(model)["bn"]
    np.testing.assert_allclose(mean, 0.9 * x.mean(0) + 0.1 * later.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, 0.9 * x.var(0) + 0.1 * later.var(0), rtol=1e-5)
    change.undo()  # the average starts from nothing again
    model(later, training=True)
    np.testing.assert_allclose(statistics(model)["bn"][0], later.mean(0), rtol=1e-5)


# --- back again -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequential", "ours", "subclassed"])
def test_undo_puts_every_bit_back(name: str) -> None:
    model, x = build(name)
    before = bits(model)
    for method in ("sequential", "batch"):
        change = fl.recalibrate(model, x, method=method)  # type: ignore[arg-type]
        assert bits(model) != before
        change.undo()
        assert bits(model) == before


@pytest.mark.parametrize("method", ["sequential", "batch"])
@pytest.mark.parametrize("step", range(2))
def test_interrupted_while_storing(method: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("sequential")
    before = bits(model)
    original, calls = MomentRecorder.store, []

    def store(self: Any, path: str, mean: Any, variance: Any) -> None:
        original(self, path, mean, variance)
        calls.append(path)
        if len(calls) > step:
            raise KeyboardInterrupt

    monkeypatch.setattr(MomentRecorder, "store", store)
    with pytest.raises(KeyboardInterrupt):
        fl.recalibrate(model, x, method=method)
    assert bits(model) == before
    assert not any("call" in vars(layer) for layer in sites_of(model).values())


@pytest.mark.parametrize("method", ["sequential", "batch"])
@pytest.mark.parametrize("name", ["sequential", "subclassed"])
def test_interrupted_inside_the_model(
    name: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build(name)
    before = bits(model)
    original, calls = keras_statistics.rows_of, []

    def rows(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    for module in (keras_moments, keras_statistics):
        monkeypatch.setattr(module, "rows_of", rows)
    with pytest.raises(KeyboardInterrupt):
        fl.recalibrate(model, x, method=method)
    assert bits(model) == before
    assert not any("call" in vars(layer) for layer in sites_of(model).values())


def test_predict_uses_the_new_statistics_without_compiling_again() -> None:
    model, x = build("sequential")
    model.predict(x, verbose=0)
    fl.recalibrate(model, x)
    fresh = keras.models.clone_model(model)
    fresh.set_weights(model.get_weights())
    np.testing.assert_allclose(
        model.predict(x, verbose=0), fresh.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )


# --- momentum ---------------------------------------------------------------------------------


def test_set_momentum_says_both_conventions_and_can_be_undone() -> None:
    model, _ = build("residual")
    change = fl.set_momentum(model, 0.9, sites=["stem_bn", "*left*"])
    momenta = {path: layer.momentum for path, layer in sites_of(model).items()}
    assert momenta == {
        "stem_bn": 0.9, "dw_bn": 0.99, "left_bn": 0.9, "right_bn": 0.99, "flat_bn": 0.99
    }  # fmt: skip
    assert "of 2 sites from 0.99 to 0.9 in Keras' convention (0.1 in PyTorch's)" in change.text
    change.undo()
    assert {layer.momentum for layer in sites_of(model).values()} == {0.99}


def test_set_momentum_is_live_on_our_layers_and_honest_on_stock_ones(backend: str) -> None:
    for layer in (L.BatchNormalization, fl.layers.BatchNormalization):
        model = keras.Sequential([keras.Input((3,)), layer(momentum=0.9, name="bn"), L.Dense(1)])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        x, y = np.full((8, 3), 4.0, "float32"), np.zeros((8, 1), "float32")
        model.train_on_batch(x, y)
        change = fl.set_momentum(model, 0.5)
        before = statistics(model)["bn"][0]
        model.train_on_batch(x, y)
        moved = (statistics(model)["bn"][0] - before) / (4.0 - before)
        stock = layer is L.BatchNormalization
        says_stale = any("after the next compile()" in note for note in change.notes)
        assert says_stale == (stock and backend != "torch")
        np.testing.assert_allclose(moved, 0.1 if says_stale else 0.5, rtol=1e-4)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan"), "0.9", True, None])
def test_set_momentum_refuses_what_is_no_share(momentum: Any) -> None:
    model, _ = build("residual")
    with pytest.raises(ModelError, match="momentum must be a number between 0 and 1"):
        fl.set_momentum(model, momentum)


def test_set_momentum_hints_at_the_other_convention() -> None:
    model, _ = build("residual")
    assert any("pass 0.9" in note for note in fl.set_momentum(model, 0.1).notes)


def test_torch_modules_get_the_complement(backend: str) -> None:
    if backend != "torch":
        pytest.skip("TorchModuleWrapper needs the torch backend")
    import torch

    wrapped = L.TorchModuleWrapper(
        torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), name="wrapped"
    )
    model = keras.Sequential([keras.Input((3,)), wrapped, L.BatchNormalization(name="bn")])
    model(np.ones((4, 3), "float32"))
    change = fl.set_momentum(model, 0.75)
    assert wrapped.module[1].momentum == 0.25
    change.undo()
    assert wrapped.module[1].momentum == 0.1
    change = fl.recalibrate(model, np.ones((4, 3), "float32"))
    assert any("1 torch module(s)" in note for note in change.notes)
    with pytest.raises(ModelError, match="TorchModuleWrapper, which cannot be recalibrated"):
        fl.recalibrate(model, np.ones((4, 3), "float32"), sites="wrapped/1")


def test_an_input_that_no_site_sees_is_no_obstacle() -> None:
    image, target = keras.Input((6,)), keras.Input((3,))
    norm = L.BatchNormalization(name="norm")
    left = L.Dense(3)(norm(L.Dense(4)(image)))
    model = keras.Model([image, target], L.Subtract()([left, target]))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)).astype("float32"), rng.normal(size=(20, 3)).astype("float32")
    wanted = ops.convert_to_numpy(model.layers[1](x)).astype(np.float64)
    fl.recalibrate(model, ((x, y),))
    np.testing.assert_allclose(ops.convert_to_numpy(norm.moving_mean), wanted.mean(0), atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(norm.moving_variance), wanted.var(0), rtol=1e-4)
