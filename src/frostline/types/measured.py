"""The nouns of a diagnosis: what was measured, what causes the gap, what a remedy gives.

Frozen dataclasses; no framework, no thresholds, no words but those that name things. Data flow one
way through them: probes and attribution -> :class:`Measurement` -> :class:`Cause` and
:class:`Remedy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from frostline.types import Array, Certainty
from frostline.types.codes import BN_CAUSES, OTHER_CAUSES

Task = Literal["binary", "multiclass", "regression", "unknown"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes:
        estimate: The value on the whole sample.
        low: Lower end.
        high: Upper end.
        level: Confidence level, for example 0.95.
    """

    estimate: float
    low: float
    high: float
    level: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is certain at this level."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """The fixed samples under one condition; nothing of the model changed.

    Attributes:
        name: See :attr:`Measurement.probes`.
        losses: Loss of each sample, shape ``(n,)``, float64; by the model's own loss.
        hits: 1.0 where the predicted class is right, shape ``(n,)``; ``None`` where the task is
            not classification.
        broken: Samples with a NaN or infinite output.
        metrics: Further metrics by name: ``auc``, ``mse``, ``spearman``.
    """

    name: str
    losses: Array = field(repr=False)
    hits: Array | None = field(default=None, repr=False)
    broken: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(np.mean(self.losses))

    @property
    def accuracy(self) -> float | None:
        """Share of hits; ``None`` where the task is not classification."""
        return None if self.hits is None else float(np.mean(self.hits))


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The difference of two probes on the same samples: ``of`` minus ``minus``.

    Attributes:
        name: See :attr:`Measurement.gaps`.
        of: Name of the first probe.
        minus: Name of the second one.
        loss: Difference of the mean loss, paired bootstrap interval over the samples.
        accuracy: The same for accuracy; ``None`` where the task is not classification.
    """

    name: str
    of: str
    minus: str
    loss: Interval
    accuracy: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What one site did in passes of the model itself; flags are not asked.

    Attributes:
        path: The site.
        training: λ that a training-mode pass used: 0 stored statistics, 1 those of the batch;
            ``None`` when unknown (both are equal, or λ is not on the path).
        inference: The same for an inference pass; anything but 0 makes a sample depend on its
            neighbours.
        moves: The training-mode pass would have moved the stored statistics.
        uncounted: It moved them and not the site's own count of updates, as a function does that is
            handed the statistics of a layer.
        calls: How often the passes in training mode and at inference came to it; 0 where that is
            not counted.
    """

    path: str
    training: float | None
    inference: float | None
    moves: bool | None
    uncounted: bool = False
    calls: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteMeasurement:
    """One site's stored statistics beside those of the data.

    All arrays have shape ``(channels,)`` and are float64; variances are biased.

    Attributes:
        path: The site.
        stored_mean: As stored.
        stored_variance: As stored (a torch view converts to the biased one).
        mean: Population mean over the samples, measured with the statistics of all sites before
            already replaced (DESIGN.md section 5, ``sequential``).
        variance: Population variance of the same.
        batch_mean: Population mean in a training-mode pass (λ = 1 at the sites before).
        batch_variance: Mean over batches of the biased variance within a batch at λ = 1: what a
            settled moving average would hold.
        values: Values per channel in one sample (height times width).
        shift: ``|mean − stored_mean| / √(stored_variance + ε)`` per channel.
        ratio: ``(variance + ε) / (stored_variance + ε)`` per channel.
        noise: Standard deviation of batch means over batches, in population standard deviations,
            median over channels, at λ = 1: what one batch is worth.
        within_variance: Population variance within a class, mean over the classes, at λ = 1;
            ``None`` without classes.
        class_distances: Distance of the stored statistics from those of batches of one class each,
            at λ = 1, one per class, in standard deviations, median over channels; NaN for classes
            that were not tried, ``None`` without classes, or where the stored ones suit the data.
        own_batches: Distance of a batch as the data bring it from all of them, in standard
            deviations, beyond that of a mixed one, root mean square; ``None`` where the data came
            in no batches that could be mixed.
        noisy_mean: ``batch_mean`` with dropout and augmentation as in training; ``None`` where
            nothing but BN acts in training only.
        noisy_variance: ``batch_variance`` in the same pass.
        uses: Per use of a shared layer, (mean, variance) of what it saw; empty unless shared.
    """

    path: str
    stored_mean: Array = field(repr=False)
    stored_variance: Array = field(repr=False)
    mean: Array = field(repr=False)
    variance: Array = field(repr=False)
    batch_mean: Array = field(repr=False)
    batch_variance: Array = field(repr=False)
    values: int | None
    shift: Array = field(repr=False)
    ratio: Array = field(repr=False)
    noise: float
    within_variance: Array | None = field(default=None, repr=False)
    class_distances: Array | None = field(default=None, repr=False)
    own_batches: float | None = None
    noisy_mean: Array | None = field(default=None, repr=False)
    noisy_variance: Array | None = field(default=None, repr=False)
    uses: tuple[tuple[Array, Array], ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """How the BN gap splits among the sites: path integral of the gradient (DESIGN.md section 5).

    Attributes:
        paths: The sites, in execution order.
        shares: Share of each in units of the loss, shape ``(sites,)``; they add up to the gap.
        gap: Loss at the training blend minus loss at λ = 0, dropout off, same samples.
        residual: ``|Σ shares − gap| / |gap|``.
        complete: The residual is at most the tolerance.
        nodes: Quadrature nodes of the last try.
        samples: How many samples were differentiated: whole batches, those whose mean gap is
            nearest to that of all.
        groups: Block name -> sum of its sites' shares.
        alone: Path -> loss at the training blend minus that with this site alone at λ = 0, of the
            same sign as its share (top sites only): a check, which does not add up.
        curve: ``(t, loss)`` along λ = t·(training blend), t from 0 to 1.
    """

    paths: tuple[str, ...]
    shares: Array = field(repr=False)
    gap: float
    residual: float
    complete: bool
    nodes: int
    samples: int = 0
    groups: Mapping[str, float] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """The samples at one batch size.

    Attributes:
        batch_size: Samples per batch.
        batch_loss: Mean loss with batch statistics at all sites (λ = 1), dropout off.
        batch_accuracy: Accuracy of the same; ``None`` where the task is not classification.
        inference_loss: Mean loss of the model's own inference at this batch size.
        inference_change: Largest change of a sample's inference output against the base batch
            size, relative to the largest output.
        padded: The same samples have another shape in these batches, as where a collate function
            pads them to the longest of a batch.
    """

    batch_size: int
    batch_loss: float
    batch_accuracy: float | None
    inference_loss: float
    inference_change: float
    padded: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class InputMoments:
    """What the inputs look like, per channel (last axis), shape ``(channels,)`` each.

    ``size`` is the shape of a sample without its channels, ``()`` where samples have several;
    ``samples`` is their number, 0 where it is not known.
    """

    mean: Array
    deviation: Array
    low: Array
    high: Array
    size: tuple[int, ...] = ()
    samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a reference model differs from the model, by layer path.

    Attributes:
        params: Path -> ``‖model − reference‖ / ‖reference‖`` over the layer's trainable kind of
            weights (kernels, biases, gamma, beta).
        statistics: Path of a site -> the same over its stored statistics, in standard deviations
            of the reference (largest channel).
        epsilons: Path of a site -> (model, reference), only where they differ.
        outputs: Largest difference of inference outputs relative to the largest output, on the
            samples; ``None`` when only a weights file was given.
        settings: Path -> what else differs in the layer's configuration, in words.
        stored: Path of a site -> mean and variance that the reference stores.
    """

    params: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, float] = field(default_factory=dict)
    epsilons: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    outputs: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, tuple[Array, Array]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """Everything that was measured of a model on data; causes and rules read nothing else.

    Attributes:
        samples: Number of samples, n.
        batch_size: Samples per batch of all probes but the sweep.
        task: Kind of task, from labels, outputs and loss.
        classes: Number of classes; ``None`` where the task is not classification.
        steps: Training steps since the optimizer was made; ``None`` when not known.
        chance: Accuracy of always guessing the most frequent class; for regression the variance of
            the targets; ``None`` for an unknown task.
        probes: By name, on the same samples in the same order and batches.
            ``inference``: the model's own inference. ``training``: its own training mode, nothing
            updated. ``stored``: λ = 0 at every site, dropout off; the same as inference unless a
            layer uses the batch there as well. ``batch``: λ = 1 at every site, dropout off.
            ``training blend``: λ as training uses it at each site (:attr:`behaviour`), dropout off.
            ``dropout``: λ = 0, everything else as in training. ``population``, ``population
            unfrozen``, ``population frozen``: λ = 0 with exact population statistics at all,
            unfrozen, frozen sites. ``sorted``: λ = 1 in class-sorted batches. ``given``,
            ``given inference``: ``training blend`` and ``inference`` of batches as the data bring
            them, where the sites see them scatter more than mixed ones; other samples, in another
            order. ``epsilon``: inference with the epsilon of the reference, or of most sites, where
            some differ; else with :attr:`epsilon`, where variances are so small that it matters.
            ``validation inference``, ``validation batch``, ``validation population``: the
            validation data, the last with the statistics of the training samples. ``validation
            recalibrated``: with their own, where batches of them do better than inference.
            ``validation resized``: inference, where they are images of another size, in that of the
            training images. ``input NAME``:
            the model's own inference with the best of the :attr:`input_trials`, if one is better
            for sure.
        gaps: By name: ``total`` (training − inference), ``bn`` (training blend − inference),
            ``dropout`` (dropout − inference), ``all batch`` (batch − inference), ``lag``
            (population unfrozen − inference), ``population`` (population − inference), ``sorted``
            (sorted − batch), ``given`` (given − given inference), ``input NAME`` (``input NAME`` −
            inference). Negative: the first one, mostly training mode, has the lower loss. Over the
            samples with a finite loss in both.
        behaviour: Path -> what the site does in training and at inference.
        sites: Path -> stored and population statistics.
        attribution: Of the gap between ``training blend`` and λ = 0; ``None`` without a gap.
        sweep: Batch sizes, ascending.
        neighbours: Largest change of a sample's inference output when it shares a batch with other
            samples, relative to the largest output.
        repeated: The same when its batch is run again as it is; ``None`` where no more than
            rounding changed in other company.
        moved_at_inference: Path -> kind of what moves state of its own in an inference pass, beside
            the sites; looked for where more than rounding changed in other company.
        input: Moments of the data's inputs; ``None`` when there are several inputs.
        validation_input: The same of the validation data.
        history: Metric name -> value per epoch, of the training run; empty when not given.
        difference: To the reference; ``None`` when not given.
        round_trip: Largest change of an inference output after saving and loading, relative to the
            largest output; ``None`` when not asked for.
        confusion: Counts, rows true class, columns predicted by inference; ``None`` where the task
            is not classification.
        relabelled: Accuracy of inference after the best one-to-one renaming of the classes.
        validation_confusion: As ``confusion``, of the validation data.
        noise_layers: Paths of layers that act in training only and are no BN: name -> kind
            (``dropout``, ``augmentation``, ``noise``).
        input_trials: Name of an input transformation -> mean inference loss with it, on the first
            samples; ``x`` is the inputs as they are, on the same samples.
        input_misfits: The same for ``x`` and the best transformation, where one lowers the loss ->
            distance of what the first site sees from its stored statistics, in standard deviations.
        epsilon: The default of a framework that was tried at every site without a reference.
        cost: Seconds per probe, and under ``NAME (passes)`` how often the samples went through the
            model, in passes over all of them (a derivative counts 3).
        skipped: Name of a probe or measurement -> why it was not made.
        notes: What a person should know of the samples and of how they were judged.
    """

    samples: int
    batch_size: int
    task: Task
    classes: int | None = None
    steps: int | None = None
    chance: float | None = None
    probes: Mapping[str, Probe] = field(default_factory=dict)
    gaps: Mapping[str, Gap] = field(default_factory=dict)
    behaviour: Mapping[str, Behaviour] = field(default_factory=dict)
    sites: Mapping[str, SiteMeasurement] = field(default_factory=dict)
    attribution: Attribution | None = None
    sweep: tuple[SweepPoint, ...] = ()
    neighbours: float | None = None
    repeated: float | None = None
    moved_at_inference: Mapping[str, str] = field(default_factory=dict)
    input: InputMoments | None = None
    validation_input: InputMoments | None = None
    history: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    difference: Difference | None = None
    round_trip: float | None = None
    confusion: Array | None = field(default=None, repr=False)
    relabelled: float | None = None
    validation_confusion: Array | None = field(default=None, repr=False)
    noise_layers: Mapping[str, str] = field(default_factory=dict)
    input_trials: Mapping[str, float] = field(default_factory=dict)
    input_misfits: Mapping[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def unused(self) -> frozenset[str]:
        """Paths of the sites that no pass came to, in training mode or at inference.

        A decoder that takes the first stages of an encoder leaves the others as they are.
        """
        return frozenset(
            path
            for path, seen in self.behaviour.items()
            if self.sites
            and path not in self.sites
            and (seen.training, seen.inference, seen.moves) == (None, None, False)
        )


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A ranked explanation of the gap.

    Attributes:
        code: One of :class:`~frostline.types.codes.CauseCode`.
        share: Part of the gap in loss that it explains, in [0, 1] where shares of all causes add
            up to 1 with the part that is not explained; ``None`` where there is no such number.
        sites: Paths of the sites to blame, in execution order; empty for causes that are not BN.
        certainty: ``"is"`` follows from what was measured; ``"may"`` is inferred.
        message: One sentence with the number that decides it.
        evidence: The numbers behind it, by name.
        settle: What further input would settle it; ``None`` when settled.
        findings: Codes of the findings behind it.
    """

    code: str
    share: float | None
    sites: tuple[str, ...]
    certainty: Certainty
    message: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    settle: str | None = None
    findings: tuple[str, ...] = ()

    @property
    def is_bn(self) -> bool:
        """Whether BN is to blame."""
        return self.code in BN_CAUSES


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A repair with its effect, measured on the data without changing the model.

    Attributes:
        name: The repair in a few words: ``recalibrate unfrozen``.
        fix: The repair as a word, as in :class:`~frostline.types.Finding`.
        causes: Codes of the causes that it is for.
        text: What it does, one sentence.
        python: The line to paste; ``None`` when there is none.
        shell: The command to paste; ``None`` when there is none.
        before: Metric name -> value now: ``loss``, ``accuracy``.
        after: Metric name -> value with the remedy, measured.
        change: ``after − before`` of the loss with its interval; ``None`` when not measured.
        closed: Share of the closable gap that it closes: 1 means that inference is then as good as
            the best of what training mode and the other remedies reach.
        recommended: It helps, and its interval excludes 0.
        note: What to know before using it; ``None`` when nothing.
    """

    name: str
    fix: str
    causes: tuple[str, ...]
    text: str
    python: str | None = None
    shell: str | None = None
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    change: Interval | None = None
    closed: float | None = None
    recommended: bool = False
    note: str | None = None


def plain(value: Any) -> Any:
    """Turn arrays and numpy numbers of a measurement into lists and numbers, for JSON."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


__all__ = [
    "BN_CAUSES",
    "OTHER_CAUSES",
    "Attribution",
    "Behaviour",
    "Cause",
    "Difference",
    "Gap",
    "InputMoments",
    "Interval",
    "Measurement",
    "Probe",
    "Remedy",
    "SiteMeasurement",
    "SweepPoint",
    "Task",
    "plain",
]
