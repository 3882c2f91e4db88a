"""A Keras graph as a flat list of calls that can be made again, on tensors or symbolically.

Nested functional and sequential models are written out in place, so that a boundary may lie inside
of them, and activations can be carried from one site to the next. A nested model that is called
with a mask, or on inputs that it would reshape, stays one call; so does what has no graph, a
subclassed model or a composite layer, unless ``symbolic`` found one for it.

Nothing here changes a layer. Replaying symbolically adds nodes to the layers' own records, as Keras
does for every model that shares layers with another one.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import keras

from frostline.adapters.keras.graph import walk
from frostline.atomic import taken_back
from frostline.graph.schedule import Slot as _Place, Step

Slot = int

#: Where Keras defines the `call` that runs a graph; a model with another `call` is not its graph.
_GRAPH_CALLS = ("keras.src.models.functional", "keras.src.models.sequential")


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of a layer or operation.

    Attributes:
        operation: What is called.
        args: Positional arguments with places instead of tensors.
        kwargs: Keyword arguments, likewise.
        reads: Slots of the tensors among the arguments, each once.
        writes: Slots of the flattened outputs.
        masked: Slots among ``writes`` whose tensors carry a mask.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[Slot, ...]
    writes: tuple[Slot, ...]
    masked: tuple[Slot, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """A model as calls in execution order.

    Attributes:
        calls: The calls.
        inputs: Slots of the model's flattened inputs.
        outputs: Slots of its flattened outputs.
        tensors: Slot -> symbolic tensor of the model; those inside nested models know less of
            their shape than :func:`replay` finds out.
    """

    calls: tuple[Call, ...]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    tensors: Mapping[Slot, Any]


def graph_of(model: Any) -> Any | None:
    """The functional graph that ``model`` runs when it is called, else ``None``."""
    if not isinstance(model, keras.Model) or "call" in vars(model):
        return None
    if getattr(type(model).call, "__module__", "") not in _GRAPH_CALLS:
        return None
    graph = model._functional if isinstance(model, keras.Sequential) else model
    return graph if isinstance(graph, keras.Function) else None


def flatten(
    model: Any,
    enter: Callable[[Any], bool] = lambda _: True,
    found: Mapping[int, Any] = MappingProxyType({}),
) -> Graph | None:
    """Write the graph of ``model`` out.

    Args:
        model: A Keras model.
        enter: Whether a nested model with a graph is written out in place.
        found: ``id(layer)`` -> graph, of layers that have none of their own.

    Returns:
        The calls; ``None`` when the model has no graph.
    """
    graph = graph_of(model)
    if graph is None:
        return None
    writer = _Writer(enter, found)
    inputs = [writer.slot(tensor) for tensor in graph.inputs]
    outputs = writer.write_out(graph, inputs, None)
    return Graph(
        calls=tuple(writer.calls),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        tensors=writer.tensors,
    )


def record(model: Any, chosen: Mapping[int, str]) -> list[Step] | None:
    """Write the model's graph out as steps in inference mode, for a measurement.

    Args:
        model: A Keras model.
        chosen: ``id(layer)`` -> path of every site that will be measured. Nested models without any
            stay one step, a *closed* one where its sites cannot be told apart.

    Returns:
        The steps in execution order (the model's inputs are the first slots); ``None`` when the
        model has no graph, or passes masks along its tensors: Keras attaches those while it runs
        a whole model, and a tensor that was stored and read back has lost its mask.
    """
    inside: dict[int, tuple[str, ...]] = {}

    def sites(operation: Any) -> tuple[str, ...]:
        key = id(operation)
        if key not in inside:
            below = walk(operation) if isinstance(operation, keras.Layer) else ()
            found = [key, *(id(place.layer) for place in below)]
            inside[key] = tuple(chosen[layer] for layer in found if layer in chosen)
        return inside[key]

    graph = flatten(model, lambda operation: bool(sites(operation)))
    if graph is None or any(call.masked for call in graph.calls):
        return None
    return [
        Step(
            operation=call.operation,
            args=call.args,
            # As Keras does in inference: the phase of the whole model overrules that of a call.
            kwargs={**call.kwargs, "training": False}
            if takes_training(call.operation)
            else call.kwargs,
            reads=call.reads,
            writes=call.writes,
            sites=sites(call.operation),
            open=id(call.operation) in chosen,
        )
        for call in graph.calls
    ]


class _Writer:
    def __init__(self, enter: Callable[[Any], bool], found: Mapping[int, Any]) -> None:
        self.enter = enter
        self.found = found
        self.calls: list[Call] = []
        self.tensors: dict[Slot, Any] = {}

    def slot(self, tensor: Any) -> Slot:
        self.tensors[len(self.tensors)] = tensor
        return len(self.tensors) - 1

    def write_out(self, graph: Any, inputs: list[Slot], training: bool | None) -> list[Slot]:
        """Append the calls of ``graph``; returns the slots of its outputs."""
        table = {id(tensor): slot for tensor, slot in zip(graph.inputs, inputs, strict=True)}
        by_depth = graph._nodes_by_depth
        for depth in sorted(by_depth, reverse=True):
            for node in by_depth[depth]:
                known = all(id(tensor) in table for tensor in node.input_tensors)
                if node.operation is None or node.is_input or not known:
                    continue
                slots = self._node(node, table, training)
                table |= {id(t): slot for t, slot in zip(node.outputs, slots, strict=True)}
        return [table[id(tensor)] for tensor in graph.outputs]

    def _node(self, node: Any, table: dict[int, Slot], training: bool | None) -> list[Slot]:
        operation = node.operation

        def fill(value: Any) -> Any:
            return _Place(table[id(value)]) if isinstance(value, keras.KerasTensor) else value

        args = keras.tree.map_structure(fill, node.arguments.args)
        kwargs = keras.tree.map_structure(fill, node.arguments.kwargs)
        if training is not None and takes_training(operation):
            kwargs = {**kwargs, "training": training}  # written at the call of the nested model
        graph = self.found.get(id(operation)) or graph_of(operation)
        if graph is not None and not self.enter(operation):
            graph = None
        entered = None if graph is None else self._entered(graph, args, kwargs)
        if graph is not None and entered is not None:
            written = kwargs.get("training")
            return self.write_out(graph, entered, written if isinstance(written, bool) else None)
        return self._append(operation, args, kwargs, node.outputs)

    def _entered(
        self, graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[Slot] | None:
        """Slots that a nested model's inputs are, cast as it would; ``None``: leave it closed."""
        if len(args) != 1 or kwargs.get("mask") is not None or set(kwargs) - {"training", "mask"}:
            return None
        given, struct = args[0], graph._inputs_struct
        if isinstance(given, dict) != isinstance(struct, dict):
            return None
        if isinstance(given, dict) and sorted(given) != sorted(struct):
            return None
        places = keras.tree.flatten(given)
        if len(places) != len(graph.inputs):
            return None
        slots = []
        for place, wanted in zip(places, graph.inputs, strict=True):
            if not isinstance(place, _Place):
                return None
            tensor = self.tensors[place.index]
            if len(tensor.shape) != len(wanted.shape) or tensor.sparse != wanted.sparse:
                return None
            slot = place.index
            if tensor.dtype != wanted.dtype:
                [slot] = self._append(keras.ops.cast, (place, wanted.dtype), {}, [wanted])
            slots.append(slot)
        return slots

    def _append(
        self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: list[Any]
    ) -> list[Slot]:
        slots = [self.slot(tensor) for tensor in outputs]
        leaves = keras.tree.flatten((args, dict(kwargs)))
        reads = [leaf.index for leaf in leaves if isinstance(leaf, _Place)]
        self.calls.append(
            Call(
                operation=operation,
                args=args,
                kwargs=kwargs,
                reads=tuple(dict.fromkeys(reads)),
                writes=tuple(slots),
                masked=tuple(
                    slot
                    for slot, tensor in zip(slots, outputs, strict=True)
                    if getattr(tensor, "_keras_mask", None) is not None
                ),
            )
        )
        return slots


def takes_training(operation: Any) -> bool:
    """Whether the operation is a layer that computes something else in training."""
    return (
        isinstance(operation, keras.Layer)
        and "training" in inspect.signature(operation.call).parameters
    )


def run(call: Call, values: dict[Slot, Any], training: bool | None = None) -> list[Any]:
    """Make one call on the tensors in ``values`` and put its outputs there; returns them.

    Args:
        call: The call.
        values: Slot -> tensor, backend's or symbolic.
        training: Phase of the whole model, which overrules the phase written at a call as it does
            in Keras; ``None``: what is written at the call.
    """
    args, kwargs = filled((call.args, dict(call.kwargs)), values)
    if training is not None and takes_training(call.operation):
        kwargs["training"] = training
    outputs = keras.tree.flatten(call.operation(*args, **kwargs))
    values.update(zip(call.writes, outputs, strict=True))
    return list(outputs)


def filled(arguments: Any, values: Mapping[Slot, Any]) -> Any:
    """Arguments with the tensors that their places stand for."""

    def fill(value: Any) -> Any:
        return values[value.index] if isinstance(value, _Place) else value

    return keras.tree.map_structure(fill, arguments)


@contextmanager
def restored_on_failure(calls: Sequence[Call]) -> Iterator[None]:
    """Take back what symbolic calls recorded on the layers, if anything fails."""
    operations = [call.operation for call in calls if hasattr(call.operation, "_inbound_nodes")]
    before = [(o, len(o._inbound_nodes), len(o._outbound_nodes)) for o in operations]
    try:
        yield
    except BaseException:
        for operation, inbound, outbound in before:
            del operation._inbound_nodes[inbound:]
            del operation._outbound_nodes[outbound:]
        raise


@contextmanager
def told_apart(calls: Sequence[Call], taken: Sequence[str] = ()) -> Iterator[None]:
    """Give every operation a name of its own for the time of building a model.

    Keras asks for unique names in one graph; layers of two nested models, each unique in its own
    graph, may share one.
    """
    operations = {id(call.operation): call.operation for call in calls}.values()
    named = [operation for operation in operations if isinstance(operation, keras.Operation)]
    used = Counter([*(operation.name for operation in named), *taken])
    before = [(operation, operation.name) for operation in named]

    def back() -> None:
        for operation, name in before:
            operation.name = name

    with taken_back(back):
        for operation, name in before:
            if used[name] > 1:
                fresh = next(f"{name}_{n}" for n in itertools.count(2) if f"{name}_{n}" not in used)
                used[name] -= 1
                used[fresh] = 1
                operation.name = fresh
        yield


def like_input(tensor: Any) -> Any:
    """A new input like the one that a symbolic tensor came from."""
    source = tensor._keras_history.operation
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        sparse=tensor.sparse,
        optional=getattr(source, "optional", False),
        name=source.name,
    )


def position(leaf: Any) -> Slot | None:
    """The slot that an argument stands for; ``None`` for any other argument."""
    return leaf.index if isinstance(leaf, _Place) else None
