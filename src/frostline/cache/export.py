"""Cached features as a table in a Parquet or Arrow file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frostline.data import files
from frostline.data.catalogue import optional
from frostline.types import Array, DataError

#: Rows in memory at a time.
_ROWS = 1024
SUFFIXES = (".parquet", ".arrow")


def write(
    cache: Any, path: Path, labels: Any = None, *, view: int = 0, overwrite: bool = False
) -> Path:
    """Write the features with ids and labels, one row per sample, 1024 rows in memory at a time.

    Args:
        cache: A :class:`frostline.FeatureCache`.
        path: A ``.parquet`` file, or an ``.arrow`` file in the streaming format.
        labels: One per sample, shape ``(n,)`` or ``(n, ...)``; ``None``: there are none.
        view: Which augmented view.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        OutputError: Another ending, or a file that cannot be written; nothing is left behind.
        DataError: Labels for another number of samples.
        BackendError: pyarrow is not installed.
    """
    arrow = require_writable(path, force=overwrite)
    parts = _batches(arrow, cache, _checked(cache, labels), view)
    first = next(parts)
    with files.replacing(path) as stream:
        if path.suffix == ".parquet":
            writer = arrow.parquet.ParquetWriter(stream, first.schema)
        else:
            writer = arrow.ipc.new_stream(stream, first.schema)
        with writer:
            writer.write_batch(first)
            for part in parts:
                writer.write_batch(part)
    return path


def require_writable(path: Path, *, force: bool) -> Any:
    """Refuse a table that cannot be written, before the work instead of after it; returns pyarrow.

    Raises:
        OutputError: Another ending, a file that is there already, or no such folder.
        BackendError: pyarrow is not installed.
    """
    files.check_output(path, SUFFIXES, "a table of features", force=force)
    if path.suffix == ".parquet":
        optional("pyarrow.parquet", "Writing Parquet")
    return optional("pyarrow", "Writing Arrow or Parquet")


def _checked(cache: Any, labels: Any) -> Array | None:
    if labels is None:
        return None
    found = np.asarray(labels)
    if not found.ndim or len(found) != len(cache):
        raise DataError(
            f"labels= needs one label for each of the {len(cache)} samples. "
            f"Received: shape {found.shape}"
        )
    return found


def _batches(arrow: Any, cache: Any, labels: Array | None, view: int) -> Iterator[Any]:
    several = len(cache.tensors) > 1
    for start in range(0, len(cache), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(cache)))
        columns = {} if cache.ids is None else {"id": arrow.array(cache.ids[rows])}
        for number, array in enumerate(cache.rows(rows, view=view)):
            name = f"features_{number}" if several else "features"
            columns[name] = _nested(arrow, array)
        if labels is not None:
            columns["label"] = _nested(arrow, labels[rows])
        yield arrow.RecordBatch.from_pydict(columns)


def _nested(arrow: Any, array: Array) -> Any:
    """Rows as lists of fixed length, nested as the axes are."""
    column = arrow.array(np.ascontiguousarray(array).reshape(-1))
    sides: Sequence[int] = array.shape[1:]
    for side in reversed(sides):
        column = arrow.FixedSizeListArray.from_arrays(column, side)
    return column
