"""A Keras prefix: its identity; and augmentations that are Keras layers, seeded."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras.metrics import Metric

from frostline.adapters.computation import (
    Identity,
    Reader,
    hashed,
    identity_of,
    is_library,
    read_of_self,
)
from frostline.adapters.dropout_rate import KEPT_RATES
from frostline.adapters.keras.arrays import copied, to_numpy
from frostline.adapters.keras.compile import without_gradients
from frostline.adapters.keras.graph import walk
from frostline.adapters.keras.native import device, full_precision, lower, native, uncompiled
from frostline.types import ModelError

#: A Keras data set keeps its own labels.
HANDS_OUT_LABELS = False


def identity(model: Any) -> Identity:
    """Hash of all that decides what a model computes at inference, apart from names of layers.

    Keras numbers layers as they are made (``conv2d_7``), so a name is replaced by the layer's place
    in its model: the same network built twice is the same network. Keras' own layers are known by
    its version, their configuration and the functions they hold; others also by their code and by
    all of their attributes.

    Raises:
        ModelError: Not built, or a layer that cannot say what it is.
    """
    if not model.built:
        raise ModelError("the prefix is not built: call it on a batch first.")
    return layer_identity(model)


def layer_identity(model: Any) -> Identity:
    """As :func:`identity`, of any layer, built or not."""
    reading = _Reading(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a lambda cannot be loaded safely
            config = keras.saving.serialize_keras_object(model)
        config = _without_names(config, reading.classes)
        text = json.dumps(config, sort_keys=True, default=repr)
    except Exception as error:  # a layer without get_config, or with one that fails
        raise ModelError(
            f"the prefix cannot be described, so its features cannot be kept ({error})"
        ) from error
    names = [
        tensor._keras_history.operation.name for tensor in getattr(model, "inputs", None) or ()
    ]
    if len(names) == 1 or any(name.startswith(_NUMBERED) for name in names):
        names = []  # Keras finds an input by its name where there are several
    settings = (keras.config.floatx(), keras.config.image_data_format(), keras.config.epsilon())
    head = (keras.__version__, repr(settings), text, *names, weights_digest(model))
    found = identity_of(_Whole(reading), reading.leaf)
    return replace(found, text=hashed(*head, found.text))


#: What Keras calls inputs without a name.
_NUMBERED = ("input_layer", "keras_tensor")
_LAYER_KEYS = ("build_config", "compile_config")


@dataclass(frozen=True, eq=False)
class _Whole:
    """A model to be read: itself, its layers and operations, in order."""

    reading: _Reading


class _Reading:
    """Reads a model's layers beyond their configuration."""

    def __init__(self, model: Any) -> None:
        self.layers = [model, *(place.layer for place in walk(model))]
        self.numbers = {id(layer): number for number, layer in enumerate(self.layers)}
        self.weights = {id(variable): number for number, variable in enumerate(model.weights)}
        self.classes = {(layer.name, type(layer).__name__) for layer in self.layers}

    def leaf(self, value: Any, reader: Reader) -> list[Any] | None:
        """Read a value of Keras' own; see :class:`frostline.adapters.computation.Reader`."""
        if isinstance(value, _Whole):
            return [part for layer in self.layers for part in self._layer(layer, reader)]
        if isinstance(value, keras.Variable):
            number = self.weights.get(id(value))
            return ["weight", str(number)] if number is not None else ["variable", *_bytes(value)]
        if isinstance(value, keras.Layer):
            number = self.numbers.get(id(value))
            return ["layer", str(number)] if number is not None else self._layer(value, reader)
        if isinstance(value, keras.KerasTensor):
            return ["tensor", str(value.shape), str(value.dtype)]
        if isinstance(value, (keras.random.SeedGenerator, keras.Optimizer, keras.Loss, Metric)):
            return [type(value).__name__]
        if keras.ops.is_tensor(value):
            return ["constant", *_bytes(value)]
        package = type(value).__module__.partition(".")[0]
        if package in ("tensorflow", "jax", "jaxlib") and not isinstance(value, type):
            compiled = getattr(value, "python_function", None) or getattr(
                value, "__wrapped__", None
            )
            if compiled is not None:
                return [type(value).__name__, reader.read(compiled)]
        library = is_library(package)
        if library and not isinstance(value, type) and callable(getattr(value, "get_config", None)):
            return [type(value).__name__, reader.read(value.get_config())]
        if "torch" in sys.modules:
            from frostline.adapters.torch.prefix import leaf as of_torch

            return of_torch(value, reader)
        return None

    def _layer(self, layer: Any, reader: Reader) -> list[Any]:
        """Class and attributes of a layer, but for those that every layer has."""
        beside = _of_every_model() if isinstance(layer, keras.Model) else _of_every_layer()
        own = {name: value for name, value in vars(layer).items() if name not in beside}
        parts: list[Any] = ["layer", reader.read(type(layer)), str(layer.autocast)]
        package = type(layer).__module__.partition(".")[0]
        if is_library(package):
            # Its configuration says the rest; what Keras keeps beside it may differ between runs.
            reader = Reader(self.leaf, lenient=_FRAMEWORKS | {package})
            own = {
                name: value
                for name, value in own.items()
                if not isinstance(value, str) and name not in ("seed", "_nodes", "_operations")
            }
            if hasattr(layer, "get_vocabulary"):  # kept in a table of TensorFlow's
                parts.append(reader.read(layer.get_vocabulary()))
        else:
            used = read_of_self(type(layer), beside=_ON_THE_WAY)
            parts += [f"{name}={getattr(layer, name)}" for name in _NAMED if name in used]
            parts.append(str(getattr(layer.dtype_policy, "name", "")))
        parts += reader.items(own)
        if isinstance(layer, keras.Function):
            parts += self._operations(layer, reader)
        return parts

    def _operations(self, graph: Any, reader: Reader) -> list[Any]:
        """Operations that are no layers, and the functions that any of them is called with."""
        parts: list[Any] = []
        for operation in graph.operations:
            if not isinstance(operation, keras.Layer):
                library = is_library(type(operation).__module__)
                own = {
                    name: value
                    for name, value in vars(operation).items()
                    if name not in _of_every_layer() and (callable(value) or not library)
                }
                parts += [reader.read(type(operation)), *reader.items(own)]
        calls = [node for _, nodes in sorted(graph._nodes_by_depth.items()) for node in nodes]
        for node in calls:
            given = (node.arguments.args, node.arguments.kwargs)
            parts += reader.each(leaf for leaf in keras.tree.flatten(given) if callable(leaf))
        return parts


