"""The registry of remedies: one function each, with the repair that it tries beside it."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from frostline.remedies.candidate import Candidate, Workplace
from frostline.types.codes import Fix

#: Tries one kind of repair.
Attempt = Callable[[Workplace], Iterator[Candidate]]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """One kind of repair.

    Attributes:
        fix: The repair as a word; causes name it in their ``treated_by``.
        rank: From the least to the most that repairs change: of equal effect the first one wins.
        verb: Name of the function of ``frostline`` that applies it to the model as it is, for
            ``diagnose --fix``; ``None`` when it acts in training, or outside of the model.
        attempt: The function: reads the workplace and yields candidates.
    """

    fix: Fix
    rank: int
    verb: str | None
    attempt: Attempt

    @property
    def summary(self) -> str:
        """First line of the documentation."""
        return self.documentation.partition("\n")[0]

    @property
    def documentation(self) -> str:
        """The function's docstring: Markdown under the headings that every one has."""
        return inspect.getdoc(self.attempt) or ""


_REGISTRY: dict[Fix, Repair] = {}


def remedy(fix: Fix, *, rank: int, verb: str | None = None) -> Callable[[Attempt], Attempt]:
    """Register a function as the attempt at a repair.

    Args:
        fix: The repair.
        rank: See :class:`Repair`; no two have the same.
        verb: See :class:`Repair`.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: The repair or the rank is taken, or it is no repair at all.
    """
    fix = Fix(fix)

    def register(attempt: Attempt) -> Attempt:
        for other in _REGISTRY.values():
            if other.fix == fix or other.rank == rank:
                raise ValueError(f"{other.fix} has rank {other.rank}. Received: {fix}, rank {rank}")
        _REGISTRY[fix] = Repair(fix=fix, rank=rank, verb=verb, attempt=attempt)
        return attempt

    return register


def all_repairs() -> tuple[Repair, ...]:
    """Every repair that can be tried, by rank."""
    _load()
    return tuple(sorted(_REGISTRY.values(), key=lambda entry: entry.rank))


def verb_of(fix: str) -> str | None:
    """Name of the function that applies a repair to the model as it is; ``None`` without one."""
    return next((entry.verb for entry in all_repairs() if entry.fix == fix), None)


@functools.cache
def _load() -> None:
    from frostline import remedies

    for module in pkgutil.iter_modules(remedies.__path__):
        importlib.import_module(f"{remedies.__name__}.{module.name}")
