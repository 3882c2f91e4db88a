"""Population statistics stage by stage, for a recorder that knows the graph of its model.

A stage takes the activations that the one before left, batch by batch, measures its sites and
passes on what later stages need; what waits between two stages lies in memory up to a limit and
beyond it in a temporary folder. Every operation of the model runs once, as in one forward pass.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from frostline.adapters.protocol import Population, Source, StagedMeter
from frostline.adapters.spool import Spool, Workspace
from frostline.adapters.together import ALONE, Together
from frostline.data.batch import Batch
from frostline.graph.schedule import Program
from frostline.numerics.stats import Moments
from frostline.types import Array

#: A layer that is used again behind its own output is measured until its statistics move by no more
#: than this, in standard deviations (and relative, for the variance): float32 holds no more.
TOLERANCE = 1e-6

#: Such a layer that has not settled after so many passes never will; the result says so.
MAX_PASSES = 50

_LOG = logging.getLogger("frostline")

Seen = Mapping[str, Sequence[Moments]]


class Total:
    """Moments of some sites, merged over batches; a batch enters as a whole or not at all."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.moments: dict[str, Moments | None] = dict.fromkeys(paths)
        self.skipped: dict[int, str] = {}
        self.count = 0
        self.reused = False

    def add(self, number: int, seen: Seen) -> bool:
        """Add the moments of one batch; ``False``: not finite, so the batch is left out."""
        for path in self.moments:
            uses = seen.get(path, ())
            if not all(moments.finite for moments in uses):
                self.skipped[number] = f"the input of '{path}' is not finite"
                return False
            self.reused |= len(uses) > 1
        for path, moments in self.moments.items():
            for use in seen.get(path, ()):
                moments = use if moments is None else moments.merge(use)
            self.moments[path] = moments
        self.count += 1
        return True

    @property
    def used(self) -> dict[str, Moments]:
        """The sites that at least one batch used."""
        return {path: moments for path, moments in self.moments.items() if moments is not None}

    def merge(self, ranks: Together, kinds: Sequence[type[Moments]] = (Moments,)) -> None:
        """Add what other processes have seen; all of them call this together."""
        if ranks.size == 1:
            return
        self.moments = {path: ranks.merged(own, kinds) for path, own in self.moments.items()}
        self.count = ranks.total(self.count)
        self.reused = any(ranks.values(self.reused))


def with_batch_statistics(
    measure: Callable[[Any], Seen],
    source: Source,
    paths: Sequence[str],
    ranks: Together = ALONE,
    kinds: Sequence[type[Moments]] = (Moments,),
) -> Population:
    """One pass with batch statistics at all sites, one batch in memory at a time."""
    total = Total(paths)
    for number, batch in source.read():
        total.add(number, measure(batch))
    total.merge(ranks, kinds)
    return Population(moments=total.used, skipped=total.skipped, batches=total.count)


def in_stages(
    meter: StagedMeter,
    source: Source,
    paths: Sequence[str],
    memory_limit: int,
    ranks: Together = ALONE,
) -> Population:
    """Site by site, each with all earlier ones at their new values, which are stored on the way."""
    with Workspace(memory_limit) as workspace:
        return _Run(meter, source, paths, ranks).all_stages(workspace)


