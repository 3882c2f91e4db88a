"""Install Frostline in fresh environments, oldest and newest versions, and run its contract tests.

Each row makes a virtual environment, installs the wheel of this tree with one extra, and pins what
the row names. ``lowest`` rows hold the lower bounds of ``pyproject.toml``, numpy's and scipy's
included. What is printed is what passed; a row that cannot be installed says so with pip's words.

    python scripts/version_matrix.py                                  # all: an hour, gigabytes
    python scripts/version_matrix.py --rows jax-lowest jax-newest --folder /tmp/matrix
    python scripts/version_matrix.py --json docs/results/version-matrix.json
    python scripts/version_matrix.py --rows torch-lowest --keep /tmp/environments

An environment is removed when its row is done; with ``--keep`` it stays, and the next run installs
only what has changed there. ``--json`` adds the rows that ran to those in the file. What a row
leaves open ``--pin`` settles, for example ``torch==2.13.0+cpu``, where pip would take gigabytes for
graphics cards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import run_tests

ROOT = Path(__file__).resolve().parents[1]
#: What the tests need beside Frostline.
TOOLS = ("pytest>=9", "pytest-timeout>=2.3", "hypothesis>=6.100")
TESTS = ("tests/contract", "tests/integration/verbs/test_edit.py")
OLD = ("numpy==1.26.*", "scipy==1.11.*")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One environment: the extra that it is installed with, and the versions it holds."""

    name: str
    extra: str
    backend: str
    pins: tuple[str, ...] = ()
    tests: tuple[str, ...] = TESTS


ROWS = (
    Row(name="jax-newest", extra="jax", backend="jax"),
    Row(name="jax-lowest", extra="jax", backend="jax",
        pins=("jax==0.4.30", "jaxlib==0.4.30", "keras==3.12.*", *OLD)),
    Row(name="tensorflow-newest", extra="tensorflow", backend="tensorflow"),
    Row(name="tensorflow-lowest", extra="tensorflow", backend="tensorflow",
        pins=("tensorflow==2.16.*", "keras==3.12.*", *OLD)),
    Row(name="torch-newest", extra="torch", backend="torch"),
    Row(name="torch-lowest", extra="torch", backend="torch",
        pins=("torch==2.4.*", "keras==3.12.*", *OLD)),
    Row(name="onnx", extra="jax,onnx", backend="jax", tests=("tests/integration/engines",)),
    Row(name="openvino", extra="jax,openvino", backend="jax",
        tests=("tests/integration/engines",)),
    Row(name="experiments", extra="jax,experiments", backend="jax",
        tests=("tests/integration/data",)),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What happened in a row."""

    row: str
    python: str
    versions: dict[str, str]
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: tuple[str, ...] = ()
    problem: str | None = None
    seconds: float

    def __str__(self) -> str:
        held = " ".join(f"{name} {version}" for name, version in self.versions.items())
        if self.problem is not None:
            return f"{self.row:18} could not run: {self.problem}"
        counts = run_tests.Counts(self.passed, self.failed, self.skipped)
        return f"{self.row:18} {counts} in {self.seconds:.0f} s ({held})"


def run(
    row: Row, wheel: Path, folder: Path, *, pins: Sequence[str] = (), keep: bool = False
) -> Outcome:
    """Make the environment of a row, or bring it up to date, and run its tests."""
    start = time.monotonic()
    place = folder / row.name
    python = place / "bin" / "python"
    requirements = [f"frostline[{row.extra}] @ {wheel.as_uri()}", *row.pins, *pins, *TOOLS]

    def outcome(problem: str | None = None, **found: object) -> Outcome:
        return Outcome(
            row=row.name, python=platform.python_version(), problem=problem,
            versions=_versions(python), seconds=round(time.monotonic() - start, 1),
            **found,  # type: ignore[arg-type]
        )  # fmt: skip

    try:
        make = [sys.executable, "-m", "venv", str(place)]
        if python.exists():  # the wheel has the version that is there
            make = [str(python), "-m", "pip", "uninstall", "--yes", "--quiet", "frostline"]
        for command in (
            make,
            [str(python), "-m", "pip", "install", "--no-cache-dir", "--quiet", *requirements],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines()
                errors = [line for line in lines if "ERROR" in line]
                return outcome((errors or lines or ["no message"])[0][:200])
        junit = place / "results.xml"
        # The wheel is tested, not src/: tests are copied beside it.
        copy = place / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("tests", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        done = subprocess.run(
            [str(python), "-m", "pytest", "-q", f"--junit-xml={junit}", *row.tests],
            cwd=copy,
            env={**_environment(), "KERAS_BACKEND": row.backend},
            capture_output=True,
            text=True,
            check=False,
        )
        counts = run_tests.judge(run_tests.count_results(junit), done.returncode)
        lines = done.stdout.splitlines()
        failures = tuple(line[:200] for line in lines if line.startswith(("FAILED", "ERROR")))
        return outcome(**asdict(counts), failures=failures[:20])
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def _environment() -> dict[str, str]:
    """The environment without what would let another copy of Frostline in."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**kept, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}


def _versions(python: Path) -> dict[str, str]:
    names = ("keras", "jax", "tensorflow", "torch", "numpy", "scipy", "onnxruntime", "openvino")
    code = (
        "import json, importlib.metadata as m\n"
        f"names = {names!r}\n"
        "have = {d.name.lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have[n] for n in names if n in have}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def _wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(folder), "."]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = folder.glob("frostline-*.whl")
    return wheel


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows and print what passed; returns 1 when one failed or could not run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--folder", type=Path, help="where environments are made, for a time")
    parser.add_argument("--pin", nargs="+", default=[], help="versions for all these rows")
    parser.add_argument("--keep", type=Path, help="where environments are, and stay")
    parser.add_argument("--json", type=Path, help="file that the outcomes are added to")
    options = parser.parse_args(arguments)
    known: dict[str, object] = {}
    if options.json is not None and options.json.is_file():
        known = {each["row"]: each for each in json.loads(options.json.read_text())["rows"]}
    good = True
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        wheel = _wheel(folder)
        for row in ROWS:
            if row.name not in options.rows:
                continue
            place, keep = options.keep or folder, options.keep is not None
            found = run(row, wheel, place, pins=options.pin, keep=keep)
            print(found, flush=True)
            print("".join(f"    {line}\n" for line in found.failures), end="", flush=True)
            good = good and found.problem is None and found.failed == 0
            known[row.name] = asdict(found)
            if options.json is not None:
                rows = [known[name] for name in names if name in known]
                options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
