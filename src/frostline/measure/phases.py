"""The essay's detection: the same samples in the dynamic phase, phase 0 and phase 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from frostline.adapters import Adapter, Forward, Outcome
from frostline.adapters.spool import WINDOW, KeptBatches, Workspace
from frostline.adapters.together import ALONE, Together
from frostline.data.arrays import leaves, to_numpy
from frostline.data.batch import Batch, NoSamplesError, all_inputs, failure, left_out
from frostline.data.batches import batches, is_reiterable, paired
from frostline.measure.ranks import as_rank_0, joined_shares
from frostline.numerics import stats
from frostline.types import (
    Array,
    DataError,
    FrostlineError,
    ModelError,
    PhaseRow,
    PhaseTable,
    as_float64,
)
from frostline.types.measured import Interval, Task
from frostline.types.names import snake_case

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

#: Without a loss, outputs are scores of classes where they are at most so many times the classes
#: that the labels show.
MOST_UNSEEN = 4

_CLASS_LOSSES = ("crossentropy", "cross_entropy", "nll", "hinge", "focal", "bce", "log_loss")

_REGRESSION_LOSSES = ("squared", "absolute", "huber", "log_cosh", "logcosh", "mse", "mae", "msle")


class _Scorer(Protocol):
    def __call__(self, batch: Batch, *, training: bool, number: int) -> Outcome: ...


@dataclass
class _Pass:
    """What one phase gave so far."""

    outputs: list[Any] = field(default_factory=list)
    losses: list[Array] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    named: dict[str, list[float]] = field(default_factory=dict)
    unit: str = "sample"

    def add(self, outcome: Outcome, count: int) -> None:
        self.outputs.append(outcome.outputs)
        self.losses.append(outcome.losses)
        self.counts.append(count)
        if outcome.unit == "batch":
            self.unit = "batch"
        for name, values in {**outcome.parts, **outcome.metrics}.items():
            self.named.setdefault(name, []).append(float(np.mean(values)))

    @property
    def known(self) -> bool:
        return all(len(losses) for losses in self.losses)

    @property
    def loss(self) -> float | None:
        """Mean over the samples; a batch counts as its samples do."""
        return (
            self._mean([float(np.mean(losses)) for losses in self.losses]) if self.known else None
        )

    def metrics(self) -> dict[str, float]:
        """Mean of each named loss and metric."""
        whole = len(self.counts)
        return {
            name: self._mean(values) for name, values in self.named.items() if len(values) == whole
        }

    def of_all(self, ranks: Together) -> _Pass:
        """What the phase gave on all ranks."""
        names = list(vars(self))
        whole = _Pass()
        for theirs in ranks.nested([getattr(self, name) for name in names]):
            for name, value in zip(names, theirs, strict=True):
                if name == "unit":
                    whole.unit = "batch" if "batch" in (value, whole.unit) else value
                elif name == "named":
                    for key, values in value.items():
                        whole.named.setdefault(key, []).extend(values)
                else:
                    getattr(whole, name).extend(value)
        return whole

    def _mean(self, values: list[float]) -> float:
        return float(np.average(values, weights=self.counts))


def phase_table(
    adapter: Adapter,
    data: Any,
    *,
    metrics: Metrics | None = None,
    loss: Any = None,
    step: Any = None,
    batch_size: int = 32,
    ranks: Together = ALONE,
) -> PhaseTable:
    """Evaluate a model in the dynamic phase, phase 0 and phase 1; see :func:`frostline.phases`.

    With several ``ranks`` the caller has entered ``ranks.collective``.
    """
    require_one(loss, step)
    with Workspace(WINDOW) as workspace:
        if not is_reiterable(data):  # two passes
            kept = KeptBatches(workspace)
            for batch in _read(adapter, data, batch_size, may_be_empty=ranks.size > 1):
                kept.keep(batch)
            data = kept
        return _phase_table(adapter, data, metrics, loss, step, batch_size, ranks)


def _phase_table(
    adapter: Adapter,
    data: Any,
    metrics: Metrics | None,
    loss: Any,
    step: Any,
    batch_size: int,
    ranks: Together,
) -> PhaseTable:
    passes = {"0": _Pass(), "1": _Pass()}
    labels: list[Any] = []
    remarks: list[str] = []
    weighted = False
    score: _Scorer | None = None
    labelled = True
    with adapter.preserved(), as_rank_0(adapter, ranks) as apart:
        stream = joined_shares(
            ranks,
            _read(adapter, data, batch_size, may_be_empty=ranks.size > 1),
            adapter.inputs(),
        )
        # Both phases in one pass: the same samples, order and batches even if the data shuffle.
        for number, batch in enumerate(paired(stream)):
            if score is None:
                score, remarks, labelled = _scorer(adapter, batch, loss, step)
            labels.append(batch.y if labelled else None)
            weighted |= batch.sample_weight is not None
            for phase, training in (("0", False), ("1", True)):
                outcome = score(batch, training=training, number=number)
                passes[phase].add(outcome, batch.count or 1)
        plain = step is None and all(part is not None for part in labels) and not remarks
        dynamic = {}
        if plain:
            try:
                dynamic = dict(adapter.evaluate(_tuples(data, batch_size)))
            except FrostlineError:  # a model whose own evaluate has no loss has no dynamic phase
                if passes["0"].known:
                    raise
    if ranks.size > 1:
        passes = {phase: done.of_all(ranks) for phase, done in passes.items()}
        labels = [part for theirs in ranks.nested(labels) for part in theirs]
        remarks = [str(remark) for remark in ranks.union(remarks)] + ([apart] if apart else [])
        if not labels:
            raise DataError("The data hold no samples, here or on any other rank.")
    loss_name, from_logits = adapter.objective() if loss is None else loss_name_of(loss)
    known = _known_outputs(labels, passes)
    task: Task = "unknown"
    judged: dict[str, Judged] = {}
    if known is not None:
        y, outputs = known
        if not weighted and getattr(loss or adapter.own_loss(), "ignore_class", None) is None:
            require_known_classes(y, outputs["0"], loss_name)
        found = passes["0"]
        losses = np.concatenate(found.losses) if found.known and found.unit == "sample" else None
        named = loss_name or ("step" if step is not None else None)
        task = infer_task(y, outputs["0"], named, losses)
        logits = bool(from_logits) or any(_outside_unit(values) for values in outputs.values())
        judged = {phase: judge(y, values, task, logits) for phase, values in outputs.items()}
    unlabelled = all(part is None for part in labels)
    unjudged = not passes["0"].known and (unlabelled or task == "unknown")
    distances = _distances(passes) if unjudged else None
    rows = [_dynamic_row(dynamic)]
    for phase in ("0", "1"):
        done = passes[phase]
        row_metrics = dict(judged[phase].metrics) if phase in judged else {}
        row_metrics |= done.metrics()
        if distances is not None:
            row_metrics["distance"] = 0.0 if phase == "0" else float(np.sqrt(distances.mean()))
        if known is not None:
            row_metrics |= _custom(metrics or {}, known[0], known[1][phase])
        rows.append(
            PhaseRow(
                phase="0" if phase == "0" else "1",
                loss=done.loss,
                metrics=row_metrics,
                outputs=None if known is None else known[1][phase],
            )
        )
    sites = len(adapter.sites())
    said = list(remarks)
    if known is not None:
        said += patterns(task, judged, sites)
    own = step is not None or loss is not None or known is None
    if passes["0"].unit == "batch":
        said.append("The loss is one number per batch: batches are compared, not samples.")
    if task == "unknown" and own:
        said += _gap_in_loss(passes)
    if distances is not None:
        why = "No labels and no loss" if unlabelled else "No loss is known that takes these labels"
        said.append(
            f"{why}: outputs are compared. Those of phase 1 are "
            f"{np.sqrt(distances.mean()):.3g} standard deviations of the outputs away from those "
            "of phase 0 (root mean square)."
            + ("" if unlabelled else " Pass loss= (on the command line --loss) to compare losses.")
        )
    return PhaseTable(
        rows=tuple(rows),
        task=task,
        samples=sum(passes["0"].counts),
        sites=sites,
        patterns=tuple(said),
    )


def _read(
    adapter: Adapter, data: Any, batch_size: int, *, may_be_empty: bool = False
) -> Iterator[Batch]:
    try:
        yield from batches(data, batch_size=batch_size, inputs=adapter.inputs())
    except NoSamplesError:
        if not may_be_empty:
            raise


def require_one(loss: Any, step: Any) -> None:
    """Raise where both a loss and a step are given, or the step is no function.

    Raises:
        ModelError: Both, or no function.
    """
    if step is not None and not callable(step):
        raise ModelError(
            "step must be a function (model, batch) that returns a loss, one loss per sample, a "
            f"mapping of losses, or (loss, metrics). Received: step={step!r}"
        )
    if loss is not None and step is not None:
        raise ModelError(
            "a step brings its own loss: pass loss= or step=, not both. Received: loss and step"
        )


def require_known_classes(labels: Any, outputs: Any, loss_name: str | None) -> None:
    """Class numbers must be those of outputs: JAX takes others for no class, TensorFlow raises.

    Raises:
        DataError: A label that is no class of these outputs.
    """
    if loss_name != "sparse_categorical_crossentropy" or labels is None or outputs is None:
        return
    classes, low, high = outputs.shape[-1], labels.min(), labels.max()
    if outputs.ndim > 1 and not (low >= 0 and high < classes):  # not so where one is NaN
        raise DataError(
            f"labels must be class numbers from 0 to {classes - 1}, for outputs of {classes} "
            f"classes. Received: labels from {low} to {high}"
        )


def _scorer(
    adapter: Adapter, first: Batch, loss: Any, step: Any
) -> tuple[_Scorer, list[str], bool]:
    """What scores a batch, what a person should know of it, and whether it holds labels."""
    plain = step is None and first.regular and bool(leaves(first.y))
    if plain and loss is None and not adapter.judges_itself():

        def score(batch: Batch, *, training: bool, number: int) -> Outcome:
            try:
                outputs, value = adapter.score(
                    batch.x, batch.y, batch.sample_weight, training=training, step=number
                )
            except FrostlineError:
                raise
            except Exception as error:  # the framework's, of labels that are no classes above all
                found: Any = None
                with suppress(Exception):  # the model itself may fail; the first error says so
                    found = adapter.forward(batch.x, training=False)
                pair = leaves(batch.y), leaves(found)
                if [len(part) for part in pair] == [1, 1]:
                    (labels,), (own,) = ([to_numpy(leaf) for _, leaf in part] for part in pair)
                    require_known_classes(labels, own, adapter.objective()[0])
                raise failure(error, batch) from error
            losses = np.empty(0) if value is None else np.array([value], np.float64)
            return Outcome(outputs=outputs, losses=losses)

        return score, [], True
    needed = adapter.inputs(labels=True)
    if first.y is None and loss is None and step is None and adapter.objective()[0] is not None:
        _require_no_labels(adapter, first)
    forward = adapter.blend_forward(loss=loss, step=step)
    remarks = [] if step is not None else [text for text in [left_out(first)] if text]

    def by_forward(batch: Batch, *, training: bool, number: int) -> Outcome:
        return tried(forward, batch, training=training, number=number)

    def bare(batch: Batch, *, training: bool, number: int) -> Outcome:
        x = all_inputs(batch, needed).x
        outputs = adapter.forward(x, training=training, step=number)
        return Outcome(outputs=outputs, losses=np.empty(0))

    if step is not None or loss is not None or all_inputs(first, needed).y is not None:
        return by_forward, remarks, True
    try:
        tried(forward, first)  # a model that computes its own loss
    except FrostlineError:
        try:
            adapter.forward(all_inputs(first, needed).x, training=False)
        except Exception as error:
            raise failure(error, first) from error
        return bare, remarks, False
    return by_forward, remarks, True


def _require_no_labels(adapter: Adapter, first: Batch) -> None:
    """Raise where the compiled loss needs labels that are not there."""
    try:
        tried(adapter.blend_forward(), first)
    except FrostlineError as error:
        raise DataError(
            "the phases are compared by loss and metrics, which need labels: pass (x, y), or step= "
            "for a loss without. Received: batches without labels"
        ) from error


def tried(forward: Forward, batch: Batch, *, training: bool = False, number: int = 0) -> Outcome:
    """The model's own pass of a batch, where what a user's code raises becomes one of our errors.

    Raises:
        FrostlineError: The pass fails; the text says on what and what to do.
    """
    try:
        outcome = forward.own(batch, training=training, number=number)
    except FrostlineError:
        raise
    except Exception as error:
        raise failure(error, batch) from error
    if outcome.losses.ndim != 1 or not len(outcome.losses):
        raise ModelError(
            "a loss must be one number per batch or one per sample. "
            f"Received: shape {outcome.losses.shape}"
        )
    return outcome


def _distances(passes: Mapping[str, _Pass]) -> Array:
    """Squared distance of the phases' outputs, in variances of phase 0, of each array or sample.

    Raises:
        ModelError: The phases' outputs differ in structure or size.
    """
    found = []
    for one, other in zip(passes["0"].outputs, passes["1"].outputs, strict=True):
        found.append([(leaf, twin) for (_, leaf), (_, twin) in zip(leaves(one), leaves(other))])  # noqa: B905
        alike = len(leaves(one)) == len(leaves(other)) > 0
        if not alike or any(np.shape(leaf) != np.shape(twin) for leaf, twin in found[-1]):
            raise ModelError(
                "there are neither labels nor a loss, and the outputs in training mode are not "
                "those of inference in kind or size: pass step=, a function (model, batch) that "
                "returns a loss. Received: outputs that cannot be compared"
            )
    totals = []
    for column in zip(*found, strict=True):
        if np.asarray(column[0][0]).dtype.kind != "f":
            continue
        base = np.concatenate([np.ravel(as_float64(leaf)) for leaf, _ in column])
        other = np.concatenate([np.ravel(as_float64(twin)) for _, twin in column])
        totals.append(np.square(other - base) / max(float(base.var()), np.finfo(np.float64).tiny))
    if not totals:
        raise ModelError(
            "there are neither labels nor a loss, and no output is a floating number: pass step=, "
            "a function (model, batch) that returns a loss. Received: no numbers to compare"
        )
    return np.concatenate([np.atleast_1d(total.mean()) for total in totals])


def _gap_in_loss(passes: Mapping[str, _Pass]) -> Iterator[str]:
    """The gap in a loss of the user's own, over samples or batches."""
    zero, one = passes["0"], passes["1"]
    if not zero.known or not one.known:
        return
    a, b = np.concatenate(one.losses), np.concatenate(zero.losses)
    sound = np.isfinite(a) & np.isfinite(b) if a.shape == b.shape else np.zeros(0, bool)
    if not sound.any():
        return
    gap = stats.paired_bootstrap(a[sound], b[sound], seed=_BOOTSTRAP_SEED)
    if gap.excludes_zero and abs(gap.estimate) > SMALL_GAP * max(abs(a.mean()), abs(b.mean())):
        yield _gap_in_words("loss", gap, worse="1" if gap.estimate > 0 else "0")


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


