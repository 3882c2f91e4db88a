"""What BN layers do, told by watching them; the expected answers follow from how they are built."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import frostline as fl
from frostline.adapters import adapter_of
from frostline.adapters.keras import state as keras_state

L = keras.layers
X = np.random.default_rng(0).normal(1, 2, (16, 5)).astype("float32")


class Own(L.BatchNormalization):  # type: ignore[misc]
    """Does more than normalise."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return ops.tanh(super().call(inputs, training=training, mask=mask)) * 2


class Between(L.BatchNormalization):  # type: ignore[misc]
    """Normalises with 30 % of the batch and never updates."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if not training:
            return super().call(inputs, training=False, mask=mask)
        mean, variance = ops.moments(inputs, [0])
        mean = 0.7 * ops.convert_to_tensor(self.moving_mean) + 0.3 * mean
        variance = 0.7 * ops.convert_to_tensor(self.moving_variance) + 0.3 * variance
        return ops.batch_normalization(
            inputs, mean, variance, -1, self.beta, self.gamma, self.epsilon
        )


class Deaf(L.BatchNormalization):  # type: ignore[misc]
    """Reads no stored statistics: normalises with the batch in every mode."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        mean, variance = ops.moments(inputs, [0])
        return ops.batch_normalization(
            inputs, mean, variance, -1, self.beta, self.gamma, self.epsilon
        )


class Forced(L.Layer):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bn = L.BatchNormalization(name="bn")

    def call(self, inputs: Any) -> Any:
        return self.bn(inputs, training=True)


def site(kind: str) -> Any:
    if kind in ("inference", "batch", "update"):
        layer: Any = fl.layers.BatchNormalization(policy=kind)
        layer.trainable = False
    elif kind == "ours":
        layer = fl.layers.BatchNormalization()
    elif kind == "frozen":
        layer = L.BatchNormalization(trainable=False)
    elif kind == "momentum 1":
        layer = L.BatchNormalization(momentum=1.0)
    elif kind == "half":
        layer = L.BatchNormalization(dtype="mixed_float16")
    else:
        kinds = {"own": Own, "between": Between, "forced": Forced, "deaf": Deaf}
        layer = kinds.get(kind, L.BatchNormalization)()
    return layer


EXPECTED = {  # training, inference, moves
    "stock": (1, 0, True),
    "frozen": (0, 0, False),
    "inference": (0, 0, False),
    "batch": (1, 0, False),
    "update": (1, 0, True),
    "ours": (1, 0, True),
    "momentum 1": (1, 0, False),
    "half": (1, 0, True),
    "own": (1, 0, True),
    "between": (0.3, 0, False),
    "forced": (1, 1, True),
    "deaf": (1, 1, False),
}


