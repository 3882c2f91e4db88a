"""Predictions compared with labels: what the task is, and how right each sample is.

Labels and outputs are arrays or rows in a file, and are looked at piece by piece: what a sample
takes in memory is a few bytes, however many outputs it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from frostline.measure.rows import Rows, pieces
from frostline.numerics import stats
from frostline.types import Array, as_float64
from frostline.types.measured import Task

Column = Array | Rows

#: "Near 1" for an AUC or a rank correlation: outstanding discrimination in Hosmer, Lemeshow,
#: Sturdivant, Applied Logistic Regression, 2013, section 5.2.4.
NEAR_ONE = 0.9

#: Without a loss, outputs are scores of classes where they are at most so many times the classes
#: that the labels show.
MOST_UNSEEN = 4

_CLASS_LOSSES = ("crossentropy", "cross_entropy", "nll", "hinge", "focal", "bce", "log_loss")

_REGRESSION_LOSSES = ("squared", "absolute", "huber", "log_cosh", "logcosh", "mse", "mae", "msle")


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """One phase's predictions compared with the labels.

    Attributes:
        metrics: ``accuracy`` (and ``auc`` if binary), or ``mse`` and ``spearman``.
        losses: Cross-entropy or squared error of each sample, ``n`` rows.
        hits: 1 where the predicted class is right, ``n`` rows; ``None`` for regression.
        reference: What no model would reach: the most frequent class's share, or the variance
            of the targets.
        broken: Number of samples with a NaN or infinite output.
        reachable: Accuracy of the best threshold on the same scores; ``None`` unless binary.
    """

    metrics: Mapping[str, float]
    losses: Column
    hits: Column | None
    reference: float
    broken: int
    reachable: float | None = None


def infer_task(
    y: Column, outputs: Column, loss_name: str | None = None, losses: Column | None = None
) -> Task:
    """Tell the task from labels, outputs and, where there is one, the loss.

    Class numbers beside an array of outputs do not make those class scores: an embedding has the
    same shape. So the loss must be one of classification, by its name or because it orders the
    samples as cross-entropy does; without a loss there must be as many outputs as classes.

    Args:
        y: Labels, shape ``(n,)``, ``(n, 1)``, or that of the outputs (one-hot, regression).
        outputs: Model outputs, shape ``(n,)`` or ``(n, k)``.
        loss_name: Snake-case name of the loss; ``None``: there is none.
        losses: Loss of each sample, shape ``(n,)``; ``None``: not known.

    Returns:
        ``"binary"`` for one sigmoid or two softmax columns, ``"multiclass"``, ``"regression"``, or
        ``"unknown"`` where the shapes fit none of these (pixels, several labels per sample).
    """
    if y.dtype.kind not in "buif" or outputs.dtype.kind not in "buif":
        return "unknown"
    if outputs.ndim not in (1, 2) or y.ndim not in (1, 2) or len(y) != len(outputs):
        return "unknown"
    if loss_name is not None and any(word in loss_name for word in _REGRESSION_LOSSES):
        return "regression" if _columns(y) == _columns(outputs) else "unknown"
    columns = _columns(outputs)
    whole = y.dtype.kind != "f" or _all(lambda part: part == np.rint(as_float64(part)), y)
    if columns == 1:
        if _columns(y) != 1:
            return "unknown"
        named = loss_name or ""
        signs = "hinge" in named and _all(lambda part: np.isin(part, (-1, 1)), y)
        soft = "crossentropy" in named  # label smoothing leaves values between 0 and 1
        binary = signs or soft or _all(lambda part: np.isin(part, (0, 1)), y)
        return "binary" if binary else "regression"
    classes: Task = "binary" if columns == 2 else "multiclass"
    low, high = bounds(y)
    if _columns(y) == 1:
        inside = whole and low >= 0 and high < columns
        return classes if inside and _are_scores(y, outputs, loss_name, losses) else "unknown"
    if _columns(y) != columns:
        return "unknown"
    in_unit = low >= 0 and high <= 1
    if in_unit and _all(_adds_up, y):  # one-hot, or smoothed
        return classes
    return "unknown" if in_unit and whole else "regression"  # multi-hot: several labels per sample


def bounds(values: Column) -> tuple[float, float]:
    """Smallest and largest value; NaN where one is."""
    ends = [(part.min(), part.max()) for (part,) in pieces(values) if part.size]
    low, high = zip(*ends, strict=True)
    return float(np.min(low)), float(np.max(high))


def outside_unit(values: Column) -> bool:
    """Whether a finite value is below 0 or above 1."""
    return not _all(lambda part: ~np.isfinite(part) | ((part >= 0) & (part <= 1)), values)


def _all(test: Callable[[Array], Any], values: Column) -> bool:
    with np.errstate(invalid="ignore"):
        return all(bool(np.all(test(part))) for (part,) in pieces(values))


def _adds_up(part: Array) -> bool:
    """Whether each row adds up to 1."""
    return bool(np.allclose(as_float64(part).sum(axis=1), 1, atol=1e-3))


def _are_scores(y: Column, outputs: Column, loss_name: str | None, losses: Column | None) -> bool:
    """Whether outputs beside class numbers are the classes' scores, and no embedding."""
    if loss_name is not None and any(word in loss_name for word in _CLASS_LOSSES):
        return True
    finite, shares = 0, True
    for (part,) in pieces(outputs):
        of_finite = as_float64(part)[np.isfinite(part).all(axis=1)]
        finite += len(of_finite)
        shares = shares and bool((of_finite >= 0).all()) and _adds_up(of_finite)
    if finite and shares:
        return True
    if loss_name is None or losses is None or len(losses) != len(y):
        most = MOST_UNSEEN * (bounds(y)[1] + 1)
        return loss_name is None and _columns(outputs) <= most
    known, entropy = [], []
    for labels, part, each in pieces(y, outputs, losses):
        flat = as_float64(part)
        sound = np.isfinite(flat).all(axis=1) & np.isfinite(each)
        known.append(each[sound])
        entropy.append(
            stats.cross_entropy(
                labels.reshape(-1)[sound].astype(int), flat[sound], from_logits=True
            )
        )
    of_loss = np.concatenate(known)
    if len(of_loss) < 3:
        return False
    return bool(stats.spearman(as_float64(of_loss), np.concatenate(entropy)) >= NEAR_ONE)


