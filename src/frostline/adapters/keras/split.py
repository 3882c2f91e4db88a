"""Cut a Keras model in two where the least has to cross: a pure prefix and the rest.

What is pure is decided in ``keras_pure``. Here the pure calls are divided from the rest, the
tensors that cross are chosen, and both parts become functional models of the model's own layers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from frostline.adapters.keras.calls import (
    Call,
    Graph,
    Slot,
    flatten,
    restored_on_failure,
    run,
    told_apart,
)
from frostline.adapters.keras.graph import resolve, walk
from frostline.adapters.keras.pure import Impurity, impurity, observe
from frostline.adapters.keras.tape import graph_of
from frostline.graph.addresses import ancestors
from frostline.graph.mincut import later_cut
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


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model cut in two.

    Attributes:
        prefix: Model of the pure part: model inputs -> frontier tensors (one tensor, or a list).
        suffix: Model of the rest: frontier tensors -> model outputs.
        frontier: What crosses, in the order of the prefix's outputs.
        notes: What ended the prefix, and what was not checked.
    """

    prefix: Any
    suffix: Any
    frontier: tuple[Crossing, ...]
    notes: tuple[str, ...]


def split(model: Any, at: Any = None, *, sample: Any = None) -> Parts:
    """Cut ``model``; see :func:`frostline.split`."""
    graph = _require_graph(model)
    names = {id(place.layer): place.path for place in walk(model)}
    pure, ends = _pure_calls(graph, model)
    if at is None:
        _require_frozen(pure, ends, names, model)
    else:
        pure = _before(graph, pure, model, at, names)
    seen = observe(graph, pure, names, sample)
    shapes = seen.shapes or {}
    known = (*graph.inputs, *(slot for call in pure for slot in call.writes))
    sizes = {slot: _bytes(graph, slot, shapes.get(slot)) for slot in known}
    forced = at is not None
    uncuttable = _uncuttable(graph, pure, seen.shapes)
    inside = _smallest(graph, pure, sizes, uncuttable, forced=forced)
    if not any(_weights(call) for call in inside) and not forced:
        raise ModelError(
            "nothing is worth storing: the frozen part is light to compute and its inputs are "
            "smaller than its outputs, or its outputs carry masks. Freeze more of the model. "
            f"Received: model {model.name!r}"
        )
    slots = _crossing(graph, inside)
    prefix, suffix = _build(graph, model, inside, slots)
    flat = dict(zip(slots, keras.tree.flatten(prefix.outputs), strict=True))
    return Parts(
        prefix=prefix,
        suffix=suffix,
        frontier=tuple(_described(graph, flat[s], s, shapes.get(s), names) for s in slots),
        notes=_notes(ends if not forced else (), names, seen.reason),
    )


# --- which calls ----------------------------------------------------------------------------------


def _require_graph(model: Any) -> Graph:
    graph = flatten(model)
    if graph is not None:
        return graph
    if isinstance(model, keras.Sequential) and not model.built:
        reason = "it is not built yet; call it once on a batch"
    elif isinstance(model, keras.Sequential):
        reason = "its layers are not single-input, single-output"
    else:
        inner = [place.path for place in walk(model) if graph_of(place.layer) is not None]
        hint = f", or split the functional model that it holds ({inner[0]!r})" if inner else ""
        reason = (
            f"{type(model).__name__} is a subclassed model, which has no graph to follow; write it "
            f"as a functional model{hint}"
        )
    raise ModelError(f"model '{model.name}' cannot be split: {reason}. Received: {model.name!r}")


def _pure_calls(graph: Graph, model: Any) -> tuple[list[Call], list[tuple[Call, Impurity]]]:
    """Calls that are pure with pure inputs only, and those that end them."""
    known: dict[int, Impurity | None] = {}
    good = set(graph.inputs)
    pure: list[Call] = []
    ends: list[tuple[Call, Impurity]] = []
    for call in graph.calls:
        if not good.issuperset(call.reads):
            continue
        key = id(call.operation)
        if key not in known:
            known[key] = impurity(call.operation, model)
        blame = known[key]
        if blame is None:
            pure.append(call)
            good.update(call.writes)
        else:
            ends.append((call, blame))
    return pure, ends


