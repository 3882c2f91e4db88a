"""How Keras' activations are written in ONNX, alone or at the end of another layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras

from frostline.adapters.keras.calls import Call
from frostline.adapters.keras.onnx.writer import Rule, Rules, Value, Writer, require
from frostline.types import ModelError

A, L = keras.activations, keras.layers


def _clip(writer: Writer, name: str, low: float, high: float) -> str:
    return writer.add("Clip", [name, writer.constant(low), writer.constant(high)])


def _silu(writer: Writer, name: str) -> str:
    return writer.add("Mul", [name, writer.add("Sigmoid", [name])])


def _gelu(writer: Writer, name: str) -> str:
    half = writer.add("Mul", [name, writer.constant(0.5)])
    error = writer.add("Erf", [writer.add("Mul", [name, writer.constant(math.sqrt(0.5))])])
    return writer.add("Mul", [half, writer.add("Add", [error, writer.constant(1.0)])])


_FUNCTIONS: dict[Any, Callable[[Writer, str], str]] = {
    A.linear: lambda _, name: name,
    A.relu: lambda writer, name: writer.add("Relu", [name]),
    A.relu6: lambda writer, name: _clip(writer, name, 0.0, 6.0),
    A.sigmoid: lambda writer, name: writer.add("Sigmoid", [name]),
    A.tanh: lambda writer, name: writer.add("Tanh", [name]),
    A.silu: _silu,
    A.gelu: _gelu,
    A.softplus: lambda writer, name: writer.add("Softplus", [name]),
    A.exponential: lambda writer, name: writer.add("Exp", [name]),
    A.hard_sigmoid: lambda writer, name: writer.add("HardSigmoid", [name], alpha=1 / 6, beta=0.5),
    A.hard_silu: lambda writer, name: writer.add("HardSwish", [name]),
    A.elu: lambda writer, name: writer.add("Elu", [name], alpha=1.0),
    A.selu: lambda writer, name: writer.add("Selu", [name]),
}
_BY_NAME = {
    "Relu": A.relu, "Relu6": A.relu6, "Sigmoid": A.sigmoid, "Tanh": A.tanh, "Silu": A.silu,
    "Softplus": A.softplus, "HardSigmoid": A.hard_sigmoid, "HardSilu": A.hard_silu,
    "Exp": A.exponential,
}  # fmt: skip


def activated(writer: Writer, function: Any, value: Value) -> Value:
    """The value behind an activation function of ``keras.activations``."""
    if function is A.softmax:
        value = writer.plain(value)
        name = writer.add("Softmax", [value.name], axis=-1)
    else:
        known = _FUNCTIONS.get(function)
        if known is None:
            name = getattr(function, "__name__", type(function).__name__)
            raise ModelError(f"no rule for the activation {name!r}")
        value.require_float32()
        name = known(writer, value.name)
    return Value(name=name, shape=value.shape, dtype=value.dtype, moved=value.moved)


def _activation(writer: Writer, call: Call) -> Value:
    return activated(writer, call.operation.activation, writer.entry(call))


def _by_name(kind: str) -> Rule:
    def rule(writer: Writer, call: Call) -> Value:
        return activated(writer, _BY_NAME[kind], writer.entry(call))

    return rule


def _relu(writer: Writer, call: Call) -> Value:
    layer, value = call.operation, writer.entry(call)
    value.require_float32()
    require(layer.threshold == 0, "a ReLU with a threshold")
    name = value.name
    if layer.negative_slope:
        name = writer.add("LeakyRelu", [name], alpha=float(layer.negative_slope))
    elif layer.max_value is None:
        name = writer.add("Relu", [name])
    if layer.max_value is not None:
        low = 0.0 if not layer.negative_slope else -3.4e38
        name = _clip(writer, name, low, float(layer.max_value))
    return writer.made(call, name, moved=value.moved)


def _leaky(writer: Writer, call: Call) -> Value:
    value = writer.entry(call)
    name = writer.add("LeakyRelu", [value.name], alpha=float(call.operation.negative_slope))
    return writer.made(call, name, moved=value.moved)


def _softmax(writer: Writer, call: Call) -> Value:
    value = writer.plain(writer.entry(call))
    axis = call.operation.axis
    require(isinstance(axis, int), "a softmax over several axes")
    return writer.made(call, writer.add("Softmax", [value.name], axis=axis))


RULES: Rules = {L.Activation: _activation, L.LeakyReLU: _leaky, L.ReLU: _relu, L.Softmax: _softmax}
#: Of operations that are no layers, by the name of their class.
OPERATIONS: Mapping[str, Rule] = {kind: _by_name(kind) for kind in _BY_NAME}
