"""The essay's detection: the same samples in the dynamic phase, phase 0 and phase 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from frostline.adapters import Adapter, Forward, Outcome
from frostline.adapters.spool import KeptBatches, Workspace
from frostline.adapters.together import ALONE, Together
from frostline.data.arrays import leaves, to_numpy
from frostline.data.batch import Batch, NoSamplesError, all_inputs, failure, left_out
from frostline.data.batches import batches, is_reiterable, paired
from frostline.measure.judged import (
    NEAR_ONE,
    Judged,
    bounds,
    difference,
    infer_task,
    judge_rows,
    mean,
    outside_unit,
)
from frostline.measure.ranks import as_rank_0, joined_shares
from frostline.measure.rows import Kept, Rows
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

#: A mean squared error of at least this share of the targets' variance is "large": the mean of the
#: targets, which needs no model, predicts as well (R² ≤ 0).
LARGE_MSE = 1.0

#: A gap in loss below this share of the larger loss is not worth a sentence: it is of the size
#: that dropout or rounding of half-precision layers leaves in a healthy model.
SMALL_GAP = 0.05

#: The model's own evaluate is that of a phase where it is off by up to this part of the gap; one
#: that returns the loss of its last batch is not equal to either.
NEARER = 0.2

#: Bytes of batches, labels, outputs and losses that are held in memory.
WINDOW = 16 << 20

#: Fixed, so that the same model and data give the same words.
_BOOTSTRAP_SEED = 0

#: What to know of a step that calls ``train()``, as one of training does.
STEP_TRAINS = (
    "step= calls train() on the model, which is put into the mode of each phase all the same, as a "
    "step of training must be: where your evaluation runs this step, it gives what training mode "
    "gives, on the statistics of each batch and with dropout, also after eval()"
)

_NO_MOMENTS = stats.Moments(0, np.zeros(1), np.zeros(1))


class _Scorer(Protocol):
    def __call__(self, batch: Batch, *, training: bool, number: int) -> Outcome: ...


@dataclass
class _Pass:
    """What one phase gave so far."""

    outputs: Kept
    losses: Kept
    loss_means: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    named: dict[str, list[float]] = field(default_factory=dict)
    unit: str = "sample"

    def add(self, outcome: Outcome, count: int) -> None:
        self.outputs.append(outcome.outputs)
        self.losses.append(outcome.losses)
        if len(outcome.losses):
            self.loss_means.append(float(np.mean(outcome.losses)))
        self.counts.append(count)
        if outcome.unit == "batch":
            self.unit = "batch"
        for name, values in {**outcome.parts, **outcome.metrics}.items():
            self.named.setdefault(name, []).append(float(np.mean(values)))

    @property
    def known(self) -> bool:
        return len(self.loss_means) == len(self.counts)

    @property
    def loss(self) -> float | None:
        """Mean over the samples; a batch counts as its samples do."""
        return self._mean(self.loss_means) if self.known else None

    def metrics(self) -> dict[str, float]:
        """Mean of each named loss and metric."""
        whole = len(self.counts)
        return {
            name: self._mean(values) for name, values in self.named.items() if len(values) == whole
        }

    def of_all(self, ranks: Together) -> _Pass:
        """What the phase gave on all ranks."""
        names = list(vars(self))
        whole = _Pass(self.outputs.emptied(), self.losses.emptied())
        mine = [getattr(self, name) for name in names]
        mine = [list(each) if isinstance(each, Kept) else each for each in mine]
        for theirs in ranks.nested(mine):
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
            for batch in _read(adapter, data, batch_size, step, may_be_empty=ranks.size > 1):
                kept.keep(batch)
            data = kept
        return _phase_table(adapter, data, metrics, loss, step, batch_size, ranks, workspace)


def _phase_table(
    adapter: Adapter,
    data: Any,
    metrics: Metrics | None,
    loss: Any,
    step: Any,
    batch_size: int,
    ranks: Together,
    workspace: Workspace,
) -> PhaseTable:
    seen = _both_phases(adapter, data, loss, step, batch_size, ranks, workspace)
    if ranks.size > 1:
        seen = seen.of_all(ranks)
    known = _known_outputs(seen.labels, seen.passes)
    task: Task = "unknown"
    judged: dict[str, Judged] = {}
    if known is not None:
        task, judged = _judged(adapter, seen, known, loss, step, workspace)
    unjudged = not seen.passes["0"].known and (seen.unlabelled or task == "unknown")
    distances = _distances(seen.passes, seen.unlabelled) if unjudged else None
    rows = [_dynamic_row(seen.dynamic)]
    for phase, done in seen.passes.items():
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
                outputs=None if known is None else known[1][phase].whole(),
            )
        )
    sites = len(adapter.sites())
    said = list(seen.remarks)
    if known is not None:
        said += patterns(task, judged, sites)
    if seen.passes["0"].unit == "batch":
        said.append("The loss is one number per batch: batches are compared, not samples.")
    if task == "unknown" and (step is not None or loss is not None or known is None):
        said += _gap_in_loss(seen.passes)
    if loss is None and step is None:
        said += _as_in_training(rows)
    if distances is not None:
        said.append(_apart(distances, seen.unlabelled))
    return PhaseTable(
        rows=tuple(rows),
        task=task,
        samples=sum(seen.passes["0"].counts),
        sites=sites,
        patterns=tuple(said),
    )


@dataclass(frozen=True)
class _Seen:
    """What both phases gave on the data.

    Attributes:
        passes: By phase, ``"0"`` and ``"1"``.
        labels: Those of each batch.
        without: Batches without labels.
        remarks: What a person should know of how batches were scored.
        weighted: Whether samples have weights.
        dynamic: What the model's own ``evaluate`` says; empty where it says nothing.
    """

    passes: dict[str, _Pass]
    labels: Kept
    without: int
    remarks: list[str]
    weighted: bool
    dynamic: dict[str, float]

    @property
    def unlabelled(self) -> bool:
        return self.without == len(self.passes["0"].counts)

    def of_all(self, ranks: Together) -> _Seen:
        """What all ranks have seen together.

        Raises:
            DataError: None has seen a sample.
        """
        passes = {phase: done.of_all(ranks) for phase, done in self.passes.items()}
        labels, without = self.labels.emptied(), 0
        for theirs, missing in ranks.nested([list(self.labels), self.without]):
            labels.extend(theirs)
            without += missing
        remarks = [str(remark) for remark in ranks.union(self.remarks)]
        if not passes["0"].counts:
            raise DataError("The data hold no samples, here or on any other rank.")
        return replace(self, passes=passes, labels=labels, without=without, remarks=remarks)


def _both_phases(
    adapter: Adapter,
    data: Any,
    loss: Any,
    step: Any,
    batch_size: int,
    ranks: Together,
    workspace: Workspace,
) -> _Seen:
    """Score every batch in both phases, in one pass: the same samples even if the data shuffle."""
    passes = {phase: _Pass(Kept(workspace), Kept(workspace)) for phase in ("0", "1")}
    labels, without = Kept(workspace), 0
    remarks: list[str] = []
    weighted = step_trains = False
    score: _Scorer | None = None
    labelled = True
    dynamic: dict[str, float] = {}
    with adapter.preserved(), as_rank_0(adapter, ranks) as apart:
        stream = joined_shares(
            ranks,
            _read(adapter, data, batch_size, step, may_be_empty=ranks.size > 1),
            adapter.inputs(),
        )
        for number, batch in enumerate(paired(stream)):
            if score is None:
                score, remarks, labelled = _scorer(adapter, batch, loss, step)
            labels.append(_first_label(batch.y) if labelled else None)
            without += not labelled or batch.y is None
            weighted |= batch.sample_weight is not None
            for phase, training in (("0", False), ("1", True)):
                outcome = score(batch, training=training, number=number)
                passes[phase].add(outcome, batch.count or 1)
                step_trains |= outcome.step_trains
        # Without labels it may have a loss that it computes itself.
        if step is None and not remarks and (not without or passes["0"].known):
            try:
                dynamic = dict(adapter.evaluate(_tuples(data, batch_size)))
            except FrostlineError:  # a model whose own evaluate has no loss has no dynamic phase
                if passes["0"].known and not without:
                    raise
    remarks = [*remarks, apart] if apart else remarks
    remarks = [*remarks, f"Note: {STEP_TRAINS}."] if step_trains else remarks
    return _Seen(passes, labels, without, remarks, weighted, dynamic)


def _judged(
    adapter: Adapter,
    seen: _Seen,
    known: tuple[Rows, Mapping[str, Rows]],
    loss: Any,
    step: Any,
    workspace: Workspace,
) -> tuple[Task, dict[str, Judged]]:
    """The task, and each phase's outputs compared with the labels."""
    y, outputs = known
    loss_name, from_logits = adapter.objective() if loss is None else loss_name_of(loss)
    if not seen.weighted and getattr(loss or adapter.own_loss(), "ignore_class", None) is None:
        require_known_classes(y, outputs["0"], loss_name)
    found = seen.passes["0"]
    losses = found.losses.rows() if found.known and found.unit == "sample" else None
    task = infer_task(y, outputs["0"], loss_name or ("step" if step is not None else None), losses)
    logits = bool(from_logits) or any(outside_unit(values) for values in outputs.values())
    return task, {
        phase: judge_rows(y, values, task, logits, lambda: Rows(workspace))
        for phase, values in outputs.items()
    }