def _require_frozen(
    pure: Sequence[Call],
    ends: Sequence[tuple[Call, Impurity]],
    names: Mapping[int, str],
    model: Any,
) -> None:
    """Refuse a model of which nothing or everything is frozen, or a layer that only seems to be."""
    if not any(v.trainable for v in model.weights) or not model.trainable:
        raise ModelError(
            "everything is frozen: nothing is left to train behind the prefix. Thaw the head, for "
            "example fl.unfreeze(model, -1), or say where to cut (at=...). "
            f"Received: {model.name!r}"
        )
    for _, blame in ends:
        layer = blame.layer
        own = [v for v in (getattr(layer, "gamma", 0), getattr(layer, "beta", 0)) if v is not None]
        seems = not layer.trainable or (own and not any(getattr(v, "trainable", 0) for v in own))
        if blame.why == "statistics" and seems:
            raise ModelError(
                f"'{names[id(layer)]}' is frozen, but {blame.text}: what it computes for one "
                "sample depends on the others, so it cannot be stored. Freeze its statistics "
                "(fl.freeze), or convert it to policy='inference'. "
                f"Received: {type(layer).__name__}"
            )
    if not any(_weights(call) for call in pure):
        raise ModelError(_nothing(ends, names, model))


def _nothing(ends: Sequence[tuple[Call, Impurity]], names: Mapping[int, str], model: Any) -> str:
    first = next(iter(ends), None)
    why = (
        "" if first is None else f": '{names[id(first[1].layer)]}' comes first, and {first[1].text}"
    )
    return (
        f"nothing is frozen at the beginning of the model{why}. Freeze the part that shall be "
        f"computed once: fl.freeze(model, until=...). Received: model {model.name!r}"
    )


def _weights(call: Call) -> bool:
    return isinstance(call.operation, keras.Layer) and bool(call.operation.weights)


def _before(
    graph: Graph, pure: Sequence[Call], model: Any, at: Any, names: Mapping[int, str]
) -> list[Call]:
    """The calls before a boundary; all of them must be pure."""
    boundary = resolve(model, at)
    places = walk(model)
    if boundary.path is None:
        raise ModelError(
            f"the boundary is the end of the model: nothing is left behind it. Received: at={at!r}"
        )
    edge = next(place for place in places if place.path == boundary.path)
    around = set(ancestors(boundary.path))
    order = {id(p.layer): p.order for p in places if p.path not in around}
    good, before = set(graph.inputs), []
    allowed = {id(call) for call in pure}
    for call in graph.calls:
        if not good.issuperset(call.reads) or order.get(id(call.operation), 0) >= edge.order:
            continue
        if id(call) not in allowed:
            blame = impurity(call.operation, model)
            path = names[id(call.operation)] if blame is None else names[id(blame.layer)]
            text = "" if blame is None else f": {blame.text}"
            raise ModelError(
                f"'{path}' is before the boundary '{boundary.path}' but not pure{text}. "
                f"fl.freeze(model, {boundary.path!r}) freezes all that is before it. "
                f"Received: at={at!r}"
            )
        before.append(call)
        good.update(call.writes)
    if not before:
        raise ModelError(f"no layer is before the boundary '{boundary.path}'. Received: at={at!r}")
    return before


# --- where to cut ---------------------------------------------------------------------------------


def _smallest(
    graph: Graph,
    pure: Sequence[Call],
    sizes: Mapping[Slot, int],
    uncuttable: set[Slot],
    *,
    forced: bool,
) -> list[Call]:
    """The pure calls that stay in the prefix so that the fewest bytes cross.

    A call with real work stays; one that is light moves behind the frontier where that makes it
    smaller, for example a ReLU whose input crosses as well. Tensors that must not be cut (with a
    mask, or whose rows are not the samples) cost more than all work, so that whatever stands
    between them and the inputs moves too.
    """
    work = sum(sizes.values()) + 1
    never = work * (len(graph.calls) + 1)
    unlimited = never * (len(sizes) + 2)
    home: dict[Slot, Hashable] = dict.fromkeys(graph.inputs, "source")
    home.update({slot: id(call) for call in pure for slot in call.writes})
    edges: dict[tuple[Hashable, Hashable], int] = {}
    for slot, producer in home.items():
        edges[producer, ("tensor", slot)] = never if slot in uncuttable else sizes[slot]
    inside = {id(call) for call in pure}
    for call in graph.calls:
        node: Hashable = id(call) if id(call) in inside else "sink"
        for slot in call.reads:
            if slot in home:
                edges[("tensor", slot), node] = unlimited  # a reader behind the cut pays for it
        if node != "sink":
            # What a call in front of the cut reads is computed in front of it as well.
            edges.update({(node, home[slot]): unlimited for slot in call.reads})
            edges["source", node] = work if forced or not _light(call) else 0
    for slot in graph.outputs:
        if slot in home:
            edges[("tensor", slot), "sink"] = unlimited
    kept = later_cut(edges, "source", "sink")
    return [call for call in pure if id(call) in kept]