def test_every_kind_of_layer() -> None:
    inputs = keras.Input((5,))
    # Side by side, so that each sees the same inputs.
    branches = [L.Activation("linear", dtype="float32")(site(kind)(inputs)) for kind in EXPECTED]
    model = keras.Model(inputs, branches)
    before = [np.array(ops.convert_to_numpy(v)) for v in keras_state.variables_of(model)]
    found = adapter_of(model).behaviour([(X,), (X[:8], None)])
    told = [(each.training, each.inference, each.moves) for each in found.values()]
    for (kind, wanted), seen in zip(EXPECTED.items(), told, strict=True):
        assert seen[0] == pytest.approx(wanted[0], abs=0.01), kind
        assert seen[1:] == wanted[1:], kind
    after = [np.array(ops.convert_to_numpy(v)) for v in keras_state.variables_of(model)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


def test_what_cannot_be_told_is_none() -> None:
    """Stored and batch statistics alike; a layer that is never called."""

    class Model(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.used = L.BatchNormalization(name="used")
            self.unused = L.BatchNormalization(name="unused")

        def call(self, x: Any, training: Any = None) -> Any:
            return self.used(x, training=training)

    model = Model()
    model.used.build((None, 5))
    model.unused.build((None, 5))
    few = X[:4]  # no more than JAX takes
    model.used.moving_mean.assign(few.mean(0))
    model.used.moving_variance.assign(few.var(0))
    found = adapter_of(model).behaviour([(few,)])
    assert (found["used"].training, found["used"].inference) == (None, None)
    assert (found["unused"].training, found["unused"].moves) == (None, None)


def test_a_switch_that_was_flipped_counts_at_once_and_a_shared_layer_once() -> None:
    layer = L.BatchNormalization(name="bn")
    inputs = keras.Input((5,))
    model = keras.Model(inputs, layer(L.Dense(5)(layer(inputs))))
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0)
    seen = adapter_of(model)
    assert [b.training for b in seen.behaviour([(X,)]).values()] == [1]
    layer.trainable = False
    (found,) = seen.behaviour([(X,)]).values()
    assert (found.training, found.moves) == (0, False)


def test_statistics_that_are_not_finite() -> None:
    inputs = keras.Input((5,))
    outputs = [L.BatchNormalization(name=name)(inputs) for name in ("thawed", "frozen")]
    model = keras.Model(inputs, outputs)
    model.get_layer("frozen").trainable = False
    for layer in model.layers[1:]:
        layer.moving_variance.assign(np.full(5, np.nan))
    found = adapter_of(model).behaviour([(X,)])
    assert (found["thawed"].training, found["thawed"].inference) == (1, 0)
    assert (found["frozen"].training, found["frozen"].moves) == (0, False)


def test_bn_inside_a_torch_module(backend: str) -> None:
    if backend != "torch":
        pytest.skip("TorchModuleWrapper exists on the torch backend only")
    import torch

    module = torch.nn.Sequential(torch.nn.BatchNorm1d(5))
    inputs = keras.Input((5,))
    outer = L.TorchModuleWrapper(module, name="outer", output_shape=(None, 5))
    model = keras.Model(inputs, outer(inputs))
    (found,) = adapter_of(model).behaviour([(X,)]).values()
    assert (found.path, found.training, found.inference) == ("outer/0", 1, 0)
    assert found.moves
    assert torch.equal(module[0].running_mean, torch.zeros_like(module[0].running_mean))


@keras.saving.register_keras_serializable("frostline-tests")
class Untold(keras.Model):
    """Its ``call`` takes no ``training``, so that Keras' trainer tells it no phase."""

    def __init__(self) -> None:
        super().__init__(name="untold")
        self.norm = keras.layers.BatchNormalization(name="bn")
        self.drop = keras.layers.Dropout(0.5)
        self.head = keras.layers.Dense(2)

    def call(self, inputs: Any) -> Any:
        return self.head(self.drop(self.norm(inputs)))


class Looped(Untold):
    """The same under a step of its own, which tells it."""

    def train_step(self, data: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("kind", [Untold, Looped])
def test_a_model_is_called_as_its_own_trainer_calls_it(kind: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, (32, 4)).astype("float32")
    y = rng.normal(size=(32, 2)).astype("float32")
    keras.utils.set_random_seed(0)
    model = kind()
    model(x)
    model.compile("sgd", "mse")
    seen = adapter_of(model).behaviour([(x,)])["bn"]
    if kind is Looped:
        assert (seen.training, seen.moves) == (1.0, True)
        return
    assert (seen.inference, seen.training, seen.moves) == (0.0, 0.0, False)
    report = fl.diagnose(model, (x, y), verbose=0)
    assert report.measurement.gaps["total"].loss.estimate == 0
    measured = report.measurement.probes["training"].loss
    stored = np.array(ops.convert_to_numpy(model.norm.moving_mean))
    assert model.train_on_batch(x, y) == pytest.approx(measured, rel=1e-5)  # dropout is off in it
    np.testing.assert_array_equal(ops.convert_to_numpy(model.norm.moving_mean), stored)
