"""Which sites, which batches, what to store: the part of recalibration that knows no framework.

How the moments of a data set are measured is the framework's own: see ``Meter.population``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from frostline.adapters import Adapter, Meter, Population
from frostline.adapters.together import ALONE, Together
from frostline.atomic import to_its_end
from frostline.data.arrays import leaves
from frostline.data.batch import Batch, NoSamplesError
from frostline.data.batches import batches, require_reiterable
from frostline.graph.selection import GROUPS, select
from frostline.types import Array, DataError, ModelError
from frostline.types.reasons import first_line

Method = Literal["sequential", "batch"]

#: Bytes of activations kept in memory between two stages; the rest waits on disk.
MEMORY_LIMIT = 1 << 30

_METHODS = ("sequential", "batch")


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
        passes: Passes over the data or over stored activations that it took; 1 unless a part of
            the model has no graph, a layer is used behind itself, or memory is short.
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
                f"took {self.passes} passes over a part of the model that has no graph, uses a "
                "layer several times, or did not fit in memory"
            )
        return (*remarks, *self.notes)


def recalibrate_adapter(
    adapter: Adapter,
    data: Any,
    *,
    sites: Any,
    method: Any,
    batch_size: int,
    max_samples: int | None = None,
    ranks: Together = ALONE,
    step: Any = None,
) -> tuple[Recalibration, Callable[[], None]]:
    """Recalibrate the model behind an adapter; see :func:`frostline.recalibrate`.

    With several ``ranks`` the caller has entered ``ranks.collective``.

    Returns:
        What was done, and a function that puts the old statistics back, bit for bit.
    """
    if method not in _METHODS:
        raise ModelError(f"method must be 'sequential' or 'batch'. Received: method={method!r}")
    chosen = select(adapter.sites(), sites)
    foreign = [site.path for site in chosen if site.kind.startswith("torch.")]
    own = [site.path for site in chosen if site.path not in foreign]
    named = not isinstance(sites, str) or sites not in GROUPS
    if foreign and (named or not own):
        raise ModelError(
            f"'{foreign[0]}' is a torch module inside a TorchModuleWrapper, which cannot be "
            f"recalibrated. Received: sites={sites!r}"
        )
    bare: list[str] = []
    asked = (ranks,) if step is None else (ranks, step)
    try:
        meter = adapter.meter(own, *asked)
    except ModelError:
        without = set() if named else _without_statistics(adapter)
        bare = [path for path in own if path in without]
        if not bare or len(bare) == len(own):
            raise
        own = [path for path in own if path not in without]
        meter = adapter.meter(own, *asked)
    undo = meter.snapshot()
    done = recalibrated(
        meter,
        own,
        data,
        method=method,
        batch_size=batch_size,
        max_samples=max_samples,
        ranks=ranks,
        inputs=adapter.inputs(),
        whole=step is not None,
    )
    if foreign:
        note = f"left alone: {len(foreign)} torch module(s) inside TorchModuleWrapper"
        done = replace(done, notes=(*done.notes, note))
    if bare:
        shown = ", ".join(map(repr, bare[:3])) + (", ..." if len(bare) > 3 else "")
        note = f"left alone: {len(bare)} BN layer(s) that keep no statistics ({shown})"
        done = replace(done, notes=(*done.notes, note))
    return done, undo


def _without_statistics(adapter: Adapter) -> set[str]:
    """Paths of sites that use the batch in both phases; those that are not built are no such."""
    return {
        entry.site.path for entry in adapter.facts() if entry.mean is None and entry.site.channels
    }


def recalibrated(
    meter: Meter,
    paths: Sequence[str],
    data: Any,
    *,
    method: Method = "sequential",
    batch_size: int = 32,
    memory_limit: int = MEMORY_LIMIT,
    max_samples: int | None = None,
    ranks: Together = ALONE,
    inputs: int = 1,
    whole: bool = False,
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
        max_samples: Read no more than so many samples; ``None``: all.
        ranks: Processes that the meter measures together with.
        inputs: So many first items of a longer batch are inputs.
        whole: A user's step takes batches as they come.

    Raises:
        ModelError: Unknown method.
        DataError: No finite batch; or a one-shot iterator where the data must be read again.
        OutputError: The temporary folder is full.
    """
    if method not in _METHODS:
        raise ModelError(f"method must be 'sequential' or 'batch'. Received: method={method!r}")
    source = ReadBatches(
        data,
        batch_size,
        max_samples=max_samples,
        may_be_empty=ranks.size > 1,
        inputs=inputs,
        whole=whole,
    )
    before = {path: meter.stored(path) for path in paths}
    restore = meter.snapshot()
    try:
        found = measured(meter, paths, source, method=method, memory_limit=memory_limit)
        for path, moments in found.moments.items():
            meter.store(path, moments.mean, moments.variance)
    except (TypeError, KeyError, AttributeError) as error:
        restore()
        raise ModelError(
            "the model does not take the inputs of a batch as the data give them: the first item "
            "of a tuple, or the mapping itself. For a model with several inputs give batches "
            f"((a, b), y). Received: {first_line(error)}"
        ) from error
    except BaseException:  # KeyboardInterrupt too: the model is the user's
        to_its_end(restore)
        raise
    unused = [path for path in paths if path not in found.moments]
    notes = list(found.notes)
    if unused:
        shown = ", ".join(map(repr, unused[:3])) + (", ..." if len(unused) > 3 else "")
        notes.append(f"left alone: {len(unused)} BN layer(s) that inference does not use ({shown})")
    samples, count, skipped = _read_by_all(ranks, source, source.reasons(found.skipped))
    if ranks.size > 1:
        notes.append(f"merged over {ranks.size} processes; all end with the same statistics")
    return Recalibration(
        method=method,
        shifts=tuple(
            _shift(meter, path, before[path], found.moments[path].count)
            for path in paths
            if path in found.moments
        ),
        samples=samples,
        batches=count,
        skipped=skipped,
        passes=found.passes,
        notes=tuple(notes),
    )


