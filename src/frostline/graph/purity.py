"""What belongs to the frozen part of a model: calls that are the same function in every step.

An adapter writes its graph out as nodes with what their flags say. Flags can be fooled, so the
nodes that passed are also run: on two batches that share one sample, in training mode and at
inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from frostline.graph.addresses import Layers, Place, is_within
from frostline.types import Array, ModelError
from frostline.types.reasons import first_line

#: Largest difference, as a share of the largest value, that rounding may make.
_ROUNDING = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}

#: Why a call is not pure. ``phase``: it is made in training only, or at inference only.
Why = Literal["trains", "statistics", "random", "state", "loss", "phase"]
#: What stands for a tensor: a slot on Keras, a node of the graph on torch. Hashable.
Value = Any


@dataclass(frozen=True, kw_only=True)
class Impurity:
    """Why a call is no pure function of its input.

    Attributes:
        why: In one word.
        path: Path of the layer to blame, which may be inside of the one that is called.
        text: In words, without the path.
        kind: Class of that layer.
        seems: Its parameters are frozen all the same.
        remedy: What to do about a BN layer that only seems frozen.
    """

    why: Why
    path: str
    text: str
    kind: str = ""
    seems: bool = False
    remedy: str = "Freeze its statistics as well: fl.freeze(model, until=...)"


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """One call of a layer or operation.

    Attributes:
        call: What the adapter runs and copies.
        path: Address of the layer; of an operation, a name that a person can find.
        kind: Class of the layer, or name of the operation.
        reads: Values that it takes.
        writes: Values that it makes.
        blame: What its flags say against its purity.
        layer: It calls a layer.
        weights: It calls a layer that holds weights.
        light: It costs next to nothing beside a convolution.
        constant: No input reaches it; both parts of a model make their own.
        phased: It may compute something else in training than at inference.
        place: Where its layer is in the order of layers; ``None`` where its inputs decide.
    """

    call: Any
    path: str
    kind: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    blame: Impurity | None = None
    layer: bool = False
    weights: bool = False
    light: bool = False
    constant: bool = False
    phased: bool = True
    place: Place | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """A model as nodes in execution order.

    Attributes:
        nodes: All calls.
        inputs: Values of the model's inputs.
        outputs: Values that it returns.
        word: What the framework calls a layer.
        received: The model, as an error names it.
        trains: Whether anything of the model trains.
        in_place: A call may change the values that it reads.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    word: str
    received: str
    trains: bool
    in_place: bool = False


def pure_nodes(graph: Graph) -> tuple[list[Node], list[Node]]:
    """The nodes that are pure by their flags, with pure inputs only, and those that end them."""
    good = set(graph.inputs)
    pure: list[Node] = []
    ends: list[Node] = []
    for node in graph.nodes:
        if not good.issuperset(node.reads):
            continue
        if node.blame is None:
            pure.append(node)
            good.update(node.writes)
        else:
            ends.append(node)
    return pure, ends


def require_frozen(graph: Graph, pure: Sequence[Node], ends: Sequence[Node]) -> None:
    """Refuse a model where nothing or everything is frozen, and a BN that only seems frozen.

    Raises:
        ModelError: One of these, with the layer to blame and what to do.
    """
    if not graph.trains:
        raise ModelError(
            "everything is frozen: nothing is left to train behind the prefix. Thaw the head, for "
            "example fl.unfreeze(model, -1), or say where to cut (at=...). "
            f"Received: {graph.received}"
        )
    blames = [node.blame for node in ends if node.blame is not None]
    for blame in blames:
        if blame.why == "statistics" and blame.seems:
            raise ModelError(
                f"'{blame.path}' is frozen, but {blame.text}: what it computes for one sample "
                f"depends on the others, so it cannot be stored. {blame.remedy}. "
                f"Received: {blame.kind}"
            )
    if not any(node.weights for node in pure):
        curable = [blame for blame in blames if blame.why not in ("state", "loss")]
        if blames and not curable:
            raise ModelError(
                f"'{blames[0].path}' comes first, and {blames[0].text}: nothing of the model can "
                "be computed once, and freezing does not change that. Train the whole model, "
                f"without a cache. Received: {graph.received}"
            )
        why = f": '{curable[0].path}' comes first, and {curable[0].text}" if curable else ""
        raise ModelError(
            f"nothing is frozen at the beginning of the model{why}. Freeze the part that is to be "
            f"computed once: fl.freeze(model, until=...). Received: {graph.received}"
        )


