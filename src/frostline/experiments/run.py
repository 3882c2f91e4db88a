"""A run of an experiment, row by row: what it tells on its way, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from frostline.types import DataError

Settings = TypeVar("Settings")
Measured = TypeVar("Measured")
Treatment = TypeVar("Treatment")
_Told = TypeVar("_Told", contravariant=True)
_Epoch = TypeVar("_Epoch", contravariant=True)
_Done = TypeVar("_Done", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Result(Generic[Settings, Measured]):
    """Everything that one run measured, with what is needed to repeat it."""

    settings: Settings
    selection: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[Measured, ...]
    interrupted: bool = False
    files: tuple[Path, ...] = field(default=(), compare=False)


Found = TypeVar("Found", bound=Result[Any, Any])


class Progress(Protocol[_Told, _Epoch, _Done]):
    """What a caller may do while the experiment runs."""

    def started(self, row: _Told, number: int, total: int) -> None:
        """Row ``number`` of ``total`` (counted from 1) begins."""

    def epoch(self, epoch: _Epoch, total: int) -> None:
        """One of ``total`` epochs is done."""

    def finished(self, result: _Done) -> None:
        """A row is done."""


class Silent:
    """Progress that shows nothing."""

    def started(self, row: Any, number: int, total: int) -> None:
        """Show nothing."""

    def epoch(self, epoch: Any, total: int) -> None:
        """Show nothing."""

    def finished(self, result: Any) -> None:
        """Show nothing."""


def check_rows(names: Sequence[str], rows: Mapping[str, Any]) -> None:
    """Refuse rows that are unknown, named twice, or none.

    Raises:
        DataError: With what is allowed and what was received.
    """
    unknown = [name for name in names if name not in rows]
    if unknown or not names:
        raise DataError(f"rows must be some of {', '.join(rows)}. Received: {unknown or 'none'}")
    if len(set(names)) != len(names):
        raise DataError(f"a row is named twice. Received: rows={names}")


def run_rows(
    result: Found,
    names: Sequence[str],
    rows: Mapping[str, Treatment],
    measure: Callable[[Treatment], Any],
    progress: Progress[Treatment, Any, Any],
    keep: Callable[[Found], None],
) -> Found:
    """Measure row by row; an interruption keeps those that were finished.

    Args:
        result: The rows it has are not measured again; those come first.
        names: Rows to run, in order.
        rows: All rows by name.
        measure: Runs one row.
        progress: Told about the rows.
        keep: Puts what is finished on disk, before the next row starts.

    Returns:
        The result with the rows that were measured.
    """
    for number, name in enumerate(names, start=1):
        if number <= len(result.rows):
            continue
        progress.started(rows[name], number, len(names))
        try:
            measured = measure(rows[name])
        except KeyboardInterrupt:
            return replace(result, interrupted=True)
        result = replace(result, rows=(*result.rows, measured))
        progress.finished(measured)
        keep(result)
    return result
