"""The bench: a model and fixed samples, on which any condition can be tried without changing it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from frostline.adapters import Adapter, Forward, Outcome
from frostline.adapters.protocol import Condition
from frostline.data.arrays import leaves
from frostline.data.batch import Batch
from frostline.graph.selection import GROUPS
from frostline.measure.judged import infer_task, judge, outside_unit
from frostline.measure.recalibration import ReadBatches, measured
from frostline.measure.samples import Samples
from frostline.numerics.stats import Moments
from frostline.types import Array, DataError, ModelError, as_float64
from frostline.types.measured import Probe, Task

#: Bytes of activations that wait in memory between two stages of a recalibration on trial; the rest
#: waits on disk. More took a diagnosis of ResNet50 above its aim of memory, fewer cost one of
#: EfficientNet-Lite0 time to read and write (``benchmarks/bench_diagnose.py`` prints both).
WAITING = 1 << 27

#: Passes over the samples that settle statistics where only the user's step can run the model, and
#: the move, in standard deviations, below which they have settled.
MOST_PASSES, SETTLED = 12, 1e-4

#: Path -> (mean, biased variance), shape ``(channels,)`` each, float64.
Statistics = Mapping[str, tuple[Array, Array]]

#: Paths in execution order; those of one stage do not depend on each other.
Stages = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A model, fixed samples, and what is known of how to judge its outputs.

    The model is the same before and after each method, bit for bit. Probes with equal conditions
    on the bench's own batches are run once.

    Attributes:
        adapter: The model.
        forward: Passes with λ and statistics as arguments; one λ per entry of its ``paths``.
        samples: The samples, mixed at random, in batches of one size.
        task: Kind of task.
        logits: The outputs come before the sigmoid or softmax.
        labels: Class index of each sample, or its target in a regression; ``None`` for other tasks.
        blend_in_training: λ of each site in training; see
            :attr:`frostline.types.measured.Measurement.behaviour`.
        unit: What a loss is of: ``"sample"`` or ``"batch"``; set by :func:`make_bench`.
        step: The user's own ``step(model, batch)``, where it calls the model; ``None``: not.
        noisy: The model has layers but BN that act in training only; without them dropout is not
            tried a second time.
        cost: Seconds per probe, and under ``NAME (passes)`` how often the samples went through the
            model, in units of one pass over all of them.
    """

    adapter: Adapter
    forward: Forward
    samples: Samples
    task: Task = "unknown"
    logits: bool = False
    labels: Array | None = None
    blend_in_training: Array | None = None
    unit: Literal["sample", "batch"] = "sample"
    noisy: bool = True
    step: Any = None
    cost: dict[str, float] = field(default_factory=dict)
    _probes: dict[Any, Probe] = field(default_factory=dict)
    _populations: dict[tuple[str, ...], tuple[Statistics, Stages]] = field(default_factory=dict)
    _meters: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """The sites that can be blended, in execution order."""
        return self.forward.paths

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The samples, in batches."""
        return self.samples.batches

    @property
    def channels(self) -> int:
        """Axis of the channels in an input; see :class:`frostline.adapters.Adapter`."""
        return self.adapter.channel_axis

    @property
    def batch_size(self) -> int:
        """Samples per batch."""
        return self.samples.batch_size

    @property
    def calls(self) -> dict[str, int]:
        """Path -> how often one pass calls the site, in a graph or in a loop that a probe saw."""
        seen = getattr(self.forward, "calls", {})
        return {
            site.path: max(1, site.calls, seen.get(site.path, 1)) for site in self.adapter.sites()
        }

    @property
    def has_classes(self) -> bool:
        """Samples can be put into batches by class."""
        classes = self.task in ("binary", "multiclass") and self.labels is not None
        return classes and self.samples.divisible

    def by_batch(self, probe: Probe) -> Array:
        """Mean loss of each batch of a probe on the bench's own batches, shape ``(batches,)``."""
        losses = as_float64(probe.losses)
        if self.unit == "batch":
            return losses
        ends = np.cumsum([part.count or 1 for part in self.batches])[:-1]
        return np.array([part.mean() for part in np.split(losses, ends)])

    # --- probes -------------------------------------------------------------------------------

    def probe(
        self,
        name: str,
        *,
        blend: Any = 0.0,
        statistics: Statistics | None = None,
        dropout: bool = False,
        batches: Iterable[Batch] | None = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> Probe:
        """Try the samples under one condition.

        Args:
            name: What to call it.
            blend: λ of all sites, of each (shape ``(sites,)``), or path -> λ, 0 where not named.
            statistics: Path -> (mean, biased variance) to use in the place of what is stored.
            dropout: Run everything but BN as in training.
            batches: Other batches than the bench's own.
            transform: Applied to the inputs of each batch before they enter the model.
        """
        shares = self.blend(blend)
        dropout = dropout and self.noisy
        key = self.condition(shares, statistics, dropout)
        own = batches is None and transform is None
        if own and key in self._probes:
            return replace(self._probes[key], name=name)

        run = self.blended(shares, statistics=statistics, dropout=dropout, transform=transform)
        probe, _, _ = self.passes(name, run, self.batches if batches is None else batches)
        return self.remember(key, probe) if own else probe

    def nominal(self, training: bool) -> Probe:
        """The model's own inference, or its own training mode with nothing updated."""
        name = "training" if training else "inference"
        key = ("own", training)
        if key not in self._probes:
            self.remember(key, self.own_probe(name, self.batches, training=training))
        return self._probes[key]

    def own_probe(
        self,
        name: str,
        batches: Iterable[Batch],
        *,
        training: bool = False,
        transform: Callable[[Any], Any] | None = None,
    ) -> Probe:
        """The model's own pass over any batches, with the inputs transformed if so wished."""
        probe, _, _ = self.passes(name, self.own(training, transform), batches)
        return probe

    def own(
        self, training: bool, transform: Callable[[Any], Any] | None = None
    ) -> Callable[[Batch, int], Outcome]:
        """What :meth:`passes` runs for the model's own passes."""

        def run(batch: Batch, number: int) -> Outcome:
            return self.forward.own(
                _transformed(batch, transform), training=training, number=number
            )

        return run

    def blended(
        self,
        blend: Any,
        *,
        statistics: Statistics | None = None,
        dropout: bool = False,
        record: bool = False,
        transform: Callable[[Any], Any] | None = None,
    ) -> Callable[[Batch, int], Outcome]:
        """What :meth:`passes` runs at some λ; ``record`` gives the moments that the sites see."""
        shares = self.blend(blend)

        def run(batch: Batch, number: int) -> Outcome:
            return self.forward.outcome(
                _transformed(batch, transform),
                Condition(
                    shares, statistics=statistics, dropout=dropout, number=number, record=record
                ),
            )

        return run

    def condition(
        self, blend: Any, statistics: Statistics | None = None, dropout: bool = False
    ) -> Any:
        """Key of a condition on the bench's own batches."""
        return self.blend(blend).tobytes(), _key(statistics), dropout

    def remember(self, key: Any, probe: Probe) -> Probe:
        """Answer later questions for the same condition with this probe."""
        self._probes[key] = probe
        return probe

    def passes(
        self,
        name: str,
        run: Callable[[Batch, int], Outcome],
        batches: Iterable[Batch],
        *,
        keep: int = 0,
    ) -> tuple[Probe, tuple[Array, ...] | None, tuple[Mapping[str, Moments], ...]]:
        """Run ``run(batch, number)`` over batches.

        Args:
            name: Of the probe.
            run: What to do with a batch.
            batches: The batches.
            keep: Outputs of so many samples, at least, are returned; where they are judged (one
                output with labels) they are those of all samples.

        Returns:
            What it gave as a probe; the outputs, one array each, ``None`` where they are not kept
            or do not fit together; and the recorded moments of each batch.
        """
        begin, count = time.perf_counter(), 0
        losses, outputs, labels, moments = [], [], [], []
        for number, batch in enumerate(batches):
            outcome = run(batch, number)
            losses.append(outcome.losses)
            if self.task != "unknown" or count < keep:
                outputs.append(outcome.outputs)
            labels.append(batch.y)
            moments.append(outcome.moments)
            count += batch.count or 1
        if not losses:
            raise DataError(f"probe '{name}' got no batch. Received: no samples")
        joined = joined_arrays(outputs) if outputs else None
        truth = joined_arrays(labels) if self.task != "unknown" else None
        whole = None if joined is None or truth is None else (only(joined), only(truth))
        found = self.judged(name, np.concatenate(losses), *(whole or (None, None)))
        self.spend(name, time.perf_counter() - begin, count / len(self.samples))
        return found, joined, tuple(moments)

    def judged(self, name: str, losses: Array, outputs: Any, labels: Any) -> Probe:
        """A probe from losses, outputs and labels; the latter are ``None`` for unknown tasks."""
        broken = ~np.isfinite(losses)
        hits, metrics = None, {}
        if outputs is not None and labels is not None:
            flat = as_float64(outputs).reshape(len(outputs), -1)
            if self.unit == "sample":
                broken = broken | ~np.isfinite(flat).all(axis=1)
            with np.errstate(invalid="ignore", over="ignore"):
                result = judge(labels, outputs, self.task, self.logits)
            hits = None if result.hits is None else as_float64(result.hits)
            metrics = {k: v for k, v in result.metrics.items() if k != "accuracy"}
        return Probe(
            name=name,
            losses=as_float64(losses),
            hits=hits,
            broken=int(broken.sum()),
            metrics=metrics,
        )

    def spend(self, name: str, seconds: float, passes: float) -> None:
        """Add to the cost of a probe."""
        self.cost[name] = self.cost.get(name, 0.0) + seconds
        key = f"{name} (passes)"
        self.cost[key] = self.cost.get(key, 0.0) + passes

    def blend(self, blend: Any) -> Array:
        """λ of each site, shape ``(sites,)``, from one number, one per site, or path -> λ.

        Raises:
            ModelError: An unknown path.
            DataError: Another shape.
        """
        if isinstance(blend, Mapping):
            unknown = [path for path in blend if path not in self.paths]
            if unknown:
                raise ModelError(f"no BN layer to blend has this path. Received: {unknown[0]!r}")
            return np.array([float(blend.get(path, 0.0)) for path in self.paths])
        values = as_float64(blend)
        if values.shape not in ((), (len(self.paths),)):
            raise DataError(
                f"blend must be one number, one per site ({len(self.paths)}), or path -> λ. "
                f"Received: shape {values.shape}"
            )
        return np.broadcast_to(values, (len(self.paths),)).copy()

    # --- population statistics ----------------------------------------------------------------

    def population(self, sites: str | Sequence[str] = "all") -> Statistics:
        """Exact population statistics of the samples at the chosen sites, all others as stored.

        Site by site, each with the statistics of those before already replaced (DESIGN.md section
        5, ``sequential``).

        Args:
            sites: ``"all"``, ``"unfrozen"``, ``"frozen"``, or paths.

        Returns:
            Path -> (mean, biased variance); empty when no site is chosen.

        Raises:
            DataError: No batch is finite.
            ModelError: A chosen site is not used.
        """
        chosen = self._chosen(sites)
        if not chosen:
            return {}
        if chosen not in self._populations:
            begin = time.perf_counter()
            known, passes = self._populations.get(self.paths), 0.0
            if known is not None and _depend_on_none_but(chosen, known[1]):
                found = {path: known[0][path] for path in chosen if path in known[0]}
                self._populations[chosen] = found, known[1]
            elif self.meter() is None:
                found, passes = self._repeated(chosen)
                self._populations[chosen] = found, ()
            else:
                self._populations[chosen], passes = self._measured(chosen), 1.0
            name = f"statistics of {sites if isinstance(sites, str) else 'chosen'} sites"
            self.spend(name, time.perf_counter() - begin, passes)
        return self._populations[chosen][0]

    def _measured(self, chosen: tuple[str, ...]) -> tuple[Statistics, Stages]:
        meter = self.meter()
        restore = meter.snapshot()
        try:
            source = ReadBatches(list(self.batches), self.batch_size)
            found = measured(meter, chosen, source, memory_limit=WAITING)
        finally:
            restore()
        moments = found.moments.items()
        return {path: (moment.mean, moment.variance) for path, moment in moments}, found.stages

    def _repeated(self, chosen: tuple[str, ...]) -> tuple[dict[str, tuple[Array, Array]], float]:
        """Repeat inference with the moments of the previous pass until they stop moving."""
        found: dict[str, tuple[Array, Array]] = {}
        run = self.blended(dict.fromkeys(chosen, 1.0), record=True)
        passes = 0.0
        for _ in range(MOST_PASSES):
            passes += 1
            _, _, seen = self.passes("statistics by passes", run, self.batches)
            before, found = found, {}
            for path in chosen:
                parts = [moments[path] for moments in seen if path in moments]
                if parts:
                    merged = functools.reduce(Moments.merge, parts)
                    found[path] = (merged.mean, merged.variance)
            if before and max(map(_moved, before.values(), found.values()), default=0) <= SETTLED:
                break
            run = self.blended(0.0, statistics=found, record=True)
        return found, passes

    def meter(self) -> Any:
        """One for all groups of sites and all trials: what it has compiled serves each of them.

        ``None``: only the user's step can run the model, and not a meter.
        """
        if "all" not in self._meters:
            given = {} if self.step is None else {"step": self.step}
            try:
                self._meters["all"] = self.adapter.meter(self.paths, **given)
            except ModelError:
                if self.step is None:
                    raise
                self._meters["all"] = None
        return self._meters["all"]

    def _chosen(self, sites: str | Sequence[str]) -> tuple[str, ...]:
        if not isinstance(sites, str) or sites not in GROUPS:
            wanted = {sites} if isinstance(sites, str) else set(sites)
            unknown = sorted(wanted - set(self.paths))
            if unknown:
                raise ModelError(f"no BN layer to measure has this path. Received: {unknown[0]!r}")
            return tuple(path for path in self.paths if path in wanted)
        frozen = {site.path: site.stats_frozen for site in self.adapter.sites()}
        return tuple(
            path for path in self.paths if sites == "all" or frozen[path] == (sites == "frozen")
        )


def task_of(
    outputs: Any,
    labels: Any,
    objective: tuple[str | None, bool | None],
    losses: Array | None = None,
) -> tuple[Task, bool]:
    """Task and whether the outputs are logits, from one output array and its labels.

    Args:
        outputs: All outputs in one array; ``None`` with several outputs.
        labels: The labels in one array.
        objective: Snake-case name of the loss and its ``from_logits``.
        losses: Loss of each sample; ``None``: not known.
    """
    if outputs is None or labels is None:
        return "unknown", False
    name, from_logits = objective
    task = infer_task(labels, outputs, name, losses)
    return task, bool(from_logits) or outside_unit(outputs)


def joined_arrays(parts: Sequence[Any]) -> tuple[Array, ...] | None:
    """The arrays of nested structures, each in one; ``None`` where they do not fit together."""
    columns = [[leaf for _, leaf in leaves(part)] for part in parts]
    if not columns or not columns[0] or len({len(column) for column in columns}) != 1:
        return None
    joined = []
    for arrays in zip(*columns, strict=True):
        if not all(isinstance(array, np.ndarray) and array.ndim for array in arrays):
            return None
        if len({array.shape[1:] for array in arrays}) != 1:
            return None
        joined.append(np.concatenate(arrays))
    return tuple(joined)


def only(arrays: tuple[Array, ...] | None) -> Array | None:
    """The array where there is just one."""
    return arrays[0] if arrays is not None and len(arrays) == 1 else None


def _moved(old: tuple[Array, Array], new: tuple[Array, Array]) -> float:
    """How far statistics moved, in standard deviations."""
    scale = np.sqrt(np.maximum(new[1], np.finfo(np.float64).tiny))
    return float(np.max([np.abs(new[0] - old[0]) / scale, np.abs(new[1] - old[1]) / scale**2]))


def _transformed(batch: Batch, transform: Callable[[Any], Any] | None) -> Batch:
    return batch if transform is None else replace(batch, x=transform(batch.x))


def _key(statistics: Statistics | None) -> Any:
    if not statistics:
        return None
    return tuple(
        (path, as_float64(mean).tobytes(), as_float64(variance).tobytes())
        for path, (mean, variance) in sorted(statistics.items())
    )


def _depend_on_none_but(chosen: Sequence[str], stages: Stages) -> bool:
    """Whether no other site comes before one of these, so that others' statistics do not matter."""
    wanted, others = set(chosen), False
    for stage in stages:
        here = set(stage)
        if here & wanted and (others or here - wanted):
            return False
        others = others or bool(here - wanted)
    return True


__all__ = ["GROUPS", "Bench", "Statistics", "joined_arrays", "only", "task_of"]
