"""Fold BN layers of a Keras model into the layers before them; the outcome is plain Keras.

At stored statistics a BN layer is ``y = s x + t`` per channel, with ``s = gamma / sqrt(variance +
epsilon)`` and ``t = beta - mean s``. A linear layer that feeds only this BN layer takes both:
``kernel' = kernel s`` and ``bias' = bias s + t``. Where no such layer is, one layer that computes
``s x + t`` takes the place (and the name) of the BN layer.

The model is read, never changed: the outcome is built beside it from copies of its layers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import float64
from frostline.adapters.keras.calls import graph_of
from frostline.adapters.keras.graph import is_site, walk, wrapped_module
from frostline.adapters.keras.rebuild import LINEAR, Rebuild, factors, fed_with, nodes, takes
from frostline.adapters.protocol import FoldedModel
from frostline.types import Array, ModelError

L = keras.layers


def fold(model: Any) -> FoldedModel:
    """Fold every BN layer of ``model`` at its stored statistics.

    Args:
        model: A built functional or sequential Keras model, possibly nested; it is not changed.

    Returns:
        A new, uncompiled model of Keras' own layers (and the user's), and where the BN layers went.

    Raises:
        ModelError: Nothing to fold; a BN layer that cannot be, or a layer that cannot be copied,
            with its path.
    """
    places = walk(model)
    paths = {id(place.layer): place.path for place in places}
    sites = [place.layer for place in places if is_site(place.layer)]
    wrapped = [place.layer for place in places if wrapped_module(place.layer) is not None]
    if not sites and not wrapped:
        raise ModelError(
            f"no BatchNormalization layer: there is nothing to fold. Received: model {model.name!r}"
        )
    if wrapped:
        raise ModelError(
            f"'{paths[id(wrapped[0])]}' is a TorchModuleWrapper: Keras can neither look into a "
            "torch module nor save it without pickle. Rebuild that part from Keras layers. "
            f"Received: model {model.name!r}"
        )
    containers = _containers(model, paths)
    found = {id(site): _factors(site, paths[id(site)]) for site in sites}
    rebuild = Rebuild(
        paths, found, _absorbing(containers), _shapes(containers), _masked(containers)
    )
    with _python_random_kept():  # initializers of the copies draw seeds from it
        outcome = rebuild.container(model)
        rebuild.write_weights()
    return FoldedModel(
        model=outcome,
        absorbed=tuple(dict.fromkeys(rebuild.absorbed)),
        replaced=tuple(dict.fromkeys(rebuild.replaced)),
    )


# --- what can be folded ---------------------------------------------------------------------------


def _containers(model: Any, paths: Mapping[int, str]) -> list[Any]:
    """The model and every nested model with a graph, each once.

    Raises:
        ModelError: A BN layer is inside something that has no graph.
    """
    found: dict[int, Any] = {}

    def visit(layer: Any) -> None:
        graph = graph_of(layer)
        if graph is None:
            _require_no_site(layer, model, paths)
        elif id(layer) not in found:
            found[id(layer)] = layer
            for operation in graph.operations:
                if isinstance(operation, keras.Layer):
                    visit(operation)

    visit(model)
    return list(found.values())


def _require_no_site(layer: Any, model: Any, paths: Mapping[int, str]) -> None:
    inner = next((place.layer for place in walk(layer) if is_site(place.layer)), None)
    if inner is None:
        return
    path, kind = paths[id(inner)], type(layer).__name__
    if isinstance(layer, keras.Sequential) and not layer.built:
        reason = f"'{layer.name}' is not built yet: call it once on a batch"
    elif layer is model:
        reason = (
            f"{kind} is a subclassed model, which has no graph to follow; write it as a "
            "functional model, or fold the functional models that it holds"
        )
    else:
        reason = f"it is inside '{paths[id(layer)]}', a {kind}, which has no graph to follow"
    raise ModelError(f"'{path}' cannot be folded: {reason}. Received: model {model.name!r}")


def _factors(site: Any, path: str) -> tuple[Array, Array]:
    """Scale and shift of a BN layer at its stored statistics, shape ``(channels,)``, float64."""
    from frostline.layers import BatchNormalization

    if type(site) not in (L.BatchNormalization, BatchNormalization):
        raise ModelError(
            f"'{path}' is a {type(site).__name__}, a BN class of your own: fold knows "
            "keras.layers.BatchNormalization and Frostline's, because yours may compute something "
            f"else. Received: {type(site).__module__}.{type(site).__qualname__}"
        )
    if not site.built:
        raise ModelError(
            f"'{path}' has no weights yet: build the model first, for example by calling it once "
            "on a batch. Received: an unbuilt layer"
        )
    scale, shift = factors(site)
    bad = int(np.count_nonzero(~np.isfinite(scale) | ~np.isfinite(shift)))
    if bad:
        raise ModelError(
            f"'{path}' cannot be folded: {bad} of its {len(scale)} channels hold a NaN, an "
            "infinity or a negative variance. Recalibrate it first. "
            f"Received: smallest stored variance {float64(site.moving_variance).min():g}"
        )
    return scale, shift


def _absorbing(containers: list[Any]) -> dict[int, Any]:
    """``id`` of each linear layer that can take a BN layer -> that BN layer.

    A layer has one kernel, so all its uses, in all containers, must feed the same BN layer and
    nothing else.
    """
    layers: dict[int, Any] = {}
    followers: dict[int, list[Any]] = {}
    for container in containers:
        graph: Any = graph_of(container)
        readers: dict[int, list[Any]] = {}
        for node in nodes(graph):
            for tensor in node.input_tensors:
                readers.setdefault(id(tensor), []).append(node.operation)
            if isinstance(node.operation, keras.Layer) and graph_of(node.operation) is None:
                # A composite uses them in ways that cannot be seen.
                for inner in walk(node.operation):
                    followers.setdefault(id(inner.layer), []).append(None)
        for tensor in graph.outputs:
            readers.setdefault(id(tensor), []).append(None)
        for node in nodes(graph):
            if type(node.operation) not in LINEAR:
                continue
            output = node.outputs[0]
            after = readers.get(id(output), [])
            alone = len(after) == 1 and takes(node.operation, after[0], len(output.shape))
            layers[id(node.operation)] = node.operation
            followers.setdefault(id(node.operation), []).append(after[0] if alone else None)
    return {
        key: followers[key][0]
        for key in layers
        if followers[key][0] is not None and all(f is followers[key][0] for f in followers[key])
    }


def _masked(containers: list[Any]) -> bool:
    """Whether masks travel along any tensor of these graphs."""
    return any(
        getattr(tensor, "_keras_mask", None) is not None
        for container in containers
        for node in nodes(graph_of(container))
        for tensor in node.outputs
    )


def _shapes(containers: list[Any]) -> dict[int, tuple[int | None, ...]]:
    """Input shape of every BN layer; ``None`` for what differs between its uses."""
    shapes: dict[int, tuple[int | None, ...]] = {}
    for container in containers:
        for node in nodes(graph_of(container)):
            if is_site(node.operation):
                shape = tuple(fed_with(node).shape)
                known = shapes.get(id(node.operation), shape)
                merged = tuple(a if a == b else None for a, b in zip(known, shape, strict=True))
                shapes[id(node.operation)] = merged
    return shapes


@contextmanager
def _python_random_kept() -> Iterator[None]:
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
