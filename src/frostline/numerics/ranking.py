"""Which of several trainings is best, and whether the numbers show it.

Every training gives a number per sample and seed, on the same samples and with the same seeds, so
that differences are paired. The best one by its mean is a winner only where its lead over *each*
other one has an interval above zero.

References:
    - Welch: The generalization of Student's problem when several different population variances
      are involved. Biometrika 34, 1947. (degrees of freedom of :func:`crossed_interval`)
    - Wilson: Probable inference, the law of succession, and statistical inference. JASA 22, 1927.
    - Dean, Pagano: Evaluating confidence interval methods for binomial proportions in clustered
      surveys. Journal of Survey Statistics and Methodology 3, 2015. (Wilson's interval with an
      effective number of samples and Student's quantile)
    - Agresti, Min: Simple improved confidence intervals for comparing matched proportions.
      Statistics in Medicine 24, 2005.
    - Hsu: Constrained simultaneous confidence intervals for multiple comparisons with the best.
      Annals of Statistics 12, 1984. (why k − 1 comparisons are enough for the one that leads)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    half = _quantile(terms, level) * math.sqrt(total)
    return Interval(mean, mean - half, mean + half, level)


def proportion_interval(hits: Array, *, level: float = 0.95) -> Interval:
    """Wilson's interval of a share of right answers; it never leaves [0, 1].

    All seeds judge the same samples, so these count once, however many seeds there are. What seeds
    differ by adds to the variance and lowers the effective number of samples, and Student's
    quantile with Welch's degrees of freedom takes the place of the normal one. With one seed, or
    seeds that agree in their shares, it is Wilson's interval for the samples.

    Args:
        hits: 1 where an answer is right, else 0, shape ``(seeds, samples)``.
        level: Confidence level.

    Returns:
        The share, and an interval around it that is wider on the side of 1/2.

    Raises:
        DataError: Another shape, no values, or values that are neither 0 nor 1.

    Example:
        >>> found = proportion_interval(np.array([[1, 1, 1, 1, 0]]))
        >>> found.estimate, round(found.low, 3), round(found.high, 3)
        (0.8, 0.376, 0.964)
    """
    hits = as_float64(hits)
    if hits.ndim != 2 or not hits.size or not are_hits(hits):
        raise DataError(
            "hits must be 0 or 1, of shape (seeds, samples). "
            f"Received: shape {hits.shape}, {'other numbers' if hits.size else 'no numbers'}"
        )
    share, (seeds, samples) = float(hits.mean()), hits.shape
    by_samples = share * (1 - share) / samples
    by_seeds = float(hits.mean(1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    total = by_samples + by_seeds
    quantile = _quantile([(by_samples, math.inf), (by_seeds, seeds - 1)], level)
    part = quantile**2 * (total / by_samples if by_samples else 1.0) / samples
    middle = (share + part / 2) / (1 + part)
    half = math.sqrt(part * share * (1 - share) + part**2 / 4) / (1 + part)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), level)


def are_hits(values: Array) -> bool:
    """Whether all of these numbers are 0 or 1: right answers and wrong ones."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def _difference_of_hits(better: Array, other: Array, *, level: float) -> Interval:
    """Interval of the difference of two shares of right answers on the same samples, in [-1, 1].

    Agresti and Min add half a sample to each of the four cells (both right, one right, the other
    one, none), so that few samples that all speak for one side are not taken for certainty.
    Student's quantile, and the spread over the seeds beside that over the samples.
    """
    difference = better - other
    (seeds, samples), estimate = difference.shape, float(difference.mean())
    if samples == 1:
        return Interval(estimate, -1.0, 1.0, level)
    count = samples + 2
    middle = float(difference.mean(0).sum()) / count
    squares = float(np.square(difference.mean(0)).sum()) + 1
    by_samples = (squares / count - middle**2) / count
    by_seeds = float(difference.mean(1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    quantile = _quantile([(by_samples, samples - 1), (by_seeds, seeds - 1)], level)
    half = quantile * math.sqrt(by_samples + by_seeds)
    return Interval(estimate, max(-1.0, middle - half), min(1.0, middle + half), level)


def _quantile(terms: Sequence[tuple[float, float]], level: float) -> float:
    """Two-sided quantile of Student for a sum of variances with their degrees of freedom."""
    from scipy.special import ndtri, stdtrit

    uncertain = sum(variance**2 / freedom for variance, freedom in terms if variance)
    if not uncertain:
        return float(ndtri((1 + level) / 2))
    freedom = sum(variance for variance, _ in terms) ** 2 / uncertain
    return float(stdtrit(freedom, (1 + level) / 2))


def lead(better: Array, other: Array, *, higher: bool, comparisons: int, level: float) -> Interval:
    """By how much one training is ahead of another, positive for better.

    Right and wrong answers (0 and 1) have an interval that suits them and lies in [-1, 1]; other
    numbers have that of :func:`crossed_interval`.

    Args:
        better: Shape ``(seeds, samples)``.
        other: Of the same samples; where it has fewer seeds, of the first ones.
        higher: Whether more is better.
        comparisons: Among how many comparisons this is one.
        level: Confidence level of all of them together.
    """
    count = min(len(better), len(other))
    better, other = as_float64(better)[:count], as_float64(other)[:count]
    if not higher:
        better, other = other, better
    each = 1 - (1 - level) / max(comparisons, 1)
    if better.ndim == 2 and better.size and are_hits(better) and are_hits(other):
        return _difference_of_hits(better, other, level=each)
    return crossed_interval(better - other, level=each)


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
