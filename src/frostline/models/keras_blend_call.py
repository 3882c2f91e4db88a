"""One call of one BN layer with blended statistics in the place of the stored ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from frostline.layers import BatchNormalization
from frostline.types import ModelError

#: Calls that do nothing but normalise; of any other, the layer's own call is run.
_KNOWN_CALLS = (keras.layers.BatchNormalization.call, BatchNormalization.call)


def blended_call(
    layer: Any,
    call: Callable[..., Any],
    blend: Any,
    stored: tuple[Any, Any],
    seen: list[Any] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The layer's output for these inputs, normalised with blended statistics."""
    inputs, mask, bound = _arguments(layer, call, args, kwargs)
    # Half precision overflows in the variance: compute in float32 at least, as the stock layer.
    x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
    batch = _batch_statistics(layer, x, mask)
    if seen is not None:
        seen.append((_count(layer, x, mask), *batch))
    weight = ops.cast(blend, x.dtype)
    mean, variance = (
        _mixed(weight, ops.cast(old, x.dtype), new) for old, new in zip(stored, batch, strict=True)
    )
    if getattr(call, "__func__", None) not in _KNOWN_CALLS:
        return _own_call(layer, call, bound, mean, variance)
    outputs = ops.batch_normalization(
        x=x,
        mean=mean,
        variance=variance,
        axis=layer.axis,
        offset=None if layer.beta is None else ops.cast(layer.beta, x.dtype),
        scale=None if layer.gamma is None else ops.cast(layer.gamma, x.dtype),
        epsilon=layer.epsilon,
    )
    return ops.cast(outputs, layer.compute_dtype)


def stored_call(layer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The layer's output in inference, whatever phase the model runs in."""
    _, _, bound = _arguments(layer, call, args, kwargs)
    return call(*bound.args, **bound.kwargs)


def _own_call(
    layer: Any, call: Callable[..., Any], bound: inspect.BoundArguments, mean: Any, variance: Any
) -> Any:
    """Run a ``call`` that Frostline does not know on statistics that are not the layer's own."""
    statistics = (layer.moving_mean, layer.moving_variance)
    stored = [variable.value for variable in statistics]
    before = vars(layer).get("_moments")
    try:
        for variable, value in zip(statistics, (mean, variance), strict=True):
            variable.assign(value)  # seen in the StatelessScope around the pass only
        # For a `call` that insists on training mode.
        vars(layer)["_moments"] = lambda *_, **__: (mean, variance)
        return call(*bound.args, **bound.kwargs)
    finally:
        vars(layer).pop("_moments", None)
        if before is not None:
            vars(layer)["_moments"] = before
        for variable, value in zip(statistics, stored, strict=True):
            variable.assign(value)


def _arguments(
    layer: Any, call: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Any, Any, inspect.BoundArguments]:
    """Inputs and mask of a call of a BN layer, and its arguments with ``training`` off."""
    bound = inspect.signature(call).bind(*args, **kwargs)
    if "training" in inspect.signature(call).parameters:
        bound.arguments["training"] = False
    elif "training" in bound.kwargs:
        bound.arguments["kwargs"]["training"] = False
    named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    inputs, mask = next(iter(bound.args or bound.kwargs.values())), named.get("mask")
    if mask is not None and len(mask.shape) != len(inputs.shape) - 1:
        raise ValueError(
            f"Layer '{layer.name}': the mask must have one dimension less than the inputs. "
            f"Received: mask.shape={mask.shape}, inputs.shape={inputs.shape}"
        )
    return inputs, mask, bound


def _mixed(weight: Any, stored: Any, batch: Any) -> Any:
    """``(1 - λ) stored + λ batch``, where a share of nothing counts nothing, even of NaN."""
    safe_batch = ops.where(ops.logical_or(weight > 0, ops.isfinite(batch)), batch, stored)
    safe_stored = ops.where(ops.logical_or(weight < 1, ops.isfinite(stored)), stored, batch)
    return (1 - weight) * safe_stored + weight * safe_batch


def _batch_statistics(layer: Any, x: Any, mask: Any) -> tuple[Any, Any]:
    shape = layer.moving_mean.shape
    if mask is not None:
        mean, variance = keras.layers.BatchNormalization._moments(layer, x, mask)
        return ops.reshape(mean, shape), ops.reshape(variance, shape)
    axes = _reduced(layer, x)
    # Around a value near the mean: neither E[x²] − E[x]² nor a float32 sum of large values is right
    # where the mean is far larger than the standard deviation.
    shift = ops.stop_gradient(ops.mean(x[:1], axis=axes, keepdims=True))
    deviations = x - shift
    offset = ops.mean(deviations, axis=axes, keepdims=True)
    variance = ops.mean(ops.square(deviations - offset), axis=axes)
    return ops.reshape(shift + offset, shape), variance


def _count(layer: Any, x: Any, mask: Any) -> Any:
    """Values per channel."""
    if mask is None:
        whole = np.prod([x.shape[axis] for axis in _reduced(layer, x)], dtype=np.int64)
        return ops.convert_to_tensor(int(whole), "int32")
    if layer.axis % len(x.shape) != len(x.shape) - 1:
        raise ModelError(
            "the moments of a masked BN layer can be recorded only with the channels on the last "
            f"axis. Received: axis={layer.axis} at layer '{layer.name}'"
        )
    return ops.sum(ops.cast(ops.broadcast_to(mask, x.shape[:-1]), "int32"))


def _reduced(layer: Any, x: Any) -> list[int]:
    rank = len(x.shape)
    return [axis for axis in range(rank) if axis != layer.axis % rank]
