"""Fold BN layers of a Keras model into the layers before them; the outcome is plain Keras.

At stored statistics a BN layer is ``y = s x + t`` per channel, with ``s = gamma / sqrt(variance +
epsilon)`` and ``t = beta - mean s``. A linear layer that feeds only this BN layer takes both:
``kernel' = kernel s`` and ``bias' = bias s + t``. Where no such layer is, one layer that computes
``s x + t`` takes the place (and the name) of the BN layer.

The model is read, never changed: the outcome is built beside it from copies of its layers.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import float64
from frostline.adapters.keras.calls import graph_of
from frostline.adapters.keras.graph import is_site, walk, wrapped_module
from frostline.adapters.keras.rebuild import (
    LINEAR,
    Rebuild,
    factors,
    fed_with,
    followed,
    nodes,
    takes,
)
from frostline.adapters.keras.symbolic import inference_graph, inputs_of
from frostline.adapters.protocol import FoldedModel
from frostline.types import Array, ModelError
from frostline.types.reasons import first_line

L = keras.layers


#: A fold that is off by more than this share of the largest output is wrong; rounding is far below.
_WRONG = 1e-2


def fold(model: Any, *, sample: Any = None) -> FoldedModel:
    """Fold every BN layer of ``model`` at its stored statistics.

    BN layers inside a layer that has no graph to follow stay as they are, and are named.

    Args:
        model: A built functional or sequential Keras model, possibly nested; it is not changed.
        sample: A batch of inputs, on which the outcome is compared with the model.

    Returns:
        A new, uncompiled model of Keras' own layers (and the user's), and where the BN layers went.

    Raises:
        ModelError: Nothing to fold; a BN layer that cannot be, or a layer that cannot be copied,
            with its path; or the outcome does not compute what the model computes.
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
    graphs: dict[int, Any] = {}
    if graph_of(model) is None and (symbols := inputs_of(model, sample)) is not None:
        graph = inference_graph(model, symbols, {})
        graphs |= {} if graph is None else {id(model): graph}
    containers, left = _containers(model, paths, graphs)
    left |= {paths[id(site)]: why for site in sites if (why := _own_class(site))}
    if all(paths[id(site)] in left for site in sites):
        path, reason = next(iter(left.items()))
        raise ModelError(
            f"no BN layer can be folded: '{path}' {reason}. Received: model {model.name!r}"
        )
    found = {
        id(site): _factors(site, paths[id(site)]) for site in sites if paths[id(site)] not in left
    }
    rebuild = Rebuild(
        paths,
        found,
        _absorbing(containers, found, graphs),
        _shapes(containers),
        _masked(containers),
        graphs,
    )
    with _python_random_kept():  # initializers of the copies draw seeds from it
        outcome = rebuild.container(graphs.get(id(model), model))
        rebuild.write_weights()
    if sample is not None:
        _require_same(model, outcome, sample)
    return FoldedModel(
        model=outcome,
        absorbed=tuple(dict.fromkeys(rebuild.absorbed)),
        replaced=tuple(dict.fromkeys(rebuild.replaced)),
        notes=tuple(f"'{path}' {reason}; it is left" for path, reason in left.items()),
    )


# --- what can be folded ---------------------------------------------------------------------------


def _containers(
    model: Any, paths: Mapping[int, str], graphs: dict[int, Any]
) -> tuple[list[Any], dict[str, str]]:
    """The model and every nested model with a graph, each once; BN layers that are in none -> why.

    Layers of a user's own that hold BN are added to ``graphs`` where one can be made of them.

    Raises:
        ModelError: The model itself has no graph.
    """
    found: dict[int, Any] = {}
    left: dict[str, str] = {}

    def visit(layer: Any) -> None:
        inner = followed(layer, graphs)
        if inner is None:
            left.update(_unseen(layer, model, paths))
        elif id(inner) not in found:
            found[id(inner)] = inner
            for node in nodes(graph_of(inner)):
                operation = node.operation
                if isinstance(operation, keras.Layer) and not is_site(operation):
                    unknown = _holds_sites(operation) and followed(operation, graphs) is None
                    if unknown and not _carries_mask(node.input_tensors):  # a graph would lose it
                        given = node.arguments
                        graph = inference_graph(operation, given.args, given.kwargs)
                        graphs.update({} if graph is None else {id(operation): graph})
                    visit(operation)

    visit(model)
    return list(found.values()), left


