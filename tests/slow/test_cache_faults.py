"""Faults that only a real system makes: kills, full disks, two processes at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import damage_caches as damages
import kill_cache_builds as kills
import numpy as np
import pytest

from frostline.cache import cache_features, folder
from frostline.cache.progress import Progress
from frostline.types import OutputError

pytestmark = pytest.mark.once

SCRIPT = kills.__file__
SILENT = Progress("", None, 0)


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path) -> None:
    outcome = kills.run(5, seed=3, folder=tmp_path)
    assert outcome.kills == 5
    assert outcome.again == 0
    assert outcome.identical


def test_two_processes_build_the_same_cache(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--build", str(tmp_path / "cache")]
    logs = [tmp_path / "one", tmp_path / "two"]
    processes = [
        subprocess.Popen([*command, str(log)], stderr=subprocess.PIPE, text=True) for log in logs
    ]
    for process in processes:
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
    computed = np.concatenate([np.fromfile(log, "<f4") for log in logs if log.exists()])
    # Each sample once, by the one or the other; the first batch's trial, the last one's padding,
    # and two batches of each process in which it judges what the other has stored.
    assert len(computed) <= kills.SAMPLES + 2 * kills.BATCH + 4 * kills.BATCH
    assert set(computed.tolist()) == set(range(kills.SAMPLES))
    cache = kills.build(tmp_path / "cache", tmp_path / "three")
    assert kills.recomputed(set(range(kills.SAMPLES)), tmp_path / "three") == 0
    x = kills.samples()
    np.testing.assert_array_equal(cache.rows(np.arange(len(x)))[0], x * x)


def test_a_second_writer_waits_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kills.build(tmp_path, tmp_path / "log")
    (home,) = folder.collections(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(home / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdout.readline()
    prefix = kills.Squares(tmp_path / "log")
    with pytest.raises(OutputError, match="another process is writing to the cache"):
        cache_features(prefix, kills.samples(), tmp_path, batch_size=kills.BATCH, lock_timeout=0.1)
    assert "waiting" in capsys.readouterr().err
    with pytest.raises(OutputError, match="another process"):
        folder.remove(home, SILENT)
    holder.kill()  # the system frees the lock
    holder.communicate()
    cache_features(prefix, kills.samples(), tmp_path, batch_size=kills.BATCH, verbose=0)


_HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount a small disk here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_a_cache_that_can_go_on(small_disk: Path, tmp_path: Path) -> None:
    x, log = kills.samples(), tmp_path / "log"
    # A generator says nothing about its length, so that the disk fills while it builds.
    stream = (x[start : start + 50] for start in range(0, len(x), 50))
    with pytest.raises(OutputError, match=r"[Nn]o space|is full") as raised:
        cache_features(kills.Squares(log), stream, small_disk, batch_size=kills.BATCH, verbose=0)
    assert "complete and stay" in str(raised.value)
    before, count = kills.stored(small_disk)
    assert count > 0
    (home,) = folder.collections(small_disk)
    assert folder.verify(home) == []
    assert not list(home.rglob("*.tmp*"))
    # Room again: the rest is computed, and nothing else.
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    log.unlink()
    cache = kills.build(small_disk, log)
    assert kills.recomputed(before, log) == 0
    np.testing.assert_array_equal(cache.rows(np.arange(len(x)))[0], x * x)


def test_a_quota_leaves_a_cache_that_can_go_on(tmp_path: Path) -> None:
    """The kernel refuses files beyond a size: as a quota does, in the middle of a write."""
    pytest.importorskip("resource")
    limited = (
        "import resource, runpy, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"sys.argv[1:] = ['--build', {str(tmp_path / 'cache')!r}, {str(tmp_path / 'log')!r}]; "
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode != 0
    assert "FullError" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "cache").exists()  # not one shard was complete
    cache = kills.build(tmp_path / "cache", tmp_path / "again")
    x = kills.samples()
    np.testing.assert_array_equal(cache.rows(np.arange(len(x)))[0], x * x)


def test_no_damage_before_or_while_a_cache_is_used_gives_a_wrong_feature() -> None:
    outcome = damages.damaged(2 * len(damages.KINDS), seed=5)
    assert {
        f"{kind}, {moment}" for kind in damages.KINDS for moment in ("before", "while used")
    } == {*outcome}
    assert {name: row for name, row in outcome.items() if row["WRONG"]} == {}
    assert sum(row["right again"] for row in outcome.values()) >= 14  # links are refused


def test_a_disk_that_is_full_after_any_number_of_bytes_leaves_nothing_and_can_go_on() -> None:
    found = damages.full_disks(step=499)
    assert found["refused"] == found["builds"] - 1 > 5
    assert (found["WRONG"], found["left behind"]) == (0, 0)
