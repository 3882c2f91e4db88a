"""Walk a Keras model: every layer with a unique hierarchical path, in execution order.

Keras' own ``layer.path`` is not hierarchical for the layers of a nested functional model, and two
nested models may hold layers of one name, so paths are built here while walking. Functional graphs
are read from their nodes; inside custom layers and subclassed models, where no graph exists, the
order is the order in which layers were attached.

This room reads only: it never changes a layer.
"""

from __future__ import annotations

import difflib
import operator
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import keras

from frostline.types import Boundary, ModelError, Site


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """One layer with its address.

    Attributes:
        path: ``backbone/block3/bn1``: names of the containers and of the layer; a name that a
            sibling already has gets ``#2``, ``#3``, ...
        layer: The layer.
        parent: Path of the container; ``None`` at the top level.
        order: Rank in execution order (of the first use, if shared); containers come before what
            they contain.
        top: Index of the top-level layer that it is or is in, as in ``model.layers``.
        calls: How often the model uses the layer.
        leaf: Holds no other layer.
    """

    path: str
    layer: Any
    parent: str | None
    order: int
    top: int
    calls: int
    leaf: bool


class _Walk:
    """Depth-first walk that meets every layer object once and counts all its uses."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, Any]] = {}
        self.paths: set[str] = set()
        self.open: set[int] = set()

    def visit(self, layer: Any, parent: str | None, top: int, calls: int) -> None:
        key = id(layer)
        if key in self.open:  # a layer that refers back to its owner
            return
        inner = _children(layer)
        if key in self.found:
            self.found[key]["calls"] += calls
        else:
            self.found[key] = {
                "path": self._unique(layer.name, parent),
                "layer": layer,
                "parent": parent,
                "order": len(self.found),
                "top": top,
                "calls": calls,
                "leaf": not inner,
            }
        self.open.add(key)
        for child, uses in inner:
            self.visit(child, self.found[key]["path"], top, calls * uses)
        self.open.discard(key)

    def _unique(self, name: str, parent: str | None) -> str:
        stem = name if parent is None else f"{parent}/{name}"
        path, count = stem, 1
        while path in self.paths:
            count += 1
            path = f"{stem}#{count}"
        self.paths.add(path)
        return path


def walk(model: Any) -> tuple[Place, ...]:
    """Every layer below ``model``, each once, in execution order.

    Args:
        model: A Keras model; it need not be built.

    Returns:
        One place per layer object: containers and leaves, without the model itself.
    """
    state = _Walk()
    state.open.add(id(model))
    for top, (layer, uses) in enumerate(_children(model)):
        state.visit(layer, None, top, uses)
    return tuple(Place(**entry) for entry in state.found.values())


def _children(layer: Any) -> list[tuple[Any, int]]:
    """Direct sublayers in execution order, each with its number of uses."""
    if isinstance(layer, keras.Sequential):
        return [(child, 1) for child in layer.layers]
    # No public name exists for the sublayers of a plain layer; `_layers` holds what was attached
    # as attribute or inside lists and dicts.
    attached = {id(child): child for child in layer._layers}
    if not isinstance(layer, keras.Function):
        return [(child, 1) for child in attached.values()]
    uses = Counter(id(node.operation) for nodes in layer._nodes_by_depth.values() for node in nodes)
    ordered = [child for child in layer.operations if isinstance(child, keras.Layer)]
    beside = [child for key, child in attached.items() if key not in uses]
    return [(child, uses[id(child)]) for child in ordered] + [(child, 1) for child in beside]


def ancestors(places: tuple[Place, ...], path: str) -> tuple[str, ...]:
    """Paths of the containers around ``path``, innermost first."""
    parents = {place.path: place.parent for place in places}
    chain: list[str] = []
    above = parents[path]
    while above is not None:
        chain.append(above)
        above = parents[above]
    return tuple(chain)


def is_site(layer: Any) -> bool:
    """Whether the layer is a Keras BN layer: the stock one, ours, or a subclass of either."""
    return isinstance(layer, keras.layers.BatchNormalization)


def sites(model: Any) -> tuple[Site, ...]:
    """Every BN layer of ``model`` as a :class:`Site`, in execution order.

    BN modules inside a ``TorchModuleWrapper`` are listed too, as ``torch.BatchNorm2d`` and so on;
    their decay is ``1 - momentum``.
    """
    found: list[dict[str, Any]] = []
    places = walk(model)
    inner = inner_optimizers(places)
    for place in places:
        if is_site(place.layer):
            trained_by = next((name for name, known in inner if trains(known, place.layer)), None)
            found.append({**_keras_site(place, model), "trained_by": trained_by})
        else:
            found.extend(_torch_site(place, *each) for each in torch_norms(place))
    return tuple(Site(index=index, **fields) for index, fields in enumerate(found))


def frozen_prefix(model: Any) -> tuple[int | None, str | None]:
    """How many sites lie before the first layer with weights that trains, and its path.

    A BN layer trains where its gamma and beta do, or where its statistics move.

    Returns:
        ``(None, None)`` when that is the very first one: there is no prefix. ``(sites, None)`` when
        every layer is frozen.
    """
    found = sites(model)
    live = {site.path for site in found if not (site.params_frozen and site.stats_frozen)}
    frozen: list[str] = []
    for place in walk(model):
        if not place.leaf or not place.layer.weights:
            continue
        if place.path in live or (place.layer.trainable and not is_site(place.layer)):
            before = sum(_is_within(site.path, frozen) for site in found)
            return (before, place.path) if frozen else (None, None)
        frozen.append(place.path)
    return len(found), None


def _is_within(path: str, places: list[str]) -> bool:
    """Whether a site is one of these layers, or inside one (a wrapped torch module)."""
    return any(path == place or path.startswith(f"{place}/") for place in places)


def inner_optimizers(places: tuple[Place, ...]) -> list[tuple[str, frozenset[int]]]:
    """Inner models that have trained for themselves: name and identities of what they train."""
    return [
        (place.layer.name, optimized)
        for place in places
        if isinstance(place.layer, keras.Model)
        and (optimized := optimized_variables(place.layer)) is not None
    ]


def optimized_variables(model: Any) -> frozenset[int] | None:
    """Identities of the variables that a model's optimizer was built for; ``None`` without one."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not getattr(optimizer, "built", False):
        return None
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # loss scaling wraps another one
    return frozenset(id(variable) for variable in inner._trainable_variables)


