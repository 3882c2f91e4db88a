"""The cache folder as users see it: where it is, what it holds, whether it is intact, removal."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from frostline.cache import build, shards
from frostline.cache.files import DamagedError, make_folder, require_no_link
from frostline.cache.progress import Progress
from frostline.cache.shards import Collection
from frostline.types import DataError, FrostlineError, OutputError

_HEX = set("0123456789abcdef")
#: What the system says of a place that cannot be written.
_NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One collection in a cache folder.

    Attributes:
        collection: What it says about itself; ``None`` when that is damaged or another version's.
        folder: Its folder.
        samples: Samples whose features are stored.
        data_sets: Manifests: data sets that are complete.
        nbytes: Bytes on disk.
        used: When it was last used, seconds since 1970.
        problem: Why it cannot be read; ``None`` when it can.
    """

    collection: Collection | None
    folder: Path
    samples: int
    data_sets: int
    nbytes: int
    used: float
    problem: str | None = None


def default_folder() -> Path:
    """``FROSTLINE_CACHE_DIR``, else ``frostline`` in the user's cache folder."""
    chosen = os.environ.get("FROSTLINE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "frostline" / "features"


def resolve(path: str | os.PathLike[str] | None) -> Path:
    """Return the cache folder that is meant, absolute.

    Raises:
        OutputError: It is a file.
    """
    folder = (default_folder() if path is None else Path(path).expanduser()).absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the cache is a folder, and {folder} is a file")
    return folder


@contextmanager
def locked(folder: Path, progress: Progress, *, timeout: float | None = None) -> Iterator[None]:
    """Hold the lock of one collection; the system frees it when the process dies.

    What fails before anything is complete leaves no folder behind.

    Where nothing can be written (a disk that is read-only, a folder of someone else) there is
    nothing to lock: what is complete can be read, and the first write fails by itself.

    Args:
        folder: The collection's folder; made when missing.
        progress: Told when it has to wait.
        timeout: Seconds to wait for another process; ``None`` waits as long as it takes.

    Raises:
        OutputError: Another process holds it for longer.
    """
    require_no_link(folder, folder / "lock")
    rootless = not folder.parent.exists()
    make_folder(folder)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"another process is writing to this cache ({folder.name[:12]}); waiting")
        try:
            lock.acquire(timeout=-1 if timeout is None else timeout)
        except Timeout:
            raise OutputError(
                f"another process is writing to the cache {folder} and did not finish within "
                f"{timeout:g} s; wait for it, or choose another folder"
            ) from None
    except OSError as error:
        if error.errno not in _NO_WRITING:
            raise
    try:
        yield
    except BaseException:
        if not any(folder.glob("*/*.json")):  # no shard, no data set
            with contextlib.suppress(OSError):
                _emptied(folder)
                if rootless:
                    folder.parent.rmdir()
        raise
    finally:
        lock.release()


def size(root: Path) -> int:
    """Bytes of everything in a cache folder."""
    total = 0
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def entries(root: Path) -> list[Entry]:
    """Everything in a cache folder, last used first; what is not ours is not listed."""
    found = [_entry(folder) for folder in collections(root)]
    return sorted(found, key=lambda entry: -entry.used)


def collections(root: Path) -> list[Path]:
    """Folders of collections: those named by a hash, and no links."""
    if not root.is_dir():
        return []
    return [
        folder
        for folder in sorted(root.iterdir())
        if len(folder.name) == 64
        and set(folder.name) <= _HEX
        and folder.is_dir()
        and not folder.is_symlink()
    ]


def _entry(folder: Path) -> Entry:
    nbytes = size(folder)
    stamps = [path.stat().st_mtime for path in folder.glob("manifests/[!.]*.json")]
    used = max(stamps, default=folder.stat().st_mtime)
    try:
        collection = shards.load(folder)
        described = []
        for path in sorted(collection.shards.glob("[!.]*.json")):
            with contextlib.suppress(DamagedError):  # `ls` reads only, `verify` tells of them
                described.append(shards.read_shard(collection, path.stem))
        samples = sum(len(shard.samples) for shard in described)
        complete = sum(1 for _ in build.manifests(collection))
    except (DamagedError, DataError) as error:
        return Entry(collection=None, folder=folder, samples=0, data_sets=0, nbytes=nbytes,
                     used=used, problem=str(error))  # fmt: skip
    return Entry(collection=collection, folder=folder, samples=samples, data_sets=complete,
                 nbytes=nbytes, used=used)  # fmt: skip


def verify(folder: Path) -> list[str]:
    """Compare every byte of a collection with its checksums; nothing is changed.

    Returns:
        What is damaged, in words; empty when all is whole.
    """
    try:
        collection = shards.load(folder)
    except (DamagedError, DataError) as error:
        return [str(error)]
    problems = []
    for path in sorted(collection.shards.glob("[!.]*.json")):
        try:
            shards.verify_shard(collection, shards.read_shard(collection, path.stem))
        except (DamagedError, DataError) as error:
            problems.append(str(error))
    for path in sorted(collection.manifests.glob("[!.]*.json")):
        try:
            manifest = build.read_manifest(collection, path.stem)
            for name in manifest.shards:
                shards.read_shard(collection, name)
        except (DamagedError, DataError) as error:
            problems.append(f"data set {path.stem[:12]}: {error}")
    return problems


def remove_at_exit(folder: Path) -> None:
    """Remove a collection that no other process can use when this one ends."""
    creator = os.getpid()

    def removed() -> None:
        if os.getpid() == creator:  # not in a forked worker
            with contextlib.suppress(FrostlineError, OSError):
                remove(folder, Progress("", None, 0))

    atexit.register(removed)


def remove(folder: Path, progress: Progress) -> None:
    """Remove a collection; does not wait for other processes.

    Raises:
        OutputError: Another process is writing to it, or it cannot be removed.
    """
    with locked(folder, progress, timeout=0):
        try:
            _emptied(folder)
        except OSError as error:
            raise OutputError(f"cannot remove {folder}: {error.strerror or error}") from error
    if os.name == "nt":  # where an open file cannot be removed
        _remove_lock(folder)


def _emptied(folder: Path) -> None:
    """Remove what a collection holds, while its lock is held, so that nobody else's is removed."""
    # The description first: if we are killed, the remains are not taken for a cache.
    (folder / "collection.json").unlink(missing_ok=True)
    for path in (folder / "shards", folder / "manifests"):
        if path.exists():
            shutil.rmtree(path)
    _remove_lock(folder)


def _remove_lock(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / "lock").unlink()
        folder.rmdir()
