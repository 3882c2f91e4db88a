"""Facts of a Keras model for the rules: stored numbers, flags, optimizer, graph. Reads only."""

from __future__ import annotations

import inspect
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import float64
from frostline.adapters.keras.graph import (
    inner_optimizers,
    is_site,
    optimized_variables,
    sites,
    torch_norms,
    trains,
    unknown_keepers,
    walk,
)
from frostline.adapters.torch.vocabulary import TORCH
from frostline.graph.addresses import Place
from frostline.types import Array, Site
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts


def facts(model: Any) -> ModelFacts:
    """Collect what rules without data may look at.

    Args:
        model: A Keras 3 model on any backend; it need not be built or compiled.

    Returns:
        The facts; arrays are float64 copies of shape ``(channels,)``.
    """
    places = walk(model)
    nodes = _nodes(model, places)
    optimizer = getattr(model, "optimizer", None)
    optimized = optimized_variables(model)
    written = _written(model)
    modules, by_path = _modules(places), {place.path: place for place in places}
    found: list[SiteFacts] = []
    for site in sites(model):
        place, module = modules[site.path]
        if module is None:
            mine = _stock(site, place.layer, optimized, written)
        else:
            mine = _wrapped(site, place.layer, module, optimized)
        training = _written_training(place, by_path, nodes)
        regimes = site.trained_by is not None and _frozen_here(place, places, optimized)
        mine = replace(mine, training=training, values=_values(place, nodes), two_regimes=regimes)
        found.append(mine)
    return ModelFacts(
        name=model.name,
        backend=keras.backend.backend(),
        sites=tuple(found),
        layers=_layers(model, places),
        order={path: place.order for path, (place, _) in modules.items()},
        batch=_batch(model),
        any_size=_any_size(model),
        steps=_steps(optimizer),
        traced=getattr(model, "train_function", None) is not None
        and not getattr(model, "run_eagerly", False),
        unknown={path: type(layer).__name__ for path, layer in unknown_keepers(model).items()},
    )


def _modules(places: tuple[Place, ...]) -> dict[str, tuple[Place, Any | None]]:
    """Map the path of every site to its place, and to its torch module inside a wrapper."""
    found: dict[str, tuple[Place, Any | None]] = {}
    for place in places:
        if is_site(place.layer):
            found[place.path] = (place, None)
            continue
        found |= {path: (place, module) for path, module in torch_norms(place)}
    return found


def _written(model: Any) -> frozenset[int] | None:
    """Identities of the variables that the compiled training step writes; ``None``: not known.

    TensorFlow alone goes on with a step that was traced under other flags, and nothing but the
    trace tells which: an optimizer may have been used by another step before.
    """
    step = getattr(model, "train_function", None)
    if keras.backend.backend() != "tensorflow" or not inspect.isfunction(step):
        return None
    around = [*inspect.getclosurevars(step).nonlocals.values()]  # two: of fit and train_on_batch
    around += [held.__wrapped__ for held in around if hasattr(held, "__wrapped__")]
    traces = [held for held in around if hasattr(held, "_list_all_concrete_functions")]
    with suppress(Exception):  # nothing of this is public: another version may do it otherwise
        from tensorflow.python.framework import auto_control_deps_utils as resources

        found: set[int] = set()
        for graph in (each.graph for t in traces for each in t._list_all_concrete_functions()):
            read = resources.get_read_only_resource_input_indices_graph(graph)
            kept = {id(graph.inputs[index]) for index in read}
            found.update(id(handle) for handle, inner in graph.captures if id(inner) not in kept)
        known = {id(v) for v in model.variables if id(v.value.handle) in found}
        return frozenset(known) if traces else None
    return None


def _stock(
    site: Site, layer: Any, optimized: frozenset[int] | None, written: frozenset[int] | None
) -> SiteFacts:
    own = [variable for variable in (layer.gamma, layer.beta) if variable is not None]
    shadow = None
    if getattr(layer, "renorm", False) and layer.built:  # Keras 3.12 has no renorm
        stddev = _numbers(layer.moving_stddev)
        shadow = None if stddev is None else np.maximum(stddev**2 - layer.epsilon, 0.0)
    return SiteFacts(
        site=site,
        mean=_numbers(layer.moving_mean),
        variance=_numbers(layer.moving_variance),
        gamma=_numbers(layer.gamma),
        beta=_numbers(layer.beta),
        shadow_variance=shadow,
        dtype=layer.variable_dtype,
        live=bool(getattr(layer, "live", False)),
        stepped=None if written is None else _stepped(layer, own, written),
        cancels=keras.backend.backend() == "torch",
        optimized=_is_optimized(own, optimized),
    )


def _stepped(layer: Any, own: list[Any], written: frozenset[int]) -> frozenset[str]:
    kept = [layer.moving_mean, layer.moving_variance]
    parts = {"parameters": own, "statistics": kept}
    return frozenset(
        name for name, variables in parts.items() if not written.isdisjoint(map(id, variables))
    )


