"""The questions that a test asks of one case, and which of them are known to be missed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .judging import Row
from .misses import MISSES
from .scenario import Case

#: Layers are named rightly from this intersection over union on.
OVERLAP = 0.75


def ask(case: Case, backend: str, run: Callable[[Case], Row]) -> None:
    """Build and diagnose a case once, and hold the answer to the book's; misses are strict."""
    wrong = answered_wrongly(run(case))
    known = {
        miss.question: miss.reason
        for miss in MISSES
        if miss.number == case.number
        and backend in miss.backends
        and (miss.question in wrong or not miss.sometimes)
    }
    assert wrong.keys() == known.keys(), {"wrong": wrong, "known as wrong": known}
    if known:
        pytest.xfail("; ".join(f"{question}: {reason}" for question, reason in known.items()))


def answered_wrongly(row: Row) -> dict[str, object]:
    """Question -> what came instead."""
    found: dict[str, object] = {}
    if not row.right:
        found["cause"] = (row.expected, row.answers, row.verdict)
    if row.blamed:
        found["blame"] = (row.blamed, row.verdict)
    if row.overlap is not None and row.overlap < OVERLAP:
        found["layers"] = (row.overlap, row.verdict)
    if not row.closes:
        found["remedy"] = (row.remedy, row.before, row.after, row.closed)
    return found
