"""Which sites, which batches, what to store: the part of recalibration that knows no framework.

``sequential`` goes through the model stage by stage. A stage takes the activations that the one
before left, batch by batch, measures its sites and passes on what later stages need; what waits
between two stages lies in memory up to a limit and beyond it in a temporary folder. Every operation
of the model runs once, as in one forward pass.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from frostline.adapters import Meter, ModelView
from frostline.data.batches import Batch, batches, leaves, require_reiterable
from frostline.graph.schedule import Program
from frostline.graph.selection import GROUPS, select
from frostline.measure.spool import Spool, Workspace
from frostline.numerics.stats import Moments
from frostline.types import Array, DataError, ModelError

Method = Literal["sequential", "batch"]

#: Bytes of activations kept in memory between two stages; the rest waits on disk.
MEMORY_LIMIT = 1 << 30

#: A layer that is used again behind its own output is measured until its statistics move by no more
#: than this, in standard deviations (and relative, for the variance): float32 holds no more.
TOLERANCE = 1e-6

#: Such a layer that has not settled after so many passes never will; the change says so.
MAX_PASSES = 50

_METHODS = ("sequential", "batch")
_LOG = logging.getLogger("frostline")

Seen = Mapping[str, Sequence[Moments]]


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far one site's stored statistics moved.

    Attributes:
        path: The site.
        mean: Largest move of a channel's mean, in its new standard deviations.
        variance: Largest factor between a channel's old and new variance, at least 1.
        count: Values per channel that the new statistics rest on.
    """

    path: str
    mean: float
    variance: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """What a recalibration did, in numbers.

    Attributes:
        method: ``"sequential"`` or ``"batch"``.
        shifts: One per site, in execution order.
        samples: Samples that entered the statistics.
        batches: Batches read.
        skipped: Batch number -> why it was left out.
        passes: Passes over the data or over stored activations that the longest stage took; 1
            unless a part of the model has no graph or a layer is used behind itself.
        notes: What else a person should know.
    """

    method: Method
    shifts: tuple[Shift, ...]
    samples: int
    batches: int
    skipped: Mapping[int, str] = field(default_factory=dict)
    passes: int = 1
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """What changed, in numbers, in one sentence."""
        mean = max(self.shifts, key=lambda shift: shift.mean)
        variance = max(self.shifts, key=lambda shift: shift.variance)
        sites = "1 site" if len(self.shifts) == 1 else f"{len(self.shifts)} sites"
        used = self.batches - len(self.skipped)
        return (
            f"recalibrated {sites} ({self.method}) on {self.samples:,} samples in {used} "
            f"{'batch' if used == 1 else 'batches'}: largest shift of a mean "
            f"{mean.mean:.3g} standard deviations at '{mean.path}', largest change of a variance "
            f"by a factor of {variance.variance:.3g} at '{variance.path}'"
        )

    def remarks(self) -> tuple[str, ...]:
        """What a person should know beside it: batches left out, repeated passes."""
        remarks = []
        if self.skipped:
            few = itertools.islice(self.skipped.items(), 3)
            shown = "; ".join(f"batch {index}: {why}" for index, why in few)
            more = len(self.skipped) - 3
            remarks.append(
                f"skipped {len(self.skipped)} of {self.batches} batches ({shown}"
                f"{f'; and {more} more' if more > 0 else ''})"
            )
        if self.passes > 1:
            remarks.append(
                f"took {self.passes} passes over a part of the model that has no graph or uses a "
                "layer behind its own output"
            )
        return (*remarks, *self.notes)


def recalibrate_view(
    view: ModelView, data: Any, *, sites: Any, method: Any, batch_size: int
) -> tuple[Recalibration, Callable[[], None]]:
    """Recalibrate the model behind a view; see :func:`frostline.recalibrate`.

    Returns:
        What was done, and a function that puts the old statistics back, bit for bit.
    """
    if method not in _METHODS:
        raise ModelError(f"method must be 'sequential' or 'batch'. Received: method={method!r}")
    chosen = select(view.sites(), sites)
    foreign = [site.path for site in chosen if site.kind.startswith("torch.")]
    own = [site.path for site in chosen if site.path not in foreign]
    named = not isinstance(sites, str) or sites not in GROUPS
    if foreign and (named or not own):
        raise ModelError(
            f"'{foreign[0]}' is a torch module inside a TorchModuleWrapper, which cannot be "
            f"recalibrated. Received: sites={sites!r}"
        )
    meter = view.meter(own)
    undo = meter.snapshot()
    done = recalibrated(meter, own, data, method=method, batch_size=batch_size)
    if foreign:
        note = f"left alone: {len(foreign)} torch module(s) inside TorchModuleWrapper"
        done = replace(done, notes=(*done.notes, note))
    return done, undo


