"""Moments, ranks, intervals and quadrature in numpy, float64 throughout.

References:
    - Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample
      variances. COMPSTAT 1982. (:meth:`Moments.merge`)
    - Hanley, McNeil: The meaning and use of the area under a ROC curve. Radiology 143, 1982.
      (:func:`auc`)
    - Efron, Tibshirani: An introduction to the bootstrap, chapter 13. 1993.
      (:func:`paired_bootstrap`)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from frostline.types import Array, DataError, as_float64
from frostline.types.measured import Interval

Float64 = npt.NDArray[np.float64]

#: Probabilities are kept this far from 0 and 1 before the logarithm, as Keras does.
PROBABILITY_FLOOR = 1e-7

#: Numbers that are drawn or searched for at a time: 2 MiB of float64.
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations per channel, which add up over batches.

    Attributes:
        count: Values per channel.
        mean: Shape ``(channels,)``; 0 while ``count`` is 0.
        m2: Sum of squared deviations from the mean, shape ``(channels,)``.

    Example:
        >>> whole = np.arange(12.0).reshape(6, 2)
        >>> parts = Moments.of(whole[:1]).merge(Moments.of(whole[1:]))
        >>> parts.mean, parts.variance
        (array([5., 6.]), array([11.66666667, 11.66666667]))
    """

    count: int
    mean: Float64
    m2: Float64

    @classmethod
    def of(cls, values: Array, axis: int = -1) -> Moments:
        """Moments of one array over all axes but the channel axis.

        Two passes in float64, with the rounding of the first corrected in the second, so that
        channels with ``|mean| >> std`` stay right (E[x²] − E[x]² would cancel).

        Args:
            values: Any shape with at least one axis.
            axis: The channel axis.
        """
        values = np.asarray(values)
        if values.ndim == 0:
            raise DataError("values must have a channel axis. Received: a single number")
        channels_last = np.moveaxis(values, axis, -1)
        flat = as_float64(channels_last).reshape(-1, channels_last.shape[-1])
        count = len(flat)
        if count == 0:
            zeros = np.zeros(flat.shape[-1])
            return cls(0, zeros, zeros)
        with np.errstate(invalid="ignore", over="ignore"):  # `finite` tells, the caller decides
            mean = flat.mean(axis=0)
            deviations = flat - mean
            residual = deviations.sum(axis=0)
            m2 = np.square(deviations).sum(axis=0) - np.square(residual) / count
        return cls(count, mean + residual / count, np.maximum(m2, 0.0))

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan's formula); weights them by their counts."""
        if self.mean.shape != other.mean.shape:
            raise DataError(
                "Moments of different channels cannot be merged. "
                f"Received: {self.mean.shape} and {other.mean.shape}"
            )
        count = self.count + other.count
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        delta = other.mean - self.mean
        share = other.count / count
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + np.square(delta) * (self.count * share),
        )

    @property
    def variance(self) -> Float64:
        """Biased variance (divided by ``count``), which is what BN normalises with."""
        return self.m2 / self.count if self.count else np.full_like(self.m2, np.nan)

    @property
    def finite(self) -> bool:
        """Whether all numbers are finite; statistics that are not are never stored."""
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.m2).all())


def ranks(values: Array) -> Float64:
    """Ranks from 1, ties share their mean rank.

    Example:
        >>> ranks(np.array([3, 1, 3]))
        array([2.5, 1. , 2.5])
    """
    flat = np.ravel(values)
    ordered = np.sort(flat)
    found = np.empty(len(flat))
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        first, last = (np.searchsorted(ordered, part, side) for side in ("left", "right"))
        found[start : start + _CHUNK] = (first + last + 1) / 2
    return found


