"""Damage feature caches before and while they are used, fill disks, and count wrong features.

    python scripts/damage_caches.py --damages 1000 --json docs/results/damaged-caches.json

Another process flips bits, cuts, extends and removes files, swaps shards and manifests, puts links
or whole older versions in their place. A cache may then give the right features, or say that it is
damaged; made again, it must give the right ones. ``--disk`` runs a small build on a disk that is
full after 0 bytes, after 1, and so on, and goes on with each when there is room again.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from frostline.cache import FeatureCache, cache_features
from frostline.data import files as writing
from frostline.types import FrostlineError

SAMPLES, BATCH = 64, 8
KINDS = ("flip", "cut", "extend", "zeros", "remove", "swap", "link", "folder link", "older",
         "other", "exchange descriptions")  # fmt: skip


class Powers:
    """A prefix of two tensors; another power is another prefix."""

    def __init__(self, power: int) -> None:
        self.power = power
        self.identity = hashlib.sha256(f"power {power}".encode()).hexdigest()

    def __call__(self, x: Any) -> list[Any]:
        """Return a power of ``x`` and the mean over the sample."""
        return [x**self.power, x.mean(axis=1, keepdims=True) * self.power]


def samples(count: int = SAMPLES) -> Any:
    """Inputs."""
    return np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)


def build(root: Path, power: int = 2, count: int = SAMPLES) -> FeatureCache:
    """Make the cache, or go on with it."""
    x = samples(count)
    return cache_features(Powers(power), x, root, batch_size=BATCH, verbose=0)


def right(cache: FeatureCache, rng: random.Random) -> bool:
    """Whether some rows, in random order, are what they should be."""
    rows = np.array(rng.sample(range(len(cache)), len(cache) // 2))
    x = samples(len(cache))[rows]
    return all(
        np.array_equal(have, want)
        for have, want in zip(cache.rows(rows), Powers(2)(x), strict=True)
    )


# --- what the other process does ------------------------------------------------------------------


def damage(home: Path, kind: str, older: Path, other: Path, rng: random.Random) -> None:
    """Do one kind of damage to a collection."""
    files = sorted(p for p in home.rglob("*") if p.is_file() and p.name != "lock")
    path = rng.choice(files)
    content = path.read_bytes()
    at = rng.randrange(len(content)) if content else 0
    if kind == "flip":
        path.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        )
    elif kind == "cut":
        os.truncate(path, at)
    elif kind == "extend":
        path.write_bytes(content + rng.randbytes(rng.randint(1, 4096)))
    elif kind == "zeros":
        path.write_bytes(content[:at] + bytes(len(content) - at))
    elif kind == "remove":
        path.unlink()
    elif kind in ("swap", "exchange descriptions"):
        ending = ".json" if kind != "swap" else rng.choice([".0.npy", ".1.npy"])
        one, two = rng.sample([p for p in files if p.name.endswith(ending)], 2)
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    elif kind == "link":
        same = [p for p in other.rglob(f"*{path.suffix}") if p.is_file()]
        path.unlink()
        path.symlink_to(rng.choice(same))
    elif kind == "folder link":
        inner = home / rng.choice(["shards", "manifests"])
        shutil.rmtree(inner)
        inner.symlink_to(other / inner.name)
    elif kind == "older":  # whole, but of fewer samples
        _replaced(home, older)
    elif kind == "other":  # whole, but of another prefix
        _replaced(home, other)


def _replaced(home: Path, source: Path) -> None:
    for inner in ("shards", "manifests"):
        shutil.rmtree(home / inner)
        shutil.copytree(source / inner, home / inner)
    shutil.copy(source / "collection.json", home)


def _serve() -> None:
    """Damage what the lines on the standard input say."""
    for line in sys.stdin:
        home, kind, older, other, seed = json.loads(line)
        damage(Path(home), kind, Path(older), Path(other), random.Random(seed))
        print("done", flush=True)


# --- what is counted ------------------------------------------------------------------------------


def damaged(count: int, seed: int = 0) -> dict[str, Counter[str]]:
    """Damage a cache ``count`` times; kind and moment -> what came of it."""
    outcome: dict[str, Counter[str]] = {}
    rng = random.Random(seed)
    command = [sys.executable, __file__, "--serve"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        older, other, whole = root / "older", root / "other", root / "whole"
        build(older, count=SAMPLES // 2)
        build(other, power=3)
        # Two builds, so that there are several shards.
        build(whole, count=SAMPLES // 2)
        build(whole)
        homes = [next(p for p in each.iterdir() if p.is_dir()) for each in (older, other, whole)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.callback(process.wait)
        assert process.stdin is not None
        assert process.stdout is not None
        stack.enter_context(process.stdout)
        stack.enter_context(process.stdin)
        for number in range(count):
            kind, moment = KINDS[number % len(KINDS)], ("before", "while used")[number // 11 % 2]
            place = root / f"{number}"
            shutil.copytree(whole, place)
            home = place / homes[2].name
            cache = build(place) if moment == "while used" else None
            if cache is not None and rng.random() < 0.8:
                assert right(cache, rng)
            task = [str(home), kind, str(homes[0]), str(homes[1]), rng.random()]
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            process.stdout.readline()
            row = outcome.setdefault(f"{kind}, {moment}", Counter())
            row[_served(cache, place, rng)] += 1
            row[_again(place, rng)] += 1
            shutil.rmtree(place)
    return outcome


def _served(cache: FeatureCache | None, place: Path, rng: random.Random) -> str:
    try:
        return "right" if right(cache or build(place), rng) else "WRONG"
    except FrostlineError:
        return "refused"


def _again(place: Path, rng: random.Random) -> str:
    try:
        return "right again" if right(build(place), rng) else "WRONG"
    except FrostlineError:  # links are refused until they are removed
        return "refused again"


@contextlib.contextmanager
def small_disk(room: int) -> Iterator[None]:
    """Let files that are opened for writing in this block take so many bytes in all."""
    left = [room]

    def limited(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = open(path, mode, *args, **kwargs)  # noqa: PTH123, SIM115 - as replacing does
        if "w" not in mode:
            return stream
        write = stream.write

        class Limited:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                stream.close()

            def write(self, content: Any) -> int:
                size = len(content)
                write(bytes(content)[: left[0]])
                left[0] -= size
                if left[0] < 0:
                    left[0] = 0
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return size

            def __getattr__(self, name: str) -> Any:
                return getattr(stream, name)

        return Limited()

    vars(writing)["open"] = limited  # before the builtin one
    try:
        yield
    finally:
        del vars(writing)["open"]


def full_disks(step: int = 1) -> Counter[str]:
    """A small build on a disk that is full after so many bytes, for every number of bytes."""
    found: Counter[str] = Counter()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        room = 0
        while True:
            place = Path(folder) / str(room)
            found["builds"] += 1
            try:
                with small_disk(room):
                    build(place, count=16)
            except FrostlineError:
                found["refused"] += 1
                whole = False
            else:
                whole = True
            found["left behind"] += len(list(place.rglob(".*.tmp*")))
            found["right afterwards" if right(build(place, count=16), rng) else "WRONG"] += 1
            shutil.rmtree(place)
            if whole:
                return found
            room += step


def main(arguments: list[str] | None = None) -> int:
    """Read the options, damage, print; exit code 1 where a feature was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=int, metavar="STEP", help="fill disks, in steps of bytes")
    parser.add_argument("--json", type=Path, help="also put what was found into this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        _serve()
        return 0
    started = time.perf_counter()
    outcome = damaged(options.damages, options.seed)
    disks = full_disks(options.disk) if options.disk else Counter()
    for name, row in sorted(outcome.items()):
        print(f"{name}: {dict(row)}")
    print(f"full disks: {dict(disks)}")
    total: Counter[str] = sum(outcome.values(), Counter())
    if options.json:
        content = {
            "damages": options.damages, "seed": options.seed, "all": total, "kinds": outcome,
            "disk step": options.disk, "full disks": disks,
            "seconds": round(time.perf_counter() - started),
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return bool(total["WRONG"] or disks["WRONG"] or disks["left behind"])


if __name__ == "__main__":
    sys.exit(main())