def _wrapped(site: Site, wrapper: Any, module: Any, optimized: frozenset[int] | None) -> SiteFacts:
    mine = {id(parameter) for parameter in module.parameters(recurse=False)}
    own = [variable for variable in wrapper.variables if id(variable.value) in mine]
    dtype = site.dtype if module.running_mean is None else str(module.running_mean.dtype)
    return SiteFacts(
        site=site,
        mean=_numbers(module.running_mean),
        variance=_numbers(module.running_var),
        gamma=_numbers(module.weight),
        beta=_numbers(module.bias),
        dtype=dtype.removeprefix("torch."),
        optimized=_is_optimized(own, optimized),
        wrapper_frozen=not wrapper.trainable,
        words=TORCH,
        cumulative=module.momentum is None,
    )


def _numbers(variable: Any) -> Array | None:
    if variable is None:
        return None
    return np.array(float64(variable))


def _frozen_here(place: Place, places: tuple[Place, ...], optimized: frozenset[int] | None) -> bool:
    """Whether this model's own step leaves alone what an inner optimizer trains.

    A live site is known to every optimizer, so the other weights of the inner model decide.
    """
    if not place.layer.trainable:
        return True
    sites_too = {
        id(variable)
        for entry in places
        if is_site(entry.layer)
        for variable in entry.layer._trainable_variables
    }
    for _, known in inner_optimizers(places):
        if trains(known, place.layer) and optimized is not None:
            return not (known - sites_too) & optimized
    return False


def _is_optimized(own: list[Any], optimized: frozenset[int] | None) -> bool | None:
    if optimized is None or not own:
        return None
    return any(id(variable) in optimized for variable in own)


def _steps(optimizer: Any) -> int | None:
    """Training steps, each with one update of the statistics, since the optimizer was made."""
    if optimizer is None:
        return None
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    # Every batch moves the statistics, also while gradients are accumulated: the public
    # `iterations` counts the weight updates only.
    return int(keras.ops.convert_to_numpy(inner._iterations))


def _layers(model: Any, places: tuple[Place, ...]) -> tuple[LayerFacts, ...]:
    return tuple(
        LayerFacts(
            path=place.path,
            order=place.order,
            # Only the root's own flag stands above the variables' flags.
            trains=model.trainable and any(variable.trainable for variable in place.layer.weights),
        )
        for place in places
        if place.leaf and not is_site(place.layer) and place.layer.weights
    )


def _batch(model: Any) -> int | None:
    sizes = {tensor.shape[0] for tensor in _inputs(model) if len(tensor.shape)}
    return sizes.pop() if len(sizes) == 1 else None


def _any_size(model: Any) -> bool:
    shapes = [tuple(tensor.shape) for tensor in _inputs(model)]
    return len(shapes) == 1 and len(shapes[0]) == 4 and shapes[0][1:].count(None) == 2


def _inputs(model: Any) -> list[Any]:
    try:
        return list(model.inputs or ())
    except (AttributeError, ValueError):  # a subclassed model
        return []


def _nodes(model: Any, places: tuple[Place, ...]) -> dict[int, list[Any]]:
    """Map the identity of every layer to its calls in the functional graphs of this model."""
    found: dict[int, list[Any]] = {}
    for container in (model, *(place.layer for place in places)):
        graph = getattr(container, "_functional", None) or container  # of a Sequential
        if not isinstance(graph, keras.Function):
            continue
        for level in graph._nodes_by_depth.values():
            for node in level:
                found.setdefault(id(node.operation), []).append(node)
    return found


def _written_training(
    place: Place, by_path: dict[str, Place], nodes: dict[int, list[Any]]
) -> bool | None:
    """``training=`` of the layer's own call, else of the nearest container's."""
    at: Place | None = place
    while at is not None:
        for node in nodes.get(id(at.layer), ()):
            written = node.arguments.kwargs.get("training")
            if isinstance(written, bool) and written is not _unwritten_training(at.layer):
                return written
        at = None if at.parent is None else by_path[at.parent]
    return None


def _unwritten_training(layer: Any) -> Any:
    """What Keras notes at a call that says nothing of ``training``: the default of ``call``."""
    parameter = inspect.signature(layer.call).parameters.get("training")
    return None if parameter is None else parameter.default


def _values(place: Place, nodes: dict[int, list[Any]]) -> int | None:
    """Values per channel in one sample, from the static shape of the layer's input."""
    for node in nodes.get(id(place.layer), ()):
        shape = list(node.input_tensors[0].shape)
        axis = getattr(place.layer, "axis", None)
        if not isinstance(axis, int) or len(shape) < 2:
            return None
        del shape[axis]
        sizes = shape[1:]
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
    return None
