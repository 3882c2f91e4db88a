"""The bench: a model and fixed samples, on which any condition can be tried without changing it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from frostline.data import Batch, leaves
from frostline.measure.phases import infer_task, judge
from frostline.measure.samples import Samples
from frostline.measurement import Probe, Task
from frostline.models import Forward, ModelView, Outcome
from frostline.recalibration import recalibrated
from frostline.selection import GROUPS
from frostline.stats import Moments
from frostline.types import Array, DataError, ModelError, as_float64

#: Path -> (mean, biased variance), shape ``(channels,)`` each, float64.
Statistics = Mapping[str, tuple[Array, Array]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A model, fixed samples, and what is known of how to judge its outputs.

    The model is the same before and after each method, bit for bit. Probes with equal conditions
    on the bench's own batches are run once.

    Attributes:
        view: The model.
        forward: Passes with λ and statistics as arguments; one λ per entry of its ``paths``.
        samples: The samples, mixed at random, in batches of one size.
        task: Kind of task.
        logits: The outputs come before the sigmoid or softmax.
        labels: Labels of all samples in one array; ``None`` with several outputs.
        noisy: The model has layers but BN that act in training only; without them dropout is not
            tried a second time.
        cost: Seconds per probe, and under ``NAME (passes)`` how often the samples went through the
            model, in units of one pass over all of them.
    """

    view: ModelView
    forward: Forward
    samples: Samples
    task: Task = "unknown"
    logits: bool = False
    labels: Array | None = None
    noisy: bool = True
    cost: dict[str, float] = field(default_factory=dict)
    _probes: dict[Any, Probe] = field(default_factory=dict)
    _populations: dict[tuple[str, ...], dict[str, tuple[Array, Array]]] = field(
        default_factory=dict
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The sites that can be blended, in execution order."""
        return self.forward.paths

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The samples, in batches."""
        return self.samples.batches

    @property
    def batch_size(self) -> int:
        """Samples per batch."""
        return self.samples.batch_size

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
        weights = self.blend(blend)
        dropout = dropout and self.noisy
        key = (weights.tobytes(), _key(statistics), dropout)
        own = batches is None and transform is None
        if own and key in self._probes:
            return replace(self._probes[key], name=name)

        def run(batch: Batch, step: int) -> Outcome:
            x = batch.x if transform is None else transform(batch.x)
            return self.forward.outcome(
                x,
                batch.y,
                batch.sample_weight,
                blend=weights,
                statistics=statistics,
                dropout=dropout,
                step=step,
            )

        probe, _, _ = self.passes(name, run, self.batches if batches is None else batches)
        if own:
            self._probes[key] = probe
        return probe

    def nominal(self, training: bool) -> Probe:
        """The model's own inference, or its own training mode with nothing updated."""
        key = ("own", training)
        name = "training" if training else "inference"
        if key not in self._probes:

            def run(batch: Batch, step: int) -> Outcome:
                return self.forward.own(
                    batch.x, batch.y, batch.sample_weight, training=training, step=step
                )

            self._probes[key], _, _ = self.passes(name, run, self.batches)
        return self._probes[key]

    def passes(
        self, name: str, run: Callable[[Batch, int], Outcome], batches: Iterable[Batch]
    ) -> tuple[Probe, Any, tuple[Mapping[str, Moments], ...]]:
        """Run ``run(batch, step)`` over batches.

        Returns:
            What it gave as a probe; all outputs in one array, ``None`` with several outputs; and
            the recorded moments of each batch.
        """
        begin, count = time.perf_counter(), 0
        losses, outputs, labels, moments = [], [], [], []
        for step, batch in enumerate(batches):
            outcome = run(batch, step)
            losses.append(outcome.losses)
            outputs.append(outcome.outputs)
            labels.append(batch.y)
            moments.append(outcome.moments)
            count += len(batch)
        if not losses:
            raise DataError(f"probe '{name}' got no batch. Received: no samples")
        joined = joined_arrays(outputs)
        found = self.judged(name, np.concatenate(losses), joined, joined_arrays(labels))
        self.spend(name, time.perf_counter() - begin, count / len(self.samples))
        return found, joined, tuple(moments)

    def judged(self, name: str, losses: Array, outputs: Any, labels: Any) -> Probe:
        """A probe from losses, outputs and labels; the latter are ``None`` with several outputs."""
        broken = ~np.isfinite(losses)
        hits, metrics = None, {}
        if outputs is not None and labels is not None:
            flat = as_float64(outputs).reshape(len(outputs), -1)
            broken = broken | ~np.isfinite(flat).all(axis=1)
            if self.task != "unknown":
                with np.errstate(invalid="ignore", over="ignore"):
                    result = judge(labels, outputs, self.task, self.logits)
                hits = result.hits
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
            meter = _meter(self.view, chosen)
            restore = meter.snapshot()
            try:
                recalibrated(meter, chosen, list(self.batches))
                self._populations[chosen] = {path: meter.stored(path) for path in chosen}
            finally:
                restore()
            name = f"statistics of {sites if isinstance(sites, str) else 'chosen'} sites"
            self.spend(name, time.perf_counter() - begin, 1.0)
        return self._populations[chosen]

    def _chosen(self, sites: str | Sequence[str]) -> tuple[str, ...]:
        if not isinstance(sites, str) or sites not in GROUPS:
            wanted = {sites} if isinstance(sites, str) else set(sites)
            unknown = sorted(wanted - set(self.paths))
            if unknown:
                raise ModelError(f"no BN layer to measure has this path. Received: {unknown[0]!r}")
            return tuple(path for path in self.paths if path in wanted)
        frozen = {site.path: site.stats_frozen for site in self.view.sites()}
        return tuple(
            path for path in self.paths if sites == "all" or frozen[path] == (sites == "frozen")
        )


def task_of(
    outputs: Any, labels: Any, objective: tuple[str | None, bool | None]
) -> tuple[Task, bool]:
    """Task and whether the outputs are logits, from one output array and its labels.

    Args:
        outputs: All outputs in one array; ``None`` with several outputs.
        labels: The labels in one array.
        objective: Snake-case name of the loss and its ``from_logits``.
    """
    if outputs is None or labels is None:
        return "unknown", False
    name, from_logits = objective
    task = infer_task(labels, outputs, name)
    finite = outputs[np.isfinite(outputs)]
    outside = bool(finite.size and (finite.min() < 0 or finite.max() > 1))
    return task, bool(from_logits) or outside


def joined_arrays(parts: Sequence[Any]) -> Any:
    """One array of all parts; ``None`` unless each part is one array of the same shape."""
    flat = [leaves(part) for part in parts]
    if any(len(each) != 1 for each in flat):
        return None
    arrays = [each[0][1] for each in flat]
    if len({array.shape[1:] for array in arrays}) != 1:
        return None
    return np.concatenate(arrays)


def _key(statistics: Statistics | None) -> Any:
    if not statistics:
        return None
    return tuple(
        (path, as_float64(mean).tobytes(), as_float64(variance).tobytes())
        for path, (mean, variance) in sorted(statistics.items())
    )


def _meter(view: ModelView, paths: Sequence[str]) -> Any:
    make = getattr(view, "meter", None)
    if make is not None:
        return make(paths)
    from frostline.models.keras_moments import KerasMoments

    return KerasMoments(view.model, paths)


__all__ = ["GROUPS", "Bench", "Statistics", "joined_arrays", "task_of"]
