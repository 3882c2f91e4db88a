"""Cut a Keras model in two where the least has to cross: a pure prefix and the rest.

Here the model's calls are written out as nodes, and both parts become functional models of the
model's own layers; the choice between is in ``graph.purity`` and ``graph.mincut``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from frostline.adapters.keras.calls import (
    Call,
    Graph as Calls,
    Slot,
    filled,
    flatten,
    graph_of,
    like_input,
    restored_on_failure,
    run,
    takes_training,
    told_apart,
)
from frostline.adapters.keras.graph import layers, walk
from frostline.adapters.keras.pipeline import own_steps
from frostline.adapters.keras.pure import impurity, observe
from frostline.adapters.keras.symbolic import graph_in_both_phases, inputs_of
from frostline.adapters.protocol import SplitModel
from frostline.graph.mincut import frontier, smallest
from frostline.graph.purity import (
    Graph,
    Node,
    Observed,
    before,
    notes,
    pure_nodes,
    require_frozen,
)
from frostline.types import Crossing, ModelError

L = keras.layers

#: Layers that cost next to nothing beside a convolution: where that makes the frontier smaller,
#: the suffix computes them again.
_LIGHT_LAYERS = (
    L.Activation, L.ReLU, L.LeakyReLU, L.PReLU, L.ELU, L.Softmax, L.Add, L.Subtract, L.Multiply,
    L.Average, L.Maximum, L.Minimum, L.Concatenate, L.ZeroPadding1D, L.ZeroPadding2D,
    L.ZeroPadding3D, L.UpSampling1D, L.UpSampling2D, L.UpSampling3D, L.Reshape, L.Flatten,
    L.Permute, L.RepeatVector, L.Rescaling, L.Normalization, L.CategoryEncoding, L.Embedding,
    L.Masking, L.BatchNormalization, L.Dropout, L.Identity,
)  # fmt: skip
#: Keras operations of the same kind, by class name.
_LIGHT_OPERATIONS = frozenset([
    "Abs", "Add", "BroadcastTo", "Cast", "Clip", "Concatenate", "Divide", "Elu", "Equal", "Exp",
    "ExpandDims", "Flip", "Gelu", "GetItem", "Greater", "HardSigmoid", "HardSilu", "Identity",
    "LeakyRelu", "Less", "Log", "Maximum", "Minimum", "Multiply", "Negative", "NotEqual", "OneHot",
    "Pad", "Relu", "Relu6", "Repeat", "Reshape", "Rsqrt", "Selu", "Sigmoid", "Silu", "Softmax",
    "Softplus", "Sqrt", "Square", "Squeeze", "Stack", "Subtract", "Tanh", "Tile", "Transpose",
    "TrueDivide", "Where",
])  # fmt: skip


def split(model: Any, at: Any = None, *, sample: Any = None) -> SplitModel:
    """Cut ``model``; see :func:`frostline.split`."""
    own, calls = _require_graph(model, sample)
    graph = _nodes(calls, model)
    pure, ends = pure_nodes(graph)
    _refuse_augmentation(graph, pure)
    if at is None:
        require_frozen(graph, pure, ends)
    else:
        pure, ends = before(graph, pure, layers(model), at), []
    seen = observe(calls, graph, pure, sample)
    shapes = seen.shapes or {}
    known = (*graph.inputs, *(slot for node in pure for slot in node.writes))
    sizes = {slot: _bytes(calls, slot, shapes.get(slot)) for slot in known}
    inside = smallest(graph, pure, sizes, _uncuttable(calls, pure, seen), forced=at is not None)
    slots = frontier(graph, inside)
    prefix, suffix = _build(calls, own, [node.call for node in inside], slots)
    paths = {slot: node.path for node in graph.nodes for slot in node.writes}
    crossing = zip(slots, keras.tree.flatten(prefix.outputs), strict=True)
    flags_only = f"purity was judged by flags alone: {seen.reason}"
    lost = [f"the suffix has no {name} of {type(model).__name__}'s" for name in own_steps(model)]
    return SplitModel(
        prefix=prefix,
        suffix=suffix,
        frontier=tuple(
            _described(calls, tensor, slot, shapes.get(slot), paths.get(slot))
            for slot, tensor in crossing
        ),
        notes=(*notes(ends), *([flags_only] if seen.reason else []), *lost),
    )


def peel(model: Any) -> tuple[Any, Any] | None:
    """Take the random layers off that a model begins with: its augmentation, and the rest of it.

    Random layers count as long as nothing with weights (but ``Normalization``) comes before them;
    what they read goes with them. Both parts are functional models of the model's own layers.

    Returns:
        Augmentation (inputs -> what crosses) and the rest (what crosses -> outputs); ``None`` where
        the model does not begin with a random layer, or has no graph.
    """
    own, calls = _written_out(model, None)
    if calls is None:
        return None
    graph = _nodes(calls, model)
    inside = _leading(graph)
    if not inside:
        return None
    return _build(calls, own, [node.call for node in inside], frontier(graph, inside))


def _leading(graph: Graph) -> list[Node]:
    """Random layers that the model begins with, and what they read."""
    leading: list[Node] = []
    good = set(graph.inputs)
    for node in graph.nodes:
        adapted = type(node.call.operation) is L.Normalization
        random = node.blame is not None and node.blame.why == "random"
        sound = random or (node.blame is None and (adapted or not node.weights))
        if sound and good.issuperset(node.reads):
            leading.append(node)
            good.update(node.writes)
    inside: list[Node] = []
    wanted: set[Slot] = set()
    for node in reversed(leading):
        if node.blame is not None or not wanted.isdisjoint(node.writes):
            inside.append(node)
            wanted.update(node.reads)
    return inside[::-1]


def _refuse_augmentation(graph: Graph, pure: Sequence[Node]) -> None:
    """Refuse a model that is frozen behind the augmentation that it begins with.

    Raises:
        ModelError: It is; names the first random layer, and says how to train through a cache.
    """
    if any(node.weights for node in pure):
        return
    if not any(node.weights and node.blame is None for node in graph.nodes):
        return  # nothing is frozen at all
    first = next((node for node in _leading(graph) if node.blame is not None), None)
    if first is None or first.blame is None:
        return
    raise ModelError(
        f"the model begins with augmentation ('{first.blame.path}'), so what its frozen part "
        "computes differs from epoch to epoch. fl.fit(model, x, y, views=8) takes such layers off "
        "and caches eight views of every sample; to split the model yourself, take them out of it "
        f"and apply them to the data. Received: {graph.received}"
    )


# --- which calls ----------------------------------------------------------------------------------


def _require_graph(model: Any, sample: Any) -> tuple[Any, Calls]:
    """The functional model that ``model`` is, or does the same as, and its calls."""
    own, calls = _written_out(model, sample)
    if calls is not None:
        return own, calls
    if isinstance(model, keras.Sequential) and not model.built:
        reason = "it is not built yet; call it once on a batch"
    elif isinstance(model, keras.Sequential):
        reason = "its layers are not single-input, single-output"
    elif not model.built:
        reason = "it is not built yet; call it once on a batch"
    elif inputs_of(model, sample) is None:
        reason = "what it takes is not known: pass sample=, a batch of inputs as arrays of numbers"
    else:
        inner = [place.path for place in walk(model) if graph_of(place.layer) is not None]
        hint = f", or split the functional model that it holds ({inner[0]!r})" if inner else ""
        reason = (
            f"{type(model).__name__} is a subclassed model, and what its call does to symbols is "
            "not what it does to arrays in training and at inference, so there is no graph to "
            f"follow; write it as a functional model{hint}"
        )
    raise ModelError(f"model '{model.name}' cannot be split: {reason}. Received: {model.name!r}")


def _written_out(model: Any, sample: Any) -> tuple[Any, Calls | None]:
    """A functional model that does what ``model`` does, and its calls.

    Layers of a user's own that hold both what is frozen and what trains are written out in place.
    """
    own, found = model, {}
    if graph_of(model) is None and not isinstance(model, keras.Sequential):
        symbols = inputs_of(model, sample) if model.built else None
        own = None if symbols is None else graph_in_both_phases(model, symbols, {})
    calls = None if own is None else flatten(own)
    while calls is not None:
        mixed = [c for c in calls.calls if id(c.operation) not in found and _mixed(c.operation)]
        if not mixed:
            break
        for call in mixed:
            args, kwargs = filled((call.args, dict(call.kwargs)), calls.tensors)
            found[id(call.operation)] = graph_in_both_phases(call.operation, args, kwargs)
        calls = flatten(own, found=found)
    return own, calls


def _mixed(operation: Any) -> bool:
    """Whether a layer of a user's own, with layers inside, is frozen in part."""
    if not isinstance(operation, keras.Layer) or not operation._layers:
        return False
    trains = {variable.trainable for variable in operation.weights} if operation.trainable else {}
    return len(trains) > 1 and any(not each.trainable for each in operation._flatten_layers())


