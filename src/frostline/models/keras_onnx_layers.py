"""How each kind of Keras layer is written in ONNX; what is not here is refused by name.

Every rule gets the writer and a call and returns the value of the call's output. Channels are on
axis 1 inside of a network of images; a rule that needs Keras' layout asks for ``plain``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from frostline.models.keras_calls import Call, position
from frostline.models.keras_graph import is_site
from frostline.models.keras_onnx import Rule, Value, Writer, factors
from frostline.models.keras_rebuild import float64
from frostline.types import Array, ModelError

L, A = keras.layers, keras.activations


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


def _entry(writer: Writer, call: Call) -> Value:
    return writer.values[call.reads[0]]


def _made(writer: Writer, call: Call, name: str, *, moved: bool = False) -> Value:
    """The value of the call's output."""
    shape = writer.shape(call.writes[0])
    dtype = keras.backend.standardize_dtype(writer.graph.tensors[call.writes[0]].dtype)
    return Value(name=name, shape=shape, dtype=dtype, moved=moved)


def _require_float32(value: Value) -> None:
    if value.dtype != "float32":
        raise ModelError(f"only float32 is exported. Received: {value.dtype}")


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ModelError(reason)


# --- images ---------------------------------------------------------------------------------------


def _images(writer: Writer, value: Value, layer: Any) -> tuple[str, bool]:
    """Name of a batch of images with the channels first, and whether Keras has them last."""
    _require_float32(value)
    last: bool = layer.data_format != "channels_first"
    return (writer.first(value) if last else writer.plain(value)).name, last


def _sizes(value: Value, *, last: bool) -> tuple[int | None, ...]:
    return value.shape[1:-1] if last else value.shape[2:]


