"""A Keras prefix: its identity; and augmentations that are Keras layers, seeded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from frostline.adapters.bytecode import code_of
from frostline.adapters.keras.compile import without_gradients
from frostline.adapters.keras.graph import walk
from frostline.adapters.keras.native import device, full_precision, native, uncompiled
from frostline.types import Array, ModelError

#: Parts of a configuration that say nothing about what an inference pass computes.
_BESIDE = ("name", "trainable", "build_config", "compile_config")

#: A Keras data set keeps its own labels.
HANDS_OUT_LABELS = False


def identity(model: Any) -> str:
    """Hash of the architecture without names, and of all weights: kernels, gamma, statistics.

    Keras numbers layers as they are made (``conv2d_7``), so a name is replaced by the layer's place
    in the model: the same network built twice is the same network. Keras' own layers are known by
    its version, others by their code.

    Raises:
        ModelError: Not built, or a layer that cannot say what it is.
    """
    if not model.built:
        raise ModelError("the prefix is not built: call it on a batch first.")
    places = walk(model)
    names = {place.layer.name: f"layer {place.order}" for place in places}
    try:
        config = keras.saving.serialize_keras_object(model)
        text = json.dumps(_plain(config, names), sort_keys=True, default=repr)
    except Exception as error:  # a layer without get_config, or with one that fails
        raise ModelError(
            f"the prefix cannot be described, so its features cannot be kept ({error})"
        ) from error
    code = [code_of(type(each), "keras") for each in (model, *(place.layer for place in places))]
    parts = (keras.__version__, keras.backend.floatx(), text, *code, weights_digest(model))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def weights_digest(model: Any) -> str:
    """Hash of all weights: kernels, gamma and beta, stored statistics."""
    digest = hashlib.sha256()
    for variable in model.weights:
        value = np.ascontiguousarray(_numpy(variable))
        digest.update(f"{variable.shape}|{variable.dtype}|".encode())
        digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _plain(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            names.get(key, key): _plain(inner, names)
            for key, inner in value.items()
            if key not in _BESIDE
        }
    if isinstance(value, (list, tuple)):
        return [_plain(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def _numpy(variable: Any) -> Array:
    value: Array = np.asarray(keras.ops.convert_to_numpy(variable))
    return value


def seeded(layer: Any) -> Callable[[Any, int], Any]:
    """Return ``(x, seed) -> x`` of a Keras augmentation: its seeds are set, then put back."""
    inner = [layer, *(place.layer for place in walk(layer))] if _has_layers(layer) else [layer]
    seeds = {
        id(each): each
        for part in inner
        for each in vars(part).values()
        if isinstance(each, keras.random.SeedGenerator)
    }
    if not seeds:
        raise ModelError(
            "the augmentation holds no seed, so its views could not be made again. "
            f"Received: {type(layer).__name__}"
        )

    def apply(x: Any, seed: int) -> Any:
        before = [_numpy(each.state) for each in seeds.values()]
        try:
            for position, each in enumerate(seeds.values()):
                each.state.assign(np.array([seed, position], dtype=each.state.dtype))
            with without_gradients():
                return keras.tree.map_structure(
                    lambda leaf: np.asarray(keras.ops.convert_to_numpy(leaf)),
                    layer(x, training=True),
                )
        finally:
            for each, state in zip(seeds.values(), before, strict=True):
                each.state.assign(state)

    return apply


def _has_layers(layer: Any) -> bool:
    return bool(getattr(layer, "_layers", None))


def takes_any_number(model: Any) -> bool:
    """Whether the number of samples is open in all inputs of the model."""
    inputs = getattr(model, "inputs", None) or ()
    return bool(inputs) and all(tensor.shape[0] is None for tensor in inputs)


def to_onnx(model: Any, batch: Any) -> bytes:  # noqa: ARG001 - the model knows its inputs
    """Serialize the model at inference as an ONNX model."""
    from frostline.adapters.keras.onnx.writer import to_onnx as written

    return written(model)


def readable(data: Any, batch_size: int) -> Any:  # noqa: ARG001 - torch's has to know it
    """Data as they are."""
    return data


def handed_out(cache: Any, labels: Sequence[Any]) -> Any:  # noqa: ARG001 - see above
    """The cache itself."""
    return cache


__all__ = [
    "HANDS_OUT_LABELS",
    "device",
    "full_precision",
    "handed_out",
    "identity",
    "native",
    "readable",
    "seeded",
    "takes_any_number",
    "to_onnx",
    "uncompiled",
    "weights_digest",
]
