"""Run the static checks, then the test suite in one process per Keras backend.

Keras reads its backend once, at import, so each backend needs processes of its own: two, which
share the tests (``-n 0`` for one). The last line printed is ``N passed, N failed, N skipped`` over
all processes; the lines above it name what failed once more, for whoever sees only the end of the
output. A static check that fails counts as one failed; so does a process that died, ran no test, or
finished none for longer than a single test may take. The whole run has no time limit: on a busy
machine it takes longer, and pytest prints how far it is. The exit code is 0 only when tests ran and
none failed.

``FROSTLINE_TEST_BACKENDS=jax,torch`` selects backends; further arguments go to pytest.

Usage: ``python scripts/run_tests.py [--checks-only | --quick] [pytest arguments]``
(the Makefile does). ``--quick`` runs ruff, then the unit and contract tests on one eager backend.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The first one runs what is marked ``once``: torch starts the quickest and compiles nothing, and
#: native torch, which some of those tests need, has its place in that process.
BACKENDS = ("torch", "tensorflow", "jax")
STATIC_CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "import-linter": ["lint-imports", "--no-logo"],
    "codespell": ["codespell"],
}
#: What ``make quick`` runs: no framework, then every adapter, on a backend that computes eagerly.
QUICK_BACKEND = "torch"
QUICK_TESTS = ["tests/unit", "tests/contract"]
# A test may take 300 seconds (pyproject.toml), and pytest ends one that takes longer. A run in
# which no test ends for four times that long hangs where pytest cannot reach it: it is stopped.
STALLED_S = 20 * 60
# A process takes what another one has not started yet; each computes in one thread. A process that
# crashed is started again a few times: the test that it was at has failed, the others still run.
PROCESSES = ["--numprocesses=2", "--dist=worksteal", "--max-worker-restart=3"]
# Time for pytest to write its results after its workers were ended: a second, and more where the
# machine is busy.
GRACE_S = 30
# Where pytest notes that a test has ended; tests/conftest.py writes it.
PROGRESS = "FROSTLINE_TEST_PROGRESS"


@dataclass(frozen=True)
class Counts:
    """How many tests passed, failed and were skipped, and a line for each thing that failed."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: tuple[str, ...] = field(default=(), compare=False)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.passed + other.passed,
            self.failed + other.failed,
            self.skipped + other.skipped,
            self.failures + other.failures,
        )

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    @property
    def exit_code(self) -> int:
        """0 if something passed and nothing failed, else 1."""
        return 0 if self.passed and not self.failed else 1


def count_results(junit: Path) -> Counts:
    """Count the test cases of a JUnit XML file, each once.

    A test that fails and whose teardown fails too is one failed test; an expected failure is a
    skipped one, as in pytest's file. A test that was interrupted is a case without a name there,
    and does not count.

    Args:
        junit: File that ``pytest --junit-xml`` wrote.

    Returns:
        The counts; nothing at all if the file is absent, empty or cut off.
    """
    try:
        cases = [case for case in ElementTree.parse(junit).iter("testcase") if case.get("name")]
    except (OSError, ElementTree.ParseError):
        return Counts()
    failed = [case for case in cases if _problem(case) is not None]
    skipped = sum(case.find("skipped") is not None and _problem(case) is None for case in cases)
    failures = tuple(
        f"{case.get('classname')}.{case.get('name')}: {_problem(case)}" for case in failed
    )
    return Counts(len(cases) - len(failed) - skipped, len(failed), skipped, failures)


def _problem(case: ElementTree.Element, longest: int = 300) -> str | None:
    """The message of what failed in a test case, in one line; None where nothing did."""
    for child in case:
        if child.tag in {"failure", "error"}:
            return " ".join(child.get("message", "").split())[:longest]
    return None


def slowest_files(junit: Path, most: int = 10) -> list[tuple[float, str]]:
    """The files that took longest: seconds of their tests in all, and the module.

    Args:
        junit: File that ``pytest --junit-xml`` wrote.
        most: How many to return.

    Returns:
        The slowest first; nothing if the file is absent, empty or cut off.
    """
    seconds: dict[str, float] = {}
    try:
        for case in ElementTree.parse(junit).iter("testcase"):
            parts = [part for part in case.get("classname", "").split(".") if part.islower()]
            module = ".".join(parts)  # a class of tests begins with a capital
            seconds[module] = seconds.get(module, 0.0) + float(case.get("time", 0.0))
    except (OSError, ElementTree.ParseError):
        return []
    return sorted(((spent, name) for name, spent in seconds.items()), reverse=True)[:most]


def judge(counts: Counts, exit_code: int | None) -> Counts:
    """Add one failure for a process that ended badly in a way its results do not show.

    Args:
        counts: What its results file holds.
        exit_code: The process' exit code; negative for a signal, None for one that was stopped.

    Returns:
        ``counts``, with one failure more where pytest did not end by itself (killed, internal
        error, usage error), or says that something failed that the file does not name, or ran
        nothing.
    """
    ended_by_itself = exit_code in (0, 1)
    ran = counts.passed + counts.failed + counts.skipped > 0
    if not ended_by_itself or not ran or (exit_code == 1 and not counts.failed):
        ended = "was stopped" if exit_code is None else f"ended with exit code {exit_code}"
        return counts + Counts(failed=1, failures=(f"pytest {ended}, after {counts}",))
    return counts


