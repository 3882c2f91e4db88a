"""What the batches of a pass gave, one row per sample, without holding all of it in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from frostline.adapters.spool import Workspace
from frostline.types import Array, OutputError

#: Numbers that are looked at at a time: 2 MiB of float64.
_PIECE = 1 << 18


class Rows:
    """Arrays of one dtype and one shape per row, one after the other.

    They are in memory while the workspace has room, and beyond it all of them are in a temporary
    file without a name. An array of all of them outlives the workspace.

    Args:
        workspace: Whose room is used; ``None``: memory alone.
    """

    def __init__(self, workspace: Workspace | None = None) -> None:
        self._workspace = workspace
        self._held: list[Array] = []
        self._counts: list[int] = []
        self._file: IO[bytes] | None = None
        self._used = 0
        self.dtype: np.dtype[Any] = np.dtype(np.float64)
        self.shape: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Axes, that of the samples among them."""
        return len(self.shape)

    def takes(self, value: Any) -> bool:
        """Whether the value is an array that can be appended."""
        if not isinstance(value, np.ndarray) or not value.ndim or value.dtype.hasobject:
            return False
        first = not self._counts
        return first or (value.dtype == self.dtype and value.shape[1:] == self.shape[1:])

    def append(self, array: Array) -> None:
        """Add the rows of a batch.

        Raises:
            OutputError: The folder for temporary files is full.
        """
        if not self._counts:
            self.dtype = array.dtype
        self.shape = (len(self) + len(array), *array.shape[1:])
        self._counts.append(len(array))
        room = self._workspace
        if self._file is None and room is not None and room.used + array.nbytes > room.limit:
            self._file = room.stream()
            for held in self._held:
                self._write(held)
            self._held.clear()
            room.used -= self._used
        if self._file is None:
            self._held.append(array)
            if room is not None:
                room.used += array.nbytes
                self._used += array.nbytes
        else:
            self._write(array)

    def _write(self, array: Array) -> None:
        assert self._file is not None
        try:
            view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise OutputError(
                f"cannot keep outputs in the temporary folder {tempfile.gettempdir()} "
                f"({error.strerror}); set TMPDIR to a larger disk or pass fewer samples. The model "
                "is unchanged."
            ) from error

    def batches(self) -> Iterator[Array]:
        """The arrays as they came."""
        if self._file is None:
            yield from self._held
            return
        start = 0
        for count in self._counts:
            yield self._read(start, count)
            start += count

    def pieces(self, rows: int) -> Iterator[Array]:
        """The same rows, so many at a time."""
        if self._file is not None:
            for start in range(0, len(self), rows):
                yield self._read(start, min(rows, len(self) - start))
            return
        waiting: list[Array] = []
        missing = rows
        for array in self._held:
            while len(array):
                waiting.append(array[:missing])
                array = array[len(waiting[-1]) :]
                missing -= len(waiting[-1])
                if not missing:
                    yield _joined(waiting)
                    waiting, missing = [], rows
        if waiting:
            yield _joined(waiting)

    def whole(self) -> Array:
        """All in one array; of a file it is read where it is looked at."""
        if self._file is None:
            return _joined(self._held) if self._held else np.empty(self.shape, self.dtype)
        # A copy on writing: who gets the array may change it.
        return np.asarray(np.memmap(self._file, self.dtype, "c", 0, self.shape))

    def astype(self, dtype: Any) -> Rows:
        """As another dtype; itself where it has it."""
        if self.dtype == dtype:
            return self
        other = Rows(self._workspace)
        for array in self.batches():
            other.append(array.astype(dtype))
        return other

    def _read(self, start: int, count: int) -> Array:
        assert self._file is not None
        width = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        read = np.empty((count, *self.shape[1:]), self.dtype)
        view, place = read.reshape(-1).view(np.uint8).data, 0
        self._file.seek(start * width)
        while place < len(view):
            found = self._file.readinto(view[place:])  # type: ignore[attr-defined]
            if not found:
                raise OutputError("a temporary file was cut short while it was in use")
            place += found
        self._file.seek(0, 2)
        return read


class Kept:
    """What each batch gave: rows of an array, and anything else as it is.

    Args:
        workspace: Whose room is used.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._rows = Rows(workspace)
        self._others: list[Any] | None = None

    def append(self, value: Any) -> None:
        """Add what a batch gave."""
        if self._others is None and self._rows.takes(value):
            self._rows.append(value)
            return
        if self._others is None:
            self._others = list(self._rows.batches())
            self._rows = Rows(self._workspace)
        self._others.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        """Add what several batches gave."""
        for value in values:
            self.append(value)

    def emptied(self) -> Kept:
        """Another one in the same workspace."""
        return Kept(self._workspace)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._others) if self._others is not None else self._rows.batches()

    def rows(self) -> Rows | None:
        """All rows; ``None`` where the batches gave no arrays, or such of different shapes."""
        if self._others is None:
            return self._rows
        arrays = [value for value in self._others if isinstance(value, np.ndarray) and value.ndim]
        if len(arrays) < len(self._others) or len({array.shape[1:] for array in arrays}) != 1:
            return None
        found = Rows(self._workspace)
        found.append(np.concatenate(arrays))
        return found


def at_a_time(*columns: Array | Rows) -> int:
    """Rows of these arrays that make a piece."""
    return max(1, _PIECE // max(1, *(int(np.prod(column.shape[1:])) for column in columns)))


def pieces(*columns: Array | Rows) -> Iterator[tuple[Array, ...]]:
    """Some rows of each at a time, the same ones of all."""
    rows = at_a_time(*columns)
    yield from zip(*(_pieces(column, rows) for column in columns), strict=True)


def _pieces(values: Array | Rows, rows: int) -> Iterator[Array]:
    if isinstance(values, Rows):
        return values.pieces(rows)
    return (values[start : start + rows] for start in range(0, len(values), rows))


def _joined(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