def recalibrated(
    meter: Meter,
    paths: Sequence[str],
    data: Any,
    *,
    method: Method = "sequential",
    batch_size: int = 32,
    memory_limit: int = MEMORY_LIMIT,
) -> Recalibration:
    """Measure the population statistics of chosen sites of the meter and store them.

    On any exception, KeyboardInterrupt included, the statistics are put back before it propagates.

    Args:
        meter: The model's sites.
        paths: The sites, in execution order; all of the meter's or some of them.
        data: Anything that :func:`frostline.data.batches.batches` reads.
        method: ``"sequential"`` or ``"batch"``.
        batch_size: Samples per batch for data given as arrays.
        memory_limit: Bytes of activations to hold in memory at a time.

    Raises:
        ModelError: Unknown method.
        DataError: No finite batch; or a one-shot iterator where the data must be read again.
        OutputError: The temporary folder is full.
    """
    if method not in _METHODS:
        raise ModelError(f"method must be 'sequential' or 'batch'. Received: method={method!r}")
    before = {path: meter.stored(path) for path in paths}
    run = _Run(meter, data, batch_size, paths)
    restore = meter.snapshot()
    try:
        if method == "batch":
            run.batch_statistics(paths)
        else:
            with Workspace(memory_limit) as workspace:
                run.sequential(workspace)
    except BaseException:  # KeyboardInterrupt too: the model is the user's
        restore()
        raise
    return Recalibration(
        method=method,
        shifts=tuple(_shift(meter, path, before[path], run.counts[path]) for path in paths),
        samples=sum(size for index, size in run.sizes.items() if index not in run.skipped),
        batches=len(run.sizes),
        skipped=dict(sorted(run.skipped.items())),
        passes=run.passes,
        notes=tuple(run.notes),
    )


def _shift(meter: Meter, path: str, before: tuple[Array, Array], count: int) -> Shift:
    mean, variance, epsilon = *meter.stored(path), meter.epsilon(path)
    # A dead channel has variance 0; epsilon is what normalises it then.
    moved = np.abs(mean - before[0]) / np.sqrt(variance + epsilon)
    ratio = np.abs(np.log((variance + epsilon) / (np.maximum(before[1], 0) + epsilon)))
    return Shift(
        path=path, mean=float(moved.max()), variance=math.exp(float(ratio.max())), count=count
    )