def before(graph: Graph, pure: Sequence[Node], layers: Layers, at: Any) -> list[Node]:
    """The nodes before a boundary; all of them must be pure.

    Args:
        graph: The graph.
        pure: Its pure nodes.
        layers: The model's layers.
        at: The boundary as the user wrote it.

    Raises:
        ModelError: No such boundary, or one with nothing on either side; or a node before it is not
            pure.
    """
    boundary = layers.resolve(at)
    if boundary.path is None:
        raise ModelError(
            f"the boundary is the end of the model: nothing is left behind it. Received: at={at!r}"
        )
    edge = next(place for place in layers.places if place.path == boundary.path)
    allowed, good = {id(node) for node in pure}, set(graph.inputs)
    found: list[Node] = []
    for node in graph.nodes:
        if not good.issuperset(node.reads) or _behind(node, edge):
            continue
        if id(node) not in allowed:
            blame = node.blame
            if node.constant or (blame is not None and blame.why == "phase"):
                continue  # what reads a trainable tensor is not before the boundary either
            path, text = (node.path, "") if blame is None else (blame.path, f": {blame.text}")
            raise ModelError(
                f"'{path}' is before the boundary '{edge.path}' but not pure{text}. "
                f"fl.freeze(model, {edge.path!r}) freezes all that is before it. "
                f"Received: at={at!r}"
            )
        found.append(node)
        good.update(node.writes)
    if not any(node.layer for node in found):
        raise ModelError(
            f"no {graph.word} is before the boundary '{edge.path}'. Received: at={at!r}"
        )
    return found


def _behind(node: Node, edge: Place) -> bool:
    """Whether a node is not before a place by the order of layers."""
    if node.layer and (is_within(node.path, edge.path) or is_within(edge.path, node.path)):
        return True
    return node.place is not None and node.place.order >= edge.order


