"""Walk a Keras model: every layer with a unique hierarchical path, in execution order.

Keras' own ``layer.path`` is not hierarchical for the layers of a nested functional model, and two
nested models may hold layers of one name, so paths are built here while walking. Functional graphs
are read from their nodes; inside custom layers and subclassed models, where no graph exists, the
order is the order in which layers were attached.

This room reads only: it never changes a layer.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from typing import Any

import keras

from frostline.graph import addresses
from frostline.graph.addresses import Layers, Place
from frostline.types import Boundary, Site


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
                "name": layer.name,
                "layer": layer,
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


def unknown_keepers(model: Any) -> dict[str, Any]:
    """Path -> layer of a user's own class that keeps what may be running statistics.

    That are two or more variables of one shape that do not train, of a layer that is told the
    phase. Layers of Keras that are no BN keep none.
    """
    return {place.path: place.layer for place in walk(model) if _keeps_unknown(place.layer)}


def _keeps_unknown(layer: Any) -> bool:
    if is_site(layer) or type(layer).__module__.partition(".")[0] == "keras":
        return False
    shapes = [tuple(variable.shape) for variable in kept_by(layer)]
    told = "training" in inspect.signature(layer.call).parameters
    return told and len(set(shapes)) < len(shapes)


def kept_by(layer: Any) -> list[Any]:
    """Floating variables of a layer itself, no single numbers, that do not train by design."""
    return [
        variable
        for variable in layer._non_trainable_variables
        if len(variable.shape) and "float" in str(variable.dtype)
    ]


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
            found.extend(_torch_site(place, *norm) for norm in torch_norms(place))
    return tuple(Site(index=index, **fields) for index, fields in enumerate(found))


def frozen_prefix(
    model: Any, found: tuple[Site, ...] | None = None
) -> tuple[int | None, str | None]:
    """How many sites lie before the first layer with weights that trains, and its path."""

    def trains(place: Place) -> bool | None:
        layer = place.layer
        own = layer.weights if place.leaf else layer._trainable_variables
        return bool(layer.trainable) and not is_site(layer) if own else None

    return addresses.frozen_prefix(walk(model), sites(model) if found is None else found, trains)


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


def torch_modules(place: Place) -> list[tuple[str, Any]]:
    """(path, module) of all that a ``TorchModuleWrapper`` holds; empty for any other layer."""
    module = wrapped_module(place.layer)
    return [
        ("/".join([place.path, *name.split(".")]) if name else place.path, inner)
        for name, inner in (() if module is None else module.named_modules())
    ]


def torch_norms(place: Place) -> list[tuple[str, Any]]:
    """Those of them that are BN."""
    found = torch_modules(place)
    norm = sys.modules["torch"].nn.modules.batchnorm._BatchNorm if found else ()
    return [(path, module) for path, module in found if isinstance(module, norm)]


def flags_of(model: Any) -> tuple[tuple[bool, Any], ...]:
    """`trainable` and policy of every layer: what a compiled pass holds as constants."""
    return tuple(
        (bool(place.layer.trainable), getattr(place.layer, "policy", None)) for place in walk(model)
    )


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


def layers(model: Any) -> Layers:
    """All layers with their addresses."""
    top = tuple(layer for layer, _ in _children(model))
    return Layers(places=walk(model), top=top, word="layer", kind=keras.Layer)


def resolve(model: Any, reference: Any) -> Boundary:
    """Translate a layer name, path, index, fraction or layer into a boundary."""
    return layers(model).resolve(reference)