#: Their instances inside a layer of Keras' are told by its configuration.
_FRAMEWORKS = frozenset({"keras", "tensorflow", "jax", "jaxlib", "torch", "threading"})
#: What a user's class may read of itself though it says nothing to others.
_NAMED = ("name", "trainable")
#: Methods that do not compute.
_ON_THE_WAY = frozenset(
    {"__init__", "__repr__", "build", "compute_output_shape", "compute_output_spec", "get_config"}
)


@functools.cache
def _of_every_layer() -> frozenset[str]:
    """Attributes of a bare layer."""
    return frozenset({*vars(keras.layers.Layer()), KEPT_RATES})


@functools.cache
def _of_every_model() -> frozenset[str]:
    """Attributes of a bare model, compiled or not."""

    class Bare(keras.Model):  # type: ignore[misc]
        def call(self, inputs: Any) -> Any:
            return inputs

    model = Bare()
    model.compile("sgd", "mse")
    graph = keras.Sequential([keras.Input((1,)), keras.layers.Flatten()])
    functional = vars(getattr(graph, "_functional", graph))
    known = {*_of_every_layer(), *vars(model), *vars(graph), *functional}
    return frozenset({*known, "history", "stop_training", "validation_data", "_layers"})


def _without_names(value: Any, layers: set[tuple[str, str]], scope: Any = None) -> Any:
    """A configuration with the names of layers replaced where they refer to one.

    Args:
        value: Part of what Keras serializes.
        layers: (name, class) of every layer in the model.
        scope: Name -> place, of the layers of the model that this is part of.
    """
    if isinstance(value, (list, tuple)):
        return [_without_names(item, layers, scope) for item in value]
    if not isinstance(value, dict):
        return value
    scope = scope or {}
    name, config = value.get("class_name"), value.get("config")
    if name == "__lambda__":
        return {"class_name": name}  # its bytes name file and line; the function itself is read
    if name == "__keras_tensor__" and isinstance(config, dict):
        layer, *indices = config["keras_history"]
        return {**value, "config": {**config, "keras_history": [scope.get(layer, layer), *indices]}}
    if not isinstance(config, dict) or "class_name" not in value:
        return {key: _without_names(item, layers, scope) for key, item in value.items()}
    config = dict(config)
    outer = {key: item for key, item in value.items() if key not in ("config", *_LAYER_KEYS)}
    if "inbound_nodes" in value or (config.get("name"), name) in layers:
        outer.pop("name", None)
        config.pop("name", None)
        config.pop("trainable", None)
    entries = config.get("layers")
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        names = [entry.get("name", entry.get("config", {}).get("name")) for entry in entries]
        scope_inside = {name: f"layer {place}" for place, name in enumerate(names)}
        inside = layers | {
            (name, entry.get("class_name")) for name, entry in zip(names, entries, strict=True)
        }
        for end in ("input_layers", "output_layers"):
            if end in config:
                config[end] = _ends(config[end], scope_inside)
        config["layers"] = [_without_names(entry, inside, scope_inside) for entry in entries]
        return {**_without_names(outer, layers, scope), "config": config}
    return {
        **_without_names(outer, layers, scope),
        "config": {key: _without_names(item, layers, scope) for key, item in config.items()},
    }