def _light(call: Call) -> bool:
    operation = call.operation
    if isinstance(operation, keras.Layer):
        return type(operation) in _LIGHT_LAYERS or (
            isinstance(operation, L.BatchNormalization)
            and type(operation).__module__.startswith("frostline.layers.")
        )
    return operation is keras.ops.cast or type(operation).__name__ in _LIGHT_OPERATIONS


def _uncuttable(graph: Graph, pure: Sequence[Call], shapes: Mapping[Slot, Any] | None) -> set[Slot]:
    """Slots that cannot be stored row by row: with a mask, or with rows that are not samples.

    Args:
        graph: The graph.
        pure: The pure calls.
        shapes: What the trial run saw of them; ``None``: there was none.
    """
    found = {slot for call in pure for slot in call.masked}
    batches = {graph.tensors[s].shape[0] for s in graph.inputs if len(graph.tensors[s].shape)}
    for slot in (slot for call in pure for slot in call.writes):
        shape = graph.tensors[slot].shape
        rows = len(shape) > 0 and shape[0] in batches
        if not rows or (shapes is not None and slot not in shapes):
            found.add(slot)
    return found


def _bytes(graph: Graph, slot: Slot, shape: tuple[int, ...] | None) -> int:
    """Bytes of one sample; sizes that are not known count as in the trial run, or as one."""
    if shape is None:
        shape = tuple(size or 1 for size in graph.tensors[slot].shape[1:])
    return math.prod(shape) * _item_bytes(graph.tensors[slot].dtype)


def _item_bytes(dtype: str) -> int:
    bits = "".join(filter(str.isdigit, dtype.replace("e4m3fn", "").replace("e5m2", "")))
    return max(1, int(bits) // 8) if bits else 1  # bool and string


def _crossing(graph: Graph, inside: Sequence[Call]) -> list[Slot]:
    """Slots that the suffix reads, in the order in which they are computed."""
    ours = {id(call) for call in inside}
    read = {slot for call in graph.calls if id(call) not in ours for slot in call.reads}
    read.update(graph.outputs)
    known = [*graph.inputs, *(slot for call in inside for slot in call.writes)]
    return [slot for slot in known if slot in read]


# --- the two models -------------------------------------------------------------------------------


def _build(
    graph: Graph, model: Any, inside: Sequence[Call], slots: Sequence[Slot]
) -> tuple[Any, Any]:
    ours = {id(call) for call in inside}
    behind = [call for call in graph.calls if id(call) not in ours]
    own: Any = graph_of(model)
    with restored_on_failure(graph.calls):
        inputs = keras.tree.map_structure(_like, own._inputs_struct)
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
            leaves = iter([values[slot] for slot in graph.outputs])
            outputs = keras.tree.map_structure(lambda _: next(leaves), own._outputs_struct)
            suffix = keras.Model(
                entries[0] if len(entries) == 1 else entries, outputs, name=model.name
            )
    # Losses and metrics are given, and reported, under these names.
    suffix.output_names = list(own.output_names)
    return prefix, suffix


def _like(tensor: Any) -> Any:
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        sparse=tensor.sparse,
        optional=getattr(tensor._keras_history.operation, "optional", False),
        name=tensor._keras_history.operation.name,
    )


def _fresh(name: str, taken: Iterable[str]) -> str:
    while name in taken:
        name += "_"
    return name


# --- what is told ---------------------------------------------------------------------------------


def _described(
    graph: Graph, tensor: Any, slot: Slot, shape: tuple[int, ...] | None, names: Mapping[int, str]
) -> Crossing:
    producer = next((call for call in graph.calls if slot in call.writes), None)
    if producer is None:
        path = graph.tensors[slot]._keras_history.operation.name
    else:
        path = names.get(id(producer.operation), getattr(producer.operation, "name", "cast"))
    known = tuple(tensor.shape[1:])
    exact = shape if None in known and shape is not None else known
    return Crossing(
        path=path,
        shape=known,
        dtype=keras.backend.standardize_dtype(tensor.dtype),
        bytes_per_sample=_bytes(graph, slot, exact if None not in exact else None),
        computed=producer is not None,
    )


def _notes(
    ends: Sequence[tuple[Call, Impurity]], names: Mapping[int, str], reason: str
) -> tuple[str, ...]:
    told = {
        names[id(blame.layer)]: blame.text
        for _, blame in ends
        if blame.why in ("random", "state", "loss")
    }
    notes = [f"the prefix ends at '{path}': {text}" for path, text in told.items()]
    if reason:
        notes.append(f"purity was judged by flags alone: {reason}")
    return tuple(notes)
