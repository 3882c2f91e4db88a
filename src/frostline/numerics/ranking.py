"""Which of several trainings is best, and whether the numbers show it.

Every training gives a number per sample and seed, on the same samples and with the same seeds, so
that differences are paired. The best one by its mean is a winner only where its lead over *each*
other one has an interval above zero.

References:
    - Welch: The generalization of Student's problem when several different population variances
      are involved. Biometrika 34, 1947. (degrees of freedom of :func:`crossed_interval`)
    - Hsu: Constrained simultaneous confidence intervals for multiple comparisons with the best.
      Annals of Statistics 12, 1984. (why k − 1 comparisons are enough for the one that leads)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from frostline.types import Array, DataError, as_float64
from frostline.types.measured import Interval


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How several trainings stand.

    Attributes:
        order: Their names, the best mean first; what is not finite comes last.
        leads: Name -> lead of the first one over it, at a level that holds for all of them
            together (Bonferroni). Positive is better, whichever way the metric goes.
        winner: The first one, where every lead is certain; ``None``: the intervals show none.
        tied: Names whose distance from the first one is not certain.
    """

    order: tuple[str, ...]
    leads: Mapping[str, Interval]
    winner: str | None
    tied: tuple[str, ...]


def crossed_interval(values: Array, *, level: float = 0.95) -> Interval:
    """Student's interval of the mean of values that have both a sample and a seed.

    Samples and seeds are both drawn, so both kinds of variance count::

        se² = var(means of the samples) / samples + var(means of the seeds) / seeds

    with Welch's degrees of freedom. With one seed only the first term is known, and the interval is
    that of ``scipy.stats.ttest_1samp``: it says nothing of other seeds.

    Args:
        values: Shape ``(seeds, samples)``.
        level: Confidence level.

    Returns:
        The mean and its interval; infinite ends with a single sample.

    Raises:
        DataError: Another shape, or no values.
    """
    values = as_float64(values)
    if values.ndim != 2 or not values.size:
        raise DataError(f"values must have shape (seeds, samples). Received: {values.shape}")
    mean = float(values.mean())
    if not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan, level)
    if values.shape[1] == 1:
        return Interval(mean, -math.inf, math.inf, level)
    terms = [
        (float(means.var(ddof=1)) / len(means), len(means) - 1)
        for means in (values.mean(0), values.mean(1))
        if len(means) > 1
    ]
    total = sum(variance for variance, _ in terms)
    if not total:
        return Interval(mean, mean, mean, level)
    freedom = total**2 / sum(variance**2 / count for variance, count in terms)
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, (1 + level) / 2)) * math.sqrt(total)
    return Interval(mean, mean - half, mean + half, level)


def lead(better: Array, other: Array, *, higher: bool, comparisons: int, level: float) -> Interval:
    """By how much one training is ahead of another, positive for better.

    Args:
        better: Shape ``(seeds, samples)``.
        other: Of the same samples; where it has fewer seeds, of the first ones.
        higher: Whether more is better.
        comparisons: Among how many comparisons this is one.
        level: Confidence level of all of them together.
    """
    count = min(len(better), len(other))
    difference = as_float64(better)[:count] - as_float64(other)[:count]
    each = 1 - (1 - level) / max(comparisons, 1)
    return crossed_interval(difference if higher else -difference, level=each)


def standing(values: Mapping[str, Array], *, higher: bool, level: float = 0.95) -> Standing:
    """Rank trainings, and say whether there is a winner.

    Args:
        values: Name -> numbers of its last epoch, shape ``(seeds, samples)``.
        higher: Whether more is better.
        level: Confidence level of all statements together.

    Raises:
        DataError: Nothing to rank.
    """
    if not values:
        raise DataError("there is no training to rank. Received: none")
    sign = 1.0 if higher else -1.0

    def worth(name: str) -> float:
        mean = sign * float(as_float64(values[name]).mean())
        return mean if math.isfinite(mean) else -math.inf

    order = tuple(sorted(values, key=worth, reverse=True))
    first, others = order[0], order[1:]
    leads = {
        name: lead(values[first], values[name], higher=higher, comparisons=len(others), level=level)
        for name in others
    }
    if worth(first) == -math.inf:
        return Standing(order=order, leads=leads, winner=None, tied=others)
    sound = [name for name in others if np.isfinite(worth(name))]
    tied = tuple(name for name in sound if not leads[name].low > 0)
    winner = first if others and not tied else None
    return Standing(order=order, leads=leads, winner=winner, tied=tied)
