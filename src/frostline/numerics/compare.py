"""How far two sets of arrays are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frostline.types import Array, as_float64


def relative_difference(
    found: Sequence[Array], expected: Sequence[Array], *, finite_only: bool = False
) -> float:
    """Largest difference as a share of the largest expected value; the worst array counts.

    Args:
        found: Arrays of any shapes.
        expected: Arrays to compare them with.
        finite_only: Compare only values that are finite on both sides. Otherwise values that are
            not finite must be the same ones on both sides.

    Returns:
        The share; infinite where shapes or non-finite values differ, or where all expected values
        are 0 and the others are not; NaN where ``finite_only`` leaves nothing to compare.

    Example:
        >>> relative_difference([np.array([1.0, -4.2])], [np.array([1.0, -4.0])])
        0.050000000000000044
    """
    if [np.shape(array) for array in found] != [np.shape(array) for array in expected]:
        return float("inf")
    differences = []
    for have, want in zip(map(as_float64, found), map(as_float64, expected), strict=True):
        finite = np.isfinite(want)
        if finite_only:
            finite &= np.isfinite(have)
            if not finite.any():
                continue
        elif not (
            np.array_equal(finite, np.isfinite(have))
            and np.array_equal(want[~finite], have[~finite], equal_nan=True)
        ):
            return float("inf")
        difference = float(np.abs(have[finite] - want[finite]).max(initial=0.0))
        largest = float(np.abs(want[finite]).max(initial=0.0))
        if difference:
            difference = difference / largest if largest else float("inf")
        differences.append(difference)
    return max(differences, default=float("nan") if finite_only else 0.0)
