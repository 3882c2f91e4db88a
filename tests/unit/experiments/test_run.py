"""Rows of an experiment one after the other: what is told, kept, skipped and interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frostline.experiments import run
from frostline.experiments.results import Result
from frostline.experiments.settings import Settings


class Tells(run.Silent):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def started(self, row: str, number: int, total: int) -> None:
        self.told.append((row, number, total))

    def finished(self, result: str) -> None:
        self.told.append(result)


def test_rows_that_are_there_are_skipped_and_an_interruption_keeps_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(row: str) -> str:
        if row == "D":
            raise KeyboardInterrupt
        return row.lower()

    kept: list[Any] = []
    monkeypatch.setattr(run.records, "write_numbers", lambda r, _: kept.append(r.rows))
    monkeypatch.setattr(run.records, "write", lambda r, folder: (folder / "figure.png",))
    start: Result[Any, Any] = Result(
        settings=Settings(rows=tuple("abcde")), selection={}, environment={}, rows=("a",)
    )
    progress = Tells()
    rows = {name.lower(): name for name in "ABCDE"}
    found = run.run_rows(start, rows, measure, progress=progress, output=tmp_path)
    assert progress.told == [("B", 2, 5), "b", ("C", 3, 5), "c", ("D", 4, 5)]
    assert kept == [("a", "b"), ("a", "b", "c")]
    assert (found.rows, found.interrupted, start.rows) == (("a", "b", "c"), True, ("a",))
    assert found.files == (tmp_path / "figure.png",)
    assert run.run_rows(start, rows, measure, progress=progress).files == ()
