"""Create or reuse the virtual environment that ``make demo`` and ``make test`` run in.

Standard library only: it is the first thing that runs on a fresh machine. Both commands share one
``.venv``. The test environment contains the demo's, so the demo reuses it, and the tests add to
what the demo installed. The stamp is written last, and a marker stands for as long as the folder
is being made: an environment whose making was interrupted is built anew, never trusted.

Usage: ``python3 scripts/prepare_environment.py demo|test|docs`` (the Makefile does).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
# `pip install --group` came with 25.1; a fresh Python 3.11 or 3.12 brings an older pip.
PIP_REQUIREMENT = "pip>=25.1"


class SetupError(Exception):
    """Something the reader of the terminal can mend."""


def pip_arguments(purpose: str, demo_backend: str) -> list[str]:
    """Return what ``pip install`` is given for ``purpose``: "demo", "test" or "docs"."""
    groups = {
        "demo": [f"backend-{demo_backend}"],
        "test": ["backends", "oracles", "docs", "release", "test"],
        "docs": ["backend-torch", "docs", "release"],
    }[purpose]
    arguments = ["--editable", ".[experiments]"]
    for group in groups:
        arguments += ["--group", group]
    return arguments


def fingerprint(root: Path, arguments: list[str]) -> str:
    """Return, as one string, what an installed environment depends on."""
    project = hashlib.sha256((root / "pyproject.toml").read_bytes()).hexdigest()
    return json.dumps({"pyproject": project, "python": _version(), "pip": arguments})


class Environment:
    """One virtual environment and the files that say what state it is in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.unfinished = folder / ".unfinished"

    def stamp(self, purpose: str) -> Path:
        """Return the file that says that the install for ``purpose`` was completed."""
        return self.folder / f".installed-{purpose}"

    def has(self, purpose: str, expected: str) -> bool:
        """Tell whether a complete install for ``purpose`` with this fingerprint is there."""
        stamp = self.stamp(purpose)
        return self.is_sound() and stamp.exists() and stamp.read_text(encoding="utf-8") == expected

    def is_sound(self) -> bool:
        """Tell whether it can be installed into.

        It can if its making was never interrupted, it belongs to this folder (its scripts hold
        absolute paths, so those of a moved or copied clone lead elsewhere), and its Python is the
        one that is running now and has pip.
        """
        if self.unfinished.exists() or not self.python.exists():
            return False
        pip = self.folder / "bin" / "pip"
        if not pip.exists() or str(self.folder) not in pip.read_text(errors="replace"):
            return False
        code = "import pip, sys; print('%d.%d.%d' % sys.version_info[:3])"
        command = [str(self.python), "-c", code]
        answer = subprocess.run(command, check=False, capture_output=True, text=True)
        return answer.stdout.strip() == _version()

    def create(self) -> None:
        """Create it, in place of a broken one if there is one."""
        if self.folder.exists():
            self._remove()
        self.folder.mkdir()
        self.unfinished.touch()
        venv = [sys.executable, "-m", "venv"]
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            # Debian's Python comes without ensurepip; the pip beside it can install one there.
            run([*venv, "--without-pip", str(self.folder)])
            run([sys.executable, "-m", "pip", "--python", str(self.python), "install", "pip"])
        else:
            run([*venv, str(self.folder)])

    def install(self, arguments: list[str]) -> None:
        """Install with pip, its own progress shown."""
        self.unfinished.touch()
        pip = [str(self.python), "-m", "pip", "install"]
        run([*pip, "--upgrade", PIP_REQUIREMENT])
        run([*pip, *arguments])
        self.unfinished.unlink()

    def megabytes(self) -> float:
        """Return its size on disk in megabytes (10⁶ bytes)."""
        files = (Path(top) / name for top, _, names in os.walk(self.folder) for name in names)
        return sum(file.lstat().st_size for file in files) / 1e6

    def _remove(self) -> None:
        ours = self.unfinished.exists() or (self.folder / "pyvenv.cfg").exists()
        if not ours and any(self.folder.iterdir()):
            raise SetupError(
                f"{self.folder.name} is not a virtual environment; move it away. "
                f"Received: {self.folder}"
            )
        say(f"{self.folder.name} is incomplete, moved or of another Python: making it anew")
        shutil.rmtree(self.folder)


def prepare(environment: Environment, purpose: str, demo_backend: str) -> None:
    """Make sure that ``environment`` has what ``purpose`` needs."""
    arguments = pip_arguments(purpose, demo_backend)
    expected = fingerprint(ROOT, arguments)
    everything = fingerprint(ROOT, pip_arguments("test", demo_backend))
    if environment.has("test", everything) or environment.has(purpose, expected):
        say(f"reusing {environment.folder.name}")
        return
    start = time.monotonic()
    if not environment.is_sound():
        environment.create()
    say(f"installing what `make {purpose}` needs; pip names each package and its size")
    environment.install(arguments)
    environment.stamp(purpose).write_text(expected, encoding="utf-8")
    say(
        f"{environment.folder.name} is ready after {time.monotonic() - start:.0f} s, "
        f"{environment.megabytes():.0f} MB on disk; later runs reuse it"
    )


def run(command: list[str]) -> None:
    """Run ``command`` in the repository with its output on the terminal; raise if it fails."""
    say(" ".join(["$", Path(command[0]).name, *command[1:]]))
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code != 0:
        raise SetupError(f"that command failed with exit code {code}; its message is above")


def say(text: str) -> None:
    """Print a line of our own among pip's, at once."""
    print(f"[frostline] {text}", flush=True)


def main(arguments: list[str]) -> int:
    """Prepare the environment for ``demo BACKEND``, ``test`` or ``docs``; return the exit code."""
    if not arguments or arguments[0] not in ("demo", "test", "docs"):
        print("usage: prepare_environment.py demo [BACKEND] | test | docs", file=sys.stderr)
        return 2
    purpose, *backend = arguments
    if sys.version_info < OLDEST_PYTHON:
        print(
            f"Frostline needs Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer; this is "
            f"{_version()}. Name another: make {purpose} PYTHON=python3.12",
            file=sys.stderr,
        )
        return 2
    try:
        prepare(Environment(ROOT / ".venv"), purpose, backend[0] if backend else "tensorflow")
    except SetupError as error:
        print(f"[frostline] {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\n[frostline] interrupted; the next run makes .venv anew", file=sys.stderr)
        return 130
    return 0


def _version() -> str:
    return ".".join(str(number) for number in sys.version_info[:3])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
