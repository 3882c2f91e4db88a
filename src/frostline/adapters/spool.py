"""What waits to be read again: in memory up to a limit, beyond it in a temporary file.

Raw bytes and nothing pickled, in a file without a name: it is gone when the workspace closes, on
any exit, and when the process ends.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

    def keep(self, array: Any) -> Any:
        """Take an array, or a tensor that numpy can view, in; on disk once the memory is used up.

        Raises:
            OutputError: There is no room on the disk, or no folder.
        """
        size = np.asarray(array).nbytes
        if self.used + size <= self.limit:
            self.used += size
            return array
        try:
            if self._slots is None:
                self._slots = _Slots(self.stream())
            return self._slots.write(np.asarray(array))
        except OSError as error:
            raise OutputError(
                f"cannot keep activations in the temporary folder {tempfile.gettempdir()} "
                f"({error.strerror}); set TMPDIR to a larger disk or pass fewer samples. The model "
                "is unchanged."
            ) from error

    def free(self, part: Any) -> None:
        """Give back the room of what :meth:`keep` returned."""
        if isinstance(part, _OnDisk):
            part.slots.free(part)
        else:
            self.used -= np.asarray(part).nbytes


class _Slots:
    """Slots of one file of raw bytes; what was read last is written over.

    Pages that a file has are written in a fraction of the time that new ones take.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._end, self._lock = stream, 0, threading.Lock()
        self._free: list[tuple[int, int]] = []

    def write(self, array: Array) -> _OnDisk:
        # Not np.save: bfloat16 is no dtype that it can read back.
        left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        with self._lock:
            fitting = [slot for slot in self._free if slot[0] >= len(left)]
            room, place = min(fitting, default=(len(left), self._end))
            if fitting:
                self._free.remove((room, place))
            else:
                self._end += room
            self._stream.seek(place)
            while left:
                left = left[self._stream.write(left) :]
        return _OnDisk(self, room, place, array.dtype, array.shape)

    def read(self, part: _OnDisk) -> Array:
        array = np.empty(part.shape, part.dtype)
        left = array.reshape(-1).view(np.uint8).data
        with self._lock:
            self._stream.seek(part.place)
            while left:
                left = left[self._stream.readinto(left) :]  # type: ignore[attr-defined]
        return array

    def free(self, part: _OnDisk) -> None:
        self._free.append((part.room, part.place))


@dataclass(frozen=True, eq=False)
class _OnDisk:
    """An array in a slot of a file."""

    slots: _Slots
    room: int
    place: int
    dtype: Any
    shape: tuple[int, ...]


def _read(parts: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(p.slots.read(p) if isinstance(p, _OnDisk) else p for p in parts)


class Spool:
    """Batches in order, in memory while there is room.

    It keeps numpy arrays, or tensors that numpy can view without a copy.

    Attributes:
        moving: Position -> part of the batch that :meth:`drain` gave last, to be handed over.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.entries: list[tuple[int, list[Any]]] = []
        self.moving: dict[int, Any] = {}

    def append(
        self, index: int, arrays: Sequence[Any], moved: Mapping[int, Any] | None = None
    ) -> None:
        """Keep the arrays of batch number ``index``.

        Args:
            index: Number of the batch.
            arrays: Its arrays.
            moved: Position -> what another spool of this workspace holds of the same values.
        """
        moved = moved or {}
        keep = self.workspace.keep
        parts = [moved[i] if i in moved else keep(array) for i, array in enumerate(arrays)]
        self.entries.append((index, parts))

    def read(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """All batches in order; they stay."""
        for index, parts in self.entries:
            yield index, _read(parts)

    def drain(self, moving: Sequence[int] = ()) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Read once and free each batch as soon as it is handed out.

        Args:
            moving: Positions that may be handed over before the next batch is asked for.
        """
        self.entries.reverse()
        while self.entries:
            index, parts = self.entries.pop()
            arrays = _read(parts)
            self.moving = {place: parts[place] for place in moving}
            self._free(part for place, part in enumerate(parts) if place not in moving)
            yield index, arrays
            self._free(self.moving.values())

    def hand_over(self, places: Mapping[int, int]) -> dict[int, Any]:
        """Parts of the batch that is drained, for another spool: its position there -> the part.

        Args:
            places: Position here -> position there.
        """
        return {there: self.moving.pop(here) for here, there in places.items()}

    def clear(self) -> None:
        """Free everything."""
        while self.entries:
            self._free(self.entries.pop()[1])

    def _free(self, parts: Iterable[Any]) -> None:
        for part in parts:
            self.workspace.free(part)


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
        kept = self._spool.entries[-1][1]
        rest = replace(batch, x=None, y=None, sample_weight=None, whole=None)

        def read() -> Batch:
            held = _read(kept)
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