# --- behaviour ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a trial run of the pure nodes showed.

    Attributes:
        shapes: Value -> shape of one sample's tensor; only of tensors whose rows are the samples.
            ``None``: there was no trial run.
        dtypes: Value -> dtype, of the same.
        reason: Why there was no trial run.
    """

    shapes: Mapping[Value, tuple[int, ...]] | None
    dtypes: Mapping[Value, str] = field(default_factory=dict)
    reason: str = ""


class NotRunError(Exception):
    """A node did not take the values that it was given: its path, and what it raised."""

    def __init__(self, path: str, problem: Exception) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem


def sample_refused(failure: NotRunError, shapes: Iterable[Any], model: str) -> ModelError:
    """What to raise where a model does not take the sample of a split, of these shapes."""
    given = ", ".join(str(tuple(shape)) for shape in shapes)
    return ModelError(
        f"the model fails on the sample at {failure.path!r} ({first_line(failure.problem)}). Pass "
        "sample=, a batch of inputs as the model takes them. "
        f"Received: sample of shape {given} for {model}"
    )


#: ``run(node, values, training)`` computes one node and puts its outputs into ``values``; returns
#: what it did beside that, in words, or ``None``.
Run = Callable[[Node, dict[Value, Any], bool], str | None]
#: ``numbers(value)``: an array; ``None`` for what has no rows to store: no tensor, or a sparse one.
Numbers = Callable[[Any], Array | None]


def observe(
    graph: Graph,
    nodes: Sequence[Node],
    batches: tuple[Mapping[Value, Any], Mapping[Value, Any], Mapping[Value, Any]],
    count: int,
    run: Run,
    numbers: Numbers,
    dtype_of: Callable[[Any], str],
) -> Observed:
    """Run nodes on trial batches and refuse what turns out not to be pure.

    Every node runs three times: in training mode on two batches that share one sample, in another
    place and among others, and at inference. There, a call that knows no phase and reads what it
    has read in training is not made again. It must return the same for that sample, and do nothing
    else.

    Args:
        graph: The graph that the nodes are from.
        nodes: Nodes in execution order, pure by their flags.
        batches: Values of the inputs: a batch; one that ends with its first sample; the first
            again, in tensors of its own.
        count: Samples in each of them.
        run: Computes a node.
        numbers: Reads a value.
        dtype_of: Name of a tensor's dtype.

    Raises:
        ModelError: A node is not pure; names the layer and says how it showed.
        NotRunError: A node raised.
    """
    tables = [dict(batch) for batch in batches]
    shapes: dict[Value, tuple[int, ...]] = {}
    dtypes: dict[Value, str] = {}

    def note(values: Sequence[Value]) -> None:
        for value in values:
            shape: Any = getattr(tables[0][value], "shape", ())
            if len(shape) and int(shape[0]) == count:
                shapes[value] = tuple(int(n) for n in shape[1:])
                dtypes[value] = dtype_of(tables[0][value])

    note(graph.inputs)
    last_use = {value: number for number, node in enumerate(nodes) for value in node.reads}
    for number, node in enumerate(nodes):
        try:
            text = run(node, tables[0], True)
            text = run(node, tables[1], True) or text
            shared = all(tables[2][value] is tables[0][value] for value in node.reads)
            if node.phased or not shared or graph.in_place:
                run(node, tables[2], False)
            else:
                tables[2].update({value: tables[0][value] for value in node.writes})
        except Exception as problem:
            raise NotRunError(node.path, problem) from problem
        for value in () if text else node.writes:
            one, other, locked = _read([table[value] for table in tables], numbers)
            if one is None or other is None or locked is None:
                continue
            note((value,))
            text = _difference(one, other, locked, count, dtype_of(tables[0][value]))
            if text is not None:
                break
            if not graph.in_place and np.array_equal(one, locked):
                tables[2][value] = tables[0][value]  # so the calls behind it are spared as well
        if text is not None:
            raise ModelError(
                f"'{node.path}' is frozen but not a pure function of its input: {text}, so what "
                "it computes cannot be stored. Put the boundary before it (at=...). "
                f"Received: {node.kind}"
            )
        for value in {*node.reads, *node.writes}:
            if last_use.get(value, -1) <= number:
                for table in tables:
                    table.pop(value, None)
    return Observed(shapes=shapes, dtypes=dtypes)


def _read(values: Sequence[Any], numbers: Numbers) -> list[Array | None]:
    """Values as arrays, the same object once."""
    known = {id(value): numbers(value) for value in values}
    return [known[id(value)] for value in values]


def _difference(one: Array, other: Array, locked: Array, count: int, dtype: str) -> str | None:
    """How a value differs between two batches with one sample in common, and at inference."""
    if one.shape != locked.shape or not _same(one, locked, dtype):
        return "it computes something else in training than at inference"
    shape: tuple[int, ...] = one.shape
    rows = shape[:1] == (count,) and shape == other.shape
    if rows and not _same(one[0], other[-1], dtype):
        return "its output for one sample depends on the other samples of the batch"
    return None


def _same(one: Array, other: Array, dtype: str) -> bool:
    if np.array_equal(one, other):  # the rule, and much faster than what follows
        return True
    one, other = one.astype(np.float64), other.astype(np.float64)
    largest = float(np.max(np.abs(other), initial=0.0, where=np.isfinite(other)))
    return bool(
        np.allclose(one, other, rtol=0.0, atol=_ROUNDING.get(dtype, 0.0) * largest, equal_nan=True)
    )


def others(rows: int, count: int) -> list[int]:
    """Rows of the second batch: other samples than the first ``count``, and the first one last."""
    return [*(count + position % (rows - count) for position in range(count - 1)), 0]


def notes(ends: Sequence[Node]) -> tuple[str, ...]:
    """What ended the prefix other than a layer that trains."""
    text = {
        node.blame.path: node.blame.text
        for node in ends
        if node.blame is not None and node.blame.why in ("random", "state", "loss", "statistics")
    }
    return tuple(f"the prefix ends at '{path}': {reason}" for path, reason in text.items())