def _apart(distances: Array, unlabelled: bool) -> str:
    """How far the outputs of the phases are apart, in words."""
    return (
        f"{_why_outputs(unlabelled)}: outputs are compared. Those of phase 1 are "
        f"{np.sqrt(distances.mean()):.3g} standard deviations of the outputs away from those "
        "of phase 0 (root mean square)."
        + ("" if unlabelled else " Pass loss= (on the command line --loss) to compare losses.")
    )


def _why_outputs(unlabelled: bool) -> str:
    return "No labels and no loss" if unlabelled else "No loss is known that takes these labels"


def _read(
    adapter: Adapter, data: Any, batch_size: int, step: Any, *, may_be_empty: bool = False
) -> Iterator[Batch]:
    inputs, whole = adapter.inputs(), step is not None
    try:
        yield from batches(data, batch_size=batch_size, inputs=inputs, whole=whole)
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
    classes, (low, high) = outputs.shape[-1], bounds(labels)
    if outputs.ndim > 1 and not (low >= 0 and high < classes):  # not so where one is NaN
        raise DataError(
            f"labels must be class numbers from 0 to {classes - 1}, for outputs of {classes} "
            f"classes. Received: labels from {low:.12g} to {high:.12g}"
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


def _distances(passes: Mapping[str, _Pass], unlabelled: bool) -> Array:
    """Squared distance of the phases' outputs, in variances of phase 0, of each array or sample.

    Raises:
        ModelError: The phases' outputs differ in structure or size.
    """
    pairs: list[tuple[stats.Moments, list[float]]] = []
    for one, other in zip(passes["0"].outputs, passes["1"].outputs, strict=True):
        found = [[leaf for _, leaf in leaves(part)] for part in (one, other)]
        shapes = [[np.shape(leaf) for leaf in part] for part in found]
        if not shapes[0] or shapes[0] != shapes[1] or len(pairs) not in (0, len(shapes[0])):
            raise ModelError(
                f"{_why_outputs(unlabelled)}, and the outputs in training mode are not those of "
                "inference in kind or size: pass step=, a function (model, batch) that returns a "
                "loss. Received: outputs that cannot be compared"
            )
        floats = [np.asarray(leaf).dtype.kind == "f" for leaf in found[0]]
        pairs = pairs or [(_NO_MOMENTS, []) for _ in floats]
        for number, (leaf, twin) in enumerate(zip(*found, strict=True)):
            if floats[number]:
                moments, squares = pairs[number]
                flat, other_flat = (np.ravel(as_float64(each)) for each in (leaf, twin))
                squares.append(float(np.square(other_flat - flat).sum()))
                pairs[number] = moments.merge(stats.Moments.of(flat[:, None])), squares
    totals = [
        sum(squares) / moments.count / max(float(moments.variance[0]), np.finfo(np.float64).tiny)
        for moments, squares in pairs
        if moments.count
    ]
    if not totals:
        raise ModelError(
            f"{_why_outputs(unlabelled)}, and no output is a floating number: pass step=, a "
            "function (model, batch) that returns a loss. Received: no numbers to compare"
        )
    return np.array(totals)


def _gap_in_loss(passes: Mapping[str, _Pass]) -> Iterator[str]:
    """The gap in a loss of the user's own, over samples or batches."""
    zero, one = passes["0"], passes["1"]
    if not zero.known or not one.known:
        return
    kept = one.losses.rows(), zero.losses.rows()
    if kept[0] is None or kept[1] is None:
        return
    a, b = (as_float64(rows.whole()) for rows in kept if rows is not None)
    sound = np.isfinite(a) & np.isfinite(b) if a.shape == b.shape else np.zeros(0, bool)
    if not sound.any():
        return
    gap = stats.paired_bootstrap(a[sound], b[sound], seed=_BOOTSTRAP_SEED)
    if gap.excludes_zero and abs(gap.estimate) > SMALL_GAP * max(abs(a.mean()), abs(b.mean())):
        yield _gap_in_words("loss", gap, worse="1" if gap.estimate > 0 else "0")


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
        gap = stats.bootstrap(difference(training.hits, inference.hits), seed=_BOOTSTRAP_SEED)
        if gap.excludes_zero:
            said = True
            yield _gap_in_words("accuracy", gap, worse="0" if gap.estimate > 0 else "1")
    gap = stats.bootstrap(difference(training.losses, inference.losses), seed=_BOOTSTRAP_SEED)
    larger = max(mean(training.losses), mean(inference.losses))
    if gap.excludes_zero and abs(gap.estimate) > SMALL_GAP * larger:
        said = True
        name = "squared error" if inference.hits is None else "cross-entropy"
        yield _gap_in_words(name, gap, worse="1" if gap.estimate > 0 else "0")
    if said and sites == 0:
        yield "The model has no BatchNormalization layer: BN cannot be the cause of the gap."


def _as_in_training(rows: list[PhaseRow]) -> Iterator[str]:
    """An evaluate of the model's own that gives what training mode gives, and not inference."""
    dynamic, inference, training = (row.loss for row in rows)
    if dynamic is None or inference is None or training is None:
        return
    gap = abs(training - inference)
    if not gap > SMALL_GAP * max(abs(training), abs(inference)):
        return
    if abs(dynamic - training) <= gap * NEARER and abs(dynamic - inference) >= gap * (1 - NEARER):
        yield (
            f"The model's own evaluate (dynamic) gives a loss of {dynamic:.4g}, which agrees with "
            f"phase 1 ({training:.4g}) and not with phase 0 ({inference:.4g}): it runs in "
            "training mode. Look for training=True in its test_step."
        )


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


def _first_label(y: Any) -> Any:
    """Of several labels one serves to count; ``None`` without an array."""
    found = leaves(y)
    return found[0][1] if found and isinstance(found[0][1], np.ndarray) else None


def _known_outputs(
    labels: Kept, passes: Mapping[str, _Pass]
) -> tuple[Rows, dict[str, Rows]] | None:
    """Labels and outputs of all samples; ``None`` for several outputs or ragged batches."""
    truth = labels.rows()
    found = {phase: rows for phase, done in passes.items() if (rows := done.outputs.rows())}
    if truth is None or len(found) != len(passes):
        return None
    if len({rows.shape[1:] for rows in found.values()}) != 1:
        return None
    if any(len(rows) != len(truth) for rows in found.values()):
        return None
    return truth, {phase: rows.astype(np.float32) for phase, rows in found.items()}


def _dynamic_row(logs: dict[str, float]) -> PhaseRow:
    loss = logs.pop("loss", None)
    return PhaseRow(
        phase="dynamic",
        loss=None if loss is None else float(loss),
        metrics={name: float(value) for name, value in logs.items()},
    )


def _custom(metrics: Metrics, y: Rows, outputs: Rows) -> dict[str, float]:
    if not metrics:
        return {}
    values, given = {}, (y.whole(), outputs.whole())
    for name, metric in metrics.items():
        value = metric(*given)
        if np.ndim(value) != 0:
            raise DataError(
                f"metrics[{name!r}] must return one number. Received: shape {np.shape(value)}"
            )
        values[name] = float(value)
    return values


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
