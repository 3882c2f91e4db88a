"""The training run as the user has it -> metric name -> value per epoch."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from frostline.types import DataError
from frostline.types.arguments import listed

#: Columns of a log that count, and are no metric.
_COUNTERS = ("epoch", "step", "steps", "batch")

_ACCEPTED = (
    "history must be a Keras History, a dict of lists, a list with a dict per epoch, or the path "
    "of a CSV file with a row per epoch."
)


def parse(history: Any) -> dict[str, tuple[float, ...]]:
    """Read the values of each metric per epoch.

    Args:
        history: A Keras ``History`` or its ``history``; a dict of lists; a list with a dict of
            numbers per epoch; or the path of a CSV file, as ``keras.callbacks.CSVLogger`` writes
            it. ``None`` gives nothing.

    Returns:
        Metric name -> values, all of one length; NaN where an epoch has no number.

    Raises:
        DataError: Something else, no number at all, or a file that cannot be read.
    """
    if history is None:
        return {}
    history = getattr(history, "history", history)
    if isinstance(history, (str, Path)):
        return _from_rows(_rows(Path(history)))
    if isinstance(history, Mapping):
        return _from_columns(history)
    if isinstance(history, Iterable):
        rows = listed(history, "history")
        if all(isinstance(row, Mapping) for row in rows):
            return _from_rows(rows)
    raise DataError(f"{_ACCEPTED} Received: {type(history).__name__}")


def _from_columns(table: Mapping[Any, Any]) -> dict[str, tuple[float, ...]]:
    columns: dict[str, tuple[float | None, ...]] = {}
    for name, values in table.items():
        if str(name) in _COUNTERS:
            continue
        listed = values if isinstance(values, Iterable) and not isinstance(values, str) else None
        if listed is None:
            raise DataError(f"{_ACCEPTED} Received: {name!r}: {values!r}")
        columns[str(name)] = tuple(_number(value) for value in listed)
    most = max(map(len, columns.values()), default=0)
    values = [value for column in columns.values() for value in column]
    if values and all(value is None for value in values):
        first = next(iter(table.values()))
        raise DataError(f"{_ACCEPTED} None of its values is a number. Received: {first!r:.80}")
    nothing = float("nan")
    return {
        name: tuple(nothing if v is None else v for v in (*column, *[None] * (most - len(column))))
        for name, column in columns.items()
        if column
    }


def _from_rows(rows: list[Mapping[Any, Any]]) -> dict[str, tuple[float, ...]]:
    names = dict.fromkeys(name for row in rows for name in row if name is not None)
    return _from_columns({name: [row.get(name) for row in rows] for name in names})


def _rows(path: Path) -> list[Mapping[Any, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            sample = stream.read(4096)
            stream.seek(0)
            separator = max(",;\t", key=sample.count)
            return list(csv.DictReader(stream, delimiter=separator))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the history ({error}). Received: {path}") from error


def _number(value: Any) -> float | None:
    """A number; ``None`` for what is none (the ``NA`` of a CSVLogger)."""
    try:
        return float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        return None