def measured(
    meter: Meter,
    paths: Sequence[str],
    source: ReadBatches,
    *,
    method: Method = "sequential",
    memory_limit: int = MEMORY_LIMIT,
) -> Population:
    """Population moments of chosen sites; statistics may be stored on the way.

    Raises:
        DataError: No batch that is finite at the sites, or a site that saw no value.
        ModelError: No chosen site is used.
    """
    if method == "batch":
        found = meter.batchwise(source, paths)
    else:
        found = meter.sequential(source, paths, memory_limit)
    if not found.batches:
        raise DataError(source.nothing_finite(found.skipped))
    for path, moments in found.moments.items():
        if moments.count == 0:
            raise DataError(f"Site '{path}' saw no value: every element was masked.")
    if paths and not found.moments:
        shown = ", ".join(map(repr, paths[:3])) + (", ..." if len(paths) > 3 else "")
        raise ModelError(
            "inference uses none of the chosen BN layers on these data, or they compute with their "
            "statistics in a way that no BN does (several models at once under torch.vmap): there "
            "is nothing to measure. Pass data, or step=, with which each of them is called by "
            f"itself. Received: {shown}"
        )
    return found


class ReadBatches:
    """Batches, and what was read of them so far.

    What is NaN or infinite in a batch may be padding that the model masks: whether the batch is
    left out is seen at the sites.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        max_samples: int | None = None,
        may_be_empty: bool = False,
        inputs: int = 1,
        whole: bool = False,
    ) -> None:
        self.data, self.batch_size, self._max_samples = data, batch_size, max_samples
        self._may_be_empty, self._inputs, self._whole = may_be_empty, inputs, whole
        self.sizes: dict[int, int] = {}
        self._broken: dict[int, str] = {}

    def read(self) -> Iterator[tuple[int, Batch]]:
        """Batches with their numbers."""
        for number, batch in enumerate(self._batches()):
            self.sizes[number] = batch.count or 1
            name = _not_finite(batch)
            if name is not None:
                self._broken[number] = f"x{name} has NaN or infinite values"
            yield number, batch

    def reasons(self, skipped: Mapping[int, str]) -> dict[int, str]:
        """Why batches were left out: what they hold themselves says more than what a site saw."""
        return {number: self._broken.get(number, why) for number, why in skipped.items()}

    def _batches(self) -> Iterator[Batch]:
        try:
            yield from batches(
                self.data,
                batch_size=self.batch_size,
                max_samples=self._max_samples,
                inputs=self._inputs,
                whole=self._whole,
            )
        except NoSamplesError:
            if not self._may_be_empty:
                raise

    def require_again(self, verb: str) -> None:
        """Raise :class:`DataError` where the data can be read only once."""
        require_reiterable(self.data, verb)

    def nothing_finite(self, late: Mapping[int, str]) -> str:
        """Why there is nothing to store."""
        if not self.sizes:
            return "The data hold no samples, here or on any other rank. The model is unchanged."
        reasons = list(self.reasons(late).items())
        shown = "; ".join(f"batch {number}: {why}" for number, why in reasons[:3])
        return (
            f"none of the {len(self.sizes)} batches is finite, so there is nothing to store "
            f"({shown}). The model is unchanged."
        )


def _read_by_all(
    ranks: Together, source: ReadBatches, skipped: Mapping[int, str]
) -> tuple[int, int, dict[int, str]]:
    """Samples and batches of all ranks, and what was skipped, numbered through in their order."""
    samples = sum(size for number, size in source.sizes.items() if number not in skipped)
    mine = [samples, len(source.sizes), list(skipped.items())]
    total = count = 0
    left_out: dict[int, str] = {}
    for rank, (their_samples, their_count, theirs) in enumerate(ranks.values(mine)):
        where = f" (batch {{}} of rank {rank})" if ranks.size > 1 else ""
        left_out |= {count + number: why + where.format(number) for number, why in sorted(theirs)}
        total, count = total + their_samples, count + their_count
    return total, count, left_out


def _shift(meter: Meter, path: str, before: tuple[Array, Array], count: int) -> Shift:
    mean, variance, epsilon = *meter.stored(path), meter.epsilon(path)
    # A dead channel has variance 0; epsilon is what normalises it then.
    moved = np.abs(mean - before[0]) / np.sqrt(variance + epsilon)
    ratio = np.abs(np.log((variance + epsilon) / (np.maximum(before[1], 0) + epsilon)))
    return Shift(
        path=path, mean=float(moved.max()), variance=math.exp(float(ratio.max())), count=count
    )


def _not_finite(batch: Batch) -> str | None:
    for name, leaf in leaves(batch.x):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fc" and not np.isfinite(leaf).all():
            return name
    return None
