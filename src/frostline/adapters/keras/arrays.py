"""Keras tensors and variables as numpy arrays."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from frostline.layers.tensors import to_numpy as to_numpy
from frostline.types import Array


def copied(variable: Any) -> Array:
    """A copy that nothing shares: backends may keep an array without copying it."""
    return np.array(to_numpy(variable))


def float64(tensor: Any) -> Array:
    """A copy in float64; half precision that numpy may lack goes through float32."""
    known = keras.backend.standardize_dtype(tensor.dtype) in ("float16", "float32", "float64")
    values = to_numpy(tensor if known else keras.ops.cast(tensor, "float32"))
    return np.array(values, dtype=np.float64)
