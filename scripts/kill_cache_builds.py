"""Kill cache builds at random moments, resume, and compare with a build that ran through.

    python scripts/kill_cache_builds.py --kills 100 --json docs/results/killed-cache-builds.json

Each round starts a process that builds a cache, ends it with SIGKILL after a random time, and looks
at what is on disk: whatever a complete shard holds must never be computed again. At the end the
build is let through; its files must be those of an undisturbed build, byte for byte. Prints one
line; exit code 1 when a round failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 10000
BATCH = 16


class Squares:
    """A prefix of two tensors that writes down what it is asked to compute."""

    identity = hashlib.sha256(b"squares").hexdigest()

    def __init__(self, log: Path) -> None:
        self.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, x: Any) -> list[Any]:
        """Return ``x²`` and the mean over the sample."""
        os.write(self.log, np.asarray(x[:, 0], "<f4").tobytes())
        return [x * x, x.mean(axis=1, keepdims=True)]


def samples() -> Any:
    """Inputs; the first number of a sample is its own."""
    x = np.random.default_rng(0).normal(size=(SAMPLES, 64)).astype(np.float32)
    x[:, 0] = np.arange(SAMPLES)
    return x


def build(folder: Path, log: Path) -> Any:
    """Build the cache, or go on with it."""
    from frostline.cache import cache_features

    return cache_features(Squares(log), samples(), folder, batch_size=BATCH, verbose=0)


@dataclass(frozen=True)
class Outcome:
    """What the rounds showed.

    Attributes:
        kills: Processes that were killed before they were done.
        caches: Caches that these built, one after the other.
        again: Samples of complete shards that were computed again, beside those that each build
            draws to judge the stored ones by (:mod:`frostline.cache.judge`).
        shards: Complete shards after each kill.
        identical: The files are those of an undisturbed build.
    """

    kills: int
    caches: int
    again: int
    shards: tuple[int, ...]
    identical: bool


def recomputed(before: set[float], log: Path) -> int:
    """Samples of complete shards that a build computed again, beside those that it judges by."""
    from frostline.cache import judge

    computed = set(np.fromfile(log, "<f4").tolist()) if log.exists() else set()
    return max(0, len(before & computed) - judge.AT_FIRST - judge.FROM_ALL)


def stored(folder: Path) -> tuple[set[float], int]:
    """Numbers of the samples in complete shards, and how many shards these are."""
    from frostline.cache import folder as folders, shards
    from frostline.cache.files import DamagedError

    numbers: set[float] = set()
    count = 0
    for path in folders.collections(folder):
        try:
            collection = shards.load(path)
        except DamagedError:  # killed before anything was described
            continue
        for description in collection.shards.glob("[!.]*.json"):
            shard = shards.read_shard(collection, description.stem)
            shards.verify_shard(collection, shard)
            squares = np.load(collection.file(shard.name, 0), allow_pickle=False)
            numbers |= set(np.sqrt(squares[:, 0]).tolist())
            count += 1
    return numbers, count


def contents(folder: Path) -> dict[str, str]:
    """Every file but locks and times -> its sha256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def run(kills: int, seed: int, folder: Path) -> Outcome:
    """Kill ``kills`` builds, in as many caches as it takes, then compare."""
    build(folder / "whole", folder / "whole.log")
    expected = contents(folder / "whole")
    rng = np.random.default_rng(seed)
    done = again = number = 0
    shards_seen: list[int] = []
    identical = True
    while done < kills:
        number += 1
        home, log = folder / f"cache{number}", folder / f"log{number}"
        finished = False
        while not finished and done < kills:
            before, _ = stored(home)
            log.unlink(missing_ok=True)
            finished = not _killed(home, log, float(rng.uniform(0, 0.4)))
            again += recomputed(before, log)
            if not finished:
                done += 1
                shards_seen.append(stored(home)[1])
        log.unlink(missing_ok=True)
        before, _ = stored(home)
        build(home, log)
        again += recomputed(before, log)
        identical &= contents(home) == expected
    return Outcome(done, number, again, tuple(shards_seen), identical)


def _killed(home: Path, log: Path, delay: float) -> bool:
    """Start a build and kill it ``delay`` seconds after its first sample; False: it was done."""
    command = [sys.executable, __file__, "--build", str(home), str(log)]
    process = subprocess.Popen(command)
    while not log.exists() and process.poll() is None:
        time.sleep(0.002)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    if process.returncode:
        raise RuntimeError(f"the build failed by itself, exit code {process.returncode}")
    return False


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also put what was found into this file")
    parser.add_argument("--build", nargs=2, metavar=("FOLDER", "LOG"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.build:
        build(Path(given.build[0]), Path(given.build[1]))
        return 0
    with tempfile.TemporaryDirectory() as name:
        outcome = run(given.kills, given.seed, Path(name))
    print(
        f"{outcome.kills} kills with {min(outcome.shards)} to {max(outcome.shards)} complete "
        f"shards on disk; {outcome.again} samples of complete shards computed again; files "
        f"{'identical to' if outcome.identical else 'DIFFER from'} those of an undisturbed build"
    )
    if given.json:
        found = {"samples": SAMPLES, "batch_size": BATCH, "seed": given.seed, **asdict(outcome)}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(outcome.again > 0 or not outcome.identical)


if __name__ == "__main__":
    sys.exit(main())