class _Run:
    """One recalibration: what was read, skipped and counted so far."""

    def __init__(self, meter: Meter, data: Any, batch_size: int, paths: Sequence[str]) -> None:
        self.meter = meter
        self.chosen = frozenset(paths)
        self.data = data
        self.batch_size = batch_size
        self.sizes: dict[int, int] = {}
        self.skipped: dict[int, str] = {}
        self.counts: dict[str, int] = {}
        self.notes: list[str] = []
        self.passes = 1

    def read(self) -> Iterator[tuple[int, Batch]]:
        """Finite batches with their numbers."""
        for index, batch in enumerate(batches(self.data, batch_size=self.batch_size)):
            self.sizes[index] = len(batch)
            name = _not_finite(batch)
            if name is None:
                yield index, batch
            else:
                self.skipped[index] = f"x{name} has NaN or infinite values"

    # --- method "batch" -----------------------------------------------------------------------

    def batch_statistics(self, paths: Sequence[str]) -> None:
        measure = self.meter.batch()
        total = _Total(paths)
        for index, batch in self.read():
            total.add(index, measure(batch.x))
        self.skipped |= total.skipped
        self.store(total)

    # --- method "sequential" ------------------------------------------------------------------

    def sequential(self, workspace: Workspace) -> None:
        stream = self.read()
        first = next(stream, None)
        if first is None:
            raise DataError(self.nothing_finite())
        programs = self.meter.programs(len(self.meter.start(first[1].x)))
        if programs[0].passes != 1 or programs[0].closed:
            require_reiterable(self.data, "recalibrate(method='sequential') on this model")
        opening: Iterator[tuple[int, Batch]] | None = itertools.chain([first], stream)

        def inputs() -> Iterator[tuple[int, tuple[Array, ...]]]:
            nonlocal opening
            source, opening = opening if opening is not None else self.read(), None
            for index, batch in source:
                yield index, self.meter.start(batch.x)

        waiting: Spool | None = None
        for number, program in enumerate(programs):
            last = number == len(programs) - 1
            _LOG.debug("stage %d of %d: %s", number + 1, len(programs), program.paths)
            following = None if last else workspace.spool()
            source = inputs if waiting is None else waiting.read
            if waiting is not None and program.passes == 1 and not program.closed:
                source = waiting.drain
            self.run_stage(program, source, following)
            if waiting is not None:
                waiting.clear()
            waiting = following

    def run_stage(
        self,
        program: Program,
        source: Callable[[], Iterator[tuple[int, tuple[Array, ...]]]],
        following: Spool | None,
    ) -> None:
        """Measure and store one stage's sites, again and again where they hang on each other."""
        stage = self.meter.stage(program)
        for number in itertools.count(1):
            total = _Total([path for path in program.paths if path in self.chosen])
            for index, values in source():
                if index in self.skipped:
                    continue
                outputs, seen = stage(values)
                if total.add(index, seen) and following is not None and number == 1:
                    following.append(index, outputs)
            if not total.count:
                raise DataError(self.nothing_finite(total.skipped))
            before = {path: self.meter.stored(path) for path in total.moments}
            self.store(total)
            self.passes = max(self.passes, number)
            if self.settled(program, before, number, total.reused):
                break
        self.skipped |= total.skipped

    def settled(self, program: Program, before: dict[str, Any], number: int, reused: bool) -> bool:
        chain = program.passes is not None and not (program.closed and reused)
        if (chain and program.passes == number) or not before:
            return True
        moved = [
            np.max([np.max(np.abs(new - old) / scale), np.max(np.abs(wide - narrow) / scale**2)])
            for path in before
            for (old, narrow), (new, wide) in [(before[path], self.meter.stored(path))]
            for scale in [np.sqrt(wide + self.meter.epsilon(path))]
        ]
        if max(moved) <= (0.0 if chain else TOLERANCE):
            return True
        if not chain and number >= MAX_PASSES:
            self.notes.append(
                f"'{list(before)[int(np.argmax(moved))]}' is used behind its own output and did "
                f"not settle in {MAX_PASSES} passes: its statistics still moved by "
                f"{max(moved):.2g} standard deviations"
            )
            return True
        return False

    # --- both ---------------------------------------------------------------------------------

    def store(self, total: _Total) -> None:
        if not total.count:
            raise DataError(self.nothing_finite(total.skipped))
        for path, moments in total.moments.items():
            if moments is None or moments.count == 0:
                raise DataError(f"Site '{path}' saw no value: every element was masked.")
        for path, moments in total.moments.items():
            if moments is not None:
                self.meter.store(path, moments.mean, moments.variance)
                self.counts[path] = moments.count

    def nothing_finite(self, late: Mapping[int, str] | None = None) -> str:
        reasons = {**self.skipped, **(late or {})}
        shown = "; ".join(f"batch {index}: {why}" for index, why in list(reasons.items())[:3])
        return (
            f"none of the {len(self.sizes)} batches is finite, so there is nothing to store "
            f"({shown}). The model is unchanged."
        )


class _Total:
    """Moments of some sites, merged over batches; a batch enters as a whole or not at all."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.moments: dict[str, Moments | None] = dict.fromkeys(paths)
        self.skipped: dict[int, str] = {}
        self.count = 0
        self.reused = False

    def add(self, index: int, seen: Seen) -> bool:
        for path in self.moments:
            uses = seen.get(path, ())
            if not uses:
                raise ModelError(
                    f"the model did not use the BN layer '{path}' on batch {index}, so it cannot "
                    "be recalibrated; leave it out of sites=."
                )
            if not all(moments.finite for moments in uses):
                self.skipped[index] = f"the input of '{path}' is not finite"
                return False
            self.reused |= len(uses) > 1
        for path, moments in self.moments.items():
            for use in seen[path]:
                moments = use if moments is None else moments.merge(use)
            self.moments[path] = moments
        self.count += 1
        return True


def _not_finite(batch: Batch) -> str | None:
    for name, leaf in leaves(batch.x):
        if leaf.dtype.kind in "fc" and not np.isfinite(leaf).all():
            return name
    return None