def _nodes(calls: Calls, model: Any) -> Graph:
    """The calls of a model with what their flags say."""
    places = {id(place.layer): place for place in walk(model)}
    names = {key: place.path for key, place in places.items()}
    operations = {id(call.operation): call.operation for call in calls.calls}
    blames = {key: impurity(operation, model, names) for key, operation in operations.items()}
    return Graph(
        nodes=tuple(
            Node(
                call=call,
                path=names.get(id(call.operation), getattr(call.operation, "name", "cast")),
                kind=type(call.operation).__name__,
                reads=call.reads,
                writes=call.writes,
                blame=blames[id(call.operation)],
                layer=isinstance(call.operation, keras.Layer),
                weights=isinstance(call.operation, keras.Layer) and bool(call.operation.weights),
                light=_light(call),
                phased=takes_training(call.operation),
                place=places.get(id(call.operation)),
            )
            for call in calls.calls
        ),
        inputs=calls.inputs,
        outputs=calls.outputs,
        word="layer",
        received=f"model {model.name!r}",
        trains=model.trainable and any(v.trainable for v in model.weights),
    )


# --- where to cut ---------------------------------------------------------------------------------


def _light(call: Call) -> bool:
    operation = call.operation
    if isinstance(operation, keras.Layer):
        return type(operation) in _LIGHT_LAYERS or (
            isinstance(operation, L.BatchNormalization)
            and type(operation).__module__.startswith("frostline.layers.")
        )
    return operation is keras.ops.cast or type(operation).__name__ in _LIGHT_OPERATIONS


