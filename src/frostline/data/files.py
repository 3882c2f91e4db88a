"""Files that are written whole or not at all, and the check of a name before the work begins."""

from __future__ import annotations

import contextlib
import os
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
    if path.is_dir():
        raise OutputError(f"{path} is a folder")
    if path.exists() and not force:
        known = source is not None and Path(source).exists() and path.samefile(source)
        same = " (the model itself)" if known else ""
        raise OutputError(f"{path} exists{same}; choose another name, or overwrite it with --force")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the folder of ``path``, and rename that file when the block ends.

    A reader sees the old file or the new one, never half of it.

    Yields:
        The temporary path, with the suffix of ``path``.

    Raises:
        OutputError: It cannot be written. After this and any other error the old file is as it
            was, and nothing is left behind.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # Libraries report a folder that cannot be written to in many ways; this in one.
        yield temporary
        temporary.replace(path)
        _sync_folder(path.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes | memoryview) -> Path:
    """Write a file whole or not at all; on return it survives a power cut.

    Raises:
        OutputError: As :func:`replacing`.
    """
    with replacing(path) as temporary, temporary.open("wb") as stream:
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
