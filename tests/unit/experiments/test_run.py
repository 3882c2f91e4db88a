"""Rows of an experiment one after the other: what is told, kept, skipped and interrupted."""

from __future__ import annotations

from typing import Any

import pytest

from frostline.experiments.run import Result, Silent, run_rows

pytestmark = pytest.mark.once


class Tells(Silent):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def started(self, row: str, number: int, total: int) -> None:
        self.told.append((row, number, total))

    def finished(self, result: str) -> None:
        self.told.append(result)


def test_rows_that_are_there_are_skipped_and_an_interruption_keeps_the_rest() -> None:
    def measure(row: str) -> str:
        if row == "D":
            raise KeyboardInterrupt
        return row.lower()

    start: Result[None, str] = Result(settings=None, selection={}, environment={}, rows=("a",))
    progress, kept = Tells(), []
    rows = {name.lower(): name for name in "ABCDE"}
    found = run_rows(start, tuple("abcde"), rows, measure, progress, lambda r: kept.append(r.rows))
    assert progress.told == [("B", 2, 5), "b", ("C", 3, 5), "c", ("D", 4, 5)]
    assert kept == [("a", "b"), ("a", "b", "c")]
    assert (found.rows, found.interrupted, start.rows) == (("a", "b", "c"), True, ("a",))
