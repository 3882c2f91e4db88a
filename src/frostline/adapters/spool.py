"""What waits to be read again: in memory up to a limit, beyond it in a temporary folder.

Raw bytes and nothing pickled. The folder is gone when the workspace closes, on any exit.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from frostline.data.arrays import is_sequence, map_leaves
from frostline.data.batch import Batch
from frostline.types import Array, OutputError

#: Bytes of batches that are held in memory where the data can be read only once.
WINDOW = 64 << 20


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
        self._open: list[IO[bytes]] = []

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._open:
            stream.close()
        if self._folder is not None:
            self._folder.cleanup()

    def spool(self) -> Spool:
        """An empty spool in this workspace."""
        return Spool(self)

    def stream(self) -> IO[bytes]:
        """A file without a name, to write and to read; closed with the workspace."""
        # Unbuffered: what cannot be written fails at once, and not when it is closed.
        self._open.append(tempfile.TemporaryFile(prefix="frostline-", buffering=0))  # noqa: SIM115
        return self._open[-1]

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


class KeptBatches:
    """Batches of data that can be read only once, to be read again.

    Their arrays, and tensors that numpy can view, go where the workspace has room for them. What
    is neither (a graph, a class of the user's own) stays in memory.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._spool = workspace.spool()
        self._read: list[Callable[[], Batch]] = []

    def keep(self, batch: Batch) -> Callable[[], Batch]:
        """Keep a batch; returns what reads it again."""
        parts = (batch.x, batch.y, batch.sample_weight, batch.whole)
        self._read.append(self._kept(batch, parts) if all(map(_plain, parts)) else lambda: batch)
        return self._read[-1]

    def __iter__(self) -> Iterator[Batch]:
        return (read() for read in self._read)

    def _kept(self, batch: Batch, parts: tuple[Any, ...]) -> Callable[[], Batch]:
        arrays: list[Array] = []
        places: dict[int, _Place] = {}

        def taken(leaf: Any) -> Any:
            array = _viewed(leaf)
            if array is None:
                return leaf
            if id(leaf) not in places:
                places[id(leaf)] = _Place(len(arrays), leaf is not array)
                arrays.append(array)
            return places[id(leaf)]

        shells = [map_leaves(taken, part) for part in parts]
        self._spool.append(len(self._read), tuple(arrays))
        entry = self._spool.entries[-1][1]
        rest = replace(batch, x=None, y=None, sample_weight=None, whole=None)

        def read() -> Batch:
            held = entry.read() if isinstance(entry, _OnDisk) else entry
            made = [_again(array) for array in held]

            def given(leaf: Any) -> Any:
                if not isinstance(leaf, _Place):
                    return leaf
                return made[leaf.index]() if leaf.tensor else held[leaf.index]

            x, y, weight, whole = (map_leaves(given, shell) for shell in shells)
            return replace(rest, x=x, y=y, sample_weight=weight, whole=whole)

        return read


@dataclass(frozen=True)
class _Place:
    """Stands for an array that is kept, or for a tensor that numpy views."""

    index: int
    tensor: bool


def _again(array: Array) -> Callable[[], Any]:
    """Makes a tensor of an array, once however often it is asked for."""
    made: list[Any] = []

    def tensor() -> Any:
        if not made:
            made.append(sys.modules["torch"].from_numpy(array))
        return made[0]

    return tensor


def _plain(value: Any) -> bool:
    """Whether it consists of plain containers, so that it can be made anew."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(map(_plain, value.values()))
    if is_sequence(value):
        known = type(value) in (list, tuple) or hasattr(value, "_fields")
        return known and all(map(_plain, value))
    return True


def _viewed(leaf: Any) -> Array | None:
    """The leaf as an array that shares its memory; ``None``: it is none, or cannot be stored."""
    kind = type(leaf)
    if kind.__module__ == "torch" and kind.__name__ == "Tensor":
        plain = leaf.device.type == "cpu" and leaf.layout is sys.modules["torch"].strided
        if not plain or leaf.requires_grad or leaf.is_conj() or leaf.is_neg():
            return None
        try:
            leaf = leaf.numpy()
        except (TypeError, RuntimeError):  # dtypes that numpy lacks
            return None
    elif kind is not np.ndarray:
        return None
    return leaf if leaf.size and not leaf.dtype.hasobject else None


def _bytes(arrays: Sequence[Any]) -> int:
    return sum(np.asarray(array).nbytes for array in arrays)
