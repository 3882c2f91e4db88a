"""How Keras' layers of images are written in ONNX: convolutions, pooling, padding.

Images have the channels on axis 1 here; a BN layer behind a convolution is already in its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import float64
from frostline.adapters.keras.calls import Call
from frostline.adapters.keras.onnx.activations import activated
from frostline.adapters.keras.onnx.writer import Rule, Rules, Value, Writer, require
from frostline.types import Array

L = keras.layers


def _images(writer: Writer, value: Value, layer: Any) -> tuple[str, bool]:
    """Name of a batch of images with the channels first, and whether Keras has them last."""
    value.require_float32()
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
    require(padding == "same", f"padding must be 'same' or 'valid'. Received: {padding!r}")
    if any(size is None for size in sizes):
        return {"auto_pad": "SAME_UPPER"}
    totals = [
        max((math.ceil(int(n) / s) - 1) * s + (k - 1) * d + 1 - int(n), 0)  # type: ignore[arg-type]
        for n, k, s, d in zip(sizes, kernel, strides, dilation, strict=True)
    ]
    return {"pads": [t // 2 for t in totals] + [t - t // 2 for t in totals]}


def _convolved(
    writer: Writer, call: Call, kernel: Array, groups: int, bias: Sequence[str] = ()
) -> tuple[str, bool]:
    """Name of the output of a convolution as its layer has it, and whether Keras has it last."""
    layer, value = call.operation, writer.entry(call)
    name, last = _images(writer, value, layer)
    size, dilation = kernel.shape[2:], layer.dilation_rate
    name = writer.add(
        "Conv",
        [name, writer.constant(kernel), *bias],
        strides=list(layer.strides),
        dilations=list(dilation),
        group=groups,
        kernel_shape=list(size),
        **_pads(layer.padding, _sizes(value, last=last), size, layer.strides, dilation),
    )
    return name, last


def _whole(writer: Writer, call: Call, kernel: Array, groups: int) -> Value:
    """A convolution with the BN layer behind it, then its activation."""
    scale, bias = writer.affine(call.operation, len(kernel))
    kernel = kernel * scale[:, None, None, None]
    name, last = _convolved(writer, call, kernel, groups, [writer.constant(bias)])
    return activated(writer, call.operation.activation, writer.made(call, name, moved=last))


def _conv2d(writer: Writer, call: Call) -> Value:
    layer = call.operation
    kernel = float64(layer.kernel).transpose(3, 2, 0, 1)  # (h, w, in, out) -> (out, in, h, w)
    return _whole(writer, call, kernel, layer.groups)


def _depthwise_kernel(layer: Any) -> Array:
    kernel = float64(layer.kernel if hasattr(layer, "kernel") else layer.depthwise_kernel)
    height, width, channels, multiplier = kernel.shape
    return kernel.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)


def _depthwise(writer: Writer, call: Call) -> Value:
    kernel = _depthwise_kernel(call.operation)
    return _whole(writer, call, kernel, len(kernel) // call.operation.depth_multiplier)


def _separable(writer: Writer, call: Call) -> Value:
    layer = call.operation
    kernel = _depthwise_kernel(layer)
    name, last = _convolved(writer, call, kernel, len(kernel) // layer.depth_multiplier)
    pointwise = float64(layer.pointwise_kernel).transpose(3, 2, 0, 1)
    scale, bias = writer.affine(layer, len(pointwise))
    weights = [writer.constant(pointwise * scale[:, None, None, None]), writer.constant(bias)]
    name = writer.add("Conv", [name, *weights], kernel_shape=[1, 1])
    return activated(writer, layer.activation, writer.made(call, name, moved=last))


def _pooling(kind: str) -> Rule:
    def rule(writer: Writer, call: Call) -> Value:
        layer, value = call.operation, writer.entry(call)
        name, last = _images(writer, value, layer)
        size = list(layer.pool_size)
        pads = _pads(layer.padding, _sizes(value, last=last), size, layer.strides)
        even = "pads" in pads and pads["pads"][: len(size)] == pads["pads"][len(size) :]
        require(
            kind == "MaxPool" or even or keras.backend.backend() != "torch",
            "on torch, where padding is uneven, Keras repeats the border, which the others leave "
            "out of the average",
        )
        name = writer.add(kind, [name], kernel_shape=size, strides=list(layer.strides), **pads)
        return writer.made(call, name, moved=last)

    return rule


def _global_pooling(kind: str) -> Rule:
    def rule(writer: Writer, call: Call) -> Value:
        layer = call.operation
        name, last = _images(writer, writer.entry(call), layer)
        name = writer.add(kind, [name])
        if layer.keepdims:
            return writer.made(call, name, moved=last)
        return writer.made(call, writer.add("Flatten", [name], axis=1))

    return rule


def _zero_padding(writer: Writer, call: Call) -> Value:
    layer = call.operation
    name, last = _images(writer, writer.entry(call), layer)
    (top, bottom), (left, right) = layer.padding
    pads = writer.constant([0, 0, top, left, 0, 0, bottom, right], np.int64)
    return writer.made(call, writer.add("Pad", [name, pads]), moved=last)


RULES: Rules = {
    L.AveragePooling2D: _pooling("AveragePool"),
    L.Conv2D: _conv2d,
    L.DepthwiseConv2D: _depthwise,
    L.GlobalAveragePooling2D: _global_pooling("GlobalAveragePool"),
    L.GlobalMaxPooling2D: _global_pooling("GlobalMaxPool"),
    L.MaxPooling2D: _pooling("MaxPool"),
    L.SeparableConv2D: _separable,
    L.ZeroPadding2D: _zero_padding,
}
