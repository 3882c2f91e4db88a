"""Activations that wait: in memory up to a limit, beyond it in a temporary folder.

Raw bytes and nothing pickled. The folder is gone when the workspace closes, on any exit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frostline.types import Array, OutputError


class Workspace:
    """Memory and disk for what waits between two stages.

    Args:
        limit: Bytes to hold in memory, over all spools.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.files = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def spool(self) -> Spool:
        """An empty spool in this workspace."""
        return Spool(self)

    def new_file(self) -> Path:
        """A file name that is not in use."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="frostline-")
        self.files += 1
        return Path(self._folder.name) / f"{self.files}.bin"


@dataclass(frozen=True, eq=False)
class _OnDisk:
    """Arrays of one batch, one after the other in a file of raw bytes."""

    file: Path
    forms: tuple[tuple[Any, tuple[int, ...]], ...]

    @classmethod
    def write(cls, file: Path, held: Sequence[Any]) -> _OnDisk:
        arrays = [np.asarray(tensor) for tensor in held]
        try:
            with file.open("wb") as stream:
                for array in arrays:
                    # Not np.save: bfloat16 is no dtype that it can read back.
                    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise OutputError(
                f"cannot keep activations in the temporary folder {file.parent} "
                f"({error.strerror}); set TMPDIR to a larger disk or pass fewer samples. The model "
                "is unchanged."
            ) from error
        return cls(file, tuple((array.dtype, array.shape) for array in arrays))

    def read(self) -> tuple[Array, ...]:
        arrays = []
        with self.file.open("rb") as stream:
            for dtype, shape in self.forms:
                size = int(np.prod(shape)) * dtype.itemsize
                arrays.append(np.fromfile(stream, np.uint8, size).view(dtype).reshape(shape))
        return tuple(arrays)


class Spool:
    """Batches in order, in memory while there is room.

    It keeps numpy arrays, or tensors that numpy can view without a copy.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.entries: list[tuple[int, tuple[Any, ...] | _OnDisk]] = []

    def append(self, index: int, arrays: tuple[Any, ...]) -> None:
        """Keep the arrays of batch number ``index``; on disk once the memory is used up."""
        size = _bytes(arrays)
        if self.workspace.used + size <= self.workspace.limit:
            self.workspace.used += size
            self.entries.append((index, arrays))
        else:
            file = self.workspace.new_file()
            self.entries.append((index, _OnDisk.write(file, arrays)))

    def read(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """All batches in order; they stay."""
        for index, entry in self.entries:
            yield index, entry.read() if isinstance(entry, _OnDisk) else entry

    def drain(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Read once and free each batch as soon as it is handed out."""
        self.entries.reverse()
        while self.entries:
            index, entry = self.entries.pop()
            arrays = entry.read() if isinstance(entry, _OnDisk) else entry
            self._free(entry)
            yield index, arrays

    def clear(self) -> None:
        """Free everything."""
        while self.entries:
            self._free(self.entries.pop()[1])

    def _free(self, entry: tuple[Any, ...] | _OnDisk) -> None:
        if isinstance(entry, _OnDisk):
            entry.file.unlink()
        else:
            self.workspace.used -= _bytes(entry)


def _bytes(arrays: Sequence[Any]) -> int:
    return sum(np.asarray(array).nbytes for array in arrays)