def _pads(
    padding: str, sizes: Sequence[int | None], kernel: Sequence[int], strides: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> dict[str, Any]:  # fmt: skip
    """ONNX attributes of a padding; TensorFlow's "same" puts the odd pixel at the end."""
    if padding == "valid":
        return {"pads": [0] * (2 * len(kernel))}
    _require(padding == "same", f"padding must be 'same' or 'valid'. Received: {padding!r}")
    if any(size is None for size in sizes):
        return {"auto_pad": "SAME_UPPER"}
    totals = [
        max((math.ceil(int(n) / s) - 1) * s + (k - 1) * d + 1 - int(n), 0)  # type: ignore[arg-type]
        for n, k, s, d in zip(sizes, kernel, strides, dilation, strict=True)
    ]
    return {"pads": [t // 2 for t in totals] + [t - t // 2 for t in totals]}


def _convolve(
    writer: Writer, call: Call, kernel: Array, bias: Array, groups: int, dilation: Sequence[int]
) -> Value:
    """A convolution with the BN layer behind it, then its activation."""
    layer, value = call.operation, _entry(writer, call)
    name, last = _images(writer, value, layer)
    scale, shift = writer.affine(layer, len(bias))
    size = kernel.shape[2:]
    name = writer.add(
        "Conv",
        [
            name,
            writer.constant(kernel * scale[:, None, None, None]),
            writer.constant(bias * scale + shift),
        ],
        strides=list(layer.strides),
        dilations=list(dilation),
        group=groups,
        kernel_shape=list(size),
        **_pads(layer.padding, _sizes(value, last=last), size, layer.strides, dilation),
    )
    return _activated(writer, layer.activation, _made(writer, call, name, moved=last))


def _bias(layer: Any, count: int) -> Array:
    return np.zeros(count) if layer.bias is None else float64(layer.bias)


def _conv2d(writer: Writer, call: Call) -> Value:
    layer = call.operation
    kernel = float64(layer.kernel).transpose(3, 2, 0, 1)  # (h, w, in, out) -> (out, in, h, w)
    return _convolve(
        writer, call, kernel, _bias(layer, len(kernel)), layer.groups, layer.dilation_rate
    )


def _depthwise_kernel(layer: Any) -> Array:
    kernel = float64(layer.kernel if hasattr(layer, "kernel") else layer.depthwise_kernel)
    height, width, channels, multiplier = kernel.shape
    return kernel.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)


def _depthwise(writer: Writer, call: Call) -> Value:
    layer = call.operation
    kernel = _depthwise_kernel(layer)
    groups = len(kernel) // layer.depth_multiplier
    return _convolve(writer, call, kernel, _bias(layer, len(kernel)), groups, layer.dilation_rate)


def _separable(writer: Writer, call: Call) -> Value:
    layer, value = call.operation, _entry(writer, call)
    name, last = _images(writer, value, layer)
    kernel = _depthwise_kernel(layer)
    size = kernel.shape[2:]
    name = writer.add(
        "Conv",
        [name, writer.constant(kernel)],
        strides=list(layer.strides),
        dilations=list(layer.dilation_rate),
        group=len(kernel) // layer.depth_multiplier,
        kernel_shape=list(size),
        **_pads(layer.padding, _sizes(value, last=last), size, layer.strides, layer.dilation_rate),
    )
    pointwise = float64(layer.pointwise_kernel).transpose(3, 2, 0, 1)
    scale, shift = writer.affine(layer, len(pointwise))
    bias = _bias(layer, len(pointwise)) * scale + shift
    weights = [writer.constant(pointwise * scale[:, None, None, None]), writer.constant(bias)]
    name = writer.add("Conv", [name, *weights], kernel_shape=[1, 1])
    return _activated(writer, layer.activation, _made(writer, call, name, moved=last))


def _pooling(kind: str) -> Rule:
    def rule(writer: Writer, call: Call) -> Value:
        layer, value = call.operation, _entry(writer, call)
        name, last = _images(writer, value, layer)
        size = list(layer.pool_size)
        pads = _pads(layer.padding, _sizes(value, last=last), size, layer.strides)
        even = "pads" in pads and pads["pads"][: len(size)] == pads["pads"][len(size) :]
        _require(
            kind == "MaxPool" or even or keras.backend.backend() != "torch",
            "on torch, where padding is uneven, Keras repeats the border, which the others leave "
            "out of the average",
        )
        name = writer.add(kind, [name], kernel_shape=size, strides=list(layer.strides), **pads)
        return _made(writer, call, name, moved=last)

    return rule


def _global_pooling(kind: str) -> Rule:
    def rule(writer: Writer, call: Call) -> Value:
        layer = call.operation
        name, last = _images(writer, _entry(writer, call), layer)
        name = writer.add(kind, [name])
        if layer.keepdims:
            return _made(writer, call, name, moved=last)
        return _made(writer, call, writer.add("Flatten", [name], axis=1))

    return rule


def _zero_padding(writer: Writer, call: Call) -> Value:
    layer = call.operation
    name, last = _images(writer, _entry(writer, call), layer)
    (top, bottom), (left, right) = layer.padding
    pads = writer.constant([0, 0, top, left, 0, 0, bottom, right], np.int64)
    return _made(writer, call, writer.add("Pad", [name, pads]), moved=last)


# --- channels -------------------------------------------------------------------------------------


def _scaled(writer: Writer, call: Call, scale: Any, shift: Any) -> Value:
    """``x * scale + shift`` along the last axis of Keras' layout."""
    value = _entry(writer, call)
    name = value.name
    if value.dtype != "float32":
        name = writer.add("Cast", [name], to=1)
    name = writer.add("Mul", [name, writer.along(scale, value)])
    name = writer.add("Add", [name, writer.along(shift, value)])
    return _made(writer, call, name, moved=value.moved)


def _site(writer: Writer, call: Call) -> Value:
    layer, value = call.operation, _entry(writer, call)
    _require_float32(value)
    rank = len(value.shape)
    if layer.axis % rank == rank - 1:
        return _scaled(writer, call, *factors(layer))
    _require(layer.axis % rank == 1, f"a BN layer along axis {layer.axis}")
    scale, shift = (each.reshape(-1, *[1] * (rank - 2)) for each in factors(layer))
    name = writer.add("Mul", [writer.plain(value).name, writer.constant(scale)])
    return _made(writer, call, writer.add("Add", [name, writer.constant(shift)]))


def _layer_norm(writer: Writer, call: Call) -> Value:
    """Over the last axis alone, which Keras' layout and ONNX then have in common."""
    layer, value = call.operation, writer.plain(_entry(writer, call))
    _require_float32(value)
    rank = len(value.shape)
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    _require([axis % rank for axis in axes] == [rank - 1], f"layer normalization along {axes}")
    _require(not layer.rms_scaling, "layer normalization with rms_scaling")
    count = value.shape[-1]
    gamma = np.ones(count or 1) if layer.gamma is None else float64(layer.gamma)
    beta = np.zeros(len(gamma)) if layer.beta is None else float64(layer.beta)
    inputs = [value.name, writer.constant(gamma), writer.constant(beta)]
    name = writer.add("LayerNormalization", inputs, axis=-1, epsilon=float(layer.epsilon))
    return _made(writer, call, name)


def _layer_scale(writer: Writer, call: Call) -> Value:
    """ConvNeXt's layer: one factor per channel."""
    value = _entry(writer, call)
    _require_float32(value)
    name = writer.add("Mul", [value.name, writer.along(float64(call.operation.gamma), value)])
    return _made(writer, call, name, moved=value.moved)


def _rescaling(writer: Writer, call: Call) -> Value:
    layer = call.operation
    scale, offset = np.asarray(layer.scale), np.asarray(layer.offset)
    _require(scale.ndim <= 1 and offset.ndim <= 1, "a scale that differs between pixels")
    return _scaled(writer, call, scale, offset)


def _normalization(writer: Writer, call: Call) -> Value:
    layer, rank = call.operation, len(_entry(writer, call).shape)
    _require(layer.axis in ((-1,), (rank - 1,)), f"normalization along axis {layer.axis}")
    mean, variance = float64(layer.mean).reshape(-1), float64(layer.variance).reshape(-1)
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return _scaled(writer, call, deviation, mean)
    return _scaled(writer, call, 1 / deviation, -mean / deviation)


def _dense(writer: Writer, call: Call) -> Value:
    layer, value = call.operation, writer.plain(_entry(writer, call))
    _require_float32(value)
    _require(
        not getattr(layer, "lora_enabled", False) and not getattr(layer, "quantization_mode", None),
        "a Dense layer with LoRA or quantization",
    )
    kernel = float64(layer.kernel)
    scale, shift = writer.affine(layer, kernel.shape[1])
    name = writer.add("MatMul", [value.name, writer.constant(kernel * scale)])
    bias = _bias(layer, kernel.shape[1]) * scale + shift
    name = writer.add("Add", [name, writer.constant(bias)])
    return _activated(writer, layer.activation, _made(writer, call, name))


# --- elementwise ----------------------------------------------------------------------------------


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


def _activated(writer: Writer, function: Any, value: Value) -> Value:
    if function is A.softmax:
        value = writer.plain(value)
        name = writer.add("Softmax", [value.name], axis=-1)
    else:
        known = _FUNCTIONS.get(function)
        if known is None:
            name = getattr(function, "__name__", type(function).__name__)
            raise ModelError(f"no rule for the activation {name!r}")
        _require_float32(value)
        name = known(writer, value.name)
    return Value(name=name, shape=value.shape, dtype=value.dtype, moved=value.moved)


def _activation(writer: Writer, call: Call) -> Value:
    return _activated(writer, call.operation.activation, _entry(writer, call))


def _by_name(kind: str) -> Rule:
    def rule(writer: Writer, call: Call) -> Value:
        return _activated(writer, _BY_NAME[kind], _entry(writer, call))

    return rule


def _relu(writer: Writer, call: Call) -> Value:
    layer, value = call.operation, _entry(writer, call)
    _require_float32(value)
    _require(layer.threshold == 0, "a ReLU with a threshold")
    name = value.name
    if layer.negative_slope:
        name = writer.add("LeakyRelu", [name], alpha=float(layer.negative_slope))
    elif layer.max_value is None:
        name = writer.add("Relu", [name])
    if layer.max_value is not None:
        low = 0.0 if not layer.negative_slope else -3.4e38
        name = _clip(writer, name, low, float(layer.max_value))
    return _made(writer, call, name, moved=value.moved)


def _leaky(writer: Writer, call: Call) -> Value:
    value = _entry(writer, call)
    name = writer.add("LeakyRelu", [value.name], alpha=float(call.operation.negative_slope))
    return _made(writer, call, name, moved=value.moved)


def _softmax(writer: Writer, call: Call) -> Value:
    value = writer.plain(_entry(writer, call))
    axis = call.operation.axis
    _require(isinstance(axis, int), "a softmax over several axes")
    return _made(writer, call, writer.add("Softmax", [value.name], axis=axis))


def _unchanged(writer: Writer, call: Call) -> Value:
    return _entry(writer, call)


# --- joining and reshaping ------------------------------------------------------------------------


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
            _require_float32(value)
        name = values[0].name
        for value in values[1:]:
            name = writer.add(kind, [name, value.name])
        return _made(writer, call, name, moved=values[0].moved)

    return rule


def _read_in_order(call: Call) -> list[int]:
    slots = [position(leaf) for leaf in keras.tree.flatten((call.args, dict(call.kwargs)))]
    return [slot for slot in slots if slot is not None]


def _average(writer: Writer, call: Call) -> Value:
    total = _joined("Add")(writer, call)
    name = writer.add("Mul", [total.name, writer.constant(1 / len(_read_in_order(call)))])
    return _made(writer, call, name, moved=total.moved)


def _binary(kind: str) -> Rule:
    """An arithmetic operation of two tensors, or of a tensor and a number."""

    def rule(writer: Writer, call: Call) -> Value:
        operands = list(call.args)
        _require(len(operands) == 2 and not call.kwargs, "arguments that are not positional")
        slots = [position(operand) for operand in operands]
        values = _aligned(writer, [writer.values[slot] for slot in slots if slot is not None])
        for value in values:
            _require_float32(value)
        rest = iter(values)
        names = []
        for slot, operand in zip(slots, operands, strict=True):
            if slot is None:
                _require(np.ndim(operand) == 0, "an operand that is an array")
            names.append(writer.constant(float(operand)) if slot is None else next(rest).name)
        return _made(writer, call, writer.add(kind, names), moved=values[0].moved)

    return rule


def _concatenate(writer: Writer, call: Call) -> Value:
    values = _aligned(writer, [writer.values[slot] for slot in _read_in_order(call)])
    rank = len(values[0].shape)
    axis = call.operation.axis % rank
    if values[0].moved and rank > 2:
        axis = 1 if axis == rank - 1 else 0 if axis == 0 else axis + 1
    name = writer.add("Concat", [value.name for value in values], axis=axis)
    return _made(writer, call, name, moved=values[0].moved)


def _reshape(writer: Writer, call: Call) -> Value:
    value = writer.plain(_entry(writer, call))
    shape = writer.shape(call.writes[0])[1:]
    _require(all(size is not None for size in shape), "a reshape to a size that is not fixed")
    target = writer.constant([0, *shape], np.int64)  # 0: the batch stays
    return _made(writer, call, writer.add("Reshape", [value.name, target]))


def _flatten(writer: Writer, call: Call) -> Value:
    value = writer.plain(_entry(writer, call))
    return _made(writer, call, writer.add("Flatten", [value.name], axis=1))


def _cast(writer: Writer, call: Call) -> Value:
    value = _entry(writer, call)
    outcome = _made(writer, call, "", moved=value.moved)
    _require(outcome.dtype == "float32", f"a cast to {outcome.dtype}")
    return _made(writer, call, writer.add("Cast", [value.name], to=1), moved=value.moved)


_RULES: dict[type, Rule] = {
    L.Activation: _activation,
    L.Add: _joined("Add"),
    L.Average: _average,
    L.AveragePooling2D: _pooling("AveragePool"),
    L.Concatenate: _concatenate,
    L.Conv2D: _conv2d,
    L.Dense: _dense,
    L.DepthwiseConv2D: _depthwise,
    L.Dropout: _unchanged,
    L.Flatten: _flatten,
    L.GlobalAveragePooling2D: _global_pooling("GlobalAveragePool"),
    L.GlobalMaxPooling2D: _global_pooling("GlobalMaxPool"),
    L.Identity: _unchanged,
    L.LayerNormalization: _layer_norm,
    L.LeakyReLU: _leaky,
    L.MaxPooling2D: _pooling("MaxPool"),
    L.Maximum: _joined("Max"),
    L.Minimum: _joined("Min"),
    L.Multiply: _joined("Mul"),
    L.Normalization: _normalization,
    L.ReLU: _relu,
    L.Rescaling: _rescaling,
    L.Reshape: _reshape,
    L.SeparableConv2D: _separable,
    L.Softmax: _softmax,
    L.SpatialDropout2D: _unchanged,
    L.Subtract: _joined("Sub"),
    L.ZeroPadding2D: _zero_padding,
}
_OPERATIONS: dict[str, Rule] = {
    "Add": _binary("Add"),
    "Subtract": _binary("Sub"),
    "Multiply": _binary("Mul"),
    "Divide": _binary("Div"),
    "TrueDivide": _binary("Div"),
    "Cast": _cast,
    **{kind: _by_name(kind) for kind in _BY_NAME},
}