def auc(labels: Array, scores: Array) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative.

    AUC = U / (n₊ n₋), with Mann and Whitney's U; ties count one half.

    Args:
        labels: 0 or 1, shape ``(n,)``.
        scores: Any monotone score of class 1, shape ``(n,)``.

    Returns:
        Between 0 and 1; NaN when a class is missing or a score is NaN.
    """
    positive, scores = _same_length(labels, scores)
    chosen = positive > 0.5
    if np.isnan(scores).any():
        return float("nan")
    return auc_of_sorted(np.sort(scores[chosen]), np.sort(scores[~chosen]))


def auc_of_sorted(positive: Array, negative: Array) -> float:
    """The same of the scores of each class in order, none of them NaN; NaN where a class is empty.

    U is counted, not added up from ranks: for each positive, the negatives below it and half of
    those that equal it.
    """
    if not len(positive) or not len(negative):
        return float("nan")
    twice = 0
    for start in range(0, len(positive), _CHUNK):
        part = positive[start : start + _CHUNK]
        for side in ("left", "right"):
            twice += int(np.searchsorted(negative, part, side).sum())
    return twice / 2 / (len(positive) * len(negative))


def spearman(a: Array, b: Array) -> float:
    """Spearman's rank correlation: Pearson's correlation of the ranks, ties at mean ranks.

    Args:
        a: Shape ``(n,)``.
        b: Shape ``(n,)``.

    Returns:
        Between −1 and 1; NaN when either is constant or has a NaN.
    """
    a, b = _same_length(a, b)
    if np.isnan(a).any() or np.isnan(b).any():
        return float("nan")
    rank_a, rank_b = ranks(a), ranks(b)
    rank_a -= rank_a.mean()
    rank_b -= rank_b.mean()
    scale = np.sqrt(np.square(rank_a).sum() * np.square(rank_b).sum())
    return float(np.clip((rank_a * rank_b).sum() / scale, -1, 1)) if scale > 0 else float("nan")


def accuracy(labels: Array, predictions: Array) -> float:
    """Share of predictions that equal their label; both of shape ``(n,)``."""
    labels, predictions = _same_length(labels, predictions)
    return float((labels == predictions).mean())


def mse(targets: Array, predictions: Array) -> float:
    """Mean squared error over all samples and columns; both of shape ``(n, ...)``."""
    targets, predictions = as_float64(targets), as_float64(predictions)
    if targets.shape != predictions.shape:
        raise DataError(
            "targets and predictions must have one shape. "
            f"Received: {targets.shape} and {predictions.shape}"
        )
    return float(np.square(targets - predictions).mean())


def cross_entropy(labels: Array, outputs: Array, *, from_logits: bool = False) -> Float64:
    """Cross-entropy of each sample, in nats.

    Args:
        labels: Class indices, shape ``(n,)``.
        outputs: Shape ``(n,)`` for one output per sample (sigmoid), or ``(n, classes)`` (softmax).
        from_logits: Whether the outputs come before the sigmoid or softmax.

    Returns:
        Shape ``(n,)``. Probabilities are clipped to [1e-7, 1 − 1e-7] first, as in Keras.
    """
    outputs = as_float64(outputs)
    labels = np.asarray(labels).reshape(-1)
    if outputs.ndim not in (1, 2) or len(outputs) != len(labels):
        raise DataError(
            "outputs must be (n,) or (n, classes), with n labels. "
            f"Received: {outputs.shape} and {labels.shape}"
        )
    if outputs.ndim == 1:
        if from_logits:
            return as_float64(np.logaddexp(0.0, np.where(labels > 0.5, -outputs, outputs)))
        chosen = np.where(labels > 0.5, outputs, 1 - outputs)
    else:
        indices = labels.astype(np.int64)[:, None]
        if from_logits:
            top = outputs.max(axis=1)
            total = top + np.log(np.exp(outputs - top[:, None]).sum(axis=1))
            return as_float64(total - np.take_along_axis(outputs, indices, axis=1)[:, 0])
        outputs = outputs / outputs.sum(axis=1, keepdims=True)
        chosen = np.take_along_axis(outputs, indices, axis=1)[:, 0]
    return as_float64(-np.log(np.clip(chosen, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)))


def paired_bootstrap(
    a: Array, b: Array, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Expanded percentile bootstrap interval of ``mean(a − b)`` over paired samples.

    Percentiles of few samples are too close: those taken are at ``Φ(−√(n/(n − 1))·t)`` and its
    complement, with Student's t of n − 1 degrees of freedom at this level in the place of ±1.96
    (Hesterberg 2015, section 4.4.1). One sample tells nothing: its interval is infinite.

    Args:
        a: One value per sample, shape ``(n,)``, for example its loss in phase 1.
        b: The same samples, for example in phase 0.
        seed: Of the resampling; global random state is not touched.
        resamples: Number of bootstrap samples.
        level: Confidence level, between 0 and 1.

    Returns:
        The mean difference and its interval.

    Raises:
        DataError: No samples, different lengths, or values out of range.
    """
    a, b = _same_length(a, b)
    if resamples < 1 or not 0 < level < 1:
        raise DataError(
            "resamples must be at least 1 and level between 0 and 1. "
            f"Received: resamples={resamples}, level={level}"
        )
    return bootstrap(a - b, seed=seed, resamples=resamples, level=level)