def trains(known: frozenset[int], layer: Any) -> bool:
    """Whether any of the layer's own trainable variables is among these."""
    return any(id(variable) in known for variable in layer._trainable_variables)


def _keras_site(place: Place, model: Any) -> dict[str, Any]:
    layer = place.layer
    own = [variable for variable in (layer.gamma, layer.beta) if variable is not None]
    live = hasattr(layer, "policy")  # ours: `trainable` decides, whatever the variables say
    frozen = not layer.trainable
    params_frozen = frozen if live or not own else all(not v.trainable for v in own)
    policy = getattr(layer, "policy", "inference")
    return {
        "path": place.path,
        "name": layer.name,
        "kind": type(layer).__name__,
        "channels": None if layer.moving_mean is None else int(layer.moving_mean.shape[0]),
        "axis": int(layer.axis),
        "decay": float(layer.momentum),
        "epsilon": float(layer.epsilon),
        # A frozen root hands no variable to the optimizer, whatever its layers say.
        "params_frozen": params_frozen or not model.trainable,
        "stats_frozen": frozen and policy != "update",
        "policy": policy,
        "calls": place.calls,
        "dtype": layer.compute_dtype,
        "version": getattr(layer, "version", None),
        "debias": bool(getattr(layer, "debias", False)),
    }


def wrapped_module(layer: Any) -> Any | None:
    """The torch module inside a ``TorchModuleWrapper``, else ``None``."""
    if "torch" not in sys.modules or type(layer).__name__ != "TorchModuleWrapper":
        return None
    return getattr(layer, "module", None)


def torch_norms(place: Place) -> list[tuple[str, Any]]:
    """(path, module) of every BN module inside a ``TorchModuleWrapper``; else empty."""
    module = wrapped_module(place.layer)
    if module is None:
        return []
    norm = sys.modules["torch"].nn.modules.batchnorm._BatchNorm
    return [
        ("/".join([place.path, *name.split(".")]) if name else place.path, inner)
        for name, inner in module.named_modules()
        if isinstance(inner, norm)
    ]


