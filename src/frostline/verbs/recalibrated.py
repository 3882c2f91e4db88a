"""Exact statistics for one evaluation, in the middle of a training that goes on as without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from frostline.adapters import Adapter, adapter_of
from frostline.adapters.together import Together
from frostline.atomic import atomically, generators as of_python, taken_back
from frostline.data.batches import require_reiterable
from frostline.measure.recalibration import Recalibration, recalibrate_adapter
from frostline.types import DataError
from frostline.types.arguments import checked

#: ``samples="auto"`` begins with so many and doubles them,
FIRST = 64

#: until no channel moves any more by so much of its standard deviation or of its variance.
SETTLED = 0.1


@dataclass(frozen=True, kw_only=True)
class Recalibrated:
    """What the model of a :func:`recalibrated` block holds for its time.

    Attributes:
        text: What changed, in numbers, one sentence.
        notes: What the user should know; may be empty.
        samples: Samples that the statistics rest on.
        curve: With ``samples="auto"`` pairs of samples and how far the farthest channel moved from
            the statistics of half as many: in standard deviations for its mean, relative for its
            variance, whichever is more. Empty otherwise.
    """

    text: str
    notes: tuple[str, ...] = ()
    samples: int
    curve: tuple[tuple[int, float], ...] = ()

    def __str__(self) -> str:
        return "\n".join([self.text, *(f"note: {note}" for note in self.notes)])


@checked
@contextmanager
def recalibrated(
    model: Any,
    data: Any,
    *,
    sites: Any = "unfrozen",
    method: Literal["sequential", "batch"] = "sequential",
    batch_size: int = 32,
    samples: int | Literal["auto"] | None = None,
    process_group: Any = None,
    step: Any = None,
) -> Iterator[Recalibrated]:
    """Give a model exact statistics for a block, and put the old ones back behind it.

    For evaluating in the middle of a training, with weights whose own statistics were never
    measured: averaged ones (EMA, SWA), or swapped ones (Schedule-Free)::

        optimizer.eval()
        with fl.recalibrated(model, train_loader, samples="auto"):
            accuracy = evaluate(model)
        optimizer.train()

    On any exit the statistics are what they were, bit for bit, and so are the random generators of
    Python, NumPy, Keras, torch and a torch ``DataLoader``: a training with such evaluations ends
    with the same weights as one without. Nothing else is touched, so weights may be swapped inside
    the block. A shuffling ``tf.data`` pipeline counts its own epochs, where nobody can put them
    back: give it one of its own here.

    Args:
        model: A built Keras model or a torch module.
        data: As in :func:`frostline.recalibrate`.
        sites: As there.
        method: As there.
        batch_size: As there.
        samples: Read no more than so many, of all ranks together. ``"auto"``: 64, then twice as
            many until twice as many no longer move any channel by a tenth of its standard
            deviation or of its variance; that costs at most twice the last pass.
        process_group: As in :func:`frostline.recalibrate`; the block itself is no collective.
        step: As in :func:`frostline.recalibrate`.

    Yields:
        What was done: ``text``, ``samples``, ``curve``.

    Raises:
        ModelError: As :func:`frostline.recalibrate`.
        DataError: As there; ``samples`` that is no positive number; with ``"auto"`` an iterator,
            which can be read only once.
    """
    wanted: Any = samples
    if wanted not in ("auto", None) and not (isinstance(wanted, int) and wanted > 0):
        raise DataError(
            f"samples must be a positive number, 'auto' or None. Received: samples={samples!r}"
        )
    adapter = adapter_of(model)
    ranks = adapter.together(process_group)
    generators = _generators(adapter, data)
    options = {"sites": sites, "method": method, "batch_size": batch_size, "step": step}
    measure = _Measure(adapter, data, ranks, options)

    def edit() -> Recalibrated:
        with ranks.collective("recalibrated", method=str(method), samples=samples):
            return measure.enough() if samples == "auto" else measure.once(samples)

    def back() -> None:
        measure.undo()
        generators()

    with taken_back(back):
        done = atomically(adapter.snapshot(), edit)
        generators()
        yield done


class _Measure:
    """Recalibrations of one model, the first of which knows the way back."""

    def __init__(
        self, adapter: Adapter, data: Any, ranks: Together, options: Mapping[str, Any]
    ) -> None:
        self._adapter, self._data, self._ranks, self._options = adapter, data, ranks, options
        self._undo: Callable[[], None] | None = None

    def undo(self) -> None:
        """Put back the statistics from before the first one."""
        if self._undo is not None:
            self._undo()

    def once(self, samples: int | None) -> Recalibrated:
        done = self._run(samples)
        return Recalibrated(text=done.text(), notes=done.remarks(), samples=done.samples)

    def enough(self) -> Recalibrated:
        require_reiterable(self._data, "samples='auto'")
        curve: list[tuple[int, float]] = []
        read, wanted = 0, max(FIRST, self._ranks.size)
        while True:
            done = self._run(wanted)
            whole = done.samples < wanted or done.samples == read
            if read and done.samples > read:
                moved = max(_moved(shift.mean, shift.variance) for shift in done.shifts)
                curve.append((done.samples, moved))
                whole = whole or moved <= SETTLED
            if whole:
                break
            read, wanted = done.samples, 2 * wanted
        notes = done.remarks()
        if curve and curve[-1][1] > SETTLED:
            left = (
                f"the data end at {done.samples:,} samples; the last of them still moved a channel "
                f"by {curve[-1][1]:.2g} of its standard deviation or variance"
            )
            notes = (*notes, left)
        return Recalibrated(text=done.text(), notes=notes, samples=done.samples, curve=tuple(curve))

    def _run(self, samples: int | None) -> Recalibration:
        share = None if samples is None else math.ceil(samples / self._ranks.size)
        done, undo = recalibrate_adapter(
            self._adapter, self._data, max_samples=share, ranks=self._ranks, **self._options
        )
        self._undo = self._undo or undo
        return done


def _moved(mean: float, variance: float) -> float:
    return max(mean, variance - 1)


def _generators(adapter: Adapter, data: Any) -> Callable[[], None]:
    """Remember every random generator; returns what puts them back."""
    python, framework = of_python(), adapter.generators(data)

    def restore() -> None:
        python()
        framework()

    return restore
