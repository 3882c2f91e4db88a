"""Our layer with default arguments against the stock layer: indistinguishable, on every backend."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import frostline as fl
from frostline.layers import BatchNormalization
from frostline.types import ModelError

Stock = keras.layers.BatchNormalization
POLICIES = ["float32", "mixed_float16", "mixed_bfloat16", "bfloat16"]
if keras.backend.backend() != "jax":  # JAX has no float64 unless asked for at start
    POLICIES.append("float64")
TOLERANCE = {"float32": 2e-6, "float64": 1e-6}  # half precision: one rounding of the output


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    rank = draw(st.integers(2, 5))
    axis = draw(st.integers(1, rank - 1))
    masked = axis == rank - 1 and draw(st.booleans())
    channels = draw(st.integers(2 if masked else 1, 4))  # the stock layer fails on masked (n, 1)
    shape = [draw(st.integers(2, 4)) for _ in range(rank)]
    shape[axis] = channels
    options: dict[str, Any] = {
        "axis": axis if draw(st.booleans()) else axis - rank,
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])),
        "epsilon": draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        "center": draw(st.booleans()),
        "scale": draw(st.booleans()),
        "dtype": draw(st.sampled_from(POLICIES)),
        "gamma_initializer": draw(st.sampled_from(["ones", "zeros"])),
        "renorm": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["gamma_regularizer"] = options["beta_regularizer"] = "l2"
    if draw(st.booleans()):
        options["gamma_constraint"] = options["beta_constraint"] = "non_neg"
    return {
        "shape": tuple(shape),
        "options": options,
        "mask": masked,
        "trainable": draw(st.booleans()),
        "built_first": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, 3.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


def numpy_of(tensor: Any) -> Any:
    return keras.ops.convert_to_numpy(tensor).astype("float64")


def same(received: Any, expected: Any, dtype: str) -> None:
    tolerance = TOLERANCE.get(dtype.removeprefix("mixed_"), 1e-2)
    np.testing.assert_allclose(
        numpy_of(received), numpy_of(expected), atol=tolerance, rtol=tolerance
    )


@given(case=cases())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_same_computation(case: dict[str, Any]) -> None:
    """Outputs, statistics, weight lists, losses and checkpoints, training and inference."""
    rng = np.random.default_rng(case["seed"])
    dtype = case["options"]["dtype"]
    pair = [cls(**case["options"]) for cls in (BatchNormalization, Stock)]
    for layer in pair:
        if case["built_first"]:
            layer.build((None, *case["shape"][1:]))
        layer.trainable = case["trainable"]
        if not case["built_first"]:
            layer.build((None, *case["shape"][1:]))
    ours, stock = pair
    start = [rng.uniform(0.5, 2.0, w.shape).astype("float32") for w in stock.weights]
    for layer in pair:
        layer.set_weights(start)
    for training in (False, True, True, False):
        x = rng.normal(case["mean"], 1.0, case["shape"]).astype("float32")
        mask = rng.uniform(size=case["shape"][:-1]) < 0.7 if case["mask"] else None
        received, expected = (layer(x, training=training, mask=mask) for layer in pair)
        assert keras.backend.standardize_dtype(received.dtype) == keras.backend.standardize_dtype(
            expected.dtype
        )
        same(received, expected, dtype)
    for received, expected in zip(ours.weights, stock.weights, strict=True):
        assert received.shape == expected.shape
        assert received.dtype == expected.dtype
        same(received, expected, dtype)
    for name in ("trainable_weights", "non_trainable_weights", "losses"):
        assert len(getattr(ours, name)) == len(getattr(stock, name)), name
    for received, expected in zip(ours.losses, stock.losses, strict=True):
        same(received, expected, dtype)
    config = ours.get_config()
    assert {key: config[key] for key in stock.get_config() if key != "name"} == {
        key: value for key, value in stock.get_config().items() if key != "name"
    }
    assert ours.count_params() == stock.count_params()


@pytest.mark.parametrize("trainable", [True, False], ids=["thawed", "frozen"])
@pytest.mark.parametrize("suffix", ["keras", "weights.h5"])
def test_checkpoints_load_both_ways(tmp_path: Path, suffix: str, trainable: bool) -> None:
    def model(layer_class: type, seed: int) -> keras.Model:
        rng = np.random.default_rng(seed)
        layer = layer_class(name="bn")
        built = keras.Sequential([keras.Input((4, 4, 3)), layer, keras.layers.Flatten()])
        layer.trainable = trainable
        built.set_weights([rng.uniform(0.5, 2, w.shape) for w in built.weights])
        return built

    x = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype("float32")
    for number, (writer, reader) in enumerate([(BatchNormalization, Stock), (Stock, fl_layer())]):
        source, target = model(writer, 1), model(reader, 2)
        path = tmp_path / f"{number}.{suffix}"
        expected = source.predict(x, verbose=0)
        if suffix == "keras":
            source.save(path)
            loaded = keras.models.load_model(path)
            assert type(loaded.get_layer("bn")) is writer
            assert loaded.get_layer("bn").trainable == trainable
            np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
            path = tmp_path / f"{number}.weights.h5"
            loaded.save_weights(path)
        else:
            source.save_weights(path)
        target.load_weights(path)
        np.testing.assert_array_equal(target.predict(x, verbose=0), expected)
        target.get_layer("bn").trainable = not trainable
        np.testing.assert_array_equal(target.predict(x, verbose=0), expected)


def fl_layer() -> type:
    return fl.layers.BatchNormalization  # type: ignore[no-any-return]


def test_config_round_trip() -> None:
    options: dict[str, Any] = {
        "policy": "batch",
        "debias": True,
        "momentum": 0.7,
        "axis": 1,
        "live": False,
        "trainable": False,
    }
    layer = BatchNormalization(**options)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(copy) is BatchNormalization
    for name, value in options.items():
        assert getattr(copy, name) == value
    copy = BatchNormalization.from_config(BatchNormalization(version="2.1.4").get_config())
    assert (copy.version, copy.policy, copy.debias) == ("2.1.4", "batch", True)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "freeze"},
        {"version": "2.5"},
        {"version": "2.2.4", "policy": "update"},
        {"version": "2.1.2", "debias": True},
        {"debias": 1},
        {"renorm": True, "policy": "batch"},
        {"renorm": True, "debias": True},
        {"renorm": True, "version": "2.2.4"},
    ],
    ids=str,
)
def test_contradictions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Received"):
        BatchNormalization(**options)


def test_unknown_release_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"2\.1\.3.*2\.2\.4.*fork-2\.2\.4.*Received: version='9'"):
        BatchNormalization(version="9")


def test_masked_single_channel() -> None:
    """Where the stock layer raises: the masked moments of one channel."""
    x = np.array([[1.0], [3.0], [100.0]], "float32")
    layer = BatchNormalization(momentum=0.0)
    layer(x, training=True, mask=np.array([True, True, False]))
    np.testing.assert_allclose(layer.get_weights()[2:], [[2.0], [1.0]], rtol=1e-5)


def test_axis_and_mask_errors() -> None:
    with pytest.raises(ValueError, match="Axis 4 is out of bounds"):
        BatchNormalization(axis=4).build((None, 3, 3, 3))
    with pytest.raises(ValueError, match="one dimension less"):
        BatchNormalization()(np.ones((2, 3, 4)), mask=np.ones((2, 3, 4), bool))


def test_synchronized_is_for_tensorflow_only() -> None:
    if keras.backend.backend() == "tensorflow":
        x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
        ours, stock = BatchNormalization(synchronized=True), Stock(synchronized=True)
        same(ours(x, training=True), stock(x, training=True), "float32")
    else:
        with pytest.raises(ValueError, match="TensorFlow"):
            BatchNormalization(synchronized=True)


def test_policies_while_frozen() -> None:
    """Against the definition, in numpy: which statistics normalise, and which move."""
    rng = np.random.default_rng(5)
    x = rng.normal(2, 3, (32, 4)).astype("float32")
    mean, variance = x.mean(0, dtype="float64"), x.var(0, dtype="float64")
    for policy, uses_batch, moves in (
        ("inference", False, False),
        ("batch", True, False),
        ("update", True, True),
    ):
        layer = BatchNormalization(policy=policy, momentum=0.9)
        layer.build(x.shape)
        layer.trainable = False
        y = numpy_of(layer(x, training=True))
        expected = (x - mean) / np.sqrt(variance + 1e-3) if uses_batch else x / np.sqrt(1 + 1e-3)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        np.testing.assert_allclose(
            numpy_of(layer.moving_mean), 0.1 * mean if moves else 0 * mean, atol=1e-6
        )
        np.testing.assert_allclose(
            numpy_of(layer.moving_variance), 0.9 + 0.1 * variance if moves else 1.0, rtol=1e-6
        )


def test_debias_is_the_weighted_mean_of_what_was_seen() -> None:
    """After t updates: weights (1-m) m^(t-i) / (1 - m^t), nothing of the start value."""
    rng = np.random.default_rng(6)
    layer = BatchNormalization(debias=True, momentum=0.9)
    layer.build((None, 3))
    layer.set_weights([np.ones(3), np.zeros(3), np.full(3, 1e3), np.full(3, 1e3)])
    batches = rng.normal(2, 3, (5, 64, 3)).astype("float32")
    for count, batch in enumerate(batches, start=1):
        layer(batch, training=True)
        weights = 0.9 ** np.arange(count)[::-1]
        weights /= weights.sum()
        seen = batches[:count].astype("float64")
        np.testing.assert_allclose(numpy_of(layer.moving_mean), weights @ seen.mean(1), rtol=1e-5)
        np.testing.assert_allclose(
            numpy_of(layer.moving_variance), weights @ seen.var(1), rtol=1e-5
        )
    layer.momentum = 1.0
    before = layer.get_weights()
    layer(batches[0], training=True)
    for received, expected in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-6)


def test_debias_starts_anew_after_loading() -> None:
    layer = BatchNormalization(debias=True)
    x = np.random.default_rng(0).normal(5, 1, (32, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), layer])
    layer(x, training=True)
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    store = {key: keras.ops.convert_to_numpy(value) for key, value in store.items()}
    layer(x - 10, training=True)
    layer.load_own_variables(store)
    layer(x + 10, training=True)
    np.testing.assert_allclose(layer.get_weights()[2], (x + 10).mean(0), rtol=1e-5)
    assert model.count_params() == 12


def test_training_leaves_no_warning() -> None:
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(4), BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile("adam", "mse")
    model.layers[1].trainable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.train_on_batch(np.ones((4, 6), "float32"), np.ones((4, 1), "float32"))


def test_mixed_precision_keeps_float32_statistics() -> None:
    layer = BatchNormalization(dtype="mixed_float16", policy="batch")
    x = np.random.default_rng(0).normal(300.0, 100.0, (64, 3)).astype("float16")
    y = layer(x, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    assert {keras.backend.standardize_dtype(w.dtype) for w in layer.weights} == {"float32"}
    assert np.isfinite(layer.get_weights()[3]).all()


def test_two_replicas() -> None:
    """MirroredStrategy with two virtual CPUs: same statistics as the stock layer, flip included."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.distribute is TensorFlow's")
    import subprocess
    import sys

    script = Path(__file__).parent / "distributed_layer.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