def _torch_site(place: Place, path: str, module: Any) -> dict[str, Any]:
    if module.momentum is None:  # cumulative average: the n-th update keeps (n - 1) / n
        seen = 0 if module.num_batches_tracked is None else int(module.num_batches_tracked)
        decay = seen / (seen + 1)
    else:
        decay = 1.0 - float(module.momentum)
    own = list(module.parameters(recurse=False))
    return {
        "path": path,
        "name": path.rpartition("/")[2],
        "kind": f"torch.{type(module).__name__}",
        "channels": int(module.num_features),
        "axis": 1,
        "decay": decay,
        "epsilon": float(module.eps),
        "params_frozen": all(not parameter.requires_grad for parameter in own),
        # The wrapper calls .train() in every training step, so they move whatever `trainable` says.
        "stats_frozen": not module.track_running_stats,
        "policy": "update",
        "calls": place.calls,
        "dtype": str(own[0].dtype).removeprefix("torch.") if own else "float32",
    }


def resolve(model: Any, reference: Any) -> Boundary:
    """Translate what a person writes into a boundary.

    Args:
        model: A Keras model.
        reference: A path (``backbone/block3/conv``) or a layer name that is unique in the model;
            an index into ``model.layers``, also negative, where ``len(model.layers)`` is the end;
            a float in [0, 1], the share of leaf layers in execution order that are before the
            boundary; a layer; a :class:`Boundary`; ``None`` for the end of the model.

    Returns:
        The boundary: first layer behind it and that layer's index at the top level.

    Raises:
        ModelError: No such layer (with the closest names), an ambiguous name, an index or fraction
            out of range.
    """
    places = walk(model)
    end = Boundary(path=None, index=len(_children(model)))
    if isinstance(reference, Boundary):
        reference = reference.path
    if reference is None:
        return end
    if isinstance(reference, str):
        place: Place | None = _by_name(places, reference)
    elif isinstance(reference, keras.Layer):
        place = _by_layer(places, reference)
    elif isinstance(reference, float):
        place = _by_fraction(places, reference)
    else:
        place = _by_index(places, reference, _children(model))
    return end if place is None else Boundary(path=place.path, index=place.top)


def _by_name(places: tuple[Place, ...], reference: str) -> Place:
    for place in places:
        if place.path == reference:
            return place
    named = [place for place in places if place.layer.name == reference]
    if len(named) == 1:
        return named[0]
    if named:
        listed = ", ".join(repr(place.path) for place in named)
        raise ModelError(
            f"boundary {reference!r} names {len(named)} layers; use one of the paths {listed}. "
            f"Received: {reference!r}"
        )
    known = [place.path for place in places]
    names = {place.layer.name: place.path for place in reversed(places)}
    close = difflib.get_close_matches(reference, [*known, *names], n=5, cutoff=0.5)
    paths = list(dict.fromkeys(names.get(name, name) for name in close))[:3]
    hint = f"Closest: {', '.join(map(repr, paths))}. " if paths else _ends(known)
    raise ModelError(
        f"boundary {reference!r} is not a layer of this model. {hint}Received: {reference!r}"
    )


def _ends(known: list[str]) -> str:
    if not known:
        return "The model has no layers. "
    return f"Its layers go from {known[0]!r} to {known[-1]!r}. "


def _by_layer(places: tuple[Place, ...], reference: Any) -> Place:
    for place in places:
        if place.layer is reference:
            return place
    raise ModelError(f"layer {reference.name!r} is not part of this model. Received: {reference!r}")


def _by_fraction(places: tuple[Place, ...], reference: float) -> Place | None:
    if not 0.0 <= reference <= 1.0:
        raise ModelError(
            f"a fractional boundary must be between 0.0 and 1.0. Received: {reference!r}"
        )
    leaves = [place for place in places if place.leaf]
    cut = round(reference * len(leaves))
    return leaves[cut] if cut < len(leaves) else None


def _by_index(
    places: tuple[Place, ...], reference: Any, top: list[tuple[Any, int]]
) -> Place | None:
    try:
        index = None if isinstance(reference, bool) else operator.index(reference)
    except TypeError:
        index = None
    if index is None:
        raise ModelError(
            "a boundary is a layer name, a path, an index, a fraction or a layer. "
            f"Received: {reference!r} ({type(reference).__name__})"
        )
    count = len(top)
    if not -count <= index <= count:
        raise ModelError(
            f"boundary index must be between {-count} and {count} for this model's {count} layers. "
            f"Received: {reference!r}"
        )
    return None if index == count else _by_layer(places, top[index][0])
