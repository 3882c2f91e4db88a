"""The one formula that mixes stored and batch statistics, for the arrays of any library."""

from __future__ import annotations

from typing import Any


def mixed(blend: Any, stored: Any, batch: Any, library: Any) -> Any:
    """Return ``(1 - λ) stored + λ batch``.

    At λ = 0 or 1 the unused operand is ignored, even if it is NaN; there the result has the bits
    of the operand in use.

    Args:
        blend: λ between 0 and 1: a number, or an array that broadcasts against the statistics.
        stored: Stored means or variances.
        batch: Those of the batch, in the same shape.
        library: Where their ``where`` and ``isfinite`` are: ``numpy``, ``torch``, ``keras.ops``.

    Example:
        >>> import numpy as np
        >>> mixed(0.25, np.array([4.0]), np.array([8.0]), np)
        array([5.])
        >>> mixed(0.0, np.array([4.0]), np.array([np.nan]), np)
        array([4.])
    """
    safe_stored = library.where((blend < 1) | library.isfinite(stored), stored, batch)
    safe_batch = library.where((blend > 0) | library.isfinite(batch), batch, stored)
    return (1 - blend) * safe_stored + blend * safe_batch
