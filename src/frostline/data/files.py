"""Files that are written whole or not at all, and the check of a name before the work begins."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from frostline.types import OutputError


def check_output(
    path: Path, suffixes: Sequence[str], noun: str, *, force: bool, source: str | None = None
) -> None:
    """Refuse an output file that cannot be written, before the work instead of after it.

    Args:
        path: The file.
        suffixes: Allowed endings, for example ``(".keras", ".h5")``.
        noun: What is written, with its article: ``"a model"``.
        force: Whether a file that is there may be replaced.
        source: The file that was read; the text says so where it is the same one.

    Raises:
        OutputError: Another ending, a folder, a file that is there already, or no such folder.
    """
    if path.suffix not in suffixes:
        *most, last = suffixes
        raise OutputError(f"{noun} is written as {', '.join(most)} or {last}. Received: {path}")
    try:
        there = path.exists()
        if path.is_dir():
            raise OutputError(f"{path} is a folder")
        if there and not path.is_file():
            raise OutputError(f"{path} is no regular file")
        if (there or path.is_symlink()) and not force:
            known = there and source is not None and Path(source).exists()
            same = " (the model itself)" if known and path.samefile(str(source)) else ""
            raise OutputError(
                f"{path} exists{same}; choose another name, or overwrite it with --force"
            )
        if not path.parent.is_dir():
            raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # links in a loop, a name too long, a null byte
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}") from None


@contextmanager
def replacing(path: Path) -> Iterator[io.BufferedRandom]:
    """Open a temporary file in the folder of ``path``, and rename it when the block ends.

    A reader sees the old file or the new one, never half of it. A link is followed, and the file
    behind it replaced; the new file has the old one's mode. Nobody can guess the temporary name,
    and it is opened only once, so that a link that is put in its place is not written through.

    Yields:
        The file, open for reading and writing bytes.

    Raises:
        OutputError: It cannot be written, or its name means another file by now. After this and
            any other error the old file is as it was, and nothing is left behind.
    """
    temporary: Path | None = None
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.stem[:60]}.", suffix=f".tmp{target.suffix}", dir=target.parent
        )
        temporary = Path(name)
        with open(name, "w+b", opener=lambda *_: descriptor) as stream:
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, _mode(target))
            yield stream
            stream.flush()
            if not os.path.samestat(os.fstat(descriptor), temporary.lstat()):
                raise OutputError(
                    f"cannot write {path}: another process put something else in the place of its "
                    f"temporary file {temporary.name}. Write to a folder of your own"
                )
        temporary.replace(target)
        _sync_folder(target.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _mode(path: Path) -> int:
    """Return the mode of the file that is replaced, else that of any new file of this process."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write(path: Path, content: bytes | memoryview) -> Path:
    """Write a file whole or not at all; on return it survives a power cut.

    Raises:
        OutputError: As :func:`replacing`.
    """
    with replacing(path) as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return path


def _sync_folder(folder: Path) -> None:
    """Make a rename last; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
