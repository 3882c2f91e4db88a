"""Checks before a file is read: it is a file, and what it says of its size can be true.

A file that was sent can declare anything. Sizes are compared with the bytes that are there and
with the memory of this machine before anything is allocated for them.
"""

from __future__ import annotations

import math
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

from frostline.types import DataError, FrostlineError

#: Members of a zip archive that hold numbers shrink this far at most; DEFLATE cannot do more.
_DEFLATE_LIMIT = 1032
#: A ``.keras`` file has a few JSON members beside its weights; far more is no model.
_MEMBER_LIMIT = 100_000


def require_file(path: Path, *, kind: type[FrostlineError] = DataError) -> None:
    """Refuse what is no regular file: a device never ends, and a pipe never begins.

    Raises:
        FrostlineError: Of ``kind``: there is no such file, it is a folder, a device or a pipe, or
            its links form a loop.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise kind(f"no such file: {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise kind(f"{path}: cannot be read ({reason})") from None
    if stat.S_ISDIR(mode):
        raise kind(f"{path} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise kind(f"{path} is not a regular file but a device, a pipe or a socket")


def require_memory(nbytes: int, what: str, *, kind: type[FrostlineError] = DataError) -> None:
    """Refuse to allocate more than the machine has.

    Raises:
        FrostlineError: Of ``kind``: ``nbytes`` is more than the free memory.
    """
    free = available_memory()
    if nbytes > free:
        raise kind(
            f"{what} would take {nbytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB of memory "
            "are free"
        )


def available_memory() -> int:
    """Return the bytes that this process can still allocate, by the kernel or its control group."""
    limits = [_meminfo(), _control_group()]
    return min((limit for limit in limits if limit is not None), default=1 << 62)


def require_sound_zip(
    archive: zipfile.ZipFile, shown: str, *, kind: type[FrostlineError] = DataError
) -> None:
    """Refuse an archive whose members claim more than their bytes can hold, or than fits.

    Raises:
        FrostlineError: Of ``kind``: more members than any model or data set has, two of one name,
            one that claims a size which its compressed bytes cannot reach, or more than the free
            memory in all.
    """
    members = archive.infolist()
    if len(members) > _MEMBER_LIMIT:
        raise kind(f"{shown}: {len(members)} members in one archive; at most {_MEMBER_LIMIT}")
    if len({member.filename for member in members}) < len(members):
        raise kind(f"{shown}: two members of the archive have one name")
    for member in members:
        most = member.compress_size
        if member.compress_type == zipfile.ZIP_DEFLATED:
            most = member.compress_size * _DEFLATE_LIMIT
        elif member.compress_type != zipfile.ZIP_STORED:
            raise kind(f"{shown}: member {member.filename!r} has a compression that is not read")
        if member.file_size > most:
            raise kind(f"{shown}: member {member.filename!r} declares more bytes than it can hold")
    total = sum(member.file_size for member in members)
    require_memory(total, f"{shown}: unpacked, it", kind=kind)


def array_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array, without overflow however large the shape claims to be."""
    return math.prod(shape) * int(dtype.itemsize)


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _control_group() -> int | None:
    """Memory that a container may still use; ``None`` without a limit."""
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):
            continue
    return None
