"""Moving averages: how much of the old value is left, and which decay suits a run."""

from __future__ import annotations

import math
import operator

from frostline.types import ModelError


def suggest_momentum(steps: int, learning_rate_ratio: float = 1.0) -> float:
    """Suggest a Keras momentum for a planned number of training steps.

    An exponential average keeps ``decay**n`` of its old value after n updates. The suggestion is
    the slowest average that has forgotten all but 1% of it by the end::

        decay = 0.01 ** (learning_rate_ratio / steps),   at least 0.5 and at most 0.999

    (Keras' default 0.99 needs 459 steps for that; 70 steps leave 49%.) The variance of the average
    is (1 − decay) / (1 + decay) of that of one batch (Hunter, J. Quality Technology 18, 1986), so a
    slower one is less noisy. The lower bound keeps at least three batches' worth of averaging; it
    is reached at 6 steps, for which :func:`frostline.recalibrate` is the better tool.

    Args:
        steps: Updates that are planned, for example epochs times batches per epoch.
        learning_rate_ratio: Learning rate of the layers below divided by the usual one. With a
            smaller one their outputs move more slowly and the average may be longer in proportion:
            at 0.1 its horizon is ten times as long (63% of the old value is left at the end).

    Returns:
        The share of the old value that one update keeps; 1 minus it is PyTorch's momentum.

    Raises:
        ModelError: Not a positive number of steps or ratio.

    Example:
        >>> round(suggest_momentum(70), 3), suggest_momentum(10**6), suggest_momentum(1)
        (0.936, 0.999, 0.5)
    """
    try:
        count = 0 if isinstance(steps, bool) else operator.index(steps)
    except TypeError:
        count = 0
    if count < 1:
        raise ModelError(f"steps must be a whole number of at least 1. Received: steps={steps!r}")
    if not (math.isfinite(learning_rate_ratio) and learning_rate_ratio > 0):
        raise ModelError(
            "learning_rate_ratio must be a positive number. "
            f"Received: learning_rate_ratio={learning_rate_ratio!r}"
        )
    decay = math.pow(0.01, learning_rate_ratio / count)
    return min(max(decay, 0.5), 0.999)
