"""The essay's detection: the same samples in the dynamic phase, phase 0 and phase 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from frostline.adapters import ModelView
from frostline.data.batches import Batch, batches, is_reiterable, leaves
from frostline.numerics import stats
from frostline.types import Array, DataError, PhaseRow, PhaseTable, as_float64
from frostline.types.measured import Interval, Task

Metrics = Mapping[str, Callable[[Array, Array], float]]

#: An accuracy this close to that of always guessing the most frequent class is "at chance". Four
#: standard errors of 400 samples' accuracy are 0.1; half of it still lets 200 samples tell.
CHANCE_MARGIN = 0.05

#: "Near 1" for an AUC or a rank correlation: outstanding discrimination in Hosmer, Lemeshow,
#: Sturdivant, Applied Logistic Regression, 2013, section 5.2.4.
NEAR_ONE = 0.9

#: A mean squared error of at least this share of the targets' variance is "large": the mean of the
#: targets, which needs no model, predicts as well (R² ≤ 0).
LARGE_MSE = 1.0

#: A gap in loss below this share of the larger loss is not worth a sentence: it is of the size
#: that dropout or rounding of half-precision layers leaves in a healthy model.
SMALL_GAP = 0.05

#: Fixed, so that the same model and data give the same words.
_BOOTSTRAP_SEED = 0

_REGRESSION_LOSSES = ("squared", "absolute", "huber", "log_cosh", "logcosh", "mse", "mae", "msle")


class _Scorer(Protocol):
    def __call__(
        self, batch: Batch, *, training: bool, number: int
    ) -> tuple[Any, float | None]: ...


@dataclass
class _Pass:
    """What one phase gave so far."""

    outputs: list[Any] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_known: bool = True

    def add(self, outputs: Any, loss: float | None, count: int) -> None:
        self.outputs.append(outputs)
        if loss is None:
            self.loss_known = False
        else:
            self.loss_sum += float(loss) * count


def phase_table(
    view: ModelView,
    data: Any,
    *,
    metrics: Metrics | None = None,
    loss: Any = None,
    batch_size: int = 32,
) -> PhaseTable:
    """Evaluate a model in the dynamic phase, phase 0 and phase 1; see :func:`frostline.phases`."""
    if not is_reiterable(data):
        data = list(batches(data, batch_size=batch_size))  # two passes over a one-shot iterator
    passes = {"0": _Pass(), "1": _Pass()}
    labels: list[Array] = []
    judge_batch = _by_score(view) if loss is None else _by_loss(view, loss)
    with view.preserved():
        # Both phases in one pass: the same samples, order and batches even if the data shuffle.
        for number, batch in enumerate(batches(data, batch_size=batch_size)):
            labels.append(_labels_of(batch, number))
            for phase, training in (("0", False), ("1", True)):
                outputs, value = judge_batch(batch, training=training, number=number)
                passes[phase].add(outputs, value, len(batch))
        dynamic = dict(view.evaluate(_tuples(data, batch_size)))
    samples = sum(len(leaf) for leaf in labels)
    known = _known_outputs(labels, passes)
    loss_name, from_logits = view.objective()
    task: Task = "unknown"
    judged: dict[str, Judged] = {}
    if known is not None:
        y, outputs = known
        task = infer_task(y, outputs["0"], loss_name)
        logits = bool(from_logits) or any(_outside_unit(values) for values in outputs.values())
        judged = {phase: judge(y, values, task, logits) for phase, values in outputs.items()}
    rows = [_dynamic_row(dynamic)]
    for phase in ("0", "1"):
        done = passes[phase]
        row_metrics = dict(judged[phase].metrics) if phase in judged else {}
        if known is not None:
            row_metrics |= _custom(metrics or {}, known[0], known[1][phase])
        rows.append(
            PhaseRow(
                phase="0" if phase == "0" else "1",
                loss=done.loss_sum / samples if done.loss_known else None,
                metrics=row_metrics,
                outputs=None if known is None else known[1][phase],
            )
        )
    sites = len(view.sites())
    return PhaseTable(
        rows=tuple(rows),
        task=task,
        samples=samples,
        sites=sites,
        patterns=patterns(task, judged, sites) if known is not None else (),
    )


def _by_score(view: ModelView) -> _Scorer:
    def score(batch: Batch, *, training: bool, number: int) -> tuple[Any, float | None]:
        return view.score(batch.x, batch.y, batch.sample_weight, training=training, step=number)

    return score


def _by_loss(view: ModelView, loss: Any) -> _Scorer:
    """Score batches by a loss that was given; see ``ModelView.score``."""
    forward = view.blend_forward(loss=loss)

    def score(batch: Batch, *, training: bool, number: int) -> tuple[Any, float]:
        outcome = forward.own(batch, training=training, number=number)
        return outcome.outputs, float(np.mean(outcome.losses))

    return score


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """One phase's predictions compared with the labels.

    Attributes:
        metrics: ``accuracy`` (and ``auc`` if binary), or ``mse`` and ``spearman``.
        losses: Cross-entropy or squared error of each sample, shape ``(n,)``.
        hits: 1 where the predicted class is right, shape ``(n,)``; ``None`` for regression.
        reference: What no model would reach: the most frequent class's share, or the variance
            of the targets.
        broken: Number of samples with a NaN or infinite output.
        reachable: Accuracy of the best threshold on the same scores; ``None`` unless binary.
    """

    metrics: Mapping[str, float]
    losses: Array
    hits: Array | None
    reference: float
    broken: int
    reachable: float | None = None


def infer_task(y: Array, outputs: Array, loss_name: str | None = None) -> Task:
    """Tell the task from labels, outputs and, where there is one, the compiled loss.

    Args:
        y: Labels, shape ``(n,)``, ``(n, 1)``, or that of the outputs (one-hot, regression).
        outputs: Model outputs, shape ``(n,)`` or ``(n, k)``.
        loss_name: Snake-case name of the compiled loss.

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
    whole = bool(np.all(y == np.rint(as_float64(y)))) if y.dtype.kind == "f" else True
    if columns == 1:
        if _columns(y) != 1:
            return "unknown"
        values = set(np.unique(y).tolist())
        named = loss_name or ""
        signs = "hinge" in named and values <= {-1, 1}
        soft = "crossentropy" in named  # label smoothing leaves values between 0 and 1
        return "binary" if values <= {0, 1} or signs or soft else "regression"
    classes: Task = "binary" if columns == 2 else "multiclass"
    if _columns(y) == 1:
        inside = whole and float(y.min()) >= 0 and float(y.max()) < columns
        return classes if inside else "unknown"
    if _columns(y) != columns:
        return "unknown"
    in_unit = float(y.min()) >= 0 and float(y.max()) <= 1
    if in_unit and np.allclose(as_float64(y).sum(axis=1), 1, atol=1e-3):  # one-hot, or smoothed
        return classes
    return "unknown" if in_unit and whole else "regression"  # multi-hot: several labels per sample