def judge(y: Array, outputs: Array, task: Task, logits: bool) -> Judged:
    """Compare one phase's outputs with the labels.

    Args:
        y: Labels, as for :func:`infer_task`.
        outputs: Model outputs, shape ``(n,)`` or ``(n, k)``.
        task: From :func:`infer_task`.
        logits: Whether the outputs come before the sigmoid or softmax.
    """
    found = judge_rows(y, outputs, task, logits, Rows)
    losses, hits = found.losses, found.hits
    assert isinstance(losses, Rows)
    return Judged(
        metrics=found.metrics,
        losses=losses.whole(),
        hits=as_float64(hits.whole()) if isinstance(hits, Rows) else None,
        reference=found.reference,
        broken=found.broken,
        reachable=found.reachable,
    )


def judge_rows(
    y: Column, outputs: Column, task: Task, logits: bool, rows: Callable[[], Rows]
) -> Judged:
    """The same with labels and outputs that may be rows in a file, and results that are.

    Args:
        y: As for :func:`judge`.
        outputs: As for :func:`judge`.
        task: As for :func:`judge`.
        logits: As for :func:`judge`.
        rows: Makes rows without any.
    """
    if task == "regression":
        return _judge_regression(y, outputs, rows())
    losses, hits = rows(), rows()
    broken, right, counts = 0, 0, np.zeros(1, np.int64)
    halves: tuple[list[Array], list[Array]] = ([], [])  # scores of the samples of each class
    for labels, part in pieces(y, outputs):
        values = as_float64(part)
        wrong = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        broken += int(wrong.sum())
        if task == "unknown":
            losses.append(np.zeros(len(values)))
            continue
        values = values.reshape(-1) if _columns(outputs) == 1 else values
        classes = class_labels(labels, values)
        hit = (predicted_classes(values, logits) == classes) & ~wrong
        hits.append(hit.astype(np.int8))
        right += int(hit.sum())
        counts = _added(counts, np.bincount(classes))
        with np.errstate(invalid="ignore", over="ignore"):
            losses.append(stats.cross_entropy(classes, values, from_logits=logits))
            if task == "binary":  # the difference is monotone in class 1, for logits as well
                scores = values if values.ndim == 1 else values[:, 1] - values[:, 0]
                for half, known in zip(halves, (classes == 0, classes == 1), strict=True):
                    half.append(scores[known])
    if task == "unknown":
        return Judged(metrics={}, losses=losses, hits=None, reference=np.nan, broken=broken)
    metrics = {"accuracy": right / len(outputs)}
    reachable = None
    if task == "binary":
        negative, positive = (np.sort(np.concatenate(half)) for half in halves)
        reachable = _best_accuracy(negative, positive)
        metrics["auc"] = float("nan") if broken else stats.auc_of_sorted(positive, negative)
    return Judged(
        metrics=metrics,
        losses=losses,
        hits=hits,
        reference=float(counts.max() / len(outputs)),
        broken=broken,
        reachable=reachable,
    )


