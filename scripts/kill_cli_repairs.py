"""Kill command-line repairs at random moments and look at what is on disk.

    KERAS_BACKEND=torch python scripts/kill_cli_repairs.py --kills 50

Each round forks a process, with all imports done, that runs recalibrate, freeze, set-momentum,
convert and fold on a model file, and once more set-momentum --force over an older file, and ends it
with SIGKILL at a random moment. Then the input must be what it was, byte for byte, and each output
absent or complete: the same configuration, weights and optimizer state as after an undisturbed run.
Prints one line; exit code 1 when a round failed.

On the torch backend, because only there a process that has imported everything can be forked.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

#: What each process runs, in this order, with ``-o FOLDER/NAME.keras``.
COMMANDS = {
    "recalibrate": ["recalibrate", "MODEL", "DATA"],
    "freeze": ["freeze", "MODEL", "--until", "conv2"],
    "set-momentum": ["set-momentum", "MODEL", "0.9"],
    "convert": ["convert", "MODEL"],
    "fold": ["fold", "MODEL"],
    "old": ["set-momentum", "MODEL", "0.8", "--force"],
}


def prepare(folder: Path) -> None:
    """Write the model, whose optimizer has state, and the data."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(16, 3, name="conv1"),
            layers.BatchNormalization(name="bn1"),
            layers.Conv2D(16, 3, name="conv2"),
            layers.BatchNormalization(name="bn2"),
            layers.Flatten(),
            layers.Dense(4096, activation="relu", name="wide"),  # a file that takes time to write
            layers.Dense(2, activation="softmax", name="head"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    rng = np.random.default_rng(0)
    y = np.arange(64) % 2
    x = (rng.normal(2, 3, (64, 8, 8, 3)) + 4 * y[:, None, None, None]).astype("float32")
    model.fit(x, y, batch_size=16, epochs=5, verbose=0)
    model.save(folder / "model.keras")
    np.savez(folder / "data.npz", x=x, y=y)


def repair(inputs: Path, home: Path) -> int:
    """Run all commands."""
    from frostline import cli

    words = {"MODEL": str(inputs / "model.keras"), "DATA": str(inputs / "data.npz")}
    for name, command in COMMANDS.items():
        typed = [words.get(word, word) for word in command]
        if cli.main([*typed, "-o", str(home / f"{name}.keras")]):
            return 1
    return 0


@dataclass
class Outcome:
    """What the rounds showed.

    Attributes:
        kills: Processes that were killed before they were done.
        complete: Outputs that were there and whole.
        absent: Outputs that were not there.
        unfinished: Kills that left a temporary file: they hit while a model was written.
        broken: What must not be, in words.
    """

    kills: int = 0
    complete: int = 0
    absent: int = 0
    unfinished: int = 0
    broken: list[str] = field(default_factory=list)


def contents(path: Path) -> dict[str, str]:
    """Parts of a ``.keras`` file but the one with the date -> sha256 of their bytes."""
    with zipfile.ZipFile(path) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if name != "metadata.json"
        }


def look(home: Path, expected: dict[str, dict[str, str]], older: dict[str, str]) -> Outcome:
    """Compare what one killed process left with the undisturbed outputs."""
    found = Outcome(kills=1, unfinished=int(any(home.glob(".*.tmp.*"))))
    for name in COMMANDS:
        path = home / f"{name}.keras"
        if not path.exists():
            found.absent += 1
            if name == "old":
                found.broken.append("--force removed the older file")
            continue
        try:
            parts = contents(path)
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            found.broken.append(f"{path.name}: {error}")
            continue
        if parts == older and name == "old":
            found.absent += 1
        elif parts == expected[name]:
            found.complete += 1
        else:
            found.broken.append(f"{path.name}: not what an undisturbed run writes")
    return found


def run(kills: int, seed: int, folder: Path) -> Outcome:
    """Kill ``kills`` processes and add up what they left."""
    subprocess.run([sys.executable, __file__, "--prepare", str(folder)], check=True)
    import_everything()
    model = folder / "model.keras"
    given, older = model.read_bytes(), contents(model)
    seconds = _killed(folder, _home(folder, "whole"), None)
    expected = {name: contents(folder / "whole" / f"{name}.keras") for name in COMMANDS}
    rng = np.random.default_rng(seed)
    total = Outcome()
    number = 0
    while total.kills < kills:
        number += 1
        home = _home(folder, f"round{number}")
        if not _killed(folder, home, float(rng.uniform(0, seconds))):
            continue  # it was done before
        found = look(home, expected, older)
        if model.read_bytes() != given:
            found.broken.append("the input changed")
        for name in ("kills", "complete", "absent", "unfinished", "broken"):
            setattr(total, name, getattr(total, name) + getattr(found, name))
    return total


def _home(folder: Path, name: str) -> Path:
    """Make a folder for one process, with the older file in it."""
    home = folder / name
    home.mkdir()
    (home / "old.keras").write_bytes((folder / "model.keras").read_bytes())
    return home


def _killed(inputs: Path, home: Path, delay: float | None) -> float:
    """Fork a process and kill it after ``delay`` seconds.

    Returns:
        0 when it was done before; else, or without a delay, the seconds that it had.
    """
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            log = os.open(home / "log.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = repair(inputs, home)
        finally:
            os._exit(code)  # nothing of the parent's is run or flushed here
    while delay is None or time.monotonic() - start < delay:
        done, status = os.waitpid(process, os.WNOHANG)
        if done and status:
            raise RuntimeError(f"a repair failed: {(home / 'log.txt').read_text()[-2000:]}")
        if done:
            return time.monotonic() - start if delay is None else 0.0
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return time.monotonic() - start


def import_everything() -> None:
    """Load what the commands need, and compute nothing: a fork must find no threads."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import keras

    if keras.backend.backend() != "torch":
        raise SystemExit("run with KERAS_BACKEND=torch")
    for name in ("verbs.diagnose", "adapters.keras.adapter", "adapters.keras.files"):
        importlib.import_module(f"frostline.{name}")


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.prepare:
        prepare(given.prepare)
        return 0
    with tempfile.TemporaryDirectory() as name:
        outcome = run(given.kills, given.seed, Path(name))
    print(
        f"{outcome.kills} kills, {outcome.unfinished} of them while a file was written: "
        f"{outcome.complete} outputs complete, {outcome.absent} not there (or the older file), "
        f"{len(outcome.broken)} broken; the input "
        f"{'CHANGED' if 'the input changed' in outcome.broken else 'is unchanged'}"
    )
    for line in outcome.broken[:10]:
        print(line)
    return int(bool(outcome.broken))


if __name__ == "__main__":
    sys.exit(main())
