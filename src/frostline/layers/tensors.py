"""Values of variables in eager code and in steps that are being traced, on three backends."""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
from keras import ops

from frostline.types import Array


def traced(variable: Any) -> Any:
    """Return the variable's tensor inside a step that is being traced, else ``None``.

    Eager code reads Python attributes: they cost nothing and are always current.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return None if tf.executing_eagerly() else read(variable)
    if backend == "jax":
        import jax

        value = variable.value
        return value if isinstance(value, jax.core.Tracer) else None
    return None


def select(live: Any, when_live: Any, when_frozen: Any) -> Any:
    """Choose between two values of one shape by a bool or by a scalar bool tensor."""
    if isinstance(live, bool):
        return when_live if live else when_frozen
    return ops.where(live, when_live, when_frozen)


def move(variable: Any, value: Any, update: Any) -> None:
    """Assign ``value`` where ``update`` holds; otherwise the variable keeps its bits."""
    if update is False:
        return
    value = ops.cast(value, variable.dtype)
    variable.assign(value if update is True else ops.where(update, value, read(variable)))


def read(variable: Any, dtype: Any = None) -> Any:
    """Return the variable's present value; TensorFlow would pass on the variable itself."""
    value = variable.value if dtype is None else ops.cast(variable.value, dtype)
    return value.read_value() if hasattr(value, "read_value") else value


def to_numpy(tensor: Any) -> Array:
    """The values of a tensor or variable, which the array may share; not to be written to.

    Keras takes ten times as long for a torch tensor, and a network has thousands of them.
    """
    if keras.backend.backend() == "torch":
        torch = sys.modules["torch"]
        held = tensor.value if isinstance(tensor, keras.Variable) else tensor
        if (
            type(held) in (torch.Tensor, torch.nn.Parameter)
            and held.is_cpu
            and held.dtype in (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)
            and held.layout is torch.strided
            and not held.is_neg()
        ):
            array: Array = held.detach().numpy()
            return array
    return np.asarray(ops.convert_to_numpy(tensor))


def copy_of(variable: Any) -> Any:
    """Return the value in a buffer of its own: JAX donates buffers, so none may be shared."""
    return ops.multiply(variable.value, ops.ones((), dtype=variable.dtype))


def values_per_channel(x: Any, mask: Any, axes: list[int]) -> Any:
    """Return how many values each channel's moments are of, masked steps left out."""
    if mask is not None:
        inner = ops.size(x) / (ops.size(mask) * ops.shape(x)[-1])
        return ops.cast(ops.sum(ops.cast(mask, "float32")) * inner, x.dtype)
    shape = ops.shape(x)
    count: Any = 1
    for axis in axes:
        count = count * shape[axis]
    return float(count) if isinstance(count, int) else ops.cast(count, x.dtype)