def _holds_sites(layer: Any) -> bool:
    """Whether BN is inside of a layer that is no model of Keras' own."""
    return layer.built and any(is_site(place.layer) for place in walk(layer))


def _unseen(layer: Any, model: Any, paths: Mapping[int, str]) -> dict[str, str]:
    """Paths of the BN layers in a layer without a graph -> why they stay.

    Raises:
        ModelError: It is the model itself, or a model that no call has built yet.
    """
    inner = [paths[id(place.layer)] for place in walk(layer) if is_site(place.layer)]
    kind = type(layer).__name__
    reason = ""
    if inner and isinstance(layer, keras.Sequential) and not layer.built:
        reason = f"'{layer.name}' is not built yet: call it once on a batch"
    elif inner and layer is model:
        reason = (
            f"{kind} is a subclassed model, which has no graph to follow; write it as a "
            "functional model, or fold the functional models that it holds"
        )
    if reason:
        raise ModelError(f"'{inner[0]}' cannot be folded: {reason}. Received: model {model.name!r}")
    why = f"is inside '{paths.get(id(layer))}', a {kind}, which has no graph to follow"
    return dict.fromkeys(inner, why)


def _require_same(model: Any, outcome: Any, sample: Any) -> None:
    """Compare a folded model with the model at inference.

    Raises:
        ModelError: The model fails on the sample, or the folded one computes something else.
    """
    try:
        wanted = keras.tree.flatten(model(sample, training=False))
    except Exception as problem:  # whatever Keras or the user's layers say to it
        raise ModelError(
            f"the model fails on the sample ({first_line(problem)}). Pass sample=, a batch of "
            f"inputs as the model takes them. Received: sample of {type(sample).__name__}"
        ) from problem
    found = keras.tree.flatten(outcome(sample, training=False))
    for one, other in zip(wanted, found, strict=True):
        a, b = float64(one), float64(other)
        if not np.allclose(a, b, rtol=0.0, atol=_WRONG * np.abs(a).max(), equal_nan=True):
            raise ModelError(
                "the folded model does not compute what the model computes on the sample. "
                f"Received: model {model.name!r}"
            )


def _own_class(site: Any) -> str:
    """Why a BN layer of this class is left; "" for those that are known."""
    from frostline.layers import BatchNormalization

    if type(site) in (L.BatchNormalization, BatchNormalization):
        return ""
    return (
        f"is a {type(site).__name__}, a BN class of your own: fold knows "
        "keras.layers.BatchNormalization and Frostline's, because yours may compute something else"
    )


def _factors(site: Any, path: str) -> tuple[Array, Array]:
    """Scale and shift of a BN layer at its stored statistics, shape ``(channels,)``, float64."""
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


def _absorbing(
    containers: list[Any], found: Mapping[int, Any], graphs: Mapping[int, Any]
) -> dict[int, Any]:
    """``id`` of each linear layer that can take a BN layer of ``found`` -> that BN layer.

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
            if isinstance(node.operation, keras.Layer) and followed(node.operation, graphs) is None:
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
        if id(followers[key][0]) in found and all(f is followers[key][0] for f in followers[key])
    }


def _masked(containers: list[Any]) -> bool:
    """Whether masks travel along any tensor of these graphs."""
    return any(
        _carries_mask(node.outputs)
        for container in containers
        for node in nodes(graph_of(container))
    )


def _carries_mask(tensors: Iterable[Any]) -> bool:
    return any(getattr(tensor, "_keras_mask", None) is not None for tensor in tensors)


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
