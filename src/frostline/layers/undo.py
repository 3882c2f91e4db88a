"""Put layers and models back as they were when a change of them fails half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from frostline.atomic import Attributes, restored
from frostline.layers.tensors import to_numpy


def remembered(owners: Iterable[Any], variables: Iterable[Any]) -> Callable[[], None]:
    """Remember some objects, bit for bit; returns what puts them back and can be repeated.

    Args:
        owners: Layers and models whose class and attributes may change.
        variables: Variables whose values, flags and regularizers may change.
    """
    kept = [Attributes.of(owner) for owner in owners]
    marks = [(v, v.trainable, getattr(v, "regularizer", None)) for v in variables]
    values = [
        (variable, np.array(to_numpy(variable)))
        for variable, _, _ in marks
        if getattr(variable, "_value", True) is not None  # inside a running fit() of JAX
    ]

    def back() -> None:
        restored(kept)
        for variable, trainable, regularizer in marks:
            if variable.trainable != trainable:
                variable.trainable = trainable
            if getattr(variable, "regularizer", None) is not regularizer:
                variable.regularizer = regularizer
        for variable, value in values:
            if to_numpy(variable).tobytes() != value.tobytes():
                variable.assign(value)

    return back
