"""Files that are whole or not there: written under a temporary name, flushed, renamed, checked.

Every JSON file is *sealed*: it carries the sha256 of its own content, so that a flipped byte is
told from a file of another version. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from frostline.data import files
from frostline.types import Array, DataError, OutputError

#: Version of everything on disk. Another one is refused, never guessed at.
SCHEMA = "frostline-cache/1"

_NAME = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20


class DamagedError(Exception):
    """A file is missing, cut short or changed; what it held must be computed again."""


class FullError(OutputError):
    """The disk or the quota is full."""


def sha256(*parts: bytes | str) -> str:
    """Hex digest of the parts, each with its length before it, so that none can run into the next.

    Example:
        >>> sha256("ab", "c") == sha256("a", "bc")
        False
    """
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def require_name(name: object, where: Path) -> str:
    """Return a name that came out of a file if it is a plain hash; no path can be made of it.

    Raises:
        DataError: It is anything else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DataError(
            f"{where}: refused, it names something else than a shard of this cache. "
            f"Received: {name!r}"
        )
    return name


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all; on return it survives a power cut.

    Raises:
        FullError: No room; nothing of it is left behind.
        OutputError: Any other reason; the same.
    """
    try:
        files.write(path, content)
    except OutputError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FullError(str(error)) from cause
        raise


def write_array(path: Path, array: Array) -> tuple[str, int]:
    """Write a ``.npy`` file; returns its sha256 and its size in bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    content = buffer.getbuffer()
    write(path, content)
    return hashlib.sha256(content).hexdigest(), len(content)


class StoredArray:
    """A ``.npy`` file that is read row by row, by position.

    It is never mapped: a file that is cut short is an error, not the end of the process. Its bytes
    are compared with their checksum when it is opened, and again when it has changed since.

    Args:
        path: The file; a link is not followed.
        digest: sha256 of its bytes.

    Raises:
        DamagedError: Not the bytes that were written.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self.digest = digest
        try:
            self._stream = _open(path)
        except OSError as error:
            raise DamagedError(f"{path.name}: {error.strerror or error}") from error
        weakref.finalize(self, self._stream.close)
        self._lock = threading.Lock()
        self.require_whole()
        try:
            self._stream.seek(0)
            version = np.lib.format.read_magic(self._stream)
            read = np.lib.format.read_array_header_1_0
            header = np.lib.format.read_array_header_2_0 if version > (1, 0) else read
            self.shape, fortran, self.dtype = header(self._stream)
        except (ValueError, EOFError) as error:
            raise DamagedError(f"{path.name}: {error}") from error
        self._start = self._stream.tell()
        if fortran or self.dtype.hasobject:
            raise DamagedError(f"{path.name}: not an array of numbers, row by row")

    def require_whole(self) -> tuple[int, ...]:
        """Compare the bytes with their checksum, unless this was done and nothing changed since.

        Returns:
            Signature of the file whose bytes are right.

        Raises:
            DamagedError: They differ.
        """
        now = _signature(self._stream)
        if (now, self.digest) in _VERIFIED:
            return now
        with self._lock:
            self._stream.seek(0)
            found = hashlib.file_digest(self._stream, "sha256").hexdigest()
        if found != self.digest or _signature(self._stream) != now:
            raise DamagedError(f"{self.path.name}: changed since it was written")
        # A clock that ticks every few milliseconds does not tell a change right behind a write.
        if time.time_ns() - max(now[-2:]) > _TICK_NS:
            _VERIFIED.add((now, self.digest))
        return now

    def read(self, rows: Array) -> Array:
        """Read rows in any order.

        Raises:
            DamagedError: The file changed while it was in use.
        """
        known = self.require_whole()
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        size = self.dtype.itemsize * math.prod(self.shape[1:])
        content: memoryview = out.reshape(-1).view(np.uint8).data
        # Runs of neighbours are read in one go.
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, stop in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            if stop > start and size:
                self._fill(content[start * size : stop * size], int(rows[start]) * size)
        if _signature(self._stream) != known:
            raise DamagedError(f"{self.path.name}: changed while it was read")
        return out

    def _fill(self, target: memoryview, offset: int) -> None:
        done, position = 0, self._start + offset
        while done < len(target):
            if hasattr(os, "preadv"):  # forked readers share the position of the file
                count = os.preadv(self._stream.fileno(), [target[done:]], position + done)
            else:
                with self._lock:
                    self._stream.seek(position + done)
                    count = self._stream.readinto(target[done:])
            if not count:
                raise DamagedError(f"{self.path.name}: cut short")
            done += count


#: Signature and sha256 of the files that this process has compared with their checksum.
_VERIFIED: set[tuple[tuple[int, ...], str]] = set()
_TICK_NS = 50_000_000


def _signature(stream: io.FileIO) -> tuple[int, ...]:
    """What changes when a file does; the last two are times."""
    found = os.fstat(stream.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_array(path: Path, digest: object) -> Array:
    """Read a whole ``.npy`` file whose bytes have this sha256.

    Raises:
        DamagedError: Not the bytes that were written, or not an array of numbers.
    """
    try:
        with _open(path) as stream:
            content = stream.read()
        if hashlib.sha256(content).hexdigest() != digest:
            raise DamagedError(f"{path.name}: changed since it was written")
        array: Array = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DamagedError(f"{path.name}: {error}") from error
    return array


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with its schema and its own sha256."""
    body = {**content, "schema": SCHEMA}
    write(path, (_canonical({**body, "sha256": _seal(body)}) + "\n").encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON file that :func:`write_sealed` wrote.

    Raises:
        DamagedError: Missing, cut short, or a byte is not what was written.
        DataError: Whole, but of another version of Frostline.
    """
    try:
        with _open(path) as stream:
            raw = stream.read()
        # A byte flipped between the fields, where JSON does not care, is a flipped byte as well.
        body = json.loads(raw)
        seal = body.pop("sha256")
        whole = seal == _seal(body) and raw.decode() == _canonical({**body, "sha256": seal}) + "\n"
        schema = body["schema"]
    except OSError as error:
        raise DamagedError(f"{path.name}: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path.name}: not a whole file of this cache") from error
    if not whole:
        raise DamagedError(f"{path.name}: changed since it was written")
    if schema != SCHEMA:
        raise DataError(
            f"{path}: written by another version of Frostline; use that version, or remove the "
            f"folder. This one reads {SCHEMA}. Received: {schema!r}"
        )
    found: dict[str, Any] = body
    return found


def require_no_link(*paths: Path) -> None:
    """Refuse links in place of the files and folders of a store: they lead out of it.

    Raises:
        DataError: One is a link.
    """
    for path in paths:
        if path.is_symlink():
            raise DataError(
                f"{path}: refused, a link does not belong into a cache; remove it, the features "
                "are computed again"
            )


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed process left behind; only while holding the lock."""
    for path in folder.glob(".*.tmp*"):
        with contextlib.suppress(OSError):
            path.unlink()


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the cache folder {path}: {error.strerror or error}"
        ) from error


def _open(path: Path) -> io.FileIO:
    """Open for reading without a buffer, and never through a link, which leads elsewhere."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return io.FileIO(os.open(path, flags), "rb")


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body).encode()).hexdigest()