def sure_difference(a: Array | None, b: Array | None, *, seed: int) -> float:
    """``mean(a − b)`` over paired samples; 0 where its interval holds 0, or one is not known."""
    if a is None or b is None or a.shape != b.shape:
        return 0.0
    interval = paired_bootstrap(a, b, seed=seed)
    return interval.estimate if interval.excludes_zero else 0.0


def bootstrap(values: Array, *, seed: int, resamples: int = 2000, level: float = 0.95) -> Interval:
    """The interval of :func:`paired_bootstrap` from differences, shape ``(n,)`` with n >= 1."""
    count = len(values)
    if count == 1:
        return Interval(float(values[0]), -math.inf, math.inf, level)
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    means = np.empty(resamples)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        total: Any = 0.0
        for first in range(0, count, _CHUNK):  # of one row where there is more than one
            drawn = rng.integers(count, size=(rows, min(_CHUNK, count - first)))
            total = total + values[drawn].sum(1, dtype=np.float64)
        means[start : start + rows] = total / count
    from scipy.special import ndtr, stdtrit

    tail = float(ndtr(math.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - level) / 2)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high), level)


def gauss_legendre(nodes: int) -> tuple[Float64, Float64]:
    """Nodes and weights of Gauss–Legendre quadrature on [0, 1].

    Exact for polynomials up to degree ``2·nodes − 1``; the weights add up to 1.

    Example:
        >>> t, weight = gauss_legendre(2)
        >>> round(float(weight @ t**3), 12)
        0.25
    """
    if nodes < 1:
        raise DataError(f"nodes must be at least 1. Received: {nodes}")
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return as_float64((points + 1) / 2), as_float64(weights / 2)


def normals_apart(first: tuple[Array, Array], second: tuple[Array, Array]) -> float:
    """Distance of two means and variances in standard deviations, median over channels.

    ``√(shift² + log(ratio)²/2)`` with ``shift = (μ₁ − μ₂)/σ₂`` and ``ratio = σ₁²/σ₂²``: the root of
    twice the Kullback-Leibler divergence of two normal distributions, to second order.

    Args:
        first: Mean and variance, shape ``(channels,)`` each.
        second: The same of the other.

    Returns:
        The distance; NaN where half of the channels have no finite one.
    """
    (mean, variance), (other_mean, other_variance) = first, second
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = (mean - other_mean) / np.sqrt(other_variance)
        ratio = np.log(variance / other_variance)
        return float(np.median(np.sqrt(np.square(shift) + np.square(ratio) / 2)))


def mean_shift(
    data_mean: Array, stored_mean: Array, stored_variance: Array, *, epsilon: float
) -> Float64:
    """Distance of means in stored standard deviations: |μ_data − μ_stored| / √(σ²_stored + ε).

    0 where the means are equal, whatever the variance.
    """
    distance = np.abs(as_float64(data_mean) - as_float64(stored_mean))
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = distance / np.sqrt(as_float64(stored_variance) + epsilon)
    return np.where(distance == 0, 0.0, shift)


def variance_ratio(data_variance: Array, stored_variance: Array, *, epsilon: float) -> Float64:
    """(σ²_data + ε) / (σ²_stored + ε): 1 when alike; ε keeps dead channels at 1."""
    return (as_float64(data_variance) + epsilon) / (as_float64(stored_variance) + epsilon)


def _same_length(a: Array, b: Array) -> tuple[Float64, Float64]:
    first, second = as_float64(a), as_float64(b)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise DataError(
            "Both must have shape (n,) with n at least 1. "
            f"Received: {first.shape} and {second.shape}"
        )
    return first, second
