"""What waits to be read again: in memory up to a limit, beyond it in a temporary file.

Raw bytes and nothing pickled, in a file without a name: it is gone when the workspace closes, on
any exit, and when the process ends.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
        self._slots: _Slots | None = None
        self._open: list[IO[bytes]] = []

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._open:
            stream.close()

    def spool(self) -> Spool:
        """An empty spool in this workspace."""
        return Spool(self)

    def stream(self) -> IO[bytes]:
        """A file without a name, to write and to read; closed with the workspace."""
        # Unbuffered: what cannot be written fails at once, and not when it is closed.
        self._open.append(tempfile.TemporaryFile(prefix="frostline-", buffering=0))  # noqa: SIM115
        return self._open[-1]

    def on_disk(self, arrays: Sequence[Any]) -> _OnDisk:
        """Write arrays to the disk.

        Raises:
            OutputError: There is no room, or no folder.
        """
        try:
            if self._slots is None:
                self._slots = _Slots(self.stream())
            return self._slots.write(arrays)
        except OSError as error:
            raise OutputError(
                f"cannot keep activations in the temporary folder {tempfile.gettempdir()} "
                f"({error.strerror}); set TMPDIR to a larger disk or pass fewer samples. The model "
                "is unchanged."
            ) from error


class _Slots:
    """Slots of one file of raw bytes; what was read last is written over.

    Pages that a file has are written in a fraction of the time that new ones take.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._end, self._lock = stream, 0, threading.Lock()
        self._free: list[tuple[int, int]] = []

    def write(self, held: Sequence[Any]) -> _OnDisk:
        # Not np.save: bfloat16 is no dtype that it can read back.
        arrays = [np.ascontiguousarray(tensor) for tensor in held]
        size = sum(array.nbytes for array in arrays)
        with self._lock:
            room, place = min((s for s in self._free if s[0] >= size), default=(size, self._end))
            if (room, place) in self._free:
                self._free.remove((room, place))
            else:
                self._end += size
            self._stream.seek(place)
            for array in arrays:
                left = array.reshape(-1).view(np.uint8).data
                while left:
                    left = left[self._stream.write(left) :]
        forms = tuple((array.dtype, np.shape(one)) for array, one in zip(arrays, held, strict=True))
        return _OnDisk(self, room, place, forms)

    def read(self, entry: _OnDisk) -> tuple[Array, ...]:
        arrays = [np.empty(shape, dtype) for dtype, shape in entry.forms]
        with self._lock:
            self._stream.seek(entry.place)
            for array in arrays:
                left = array.reshape(-1).view(np.uint8).data
                while left:
                    left = left[self._stream.readinto(left) :]  # type: ignore[attr-defined]
        return tuple(arrays)

    def free(self, entry: _OnDisk) -> None:
        self._free.append((entry.room, entry.place))


@dataclass(frozen=True, eq=False)
class _OnDisk:
    """Arrays of one batch, one after the other in a slot of a file."""

    slots: _Slots
    room: int
    place: int
    forms: tuple[tuple[Any, tuple[int, ...]], ...]

    def read(self) -> tuple[Array, ...]:
        return self.slots.read(self)


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
            self.entries.append((index, self.workspace.on_disk(arrays)))

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
            entry.slots.free(entry)
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
