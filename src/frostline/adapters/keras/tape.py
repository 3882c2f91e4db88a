"""A Keras graph as a flat list of steps.

Nested functional and sequential models are written out in place wherever they hold a chosen site,
so that activations can be carried from one site to the next instead of starting again at the input.
What has no graph (a subclassed model, a composite layer that holds BN) stays one *closed* step: its
sites are measured together, in as many passes over the step's input as it takes.

This room reads only: it never changes a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras

from frostline.adapters.keras.graph import walk
from frostline.graph.schedule import Slot, Step

#: Where Keras defines the `call` that runs a graph; a model with another `call` is not its graph.
_GRAPH_CALLS = ("keras.src.models.functional", "keras.src.models.sequential")


def graph_of(model: Any) -> Any | None:
    """The functional graph that ``model`` runs when it is called, else ``None``."""
    if not isinstance(model, keras.Model) or "call" in vars(model):
        return None
    if getattr(type(model).call, "__module__", "") not in _GRAPH_CALLS:
        return None
    graph = model._functional if isinstance(model, keras.Sequential) else model
    return graph if isinstance(graph, keras.Function) else None


def record(model: Any, chosen: Mapping[int, str]) -> list[Step] | None:
    """Write the model's graph out as steps.

    Args:
        model: A Keras model.
        chosen: ``id(layer)`` -> path of every site that will be measured.

    Returns:
        The steps in execution order (the model's inputs are the first slots); ``None`` when the
        model has no graph, or passes masks along its tensors: Keras attaches those while it runs
        a whole model, and a tensor that was stored and read back has lost its mask.
    """
    graph = graph_of(model)
    if graph is None:
        return None
    recorder = _Recorder(chosen)
    recorder.write_out(graph, [recorder.new_slot() for _ in graph.inputs])
    return None if recorder.masked else recorder.steps


class _Recorder:
    def __init__(self, chosen: Mapping[int, str]) -> None:
        self.chosen = chosen
        self.steps: list[Step] = []
        self.slots = 0
        self.masked = False
        self.inside: dict[int, tuple[str, ...]] = {}

    def new_slot(self) -> Slot:
        self.slots += 1
        return Slot(self.slots - 1)

    def write_out(self, graph: Any, inputs: list[Slot]) -> list[Slot]:
        """Append the steps of ``graph``; returns the slots of its outputs."""
        table = {id(tensor): slot for tensor, slot in zip(graph.inputs, inputs, strict=True)}
        by_depth = graph._nodes_by_depth
        for depth in sorted(by_depth, reverse=True):
            for node in by_depth[depth]:
                known = all(id(tensor) in table for tensor in node.input_tensors)
                if node.operation is None or node.is_input or not known:
                    continue
                slots = self._node(node, table)
                table |= {id(t): slot for t, slot in zip(node.outputs, slots, strict=True)}
                self.masked |= any(
                    getattr(tensor, "_keras_mask", None) is not None for tensor in node.outputs
                )
        return [table[id(tensor)] for tensor in graph.outputs]

    def _node(self, node: Any, table: dict[int, Slot]) -> list[Slot]:
        operation = node.operation

        def fill(value: Any) -> Any:
            return table.get(id(value)) if isinstance(value, keras.KerasTensor) else value

        args = keras.tree.map_structure(fill, node.arguments.args)
        kwargs = keras.tree.map_structure(fill, node.arguments.kwargs)
        graph = graph_of(operation)
        if graph is not None and args and self._sites(operation):
            entered = self._append(graph._standardize_inputs, args[:1], {}, len(graph.inputs))
            return self.write_out(graph, entered)
        # As Keras does in inference: the phase of the whole model overrules that of the node.
        if isinstance(operation, keras.Layer) and _takes_training(operation):
            kwargs = {**kwargs, "training": False}
        return self._append(operation, args, kwargs, len(node.outputs))

    def _append(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: int
    ) -> list[Slot]:
        slots = [self.new_slot() for _ in range(outputs)]
        reads = [leaf.index for leaf in _leaves((args, kwargs)) if isinstance(leaf, Slot)]
        self.steps.append(
            Step(
                operation=operation,
                args=args,
                kwargs=kwargs,
                reads=tuple(dict.fromkeys(reads)),
                writes=tuple(slot.index for slot in slots),
                sites=self._sites(operation),
                open=id(operation) in self.chosen,
            )
        )
        return slots

    def _sites(self, operation: Any) -> tuple[str, ...]:
        if not isinstance(operation, keras.Layer):
            return ()
        key = id(operation)
        if key not in self.inside:
            inner = [key, *(id(place.layer) for place in walk(operation))]
            self.inside[key] = tuple(self.chosen[each] for each in inner if each in self.chosen)
        return self.inside[key]


def _takes_training(layer: Any) -> bool:
    return "training" in inspect.signature(layer.call).parameters


def _leaves(structure: Any) -> list[Any]:
    return list(keras.tree.flatten(structure))