def _uncuttable(graph: Calls, pure: Sequence[Node], seen: Observed) -> set[Slot]:
    """Slots that cannot be stored row by row: with a mask, or with rows that are not samples."""
    found = {slot for node in pure for slot in node.call.masked}
    batches = {graph.tensors[s].shape[0] for s in graph.inputs if len(graph.tensors[s].shape)}
    for slot in (slot for node in pure for slot in node.call.writes):
        shape = graph.tensors[slot].shape
        rows = len(shape) > 0 and shape[0] in batches
        if not rows or (seen.shapes is not None and slot not in seen.shapes):
            found.add(slot)
    return found


def _bytes(graph: Calls, slot: Slot, shape: tuple[int, ...] | None) -> int:
    """Bytes of one sample; sizes that are not known count as in the trial run, or as one."""
    if shape is None:
        shape = tuple(size or 1 for size in graph.tensors[slot].shape[1:])
    return math.prod(shape) * _item_bytes(graph.tensors[slot].dtype)


def _item_bytes(dtype: str) -> int:
    bits = "".join(filter(str.isdigit, dtype.replace("e4m3fn", "").replace("e5m2", "")))
    return max(1, int(bits) // 8) if bits else 1  # bool and string


# --- the two models -------------------------------------------------------------------------------


def _build(
    graph: Calls, model: Any, inside: Sequence[Call], slots: Sequence[Slot]
) -> tuple[Any, Any]:
    """Both parts of a model that has the graph."""
    ours = {id(call) for call in inside}
    behind = [call for call in graph.calls if id(call) not in ours]
    own: Any = graph_of(model)
    with restored_on_failure(graph.calls):
        inputs = keras.tree.map_structure(like_input, own._inputs_struct)
        values = dict(zip(graph.inputs, keras.tree.flatten(inputs), strict=True))
        with told_apart(inside, [tensor.name for tensor in values.values()]):
            for call in inside:
                run(call, values)
            crossing = [values[slot] for slot in slots]
            prefix = keras.Model(
                inputs, crossing[0] if len(crossing) == 1 else crossing, name=f"{model.name}_prefix"
            )
        taken = {call.operation.name for call in behind if hasattr(call.operation, "name")}
        entries = [
            keras.Input(
                batch_shape=tensor.shape, dtype=tensor.dtype, sparse=tensor.sparse,
                name=_fresh(f"frontier_{number}", taken),
            )
            for number, tensor in enumerate(crossing)
        ]  # fmt: skip
        values = dict(zip(slots, entries, strict=True))
        with told_apart(behind, [entry.name for entry in entries]):
            for call in behind:
                run(call, values)
            # map_structure would visit a mapping in its own order, flatten sorts by key.
            leaves = [values[slot] for slot in graph.outputs]
            outputs = keras.tree.pack_sequence_as(own._outputs_struct, leaves)
            suffix = keras.Model(
                entries[0] if len(entries) == 1 else entries, outputs, name=model.name
            )
    # Losses and metrics are given, and reported, under these names.
    suffix.output_names = list(own.output_names)
    return prefix, suffix


def _fresh(name: str, taken: Iterable[str]) -> str:
    while name in taken:
        name += "_"
    return name


# --- notes ------------------------------------------------------------------------------------


def _described(
    graph: Calls, tensor: Any, slot: Slot, shape: tuple[int, ...] | None, path: str | None
) -> Crossing:
    """What crosses; ``path`` of the layer that computes it, ``None`` for a model input."""
    known = tuple(tensor.shape[1:])
    exact = shape if None in known and shape is not None else known
    return Crossing(
        path=graph.tensors[slot]._keras_history.operation.name if path is None else path,
        shape=known,
        dtype=keras.backend.standardize_dtype(tensor.dtype),
        bytes_per_sample=_bytes(graph, slot, exact if None not in exact else None),
        computed=path is not None,
    )