def infer_task(
    y: Array, outputs: Array, loss_name: str | None = None, losses: Array | None = None
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
        return classes if inside and _are_scores(y, outputs, loss_name, losses) else "unknown"
    if _columns(y) != columns:
        return "unknown"
    in_unit = float(y.min()) >= 0 and float(y.max()) <= 1
    if in_unit and np.allclose(as_float64(y).sum(axis=1), 1, atol=1e-3):  # one-hot, or smoothed
        return classes
    return "unknown" if in_unit and whole else "regression"  # multi-hot: several labels per sample


def _are_scores(y: Array, outputs: Array, loss_name: str | None, losses: Array | None) -> bool:
    """Whether outputs beside class numbers are the classes' scores, and no embedding."""
    if loss_name is not None and any(word in loss_name for word in _CLASS_LOSSES):
        return True
    flat = as_float64(outputs)
    finite = np.isfinite(flat).all(axis=1)
    shares = finite.any() and bool((flat[finite] >= 0).all())
    if shares and np.allclose(flat[finite].sum(axis=1), 1, atol=1e-3):
        return True
    if loss_name is None or losses is None or len(losses) != len(y):
        return loss_name is None and flat.shape[1] <= MOST_UNSEEN * (float(y.max()) + 1)
    sound = finite & np.isfinite(losses)
    if sound.sum() < 3:
        return False
    entropy = stats.cross_entropy(y.reshape(-1)[sound].astype(int), flat[sound], from_logits=True)
    return bool(stats.spearman(as_float64(losses)[sound], entropy) >= NEAR_ONE)


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


def _tuples(data: Any, batch_size: int) -> Iterator[tuple[Any, ...]]:
    for batch in batches(data, batch_size=batch_size):
        parts = (batch.x, batch.y, batch.sample_weight)
        yield tuple(_without_lists(part) for part in parts[: 2 + (parts[2] is not None)])


def _without_lists(value: Any) -> Any:
    """The structure with tuples for lists, which tf.data refuses in what a generator yields."""
    if isinstance(value, Mapping):
        return {key: _without_lists(item) for key, item in value.items()}
    return tuple(map(_without_lists, value)) if isinstance(value, (list, tuple)) else value


def _known_outputs(
    labels: list[Any], passes: Mapping[str, _Pass]
) -> tuple[Array, dict[str, Array]] | None:
    """Labels and outputs in one array each; ``None`` for several outputs or ragged batches."""
    y = [leaves(part) for part in labels]
    if not all(len(found) >= 1 and isinstance(found[0][1], np.ndarray) for found in y):
        return None
    first = [found[0][1] for found in y]  # of several labels one serves to count
    single = all(isinstance(part, np.ndarray) for done in passes.values() for part in done.outputs)
    shapes = {
        part.shape[1:] for done in passes.values() for part in done.outputs if single and part.ndim
    }
    if not single or len(shapes) != 1 or len({label.shape[1:] for label in first}) != 1:
        return None
    found = {
        phase: np.concatenate(done.outputs).astype(np.float32, copy=False)
        for phase, done in passes.items()
    }
    truth = np.concatenate(first)
    return None if any(len(part) != len(truth) for part in found.values()) else (truth, found)


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


def loss_name_of(loss: Any) -> tuple[str | None, bool | None]:
    """Snake-case name of a loss that the user gave, and its ``from_logits``."""
    if isinstance(loss, str):
        return snake_case(loss), None
    if isinstance(loss, Mapping) and loss.keys() == {"class_name", "config"}:
        return snake_case(loss["class_name"]), loss["config"].get("from_logits")
    if isinstance(loss, (Mapping, list, tuple)):
        return None, None
    name = getattr(loss, "__name__", None) or type(loss).__name__
    return snake_case(name), getattr(loss, "_fn_kwargs", {}).get("from_logits")
