"""The graph of a layer or model that has none: its ``call``, run on symbols once.

Keras records what layers and ``keras.ops`` make of symbols. Where a ``call`` takes them, as any
does that neither looks at values nor leaves Keras, that record is a functional model of the very
same layers. It is compared with the layer on random inputs before it is used: what it returns, the
variables that it writes and the losses that it adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import float64
from frostline.adapters.keras.calls import like_input, takes_training
from frostline.adapters.keras.graph import walk
from frostline.adapters.keras.random import undisturbed
from frostline.atomic import Attributes, restored, taken_back
from frostline.data.arrays import to_numpy

#: Sizes of axes that a symbol leaves open.
_SIDE = 8
#: How far the graph may be from the layer, as a share of the largest output.
_SAME = 1e-4


def inference_graph(layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any | None:
    """The functional model that a layer computes at inference; ``None``: it cannot be found.

    Args:
        layer: A built layer or model; it is left as it was found.
        args: What it is called with, symbols among it.
        kwargs: Likewise; ``training`` is left out.

    Returns:
        A model of the layer's own layers. Its inputs are the symbols among the arguments, in order,
        structured as the one argument if there is one.
    """
    return _traced(layer, args, kwargs, (False,))


def graph_in_both_phases(layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any | None:
    """As :func:`inference_graph`, of a layer that takes the same way in training.

    The phase is left to whoever runs the graph, as in any functional model; and all variables that
    decide what it computes belong to layers of the graph, so that training it trains the layer.
    """
    graph = _traced(layer, args, kwargs, (False, True))
    if graph is None:
        return None
    known = {id(variable) for variable in graph.variables}
    used = [*layer._trainable_variables, *layer._non_trainable_variables]
    for nodes in graph._nodes_by_depth.values():
        for node in nodes:
            given = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
            used += [value for value in given if isinstance(value, keras.Variable)]
    return graph if known.issuperset(map(id, used)) else None


def _traced(
    layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any], phases: Sequence[bool]
) -> Any | None:
    kwargs = {name: value for name, value in kwargs.items() if name != "training"}
    symbols = [x for x in keras.tree.flatten((list(args), kwargs)) if _is_symbol(x)]
    inputs = [like_input(symbol) for symbol in symbols]
    table = dict(zip(map(id, symbols), inputs, strict=True))
    given, named = keras.tree.map_structure(lambda x: table.get(id(x), x), (list(args), kwargs))
    if takes_training(layer):
        named["training"] = False if len(phases) == 1 else None
    layers = [layer, *(place.layer for place in walk(layer))]
    kept = [Attributes.of(each) for each in layers]
    try:
        with taken_back(lambda: restored(kept)):
            single = given[0] if len(given) == 1 and len(keras.tree.flatten(named)) <= 1 else inputs
            graph = keras.Model(single, layer.call(*given, **named), name=layer.name)
            # What a call made of weights before any symbol is a constant: other weights show it.
            values = _moved(layer.weights) if len(phases) > 1 else ()
            alike = all(
                _alike(layer, graph, args, kwargs, symbols, phase, values) for phase in phases
            )
    except Exception:  # whatever code of a user's own says to symbols
        return None
    return graph if alike else None


def inputs_of(model: Any, sample: Any) -> tuple[Any, ...] | None:
    """Symbols for a sample, or for what a subclassed model was built with; ``None``: no such."""
    if sample is not None:
        try:
            arrays = keras.tree.map_structure(to_numpy, sample)
            rows = keras.tree.map_structure(
                lambda x: keras.Input(x.shape[1:], dtype=str(x.dtype)), arrays
            )
        except Exception:  # of an object's own methods, or of a dtype without symbols
            return None
        return (rows,)
    shapes = getattr(model, "_build_shapes_dict", None) or {}
    found = [_inputs_of_shapes(shape) for shape in shapes.values()]
    return tuple(found) if found and all(each is not None for each in found) else None


def _inputs_of_shapes(shape: Any) -> Any | None:
    """Symbols for a shape, or for shapes in a mapping or list; ``None``: there is none for one."""
    if isinstance(shape, Mapping):
        parts = {name: _inputs_of_shapes(each) for name, each in shape.items()}
        return None if any(each is None for each in parts.values()) else parts
    if not isinstance(shape, (tuple, list)) or not shape:
        return None
    if all(side is None or isinstance(side, int) for side in shape):
        return keras.Input(tuple(shape[1:]))
    several = [_inputs_of_shapes(each) for each in shape]
    return None if any(each is None for each in several) else type(shape)(several)


def _is_symbol(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _alike(
    layer: Any,
    graph: Any,
    args: Any,
    kwargs: Any,
    symbols: Sequence[Any],
    training: bool,
    values: Sequence[tuple[Any, Any]],
) -> bool:
    """Whether the graph does on random inputs what the layer does, at these values of variables."""
    rng = np.random.default_rng(0)
    drawn = []
    for symbol in symbols:
        shape = [2, *(_SIDE if side is None else side for side in symbol.shape[1:])]
        floats = "float" in str(symbol.dtype)
        numbers = rng.normal(size=shape) if floats else rng.integers(0, 2, shape)
        drawn.append(keras.ops.convert_to_tensor(numbers, dtype=symbol.dtype))
    table = dict(zip(map(id, symbols), drawn, strict=True))
    given, named = keras.tree.map_structure(lambda x: table.get(id(x), x), (list(args), kwargs))
    # Keras tells a model that does not take the phase nothing of it, in training neither.
    told = {"training": training} if takes_training(layer) or not training else {}
    packed = keras.tree.pack_sequence_as(graph._inputs_struct, drawn)
    wanted, written, losses = _effects(lambda: layer(*given, **named, **told), values)
    found, also, others = _effects(lambda: graph(packed, training=training), values)
    return (
        len(wanted) == len(found)
        and losses == others
        and set(written) == set(also)
        and all(_close(a, b) for a, b in zip(wanted, found, strict=True))
        and all(_close(value, also[key]) for key, value in written.items())
    )


def _moved(variables: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Variables with values near their own; kernels keep their scale, however many there are."""
    return [
        (variable, variable.value * 1.01 + (0.01 if len(variable.shape) < 2 else 0.0))
        for variable in variables
        if "float" in str(variable.dtype)
    ]


def _effects(
    run: Callable[[], Any], values: Sequence[tuple[Any, Any]]
) -> tuple[list[Any], dict[int, Any], int]:
    """Outputs of a call at these values of variables, what it writes, and how many losses it adds.

    Nothing is written: random numbers start where they did, and statistics stay.
    """
    with undisturbed(), keras.StatelessScope(values, collect_losses=True) as scope:
        outputs = keras.tree.flatten(run())
    return outputs, dict(scope.state_mapping), len(scope.losses)


def _close(one: Any, other: Any) -> bool:
    a, b = float64(one), float64(other)
    return a.shape == b.shape and np.allclose(
        a, b, rtol=0.0, atol=_SAME * np.abs(a).max(initial=0.0), equal_nan=True
    )
