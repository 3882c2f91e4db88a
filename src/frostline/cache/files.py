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
import os
import re
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


def checksum(path: Path) -> str:
    """Return the sha256 of a file's bytes, read a megabyte at a time.

    Raises:
        DamagedError: It cannot be read.
    """
    try:
        with _open(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DamagedError(f"{path.name}: {error.strerror or error}") from error


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


def map_array(path: Path) -> np.memmap[Any, Any]:
    """Map a ``.npy`` file into memory, read only.

    Raises:
        DamagedError: Not a whole ``.npy`` file of numbers.
    """
    try:
        _open(path).close()
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DamagedError(f"{path.name}: {error}") from error
    if not isinstance(mapped, np.memmap):
        raise DamagedError(f"{path.name}: not a .npy file")
    return mapped


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


def _open(path: Path) -> io.BufferedReader:
    """Open for reading, and never through a link: a link could lead out of the cache."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return io.open(os.open(path, flags), "rb")  # noqa: UP020 - of a descriptor, Path cannot


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body).encode()).hexdigest()
