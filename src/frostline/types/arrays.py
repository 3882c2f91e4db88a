"""The array type of all nouns, and the dtype of all statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def as_float64(values: Any) -> npt.NDArray[np.float64]:
    """Return ``values`` as a float64 array; the dtype that all statistics are computed in."""
    return np.asarray(values, dtype=np.float64)