def _ends(value: Any, scope: dict[str, str]) -> Any:
    """Inputs or outputs of a graph: layers as ``[name, node, tensor]`` in any structure."""
    if isinstance(value, dict):
        return {key: _ends(item, scope) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and len(value) == 3 and isinstance(value[0], str):
        return [scope.get(value[0], value[0]), *value[1:]]
    return [_ends(item, scope) for item in value] if isinstance(value, (list, tuple)) else value


def _bytes(tensor: Any) -> tuple[str, str, memoryview]:
    value = np.ascontiguousarray(to_numpy(tensor))
    return str(value.shape), str(value.dtype), value.reshape(-1).view(np.uint8).data


def weights_digest(model: Any) -> str:
    """Hash of all weights: kernels, gamma and beta, stored statistics."""
    digest = hashlib.sha256()
    for variable in model.weights:
        digest.update(f"{variable.shape}|{variable.dtype}|".encode())
        digest.update(_bytes(variable)[2])
    return digest.hexdigest()


def seeded(layer: Any) -> Callable[[Any, int], Any]:
    """Return ``(x, seed) -> x`` of a Keras augmentation: its seeds are set, then put back."""
    inner = [layer, *(place.layer for place in walk(layer))] if _has_layers(layer) else [layer]
    seeds = {
        id(value): value
        for part in inner
        for value in vars(part).values()
        if isinstance(value, keras.random.SeedGenerator)
    }
    if not seeds:
        raise ModelError(
            "the augmentation holds no seed, so its views could not be made again. "
            f"Received: {type(layer).__name__}"
        )

    def apply(x: Any, seed: int) -> Any:
        before = [copied(generator.state) for generator in seeds.values()]
        try:
            for position, generator in enumerate(seeds.values()):
                generator.state.assign(np.array([seed, position], dtype=generator.state.dtype))
            with without_gradients():
                return keras.tree.map_structure(
                    lambda leaf: np.asarray(keras.ops.convert_to_numpy(leaf)),
                    layer(x, training=True),
                )
        finally:
            for generator, state in zip(seeds.values(), before, strict=True):
                generator.state.assign(state)

    return apply


def _has_layers(layer: Any) -> bool:
    return bool(getattr(layer, "_layers", None))


def takes_any_number(model: Any) -> bool | None:
    """Whether the number of samples is open in all inputs of the model; ``None``: it has none."""
    inputs = getattr(model, "inputs", None)
    return all(tensor.shape[0] is None for tensor in inputs) if inputs else None


def to_onnx(model: Any, batch: Any) -> bytes:  # noqa: ARG001 - the model knows its inputs
    """Serialize the model at inference as an ONNX model."""
    from frostline.adapters.keras.onnx.export import to_onnx as written

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
    "layer_identity",
    "lower",
    "native",
    "readable",
    "seeded",
    "takes_any_number",
    "to_onnx",
    "uncompiled",
    "weights_digest",
]
