"""The registry of causes: one function each, with its rank and what treats it beside it."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from frostline.causes.assignment import Assigned
from frostline.causes.case import Case, Claim
from frostline.types.codes import CauseCode, Fix

Explain = Callable[[Case, Assigned], Iterator[Claim]]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One cause.

    Attributes:
        code: Its code.
        rank: Place among causes that explain equally much, lowest first: what would be blamed
            wrongly for the others comes before them.
        treated_by: Repairs that are tried when the cause is found.
        explain: The function: reads a case and what was assigned to its sites, and yields claims.
    """

    code: CauseCode
    rank: int
    treated_by: tuple[Fix, ...]
    explain: Explain

    @property
    def summary(self) -> str:
        """First line of the documentation."""
        return self.documentation.partition("\n")[0]

    @property
    def documentation(self) -> str:
        """The function's docstring: Markdown under the headings that every one has."""
        return inspect.getdoc(self.explain) or ""


_REGISTRY: dict[CauseCode, Explanation] = {}


def cause(
    code: CauseCode, *, rank: int, treated_by: tuple[Fix, ...] = ()
) -> Callable[[Explain], Explain]:
    """Register a function as the explanation of a cause.

    Args:
        code: The cause.
        rank: See :class:`Explanation`; no two causes have the same.
        treated_by: See :class:`Explanation`.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: The code or the rank is taken, or is no code at all.
    """
    code, treated_by = CauseCode(code), tuple(Fix(fix) for fix in treated_by)

    def register(explain: Explain) -> Explain:
        for other in _REGISTRY.values():
            if other.code == code or other.rank == rank:
                raise ValueError(
                    f"{other.code} has rank {other.rank}. Received: {code} with rank {rank}"
                )
        _REGISTRY[code] = Explanation(code=code, rank=rank, treated_by=treated_by, explain=explain)
        return explain

    return register


def all_causes() -> tuple[Explanation, ...]:
    """Every cause that can be found, by rank."""
    _load()
    return tuple(sorted(_REGISTRY.values(), key=lambda entry: entry.rank))


def treated_by(fix: Fix) -> tuple[CauseCode, ...]:
    """Causes that a repair is tried for, by rank."""
    return tuple(entry.code for entry in all_causes() if fix in entry.treated_by)


@functools.cache
def _load() -> None:
    from frostline import causes

    for module in pkgutil.iter_modules(causes.__path__):
        importlib.import_module(f"{causes.__name__}.{module.name}")
