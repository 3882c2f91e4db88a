"""A model's graph as a flat list of steps, and the order in which its sites can be measured.

Views write their graphs out as steps; what is done with them needs no framework. What has no graph
is one *closed* step: its sites are measured together, in as many passes over the step's input as
it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Slot:
    """Place of one tensor; stands for it in the arguments of a step."""

    index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One operation of the flattened graph.

    Attributes:
        operation: What is called; a Keras layer or operation.
        args: Positional arguments with slots in the place of tensors.
        kwargs: Keyword arguments, likewise.
        reads: Slots that the arguments hold.
        writes: Slots of the flattened outputs.
        sites: Paths of the chosen sites that it is (``open``) or holds (closed).
        open: The step *is* a site, whose input can be looked at without running the step.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    sites: tuple[str, ...] = ()
    open: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """What one stage does with each batch.

    Attributes:
        paths: The sites that the stage measures.
        steps: ``(step, run, look)`` in order: run it; look at the input of the site.
        takes: Slots that it needs from the stages before.
        gives: Slots that later stages need.
        passes: Most passes that its sites can need to become exact: 1 where none of them depends on
            another one (or on itself); ``None`` where a layer is used again behind its own output,
            so that only a fixed-point iteration finds its statistics.
        closed: It looks into closed steps, where a layer may be used more often than can be seen.
    """

    paths: tuple[str, ...]
    steps: tuple[tuple[Step, bool, bool], ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    passes: int | None
    closed: bool


def closed(model: Any, chosen: Mapping[int, str], inputs: int) -> list[Step]:
    """A model without a graph as one closed step that reads all inputs.

    Args:
        model: What is called with the tuple of input slots.
        chosen: As for :func:`record`.
        inputs: Number of arrays in one batch of ``x``.
    """
    slots = tuple(Slot(index) for index in range(inputs))
    return [
        Step(
            operation=model,
            args=(slots,),
            kwargs={},
            reads=tuple(range(inputs)),
            writes=(),
            sites=tuple(chosen.values()),
        )
    ]


def schedule(steps: list[Step]) -> tuple[Program, ...]:
    """Put the sites in an order in which each is measured after all that it depends on.

    Sites that do not depend on each other (parallel branches, the towers of a siamese network)
    share a stage. A layer that is used again behind its own output depends on itself; so do, for
    lack of a graph, all sites of a closed step: such a stage is repeated.

    Args:
        steps: From :func:`record` or :func:`closed`.
    """
    before = _ancestors(steps)
    needs = _closure(steps, before)
    stages = _stages(needs)
    final = [  # the stage in which everything that a step computes with has its final value
        max((stages[path] + 1 for path in before[index].union(step.sites)), default=0)
        for index, step in enumerate(steps)
    ]
    programs: list[Program] = []
    wanted: set[int] = set()  # what the stages behind this one take from those before them
    for number in reversed(range(max(stages.values()) + 1)):
        gives = tuple(sorted(wanted))
        kept: list[tuple[Step, bool, bool]] = []
        needed = set(wanted)
        for step, level in reversed(list(zip(steps, final, strict=True))):
            look = any(stages[path] == number for path in step.sites)
            # Behind a site of this very stage values are provisional; they are computed only where
            # another site of the stage depends on them, and again in a later stage.
            run = level >= number and (
                not needed.isdisjoint(step.writes) or (look and not step.open)
            )
            if run or look:
                kept.append((step, run, look))
                needed -= set(step.writes) if run else set()
                needed |= set(step.reads)
        kept.reverse()
        programs.append(
            Program(
                paths=tuple(path for path, stage in stages.items() if stage == number),
                steps=tuple(kept),
                takes=tuple(sorted(needed)),
                gives=gives,
                passes=_passes(number, stages, needs, steps),
                closed=any(look and not step.open for step, _, look in kept),
            )
        )
        wanted = needed
    return tuple(reversed(programs))


def _ancestors(steps: list[Step]) -> list[set[str]]:
    """For each step the sites whose output enters its inputs."""
    behind: dict[int, set[str]] = {}
    before: list[set[str]] = []
    for step in steps:
        above = set().union(*(behind.get(slot, set()) for slot in step.reads))
        before.append(above)
        behind |= dict.fromkeys(step.writes, above.union(step.sites))
    return before


def _closure(steps: list[Step], before: list[set[str]]) -> dict[str, set[str]]:
    """For each site all sites that its statistics depend on, over all of its uses."""
    needs: dict[str, set[str]] = {}
    for step, above in zip(steps, before, strict=True):
        for path in step.sites:
            needs.setdefault(path, set()).update(above, () if step.open else step.sites)
    changed = True
    while changed:
        changed = False
        for own in needs.values():
            size = len(own)
            own.update(*[needs[path] for path in own])
            changed |= len(own) > size
    return needs


def _stages(needs: Mapping[str, set[str]]) -> dict[str, int]:
    """Longest path: a site comes one stage after the last one that it depends on, not sooner."""
    stages = dict.fromkeys(needs, 0)
    changed = True
    while changed:
        changed = False
        for path, own in needs.items():
            for other in own:
                mutual = path in needs[other]
                least = stages[other] + (0 if mutual else 1)
                if stages[path] < least:
                    stages[path], changed = least, True
    return stages


def _passes(
    number: int, stages: Mapping[str, int], needs: Mapping[str, set[str]], steps: list[Step]
) -> int | None:
    most = 1
    for path in (path for path, stage in stages.items() if stage == number):
        if path not in needs[path]:
            continue
        if sum(path in step.sites for step in steps) > 1:
            return None
        holder = next(step for step in steps if path in step.sites)
        group = {other for other in needs[path] if path in needs[other]}
        if not group.issubset(holder.sites):
            return None
        # In a chain the first site is exact after one pass, the next after two, and so on.
        most = max(most, len(group))
    return most
