"""Run an experiment row by row: report progress, keep what is finished, write it down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from frostline.experiments import records
from frostline.experiments.results import OverfitResult, TransferResult

_Row = TypeVar("_Row", contravariant=True)
_Epoch = TypeVar("_Epoch", contravariant=True)
_RowResult = TypeVar("_RowResult", contravariant=True)

AnyResult = TypeVar("AnyResult", OverfitResult, TransferResult)


class Progress(Protocol[_Row, _Epoch, _RowResult]):
    """What a caller may do while the experiment runs."""

    def started(self, row: _Row, number: int, total: int) -> None:
        """Row ``number`` of ``total`` (counted from 1) begins."""

    def epoch(self, epoch: _Epoch, total: int) -> None:
        """One of ``total`` epochs is done."""

    def finished(self, result: _RowResult) -> None:
        """A row is done."""


class Silent:
    """Progress that shows nothing."""

    def started(self, row: Any, number: int, total: int) -> None:
        """Show nothing."""

    def epoch(self, epoch: Any, total: int) -> None:
        """Show nothing."""

    def finished(self, result: Any) -> None:
        """Show nothing."""


def run_rows(
    result: AnyResult,
    rows: Mapping[str, Any],
    measure: Callable[[Any], Any],
    *,
    progress: Progress[Any, Any, Any],
    output: Path | None = None,
) -> AnyResult:
    """Measure the rows of ``result.settings`` that ``result`` does not have.

    Args:
        result: Its rows are the first of the settings' rows; they are not measured again.
        rows: All rows by name.
        measure: Runs one row.
        progress: Told about the rows.
        output: Folder in which finished rows are on disk before the next one starts.

    Returns:
        The result with all rows; on ``KeyboardInterrupt`` with those that were finished, and
        ``interrupted=True``.
    """
    names = result.settings.rows
    for number, name in list(enumerate(names, start=1))[len(result.rows) :]:
        progress.started(rows[name], number, len(names))
        try:
            measured = measure(rows[name])
        except KeyboardInterrupt:
            result = replace(result, interrupted=True)
            break
        result = replace(result, rows=(*result.rows, measured))
        progress.finished(measured)
        if output is not None:
            records.write_numbers(result, output)
    if output is not None and result.rows:
        result = replace(result, files=records.write(result, output))
    return result
