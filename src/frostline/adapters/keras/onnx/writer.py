"""The ONNX graph while it is written: nodes, weights, and what the rules of layers use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import float64
from frostline.adapters.keras.calls import Call, Graph, Slot
from frostline.adapters.keras.rebuild import factors, takes
from frostline.types import Array, ModelError

OPSET, IR_VERSION = 17, 9
_LARGEST = 2**31 - 2**20  # bytes that one protobuf message can hold
_ELEMENT = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7}  # ONNX' numbers


@dataclass(frozen=True, kw_only=True)
class Value:
    """One tensor of the ONNX graph.

    Attributes:
        name: Its name.
        shape: Shape *in Keras' layout*, with the batch; ``None`` for sizes that are not known.
        dtype: Name of its dtype.
        moved: The last axis of Keras' layout is axis 1 here.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    moved: bool = False

    def require_float32(self) -> None:
        """Refuse another dtype, with a :class:`ModelError`."""
        require(self.dtype == "float32", f"only float32 is exported. Received: {self.dtype}")


class Writer:
    """Collects nodes and weights while the calls of a graph are followed.

    Args:
        onnx: The package of that name.
        graph: The model's calls.
        rule_for: The rule for a layer or operation.
    """

    def __init__(self, onnx: Any, graph: Graph, rule_for: Callable[[Any], Rule]) -> None:
        self.onnx = onnx
        self._rule_for = rule_for
        self.graph = graph
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.values: dict[Slot, Value] = {}
        self.folded: dict[int, tuple[Array, Array]] = {}
        self.count = 0
        self.done: set[int] = set()
        self.readers: dict[Slot, list[Any]] = {}
        for call in graph.calls:
            for slot in call.reads:
                self.readers.setdefault(slot, []).append(call)
        for slot in graph.outputs:
            self.readers.setdefault(slot, []).append(None)

    def written(self, name: str) -> bytes:
        """Follow the calls and return the serialized model."""
        helper = self.onnx.helper
        inputs = [self._input(number, slot) for number, slot in enumerate(self.graph.inputs)]
        for call in self.graph.calls:
            self._call(call)
        outputs = [self._output(number, slot) for number, slot in enumerate(self.graph.outputs)]
        size = sum(len(weight.raw_data) for weight in self.weights)
        if size > _LARGEST:
            raise ModelError(f"an ONNX graph holds 2 GB at most. Received: {size:,} bytes")
        graph = helper.make_graph(self.nodes, name, inputs, outputs, initializer=self.weights)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="frostline",
        )
        serialized: bytes = model.SerializeToString()
        return serialized

    # --- what rules use -----------------------------------------------------------------------

    def add(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        self.count += 1
        name = f"t{self.count}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Append a weight; returns its name."""
        self.count += 1
        name = f"w{self.count}"
        array = np.ascontiguousarray(np.asarray(value, dtype=dtype))
        self.weights.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def first(self, value: Value) -> Value:
        """The value with Keras' last axis on axis 1."""
        return value if value.moved else self._transposed(value, moved=True)

    def plain(self, value: Value) -> Value:
        """The value in Keras' layout."""
        return self._transposed(value, moved=False) if value.moved else value

    def _transposed(self, value: Value, *, moved: bool) -> Value:
        rank = len(value.shape)
        if rank <= 2:
            return Value(name=value.name, shape=value.shape, dtype=value.dtype, moved=moved)
        order = [0, rank - 1, *range(1, rank - 1)] if moved else [0, *range(2, rank), 1]
        name = self.add("Transpose", [value.name], perm=order)
        return Value(name=name, shape=value.shape, dtype=value.dtype, moved=moved)

    def along(self, vector: Any, value: Value) -> str:
        """A constant vector along Keras' last axis, shaped to be broadcast against ``value``."""
        array = np.asarray(vector, dtype=np.float64).reshape(-1)
        if value.moved and len(value.shape) > 2:
            array = array.reshape(-1, *[1] * (len(value.shape) - 2))
        return self.constant(array)

    def shape(self, slot: Slot) -> tuple[int | None, ...]:
        """Shape of a tensor in Keras' layout."""
        return tuple(self.graph.tensors[slot].shape)

    def entry(self, call: Call) -> Value:
        """What a call with one input reads."""
        return self.values[call.reads[0]]

    def made(self, call: Call, name: str, *, moved: bool = False) -> Value:
        """The value of a call's output, which a node has computed."""
        slot = call.writes[0]
        dtype = keras.backend.standardize_dtype(self.graph.tensors[slot].dtype)
        return Value(name=name, shape=self.shape(slot), dtype=dtype, moved=moved)

    def affine(self, layer: Any, channels: int) -> tuple[Array, Array]:
        """What a linear layer's kernel is multiplied with, and its bias, with the BN behind it."""
        scale, shift = self.folded.get(id(layer), (np.ones(channels), np.zeros(channels)))
        return scale, shift if layer.bias is None else float64(layer.bias) * scale + shift

    # --- the graph ----------------------------------------------------------------------------

    def _input(self, number: int, slot: Slot) -> Any:
        tensor = self.graph.tensors[slot]
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if dtype not in _ELEMENT:
            raise ModelError(f"an input of dtype {dtype} cannot be exported. Received: {dtype}")
        name = f"input_{number}"
        self.values[slot] = Value(name=name, shape=tuple(tensor.shape), dtype=dtype)
        sizes = ["batch", *(f"d{i}" if n is None else n for i, n in enumerate(tensor.shape[1:]))]
        return self.onnx.helper.make_tensor_value_info(name, _ELEMENT[dtype], sizes)

    def _output(self, number: int, slot: Slot) -> Any:
        value = self.plain(self.values[slot])
        name = f"output_{number}"
        self.nodes.append(self.onnx.helper.make_node("Identity", [value.name], [name]))
        sizes = ["batch", *(None for _ in value.shape[1:])]
        return self.onnx.helper.make_tensor_value_info(name, _ELEMENT[value.dtype], sizes)

    def _call(self, call: Call) -> None:
        operation = call.operation
        name = getattr(operation, "name", "cast")
        if call.masked:
            raise ModelError(f"'{name}' passes a mask on, which ONNX does not know")
        if id(operation) in self.done:
            return
        site = self._follower(call)
        if site is not None:
            self.folded[id(operation)] = factors(site)
        for slot in call.reads:
            if slot not in self.values:
                raise ModelError(f"'{name}' reads what was not computed")
        try:
            outcome = self._rule_for(operation)(self, call)
        except ModelError as problem:
            raise ModelError(f"layer '{name}' cannot be exported: {problem}") from problem
        self.values[call.writes[0]] = outcome
        if site is not None:
            self.values[self.readers[call.writes[0]][0].writes[0]] = outcome
            self.done.add(id(site))

    def _follower(self, call: Call) -> Any | None:
        """The BN layer that alone reads a linear layer's output, along its channels."""
        layer = call.operation
        after = self.readers.get(call.writes[0], [])
        if len(after) != 1 or after[0] is None:
            return None
        site = after[0].operation
        calls = [entry.operation for entry in self.graph.calls]
        shared = sum(operation is layer or operation is site for operation in calls) > 2
        alone = not shared and takes(layer, site, len(self.shape(call.writes[0])))
        return site if alone else None


def require(condition: bool, reason: str) -> None:
    """Refuse what a rule does not know, with a :class:`ModelError`."""
    if not condition:
        raise ModelError(reason)


Rule = Callable[[Writer, Call], Value]
Rules = Mapping[type, Rule]
