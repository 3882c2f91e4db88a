"""Differences to a reference, saving and loading, trials, noise layers of Keras models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import frostline as fl
from frostline.adapters import adapter_of
from frostline.adapters.keras import state as keras_state
from frostline.types import ModelError

L = keras.layers
X = np.random.default_rng(0).normal(1, 2, (8, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")


def network(seed: int = 1, **bn: Any) -> Any:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    x = L.BatchNormalization(name="bn", **bn)(L.Dense(3, name="d1")(inputs))
    return keras.Model(inputs, L.Dense(2, name="head")(x))


def state(model: Any) -> list[bytes]:
    return [np.array(ops.convert_to_numpy(v)).tobytes() for v in keras_state.variables_of(model)]


def changed() -> tuple[Any, Any]:
    """A model and a twin that differs in known ways."""
    model, twin = network(), network()
    twin.get_layer("head").kernel.assign(model.get_layer("head").kernel * 2)
    twin.get_layer("head").bias.assign([0.0, 0.0])
    twin.get_layer("bn").moving_mean.assign([0.0, 3.0, 0.0])
    twin.get_layer("bn").moving_variance.assign([1.0, 4.0, 1.0])
    return model, twin


@pytest.mark.parametrize("kind", ["model", ".keras", ".h5", ".weights.h5", "layers", "flat"])
def test_difference(tmp_path: Path, kind: str) -> None:
    model, twin = changed()
    path = tmp_path / f"reference{kind}"
    if kind == "model":
        reference: Any = twin
    elif kind == "layers":
        reference = [layer.get_weights() for layer in twin.layers]
    elif kind == "flat":
        reference = twin.get_weights()
    else:
        (twin.save_weights if kind == ".weights.h5" else twin.save)(path)
        reference = str(path)
    before = state(model)
    found = adapter_of(model).difference(reference, X)
    assert state(model) == before
    # head: ‖k − 2k‖ / ‖2k‖ = ½; statistics: (0 − 3) / √(4 + ε)
    wanted = {"d1": 0.0, "bn": 0.0, "head": pytest.approx(0.5, abs=1e-6)}
    assert found.params == wanted
    assert found.statistics == {"bn": pytest.approx(3 / np.sqrt(4 + 1e-3), rel=1e-5)}
    if kind in ("model", ".keras", ".h5"):
        own, other = (each.predict(X, verbose=0) for each in (model, twin))
        wanted_change = np.abs(own - other).max() / np.abs(own).max()
        assert found.outputs == pytest.approx(wanted_change, rel=1e-4)
    else:
        assert found.outputs is None


def test_difference_in_settings() -> None:
    found = adapter_of(network()).difference(network(epsilon=0.1, center=True, axis=1), X)
    assert found.epsilons == {"bn": (0.001, 0.1)}
    assert found.settings == {"bn": "axis -1, not 1"}


def test_references_that_do_not_fit(tmp_path: Path) -> None:
    model = network()
    model.compile("adam", "mse")
    before = state(model)
    keras.Sequential([keras.Input((4,)), L.Dense(7)]).save_weights(tmp_path / "o.weights.h5")
    other = keras.Sequential([keras.Input((4,)), L.Dense(7)])
    for reference, message in (
        (tmp_path / "missing.keras", "no such reference file"),
        (tmp_path / "o.weights.h5", "does not fit model"),
        (other, "another architecture"),
        (other.get_weights(), "does not fit model"),
        ([layer.get_weights() for layer in other.layers], "one list of arrays for each"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            adapter_of(model).difference(reference, None)
        assert "\n" not in str(caught.value)
        assert state(model) == before


class Forgets(L.Layer):  # type: ignore[misc]
    """Loses its factor when it is loaded; it is not registered with Keras."""

    def __init__(self, factor: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.factor = factor

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}

    def call(self, x: Any) -> Any:
        return x * self.factor


def test_round_trip() -> None:
    assert adapter_of(fl.convert(network(), policy="batch")).round_trip(X) == 0.0
    model = keras.Sequential([keras.Input((4,)), Forgets(4.0)])
    assert adapter_of(model).round_trip(X) == pytest.approx(0.75)  # |4x − x| / |4x|
    model = keras.Sequential([keras.Input((4,)), L.Lambda(lambda x: x)])
    with pytest.raises(ModelError, match="a Lambda holds code"):
        adapter_of(model).round_trip(X)


# --- trial ----------------------------------------------------------------------------------------


def compiled(policy: str | None) -> Any:
    model = network()
    model.get_layer("d1").trainable = False
    if policy is not None:
        fl.convert(model, policy=policy)
    model.get_layer("bn").trainable = False
    model.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize("policy", [None, "update"], ids=["stock", "update"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("fuse", [None, KeyboardInterrupt()], ids=["normal", "interrupt"])
def test_trial(policy: str | None, trained: bool, fuse: BaseException | None) -> None:
    model = compiled(policy)
    if trained:
        model.fit(X, Y, batch_size=4, verbose=0)
    # The oracle: a stock model with frozen BN, trained by Keras itself from the same weights.
    oracle = compiled(None)
    if trained:
        oracle.fit(X, Y, batch_size=4, verbose=0)  # its optimizer's slots need not be the same
    for layer in oracle.layers[1:]:
        layer.set_weights(model.get_layer(layer.name).get_weights())
    if not trained:
        oracle.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    before, history = state(model), getattr(model, "history", None)
    step, optimizer = model.train_function, model.optimizer
    try:
        batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
        with adapter_of(model).trial(batches, policy="inference", epochs=2):
            moved = model.get_layer("head").get_weights()
            kept = model.get_layer("bn").get_weights()
            if fuse is not None:
                raise fuse
    except KeyboardInterrupt:
        assert fuse is not None
    assert state(model) == before
    assert (model.train_function, model.optimizer) == (step, optimizer)
    assert "train_step" not in vars(model)
    assert getattr(model, "history", None) is history
    assert getattr(model.get_layer("bn"), "policy", None) == policy
    for a, b in zip(kept, model.get_layer("bn").get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(moved[0], model.get_layer("head").get_weights()[0], atol=0.01)
    if not trained:
        for a, b in zip(moved, oracle.get_layer("head").get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    model.fit(X, Y, batch_size=4, verbose=0)  # it still trains


def test_trial_after_a_flip_of_trainable() -> None:
    """The flags of now count, though a step and an optimizer for other variables exist."""
    model = compiled(None)
    model.fit(X, Y, batch_size=4, verbose=0)
    model.get_layer("d1").trainable = True
    before = state(model)
    kernel = model.get_layer("d1").get_weights()[0]
    with adapter_of(model).trial([(X, Y)], policy="inference", epochs=1):
        assert not np.array_equal(kernel, model.get_layer("d1").get_weights()[0])
    assert state(model) == before


def test_trials_that_cannot_be() -> None:
    for change, message in (
        (lambda m: None, "not compiled"),
        (lambda m: m.compile("sgd", "mse") or setattr(m, "trainable", False), "trains"),
    ):
        model = network()
        change(model)
        with (
            pytest.raises(ModelError, match=message),
            adapter_of(model).trial([(X, Y)], policy="inference", epochs=1),
        ):
            pass


# --- noise layers ---------------------------------------------------------------------------------


class DropPath(L.Layer):  # type: ignore[misc]
    def call(self, x: Any, training: Any = None) -> Any:
        return x


class Sampling(L.Layer):  # type: ignore[misc]
    """Draws in inference too: no difference between the phases."""

    def __init__(self) -> None:
        super().__init__(name="sampling")
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, x: Any) -> Any:
        return x + keras.random.normal(ops.shape(x), seed=self.seeds)


def test_noise_layers() -> None:
    inputs = keras.Input((8, 8, 3))
    x = L.RandomFlip(name="flip")(inputs)
    x = L.SpatialDropout2D(0.1, name="spatial")(L.GaussianNoise(0.1, name="gauss")(x))
    x = L.Dropout(0.0, name="nothing")(L.BatchNormalization()(x))
    x = DropPath(name="path")(Sampling()(x))
    x = L.LSTM(2, dropout=0.1, name="lstm", return_sequences=True)(L.Reshape((64, 3))(x))
    x = L.LSTM(2, name="plain", return_sequences=True)(x)
    x = L.MultiHeadAttention(1, 2, dropout=0.1, name="heads")(x, x)
    inner = keras.Sequential([keras.Input((64, 2)), L.Dropout(0.5, name="drop")], name="inner")
    found = adapter_of(keras.Model(inputs, inner(x))).noise_layers()
    assert {path.split("/")[0] + ":" + kind for path, kind in found.items()} == {
        "flip:augmentation",
        "gauss:noise",
        "spatial:dropout",
        "path:dropout",
        "lstm:dropout",
        "heads:dropout",
        "inner:dropout",
    }
    assert found["inner/drop"] == "dropout"
    assert len(found) == 7
