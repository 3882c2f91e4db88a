"""``frostline cache``: needs no backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.cache import cache_features, folder
from frostline.cli import main

pytestmark = pytest.mark.once


def double(x: Any) -> list[Any]:
    return [x * 2]


double.identity = "b" * 64  # type: ignore[attr-defined]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "features"
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(root))
    for dtype in ("float32", "float16"):
        cache_features(double, np.arange(60.0).reshape(20, 3), dtype=dtype, verbose=0)
    return root


def test_ls(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert any("float16" in line and "20 samples, 1 complete data set(s)" in line for line in lines)
    assert lines[-1].startswith(f"{cache}: 2 cache(s), ")
    assert main(["cache", "ls", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["dtype"] for each in found["caches"]} == {"float32", "float16"}
    assert found["folder"] == str(cache)


def test_verify_names_what_is_damaged(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify"]) == 0
    home = folder.collections(cache)[0]
    shard = next(home.glob("shards/*.npy"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert main(["cache", "verify"]) == 1
    out = capsys.readouterr().out
    assert f"{home.name[:12]}: damaged" in out
    assert f"{shard.name}: changed since it was written" in out
    assert main(["cache", "verify", folder.collections(cache)[1].name[:8]]) == 0


def test_rm(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folder.collections(cache)
    (cache / "mine.txt").write_text("not a cache")
    assert main(["cache", "rm"]) == 2
    assert "--all" in capsys.readouterr().err
    assert main(["cache", "rm", "zzz"]) == 2
    assert "no cache in" in capsys.readouterr().err
    assert main(["cache", "rm", first.name[:12]]) == 0
    assert folder.collections(cache) == [second]
    assert main(["cache", "rm", "--all"]) == 0
    assert [path.name for path in cache.iterdir()] == ["mine.txt"]


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls", "--cache", str(tmp_path / "none")]) == 0
    assert "0 cache(s), 0 B" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