def selected_backends(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the backends named in ``FROSTLINE_TEST_BACKENDS``, all of them if it is not set.

    Raises:
        ValueError: for a name that is no Keras backend of ours.
    """
    named = environ.get("FROSTLINE_TEST_BACKENDS", "").replace(",", " ").split()
    unknown = sorted(set(named) - set(BACKENDS))
    if unknown:
        raise ValueError(
            f"FROSTLINE_TEST_BACKENDS takes {', '.join(BACKENDS)}, separated by commas. "
            f"Received: {', '.join(unknown)}"
        )
    return tuple(dict.fromkeys(named)) or BACKENDS


def run_static_checks(only: str = "") -> Counts:
    """Run every static check whose name begins so, also after one that failed; count failures."""
    counts = Counts()
    tools = Path(sys.executable).parent
    for name, (tool, *arguments) in STATIC_CHECKS.items():
        if not name.startswith(only):
            continue
        say(f"static check: {name}")
        code = subprocess.run([str(tools / tool), *arguments], cwd=ROOT, check=False).returncode
        if code != 0:
            counts += Counts(failed=1, failures=(f"static check: {name}",))
    return counts


def run_backend(
    backend: str, pytest_arguments: Sequence[str], *, first: bool, stalled_s: float = STALLED_S
) -> Counts:
    """Run the suite on one backend in a process of its own and count its results.

    Args:
        backend: Keras backend.
        pytest_arguments: Handed to pytest as they are.
        first: Whether this is the first backend; only there are the tests run that are marked
            ``once``, whose result does not depend on the backend.
        stalled_s: Seconds without a test that ends after which the process is stopped; what it had
            finished still counts.

    Returns:
        Its counts, judged.
    """
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch) / "results.xml"
        command = [sys.executable, "-m", "pytest", f"--junit-xml={junit}", *PROCESSES]
        if not first:
            command += ["-m", "not once"]
        command += pytest_arguments
        progress = Path(scratch) / "progress"
        progress.touch()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**backend_environment(backend, Path(scratch)), PROGRESS: str(progress)},
            start_new_session=True,
        )
        exit_code: int | None = None
        try:
            while exit_code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    exit_code = process.wait(timeout=1)
                if exit_code is None and time.time() - progress.stat().st_mtime > stalled_s:
                    say(f"{backend}: stopped, for no test has ended in {stalled_s:.0f} s")
                    stop(process)
                    break
        except BaseException:
            stop(process)
            raise
        slow = [f"{spent:.0f} s {name}" for spent, name in slowest_files(junit)]
        say(f"{backend}: most time went to {', '.join(slow) or 'nothing'}")
        return judge(count_results(junit), exit_code)


def backend_environment(backend: str, scratch: Path) -> dict[str, str]:
    """Return the environment of a test process: one backend, and no settings of the user's."""
    return {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(scratch),  # a user's keras.json would change dtypes and data formats
        "MPLBACKEND": "Agg",
        "PYTHONFAULTHANDLER": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        # What JAX compiled, however quickly, serves later tests and the next run.
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # A test compiles for longer than it runs: LLVM need not look for the fastest code.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a test process and its children; pytest first gets the time to write its results.

    Its workers go first, and it then names the tests that they were at. Told to stop by a signal it
    would wait for a worker that hangs, and longer than can be foreseen.
    """
    workers = children(process.pid)
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    if not workers:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        say("it does not answer: killed")
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def children(parent: int) -> list[int]:
    """Processes that this one started and that have not ended; none where there is no ``ps``."""
    command = ["ps", "-A", "-o", "pid=,ppid="]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    pairs = (line.split() for line in listed.splitlines())
    return [int(process) for process, of in pairs if int(of) == parent]


def run_backends(backends: Sequence[str], pytest_arguments: Sequence[str]) -> Iterator[Counts]:
    """Run the suite on each backend in turn."""
    for index, backend in enumerate(backends):
        say(f"tests on Keras backend {backend} ({index + 1} of {len(backends)})")
        start = time.monotonic()
        counts = run_backend(backend, pytest_arguments, first=index == 0)
        say(f"{backend}: {counts}, in {time.monotonic() - start:.0f} s")
        yield replace(counts, failures=tuple(f"{backend}: {line}" for line in counts.failures))


def say(text: str) -> None:
    """Print a heading among the output of the tools, at once."""
    print(f"== {text}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run everything, print the summary line last, return the exit code."""
    try:
        backends = selected_backends(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    checks_only, quick = "--checks-only" in arguments, "--quick" in arguments
    counts = Counts()
    try:
        counts += run_static_checks("ruff" if quick else "")
        if checks_only:
            backends = ()
        if quick:
            backends = (QUICK_BACKEND,)
            arguments = [*QUICK_TESTS, *(given for given in arguments if given != "--quick")]
        for counts_of_backend in run_backends(backends, arguments):
            counts += counts_of_backend
    except KeyboardInterrupt:
        counts += Counts(failed=1, failures=("interrupted",))
    for failure in counts.failures:
        say(f"FAILED {failure}")
    if checks_only:
        return 1 if counts.failed else 0
    print(counts, flush=True)
    return counts.exit_code


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