def judge(y: Array, outputs: Array, task: Task, logits: bool) -> Judged:
    """Compare one phase's outputs with the labels.

    Args:
        y: Labels, as for :func:`infer_task`.
        outputs: Model outputs, shape ``(n,)`` or ``(n, k)``.
        task: From :func:`infer_task`.
        logits: Whether the outputs come before the sigmoid or softmax.
    """
    flat = as_float64(outputs).reshape(len(outputs), -1)
    broken: Array = np.asarray(~np.isfinite(flat).all(axis=1))
    if task == "unknown":
        return Judged(
            metrics={},
            losses=np.zeros(len(y)),
            hits=None,
            reference=np.nan,
            broken=int(broken.sum()),
        )
    if task == "regression":
        return _judge_regression(y, outputs, broken)
    outputs = as_float64(outputs)
    if _columns(outputs) == 1:
        outputs = scores = outputs.reshape(-1)
    else:
        scores = outputs[:, 1] - outputs[:, 0]  # monotone in class 1, for logits as well
    labels, predicted = class_labels(y, outputs), predicted_classes(outputs, logits)
    hits = ((predicted == labels) & ~broken).astype(np.float64)
    metrics = {"accuracy": float(hits.mean())}
    reachable = None
    if task == "binary":
        reachable = _best_accuracy(labels, scores)
        metrics["auc"] = stats.auc(labels, np.where(broken, np.nan, scores))
    with np.errstate(invalid="ignore", over="ignore"):
        losses = stats.cross_entropy(labels, outputs, from_logits=logits)
    return Judged(
        metrics=metrics,
        losses=losses,
        hits=hits,
        reference=float(np.bincount(labels).max() / len(labels)),
        broken=int(broken.sum()),
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


def _best_accuracy(labels: Array, scores: Array) -> float:
    """Accuracy with the threshold that suits these samples best."""
    order = np.argsort(scores, kind="stable")
    positives, ordered = labels[order], scores[order]
    # Cut k: the k lowest are called 0. A cut between equal scores is no threshold.
    zeros_below = np.concatenate([[0], np.cumsum(1 - positives)])
    ones_below = np.concatenate([[0], np.cumsum(positives)])
    right = zeros_below + (ones_below[-1] - ones_below)
    allowed = np.concatenate([[True], ordered[1:] > ordered[:-1], [True]])
    return float(right[allowed].max() / len(labels))


def _judge_regression(y: Array, outputs: Array, broken: Array) -> Judged:
    targets = as_float64(y).reshape(len(y), -1)
    predicted = as_float64(outputs).reshape(len(y), -1)
    with np.errstate(invalid="ignore", over="ignore"):
        losses = np.square(targets - predicted).mean(axis=1)
    correlations = [
        stats.spearman(targets[:, column], predicted[:, column])
        for column in range(targets.shape[1])
    ]
    return Judged(
        metrics={"mse": float(losses.mean()), "spearman": float(np.mean(correlations))},
        losses=losses,
        hits=None,
        reference=float(targets.var(axis=0).mean()),
        broken=int(broken.sum()),
    )


def patterns(task: Task, judged: Mapping[str, Judged], sites: int) -> tuple[str, ...]:
    """The essay's tell-tale patterns that are present, one sentence each."""
    found: list[str] = []
    for phase, result in judged.items():
        if result.broken:
            found.append(
                f"Phase {phase}: {result.broken} of {len(result.losses)} outputs are NaN or "
                "infinite."
            )
        found.extend(_ranking_kept(phase, result))
    if task != "unknown":
        found.extend(_gaps(judged["0"], judged["1"], sites))
    return tuple(found)


def _ranking_kept(phase: str, result: Judged) -> Iterator[str]:
    """The order of the predictions is right and their level is not: the essay's signature."""
    accuracy, auc = result.metrics.get("accuracy"), result.metrics.get("auc")
    if (
        accuracy is not None
        and auc is not None
        and result.reachable is not None
        and accuracy <= result.reference + CHANCE_MARGIN
        and auc >= NEAR_ONE
        # With very unequal classes a good model is near chance too; no threshold would help it.
        and result.reachable >= accuracy + 2 * CHANCE_MARGIN
    ):
        yield (
            f"Phase {phase}: accuracy {accuracy:.3f} is at chance (guessing the most frequent "
            f"class gives {result.reference:.3f}) while AUC is {auc:.3f}, near 1. The network "
            "still ranks the samples; its outputs are shifted: another threshold would give "
            f"{result.reachable:.3f}."
        )
    mse, spearman = result.metrics.get("mse"), result.metrics.get("spearman")
    if (
        mse is not None
        and spearman is not None
        and result.reference > 0
        and mse >= LARGE_MSE * result.reference
        and spearman >= NEAR_ONE
    ):
        yield (
            f"Phase {phase}: MSE {mse:.4g} is large (predicting the mean gives "
            f"{result.reference:.4g}) while Spearman's rank correlation is {spearman:.3f}, near "
            "1. The network still ranks the samples; its outputs are shifted or scaled."
        )


def _gaps(inference: Judged, training: Judged, sites: int) -> Iterator[str]:
    """Gaps whose bootstrap interval excludes 0, phase 1 minus phase 0."""
    if inference.broken or training.broken:
        return
    said = False
    if inference.hits is not None and training.hits is not None:
        gap = stats.paired_bootstrap(training.hits, inference.hits, seed=_BOOTSTRAP_SEED)
        if gap.excludes_zero:
            said = True
            yield _gap_in_words("accuracy", gap, worse="0" if gap.estimate > 0 else "1")
    gap = stats.paired_bootstrap(training.losses, inference.losses, seed=_BOOTSTRAP_SEED)
    larger = max(training.losses.mean(), inference.losses.mean())
    if gap.excludes_zero and abs(gap.estimate) > SMALL_GAP * larger:
        said = True
        name = "squared error" if inference.hits is None else "cross-entropy"
        yield _gap_in_words(name, gap, worse="1" if gap.estimate > 0 else "0")
    if said and sites == 0:
        yield "The model has no BatchNormalization layer: BN cannot be the cause of the gap."


def _gap_in_words(name: str, gap: Interval, *, worse: str) -> str:
    interval = f"{100 * gap.level:.0f}% interval {gap.low:+.3g} to {gap.high:+.3g}"
    return (
        f"Gap in {name}, phase 1 minus phase 0: {gap.estimate:+.3g} ({interval}); "
        f"phase {worse} is worse."
    )


def _labels_of(batch: Batch, number: int) -> Array:
    found = leaves(batch.y)
    if not found:
        raise DataError(
            f"The phases are compared by loss and metrics, which need labels: pass (x, y). "
            f"Received: batch {number} without labels"
        )
    # Models with several outputs get their loss only, so one of their labels serves to count.
    first: Array = found[0][1]
    return first


def _tuples(data: Any, batch_size: int) -> Iterator[tuple[Any, ...]]:
    for batch in batches(data, batch_size=batch_size):
        if batch.sample_weight is None:
            yield batch.x, batch.y
        else:
            yield batch.x, batch.y, batch.sample_weight


def _known_outputs(
    labels: list[Array], passes: Mapping[str, _Pass]
) -> tuple[Array, dict[str, Array]] | None:
    """Labels and outputs in one array each; ``None`` for several outputs or ragged batches."""
    single = all(isinstance(part, np.ndarray) for done in passes.values() for part in done.outputs)
    shapes = {part.shape[1:] for part in passes["0"].outputs} if single else set()
    if len(shapes) != 1 or len({label.shape[1:] for label in labels}) != 1:
        return None
    return np.concatenate(labels), {
        phase: np.concatenate(done.outputs).astype(np.float32, copy=False)
        for phase, done in passes.items()
    }


def _dynamic_row(logs: dict[str, float]) -> PhaseRow:
    loss = logs.pop("loss", None)
    return PhaseRow(
        phase="dynamic",
        loss=None if loss is None else float(loss),
        metrics={name: float(value) for name, value in logs.items()},
    )


def _custom(metrics: Metrics, y: Array, outputs: Array) -> dict[str, float]:
    values = {}
    for name, metric in metrics.items():
        value = metric(y, outputs)
        if np.ndim(value) != 0:
            raise DataError(
                f"metrics[{name!r}] must return one number. Received: shape {np.shape(value)}"
            )
        values[name] = float(value)
    return values


def _columns(values: Array) -> int:
    return 1 if values.ndim == 1 else int(values.shape[1])


def _outside_unit(values: Array) -> bool:
    finite = values[np.isfinite(values)]
    return bool(finite.size and (finite.min() < 0 or finite.max() > 1))
