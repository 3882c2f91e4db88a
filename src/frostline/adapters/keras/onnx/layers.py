"""How each kind of Keras layer is written in ONNX; what is not here is refused by name.

Every rule gets the writer and a call and returns the value of the call's output. Channels are on
axis 1 inside of a network of images; a rule that needs Keras' layout asks for ``plain``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import float64
from frostline.adapters.keras.calls import Call, position
from frostline.adapters.keras.graph import is_site
from frostline.adapters.keras.onnx import (
    activations as keras_onnx_activations,
    images as keras_onnx_images,
)
from frostline.adapters.keras.onnx.activations import activated
from frostline.adapters.keras.onnx.writer import Rule, Rules, Value, Writer, require
from frostline.adapters.keras.rebuild import factors
from frostline.types import ModelError

L = keras.layers


def rule_for(operation: Any) -> Rule:
    """The rule for a layer or operation.

    Raises:
        ModelError: There is none. Exactly the known classes count: a subclass may do more.
    """
    if is_site(operation) and type(operation).__module__.startswith(("keras.", "frostline.")):
        return _site
    rule = _RULES.get(type(operation))
    if rule is not None:
        return rule
    kind = type(operation).__name__
    if type(operation).__module__ == "keras.src.applications.convnext" and kind == "LayerScale":
        return _layer_scale  # Keras does not export the class
    if type(operation).__module__.startswith("keras.src.ops") and kind in _OPERATIONS:
        return _OPERATIONS[kind]
    if operation is keras.ops.cast:
        return _cast
    raise ModelError(f"no rule for {type(operation).__module__}.{kind}")


# --- channels -------------------------------------------------------------------------------------


def _scaled(writer: Writer, call: Call, scale: Any, shift: Any) -> Value:
    """``x * scale + shift`` along the last axis of Keras' layout."""
    value = writer.entry(call)
    name = value.name
    if value.dtype != "float32":
        name = writer.add("Cast", [name], to=1)
    name = writer.add("Mul", [name, writer.along(scale, value)])
    name = writer.add("Add", [name, writer.along(shift, value)])
    return writer.made(call, name, moved=value.moved)


def _site(writer: Writer, call: Call) -> Value:
    layer, value = call.operation, writer.entry(call)
    value.require_float32()
    rank = len(value.shape)
    if layer.axis % rank == rank - 1:
        return _scaled(writer, call, *factors(layer))
    require(layer.axis % rank == 1, f"a BN layer along axis {layer.axis}")
    scale, shift = (factor.reshape(-1, *[1] * (rank - 2)) for factor in factors(layer))
    name = writer.add("Mul", [writer.plain(value).name, writer.constant(scale)])
    return writer.made(call, writer.add("Add", [name, writer.constant(shift)]))


def _layer_norm(writer: Writer, call: Call) -> Value:
    """Over the last axis alone, which Keras' layout and ONNX then have in common."""
    layer, value = call.operation, writer.plain(writer.entry(call))
    value.require_float32()
    rank = len(value.shape)
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    require([axis % rank for axis in axes] == [rank - 1], f"layer normalization along {axes}")
    require(not layer.rms_scaling, "layer normalization with rms_scaling")
    count = value.shape[-1]
    gamma = np.ones(count or 1) if layer.gamma is None else float64(layer.gamma)
    beta = np.zeros(len(gamma)) if layer.beta is None else float64(layer.beta)
    inputs = [value.name, writer.constant(gamma), writer.constant(beta)]
    name = writer.add("LayerNormalization", inputs, axis=-1, epsilon=float(layer.epsilon))
    return writer.made(call, name)


def _layer_scale(writer: Writer, call: Call) -> Value:
    """ConvNeXt's layer: one factor per channel."""
    value = writer.entry(call)
    value.require_float32()
    name = writer.add("Mul", [value.name, writer.along(float64(call.operation.gamma), value)])
    return writer.made(call, name, moved=value.moved)


def _rescaling(writer: Writer, call: Call) -> Value:
    layer = call.operation
    scale, offset = np.asarray(layer.scale), np.asarray(layer.offset)
    require(scale.ndim <= 1 and offset.ndim <= 1, "a scale that differs between pixels")
    return _scaled(writer, call, scale, offset)


def _normalization(writer: Writer, call: Call) -> Value:
    layer, rank = call.operation, len(writer.entry(call).shape)
    require(layer.axis in ((-1,), (rank - 1,)), f"normalization along axis {layer.axis}")
    mean, variance = float64(layer.mean).reshape(-1), float64(layer.variance).reshape(-1)
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return _scaled(writer, call, deviation, mean)
    return _scaled(writer, call, 1 / deviation, -mean / deviation)


