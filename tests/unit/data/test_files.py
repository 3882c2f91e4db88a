"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from frostline.data import files
from frostline.types import OutputError


def test_a_file_is_replaced_when_the_block_ends_and_keeps_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(b"old")
    with files.replacing(path) as stream:
        stream.write(b"new")
        assert (path.read_bytes(), Path(stream.name).suffix) == (b"old", ".keras")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("a user's own")])
def test_any_error_keeps_the_old_file(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(b"old")
    kind = OutputError if isinstance(error, OSError) else ValueError

    def write_half() -> None:
        with files.replacing(path) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(kind, match=r"No space left|own"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_ours_is_not_wrapped_again(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"^full$"), files.replacing(tmp_path / "a"):
        raise OutputError("full")


def test_content_reaches_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append((tmp_path / "a").exists()), sync(number))
    )
    files.write(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert synced[0] is False


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    there = tmp_path / "there.keras"
    there.write_bytes(b"")
    (tmp_path / "folder.h5").mkdir()
    for name, text in (
        ("a.txt", r"a model is written as \.keras or \.h5\. Received: .*a\.txt"),
        ("folder.h5", "is a folder"),
        ("there.keras", r"exists \(the model itself\); choose another name"),
        ("missing/a.h5", "there is no folder"),
    ):
        with pytest.raises(OutputError, match=text):
            files.check_output(
                tmp_path / name, (".keras", ".h5"), "a model", force=False, source=str(there)
            )
    files.check_output(there, (".keras", ".h5"), "a model", force=True)