class _Run:
    """One measurement: what was read, skipped and found so far."""

    def __init__(
        self, meter: StagedMeter, source: Source, paths: Sequence[str], ranks: Together
    ) -> None:
        self.meter, self.source, self.ranks = meter, source, ranks
        self.chosen = frozenset(paths)
        self.moments: dict[str, Moments] = {}
        self.skipped: dict[int, str] = {}
        self.notes: list[str] = []
        self.passes = 1

    def all_stages(self, workspace: Workspace) -> Population:
        stream = self.source.read()
        first = next(stream, None)
        # A share of the data may be empty; the others know how many arrays a batch has.
        inputs_of_all = self.ranks.values(len(self.meter.start(first[1].x)) if first else 0)
        if not any(inputs_of_all):
            return Population(moments={}, batches=0)
        programs = self.meter.programs(max(inputs_of_all), self.chosen)
        if programs[0].passes != 1 or programs[0].closed:
            self.source.require_again("recalibrate(method='sequential') on this model")
        opening: Iterator[tuple[int, Batch]] | None
        opening = itertools.chain([first] if first else [], stream)

        def inputs() -> Iterator[tuple[int, tuple[Array, ...]]]:
            nonlocal opening
            batches, opening = opening if opening is not None else self.source.read(), None
            for number, batch in batches:
                yield number, self.meter.start(batch.x)

        waiting: Spool | None = None
        count = 0
        for position, program in enumerate(programs):
            last = position == len(programs) - 1
            _LOG.debug("stage %d of %d: %s", position + 1, len(programs), program.paths)
            following = None if last else workspace.spool()
            read = inputs if waiting is None else waiting.read
            moved: Callable[[], Mapping[int, Any]] = dict
            if waiting is not None and program.passes == 1 and not program.closed:
                # What a residual connection adds later waits where it is.
                shared = {*program.takes} & {*program.gives}
                places = {program.takes.index(s): program.gives.index(s) for s in shared}
                read = partial(waiting.drain, tuple(places))
                moved = partial(waiting.hand_over, places)
            count = self.one_stage(program, read, following, moved)
            if waiting is not None:
                waiting.clear()
            waiting = following
            if not count:
                break
        return Population(
            moments=self.moments if count else {},
            batches=count,
            skipped=self.skipped,
            passes=self.passes,
            stages=tuple(tuple(program.paths) for program in programs),
            notes=tuple(self.notes),
        )

    def one_stage(
        self,
        program: Program,
        read: Callable[[], Iterator[tuple[int, tuple[Array, ...]]]],
        following: Spool | None,
        moved: Callable[[], Mapping[int, Any]],
    ) -> int:
        """Measure and store one stage's sites, repeatedly where they depend on each other.

        Args:
            program: The stage.
            read: Gives the batches, as often as it is called.
            following: Takes what later stages need; ``None``: there is none.
            moved: Gives what of the batch at hand goes on as it is: position in what the stage
                gives -> part of a spool.
        """
        stage, damped = self.meter.stage(program), Damped()
        for turn in itertools.count(1):
            total = Total([path for path in program.paths if path in self.chosen])
            for number, values in read():
                if number in self.skipped:
                    continue
                outputs, seen = stage(values)
                if total.add(number, seen) and following is not None and turn == 1:
                    following.append(number, outputs, moved())
            total.merge(self.ranks)
            self.passes = max(self.passes, turn)
            before = {path: self.meter.stored(path) for path in total.used}
            chain = program.passes is not None and not (program.closed and total.reused)
            for path, moments in total.used.items():
                if moments.count and chain:
                    self.meter.store(path, moments.mean, moments.variance)
                elif moments.count:
                    self.meter.store(path, *damped.statistics(path, before[path], moments))
            if not total.count or self.settled(program, before, turn, chain, damped.least):
                break
        self.moments |= total.used
        self.skipped |= total.skipped
        return total.count

    def settled(
        self, program: Program, before: Mapping[str, Any], turn: int, chain: bool, part: float
    ) -> bool:
        if (chain and program.passes == turn) or not before:
            return True
        moved = {
            path: shift(old, self.meter.stored(path), self.meter.epsilon(path)) / part
            for path, old in before.items()
        }
        if max(moved.values()) <= (0.0 if chain else TOLERANCE):
            return True
        if not chain and turn >= MAX_PASSES:
            self.notes.append(unsettled(moved))
            return True
        return False


class Damped:
    """Steps of statistics toward new moments: half of one where the step before led the other way.

    A layer behind its own output may answer new statistics with such as lead back, further each
    time. Where the steps end is the same.
    """

    def __init__(self) -> None:
        self._steps: dict[str, Array] = {}
        self._parts: dict[str, Array] = {}

    @property
    def least(self) -> float:
        """The smallest part of a step that is made."""
        return min((float(part.min()) for part in self._parts.values()), default=1.0)

    def statistics(self, path: str, old: tuple[Array, Array], new: Moments) -> Array:
        """Mean and variance to store."""
        goal, start = np.stack([new.mean, new.variance]), np.stack(old)
        with np.errstate(invalid="ignore", over="ignore"):
            step = goal - start
            back = step * self._steps.get(path, 0.0) < 0
            part = self._parts.get(path, np.ones_like(step)) / np.where(back, 2.0, 1.0)
            self._steps[path], self._parts[path] = step, part
            return np.where(part == 1, goal, start + part * step)


def shift(old: tuple[Array, Array], new: tuple[Array, Array], epsilon: float) -> float:
    """Largest move of a mean in new standard deviations, or relative move of a variance."""
    scale = np.sqrt(new[1] + epsilon)
    mean = np.max(np.abs(new[0] - old[0]) / scale)
    return float(np.maximum(mean, np.max(np.abs(new[1] - old[1]) / scale**2)))


def unsettled(moved: Mapping[str, float]) -> str:
    """What to say of layers that never settle."""
    worst = max(moved, key=lambda path: moved[path])
    return (
        f"'{worst}' is used behind its own output and did not settle in {MAX_PASSES} passes: its "
        f"statistics still moved by {moved[worst]:.2g} standard deviations"
    )
