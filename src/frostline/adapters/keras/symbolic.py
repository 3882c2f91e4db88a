"""The graph at inference of a layer or model that has none: its ``call``, run on symbols once.

Keras records what layers and ``keras.ops`` make of symbols. Where a ``call`` takes them, as any
does that neither looks at values nor leaves Keras, that record is a functional model of the very
same layers. It is compared with the layer on random inputs before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import float64
from frostline.adapters.keras.calls import like_input, takes_training
from frostline.adapters.keras.graph import walk
from frostline.atomic import Attributes, restored, taken_back

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
    kwargs = {name: value for name, value in kwargs.items() if name != "training"}
    symbols = [x for x in keras.tree.flatten((list(args), kwargs)) if _is_symbol(x)]
    inputs = [like_input(symbol) for symbol in symbols]
    table = dict(zip(map(id, symbols), inputs, strict=True))
    given, named = keras.tree.map_structure(lambda x: table.get(id(x), x), (list(args), kwargs))
    if takes_training(layer):
        named["training"] = False
    layers = [layer, *(place.layer for place in walk(layer))]
    kept = [Attributes.of(each) for each in layers]
    try:
        with taken_back(lambda: restored(kept)):
            single = given[0] if len(given) == 1 and len(keras.tree.flatten(named)) <= 1 else inputs
            graph = keras.Model(single, layer.call(*given, **named), name=layer.name)
            alike = _alike(layer, graph, args, kwargs, symbols)
    except Exception:  # whatever code of a user's own says to symbols
        return None
    return graph if alike else None


def inputs_of(model: Any, sample: Any) -> tuple[Any, ...] | None:
    """Symbols for a sample, or for what a subclassed model was built with."""
    if sample is not None:
        arrays = keras.tree.map_structure(np.asarray, sample)
        return (
            keras.tree.map_structure(
                lambda x: keras.Input(x.shape[1:], dtype=str(x.dtype)), arrays
            ),
        )
    shapes = getattr(model, "_build_shapes_dict", None) or {}
    if not shapes:
        return None
    found = list(shapes.values())
    if not all(isinstance(s, (tuple, list)) and not isinstance(s[0], (tuple, list)) for s in found):
        return None
    return tuple(keras.Input(shape[1:]) for shape in found)


def _is_symbol(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _alike(layer: Any, graph: Any, args: Any, kwargs: Any, symbols: Sequence[Any]) -> bool:
    """Whether the graph computes on random inputs what the layer computes."""
    rng = np.random.default_rng(0)
    drawn = []
    for symbol in symbols:
        shape = [2, *(_SIDE if side is None else side for side in symbol.shape[1:])]
        floats = "float" in str(symbol.dtype)
        values = rng.normal(size=shape) if floats else rng.integers(0, 2, shape)
        drawn.append(keras.ops.convert_to_tensor(values, dtype=symbol.dtype))
    table = dict(zip(map(id, symbols), drawn, strict=True))
    given, named = keras.tree.map_structure(lambda x: table.get(id(x), x), (list(args), kwargs))
    wanted = keras.tree.flatten(layer(*given, **named, training=False))
    packed = keras.tree.pack_sequence_as(graph._inputs_struct, drawn)
    found = keras.tree.flatten(graph(packed, training=False))
    if len(wanted) != len(found):
        return False
    pairs = [(float64(a), float64(b)) for a, b in zip(wanted, found, strict=True)]
    return all(
        a.shape == b.shape and np.allclose(a, b, rtol=0.0, atol=_SAME * np.abs(a).max(initial=0.0))
        for a, b in pairs
    )