def class_labels(y: Array, outputs: Array) -> Array:
    """Class index of each sample, shape ``(n,)``, int64; of a classification task."""
    if _columns(outputs) == 1:
        return np.asarray(as_float64(y).reshape(-1) > 0.5, dtype=np.int64)
    labels = y.reshape(-1) if _columns(y) == 1 else y.argmax(axis=1)
    return np.asarray(labels, dtype=np.int64)


def predicted_classes(outputs: Array, logits: bool) -> Array:
    """Class index that each sample is given, shape ``(n,)``, int64."""
    if _columns(outputs) == 1:
        return np.asarray(outputs.reshape(-1) > (0.0 if logits else 0.5), dtype=np.int64)
    return np.asarray(outputs.argmax(axis=1), dtype=np.int64)


def _added(counts: Array, more: Array) -> Array:
    longer, shorter = (counts, more) if len(counts) > len(more) else (more, counts)
    longer = longer.copy()
    longer[: len(shorter)] += shorter
    return longer


def _best_accuracy(negative: Array, positive: Array) -> float:
    """Accuracy with the threshold that suits these samples best.

    Args:
        negative: Scores of class 0, in order; NaN last.
        positive: Scores of class 1, in order; NaN last.
    """
    # All are called 1, or all 0. Else the best cut is just above a score of class 0.
    best = max(len(positive), len(negative))
    below, above = (half[~np.isnan(half)] for half in (negative, positive))
    if len(below) and len(below) + len(above) < len(negative) + len(positive):
        # Between the largest score and a NaN there is no threshold.
        below = below[below < np.concatenate([below[-1:], above[-1:]]).max()]
    for (cuts,) in pieces(below):
        right = np.searchsorted(below, cuts, "right") - np.searchsorted(above, cuts, "right")
        best = max(best, len(positive) + int(right.max()))
    return best / (len(negative) + len(positive))


def _judge_regression(y: Column, outputs: Column, losses: Rows) -> Judged:
    broken, columns = 0, _columns(outputs)
    targets, predicted = np.empty((2, columns, len(y)))
    moments, start = stats.Moments(0, np.zeros(columns), np.zeros(columns)), 0
    for labels, part in pieces(y, outputs):
        truth = as_float64(labels).reshape(len(labels), -1)
        values = as_float64(part).reshape(len(labels), -1)
        broken += int((~np.isfinite(values).all(axis=1)).sum())
        with np.errstate(invalid="ignore", over="ignore"):
            losses.append(np.square(truth - values).mean(axis=1))
        moments = moments.merge(stats.Moments.of(truth))
        targets[:, start : start + len(truth)] = truth.T
        predicted[:, start : start + len(truth)] = values.T
        start += len(truth)
    correlations = [stats.spearman(a, b) for a, b in zip(targets, predicted, strict=True)]
    with np.errstate(invalid="ignore", over="ignore"):
        squares = mean(losses)
    return Judged(
        metrics={"mse": squares, "spearman": float(np.mean(correlations))},
        losses=losses,
        hits=None,
        reference=float(moments.variance.mean()),
        broken=broken,
    )


def mean(values: Column) -> float:
    """Mean of a column of numbers."""
    return float(sum(float(part.sum()) for (part,) in pieces(values)) / len(values))


def difference(a: Column, b: Column) -> Array:
    """``a − b``, in one array."""
    whole = np.empty(len(a), np.int8 if a.dtype == b.dtype == np.int8 else np.float64)
    start = 0
    for one, other in pieces(a, b):
        whole[start : start + len(one)] = one - other
        start += len(one)
    return whole


def _columns(values: Column) -> int:
    return 1 if values.ndim == 1 else int(values.shape[1])