def _dense(writer: Writer, call: Call) -> Value:
    layer, value = call.operation, writer.plain(writer.entry(call))
    value.require_float32()
    require(
        not getattr(layer, "lora_enabled", False) and not getattr(layer, "quantization_mode", None),
        "a Dense layer with LoRA or quantization",
    )
    kernel = float64(layer.kernel)
    scale, bias = writer.affine(layer, kernel.shape[1])
    name = writer.add("MatMul", [value.name, writer.constant(kernel * scale)])
    name = writer.add("Add", [name, writer.constant(bias)])
    return activated(writer, layer.activation, writer.made(call, name))


# --- joining and reshaping ------------------------------------------------------------------------


def _unchanged(writer: Writer, call: Call) -> Value:
    return writer.entry(call)


def _aligned(writer: Writer, values: Sequence[Value]) -> list[Value]:
    """Values in one layout, so that they can be joined."""
    rank = max(len(value.shape) for value in values)
    if any(value.moved for value in values) and all(len(v.shape) == rank for v in values):
        return [writer.first(value) for value in values]
    return [writer.plain(value) for value in values]


def _joined(kind: str) -> Rule:
    def rule(writer: Writer, call: Call) -> Value:
        values = _aligned(writer, [writer.values[slot] for slot in _read_in_order(call)])
        for value in values:
            value.require_float32()
        name = values[0].name
        for value in values[1:]:
            name = writer.add(kind, [name, value.name])
        return writer.made(call, name, moved=values[0].moved)

    return rule


def _read_in_order(call: Call) -> list[int]:
    slots = [position(leaf) for leaf in keras.tree.flatten((call.args, dict(call.kwargs)))]
    return [slot for slot in slots if slot is not None]


def _average(writer: Writer, call: Call) -> Value:
    total = _joined("Add")(writer, call)
    name = writer.add("Mul", [total.name, writer.constant(1 / len(_read_in_order(call)))])
    return writer.made(call, name, moved=total.moved)


def _binary(kind: str) -> Rule:
    """An arithmetic operation of two tensors, or of a tensor and a number."""

    def rule(writer: Writer, call: Call) -> Value:
        operands = list(call.args)
        require(len(operands) == 2 and not call.kwargs, "arguments that are not positional")
        slots = [position(operand) for operand in operands]
        values = _aligned(writer, [writer.values[slot] for slot in slots if slot is not None])
        for value in values:
            value.require_float32()
        rest = iter(values)
        names = []
        for slot, operand in zip(slots, operands, strict=True):
            if slot is None:
                require(np.ndim(operand) == 0, "an operand that is an array")
            names.append(writer.constant(float(operand)) if slot is None else next(rest).name)
        return writer.made(call, writer.add(kind, names), moved=values[0].moved)

    return rule


def _concatenate(writer: Writer, call: Call) -> Value:
    values = _aligned(writer, [writer.values[slot] for slot in _read_in_order(call)])
    rank = len(values[0].shape)
    axis = call.operation.axis % rank
    if values[0].moved and rank > 2:
        axis = 1 if axis == rank - 1 else 0 if axis == 0 else axis + 1
    name = writer.add("Concat", [value.name for value in values], axis=axis)
    return writer.made(call, name, moved=values[0].moved)


def _reshape(writer: Writer, call: Call) -> Value:
    value = writer.plain(writer.entry(call))
    shape = writer.shape(call.writes[0])[1:]
    require(all(size is not None for size in shape), "a reshape to a size that is not fixed")
    target = writer.constant([0, *shape], np.int64)  # 0: the batch stays
    return writer.made(call, writer.add("Reshape", [value.name, target]))


def _flatten(writer: Writer, call: Call) -> Value:
    value = writer.plain(writer.entry(call))
    return writer.made(call, writer.add("Flatten", [value.name], axis=1))


def _cast(writer: Writer, call: Call) -> Value:
    value = writer.entry(call)
    outcome = writer.made(call, "", moved=value.moved)
    require(outcome.dtype == "float32", f"a cast to {outcome.dtype}")
    return writer.made(call, writer.add("Cast", [value.name], to=1), moved=value.moved)


_RULES: Rules = {
    **keras_onnx_activations.RULES,
    **keras_onnx_images.RULES,
    L.Add: _joined("Add"),
    L.Average: _average,
    L.Concatenate: _concatenate,
    L.Dense: _dense,
    L.Dropout: _unchanged,
    L.Flatten: _flatten,
    L.Identity: _unchanged,
    L.LayerNormalization: _layer_norm,
    L.Maximum: _joined("Max"),
    L.Minimum: _joined("Min"),
    L.Multiply: _joined("Mul"),
    L.Normalization: _normalization,
    L.Rescaling: _rescaling,
    L.Reshape: _reshape,
    L.SpatialDropout2D: _unchanged,
    L.Subtract: _joined("Sub"),
}
_OPERATIONS: dict[str, Rule] = {
    "Add": _binary("Add"),
    "Subtract": _binary("Sub"),
    "Multiply": _binary("Mul"),
    "Divide": _binary("Div"),
    "TrueDivide": _binary("Div"),
    "Cast": _cast,
    **keras_onnx_activations.OPERATIONS,
}
