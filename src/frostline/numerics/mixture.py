"""Mean and variance of several populations together, from those of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frostline.numerics.stats import Float64
from frostline.types import Array, DataError, as_float64


def shares(weights: Sequence[float] | None, count: int) -> Float64:
    """Weights of ``count`` populations as shares that add up to 1; ``None``: equal ones.

    Raises:
        DataError: Not one finite weight of at least 0 for each, or all of them 0.
    """
    given = np.ones(count) if weights is None else as_float64(np.asarray(weights))
    usable = given.shape == (count,) and np.isfinite(given).all() and (given >= 0).all()
    if not usable or not given.sum() > 0:
        raise DataError(
            f"weights must be {count} finite numbers, one for each, none negative and not all 0. "
            f"Received: weights={weights!r}"
        )
    return as_float64(given / given.sum())


def mixture(
    means: Sequence[Array], variances: Sequence[Array], share: Float64
) -> tuple[Float64, Float64]:
    """Mean and variance of a mixture: ``Σ sᵢ mᵢ`` and ``Σ sᵢ (vᵢ + (mᵢ − mean)²)``, float64.

    Args:
        means: One array per population, all of one shape.
        variances: The same of their variances.
        share: Shape ``(populations,)``; adds up to 1.

    Example:
        >>> mixture([np.zeros(1), np.full(1, 2.0)], [np.ones(1), np.ones(1)], np.full(2, 0.5))
        (array([1.]), array([2.]))
    """
    stacked, spread = as_float64(np.stack(means)), as_float64(np.stack(variances))
    mean = np.tensordot(share, stacked, 1)
    return mean, np.tensordot(share, spread + np.square(stacked - mean), 1)
