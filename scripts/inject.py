"""Interrupt verbs anywhere, and look whether the model and the process are as they were.

    KERAS_BACKEND=torch python scripts/inject.py --framework torch --exceptions 2000 --signals 100
    KERAS_BACKEND=jax python scripts/inject.py --framework keras --network lite0 --exceptions 200

An exception is raised before a line of Frostline, or at a call of any Python function outside of it
(the framework and the standard library). Some trials raise a second one while the first is on its
way. Those that fall into clean-up (``finally``, ``__exit__``, ``undo``) are counted apart. Ctrl-C
is a real SIGINT, sent by another process at a random time.

With the same seed the places are the same. With ``--keep tests/slow/hostile`` each
failure becomes a file, as small as it gets, that the tests run again.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import inspect
import json
import linecache
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import source_state

import frostline as fl

SOURCES = str(Path(fl.__file__).parent)
HERE = str(Path(__file__).parent)
#: Functions that only put back.
_BACK = frozenset(["__exit__", "__aexit__", "__del__", "to_its_end", "undo", "restore", "back"])


class Interruption(BaseException):
    """As a signal: no line expects it."""


class Fault(Exception):  # noqa: N818 - as an error of a library, out of memory for example
    """As an error of a library."""


@dataclass(frozen=True)
class Trial:
    """One interruption.

    Attributes:
        framework: ``"torch"`` or ``"keras"``.
        network: ``"small"`` or ``"lite0"``.
        verb: A name of ``injected_verbs.verbs``.
        mode: ``"line"`` of Frostline or ``"call"`` of another function.
        where: File, function and text of the line.
        occurrence: Which time, from 1.
        fault: An ``Exception`` in place of a ``BaseException``.
        second: Calls after which another one is raised; 0: none.
    """

    framework: str
    network: str
    verb: str
    mode: str
    where: str
    occurrence: int
    fault: bool = False
    second: int = 0


@dataclass
class Found:
    """What a trial showed.

    Attributes:
        raised: The exception was raised.
        passed: It came out of the verb.
        cleaning: It fell into clean-up.
        changed: What differs in the model.
        around: What differs in the process.
        broken: The model does not work any more, or cannot be put back.
    """

    raised: bool = False
    passed: bool = False
    cleaning: bool = False
    changed: list[str] = field(default_factory=list)
    around: list[str] = field(default_factory=list)
    broken: str = ""

    @property
    def failed(self) -> bool:
        """Whether it shows a fault."""
        return bool(self.changed or self.around or self.broken)


class Injector:
    """Counts lines or calls, and raises at one of them.

    Args:
        mode: ``"line"`` or ``"call"``.
        where: Place to raise at; ``None``: none, and ``places`` notes all.
        occurrence: At which time.
        fault: See :class:`Trial`.
        second: See :class:`Trial`.
    """

    def __init__(
        self, mode: str, where: str | None, occurrence: int = 1, fault: bool = False,
        second: int = 0,
    ) -> None:  # fmt: skip
        self.mode, self.where, self.left = mode, where, occurrence
        self.kind: type[BaseException] = Fault if fault else Interruption
        self.second = second
        self.places: list[str] = []
        self.raised = self.cleaning = False
        self._seen: dict[Any, bool] = {}

    def run(self, call: Callable[[], Any]) -> Any:
        """Run under watch."""
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            return call()
        finally:
            sys.settrace(before)
            sys.setprofile(None)

    def _called(self, frame: FrameType, _event: str, _: Any) -> Any:
        code = frame.f_code
        meant = self._seen.get(code)
        if meant is None:
            meant = self._seen[code] = self._meant(code)
        if not meant:
            return None
        if self.mode == "line":
            return self._line
        self._at(frame)
        return None

    def _meant(self, code: CodeType) -> bool:
        """Whether it can hold the place; other functions run at almost full speed."""
        name = code.co_filename
        ours = name.startswith(SOURCES)
        if ours != (self.mode == "line") or (not ours and name.startswith((HERE, "<"))):
            return False
        function = _place(name, code.co_qualname, 0, "call")
        return self.where is None or (self.where + ":").startswith(function + ":")

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self._at(frame)
        return self._line

    def _at(self, frame: FrameType) -> None:
        if self.raised:
            return
        code, number = frame.f_code, frame.f_lineno
        place = _place(code.co_filename, code.co_qualname, number, self.mode)
        if self.where is None:
            self.places.append(place)
        elif place == self.where:
            self.left -= 1
            if not self.left:
                self.raised, self.cleaning = True, _cleaning(frame)
                if self.second:
                    sys.setprofile(self._again)
                raise self.kind

    def _again(self, frame: FrameType, event: str, _: Any) -> None:
        # Not where a generator goes on: raised from a profile, it would end without its handlers,
        # as it does of no error and of no signal.
        if (
            event == "call"
            and not frame.f_code.co_filename.startswith((HERE, "<"))
            and not (frame.f_lasti >= 0 and frame.f_code.co_flags & inspect.CO_GENERATOR)
        ):
            self.second -= 1
            if not self.second:
                sys.setprofile(None)
                self.cleaning = True
                raise self.kind


@functools.cache
def _place(file: str, function: str, line: int, mode: str) -> str:
    short = file.partition("site-packages/")[2] or file.removeprefix(
        str(Path(SOURCES).parent) + "/"
    )
    short = short if not short.startswith("/") else Path(file).name
    text = linecache.getline(file, line).strip() if mode == "line" else ""
    return f"{short}:{function}: {text}".rstrip(": ")


def _cleaning(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith(HERE):
        if frame.f_code.co_name in _BACK or frame.f_lineno in _ways_back(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


@functools.cache
def _ways_back(file: str) -> frozenset[int]:
    """Lines of a file that only run to put something back."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            handlers = [h.body for h in node.handlers if _raises_again(h.body)]
            for body in [node.finalbody, *handlers]:
                for each in body:
                    lines.update(range(each.lineno, (each.end_lineno or each.lineno) + 1))
    return frozenset(lines)


def _raises_again(body: Sequence[ast.stmt]) -> bool:
    return isinstance(body[-1], ast.Raise) and body[-1].exc is None


class Bench:
    """Runs trials of one verb on one network; it is built anew only when a trial spoilt it."""

    def __init__(self, framework: str, network: str, verb: str) -> None:
        from injected_verbs import STAYS, TRAINS, verbs

        self.framework, self.network, self.verb = framework, network, verb
        self.run = verbs(framework)[verb]
        self.of_undo = verb.startswith("undo of ")
        self.trains, self.stays = verb in TRAINS, verb in STAYS
        self.warm = False
        self._build()

    def _build(self) -> None:
        from injected_verbs import prepared
        from model_state import model_state

        self.net = prepared(self.framework, self.network, self.verb)
        self.before = model_state(self.net.model, self.net.optimizer)

    def places(self, mode: str) -> list[str]:
        """Every place that the verb passes, in order."""
        self._warm()
        call, watch = self._start(), Injector(mode, None)
        self._finish(watch.run(call))
        if self._changed():
            self._build()
        return watch.places

    def _warm(self) -> None:
        """Run the verb until it imports and caches nothing more."""
        for _ in range(0 if self.warm else 2):
            self._finish(self._start()())
        self.warm = True

    def _start(self) -> Callable[[], Any]:
        from injected_verbs import fresh_folder

        net = fresh_folder(self.net)
        if self.of_undo:
            self.back = self.run(net)
            return self.back or (lambda: None)
        self.back = None
        return functools.partial(self.run, net)

    def _finish(self, back: Any) -> None:
        if back is not None and not self.of_undo:
            back()

    def trial(self, trial: Trial) -> Found:
        """Interrupt the verb once."""
        from model_state import changed, surroundings

        found = Found()
        call = self._start()
        watch = Injector(trial.mode, trial.where, trial.occurrence, trial.fault, trial.second)
        around, handler = surroundings(), signal.getsignal(signal.SIGINT)
        try:
            back = watch.run(call)
        except BaseException as error:  # or what the first one led to
            if not watch.raised:
                raise
            found.passed = True
            traceback.clear_frames(error.__traceback__)
            del error
        else:
            self._finish(back)
        found.raised, found.cleaning = watch.raised, watch.cleaning
        gc.collect(0)
        self._judge(found, lambda: changed(around, _settled(around)))
        signal.signal(signal.SIGINT, handler)
        return found

    def _judge(self, found: Found, around: Callable[[], list[str]]) -> None:
        from model_state import DRAWN, reset

        if self.of_undo and self.back and found.passed and self._changed():
            found.cleaning = True  # an undo is nothing else
            try:
                self.back()
            except Exception as error:
                found.broken = f"undo() again: {error!r}"
        found.changed = self._changed_beyond_training()
        # What a training drew is meant, and so is what a verb drew that went on to its end.
        drawn = DRAWN if self.trains or not found.passed else ()
        found.around = [name for name in around() if name not in drawn]
        if not found.passed and self.stays:  # it did what it was asked for
            found.changed = []
            self._build()
        if found.changed or self.trains:
            found.broken = found.broken or self._broken()
        if found.failed or self.trains:
            if found.around:
                reset()
            self._build()

    def _moves(self, name: str) -> bool:
        return _noted_in_training(name) or (self.trains and name.startswith("variable "))

    @functools.cached_property
    def seconds(self) -> float:
        """How long the verb takes by itself."""
        self._warm()
        if not self.fresh():
            self._build()
        started = time.perf_counter()
        self._finish(self._start()())
        seconds = time.perf_counter() - started
        if not self.fresh():
            self._build()
        return seconds

    def sound(self, trial: Callable[[], Found]) -> Found:
        """Run a trial; if it cannot even be judged, the model or the process is broken."""
        try:
            return trial()
        except Exception as error:
            text = "".join(traceback.format_exception(error)[-3:])
            self._build()
            return Found(raised=True, passed=True, broken=text)

    def fresh(self) -> bool:
        """Whether the verb can run on it again, after it ran to its end."""
        return not self.stays and not self._changed()

    def _changed(self) -> list[str]:
        from model_state import changed, model_state

        return changed(self.before, model_state(self.net.model, self.net.optimizer))

    def _changed_beyond_training(self) -> list[str]:
        """What is not as it was, but for what a training may move, or note when it begins."""
        from injected_verbs import PREPARES

        trained = self.trains or self.verb in PREPARES
        return [each for each in self._changed() if not (trained and self._moves(each))]

    def _broken(self) -> str:
        import numpy as np

        try:
            if not np.isfinite(self.net.forward()).all():
                return "outputs are not finite"
            if self.net.optimizer is None:
                self.net.model.fit(self.net.x, self.net.y, batch_size=4, verbose=0)
        except Exception as error:
            return repr(error)
        return ""


def _settled(before: dict[str, Any]) -> dict[str, Any]:
    """The state of the process when threads that are about to end have ended.

    Keras' list of callbacks starts a pool of threads in each ``fit`` and ``evaluate``. Of one that
    was interrupted the pool ends when the list is freed, after ``Model.fit`` as after ours.
    """
    from model_state import surroundings

    until = time.monotonic() + 5
    while True:
        now = surroundings()
        if not any(name.startswith("thread ") for name in now.keys() ^ before.keys()):
            return now
        if time.monotonic() > until:
            return now
        gc.collect()
        time.sleep(0.02)


def _noted_in_training(name: str) -> bool:
    return name.endswith(
        (".stop_training", ".train_function", ".test_function", "._jax_state_synced",
         "._jax_state", ".history", "._compile_metrics", "._loss_tracker", ".steps_per_execution",
         "._tracker", "._metrics", "model.training",
         "model._modules")
    )  # fmt: skip


def drawn(bench: Bench, count: int, rng: random.Random) -> list[Trial]:
    """Trials of a verb: half of them spread over all places, half over all that runs."""
    found = []
    share = {"line": (count + 1) // 2, "call": count // 2}
    for mode, number in share.items():
        places = bench.places(mode)
        times = Counter(places)
        kinds = sorted(times)
        for _ in range(number if kinds else 0):
            where = rng.choice(kinds) if rng.random() < 0.5 else rng.choice(places)
            trial = Trial(
                framework=bench.framework, network=bench.network, verb=bench.verb, mode=mode,
                where=where, occurrence=rng.randint(1, times[where]),
                fault=rng.random() < 0.25, second=rng.randint(1, 40) * (rng.random() < 0.2),
            )  # fmt: skip
            found.append(trial)
    return found


def _named(framework: str, network: str) -> str:
    on = f"/{os.environ.get('KERAS_BACKEND')}" if framework == "keras" else ""
    return f"{framework}{on} {network}"


@dataclass
class Outcome:
    """Counts by verb, and every failure with what it showed."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: list[tuple[Trial | dict[str, Any], Found]] = field(default_factory=list)

    def note(self, trial: Trial, found: Found) -> None:
        """Count a trial."""
        row = self.counts[f"{_named(trial.framework, trial.network)}: {trial.verb}"]
        kind = "in clean-up" if found.cleaning else "exceptions"
        row[kind if found.raised else "not reached"] += 1
        if found.failed:
            self.failures.append((trial, found))
            if found.cleaning:
                row["changed in clean-up"] += bool(found.changed or found.around)
                row["broken in clean-up"] += bool(found.broken)
            else:
                row["changed"] += bool(found.changed)
                row["around"] += bool(found.around)
                row["broken"] += bool(found.broken)

    def heard(self, place: str, bench: Bench, rng: random.Random) -> None:
        """Interrupt a verb with SIGINT, and count it; too late, and it is sent again."""
        for _ in range(10):
            trace = ""

            def once() -> Found:
                nonlocal trace
                found, trace = _hit(bench, bench.seconds, rng)
                return found

            found = bench.sound(once)
            row = self.counts[place]
            late = "signals dropped" if trace.startswith("dropped") else "signals too late"
            row["signals" if found.passed or found.broken else late] += 1
            row["signals as another error"] += found.passed and trace.endswith(" as another error")
            for name in ("changed", "around", "broken"):
                row[f"signals {name}"] += bool(getattr(found, name))
            if found.failed:
                self.failures.append(({"verb": bench.verb, "trace": trace}, found))
            if found.passed or found.broken:
                return


def inject(
    framework: str, network: str, exceptions: int, signals: int = 0, *, seed: int = 0,
    only: Sequence[str] = (), until: float = math.inf,
    after: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:  # fmt: skip
    """Interrupt verbs, all of them in turn.

    Args:
        framework: See :class:`Trial`.
        network: Likewise.
        exceptions: How many, over all verbs.
        signals: How many SIGINTs that come while a verb runs.
        seed: Of the places; with ``until`` fewer of them are come to.
        only: Names of verbs; empty: all.
        until: ``time.monotonic()`` at which to stop.
        after: Called with what was found so far, now and then.
    """
    from injected_verbs import verbs

    outcome = Outcome()
    names = [name for name in verbs(framework) if not only or name in only]
    turns = [
        _turns((framework, network, name), ours, sent, seed, outcome)
        for name, ours, sent in zip(
            names, _shares(exceptions, names), _shares(signals, names), strict=True
        )
        if ours or sent
    ]
    before = signal.signal(signal.SIGINT, _too_late)
    try:
        while turns:
            for turn in list(turns):
                if time.monotonic() > until:
                    return outcome
                if next(turn, None) is None:
                    turns.remove(turn)
                after(outcome)
        return outcome
    finally:
        sender().end()
        sender.cache_clear()
        signal.signal(signal.SIGINT, before)


def _too_late(*_: Any) -> None:
    """A SIGINT that comes when no verb runs."""


def _shares(count: int, names: Sequence[str]) -> list[int]:
    return [count // len(names) + (number < count % len(names)) for number in range(len(names))]


def _turns(
    of: tuple[str, str, str], exceptions: int, signals: int, seed: int, outcome: Outcome
) -> Iterator[int]:
    """All trials of a verb, some at a time."""
    bench = Bench(*of)
    place = f"{_named(bench.framework, bench.network)}: {bench.verb}"
    rng = random.Random(f"{seed} {bench.framework} {bench.network} {bench.verb}")
    trials = drawn(bench, exceptions, rng) if exceptions else []
    rng.shuffle(trials)
    size = max(1, round(len(trials) / max(signals, 5)))
    while trials or signals:
        for trial in trials[:size]:
            outcome.note(trial, bench.sound(functools.partial(bench.trial, trial)))
        del trials[:size]
        if signals:
            signals -= 1
            outcome.heard(place, bench, rng)
        yield len(trials)


# --- Ctrl-C ---------------------------------------------------------------------------------------


class Sender:
    """Another process, which sends SIGINT to this one when it is asked to."""

    def __init__(self) -> None:
        script = f'while read delay; do sleep "$delay"; kill -INT {os.getpid()}; done'
        self._shell = subprocess.Popen(
            ["sh", "-c", script], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def ask(self, delay: float) -> None:
        """Send one after so many seconds."""
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"{delay:.4f}\n")
        self._shell.stdin.flush()

    def end(self) -> None:
        """Send what was asked for, and end."""
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait()


@functools.cache
def sender() -> Sender:
    """The one of this process."""
    return Sender()


def _hit(bench: Bench, seconds: float, rng: random.Random) -> tuple[Found, str]:
    """Run a verb again and again until SIGINT comes while it runs, or just after."""
    from model_state import DRAWN, changed, reset, surroundings

    asked = 0.0
    missed: list[int] = []
    heard_of: list[str] = []

    def ask() -> None:
        nonlocal asked
        missed.clear()
        asked = time.monotonic()
        sender().ask(rng.uniform(0, max(1.5 * seconds, 0.005)))

    def heard(_: int, frame: FrameType | None) -> None:
        stack = traceback.extract_stack(frame, limit=8)[::-1]
        heard_of.append(" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in stack))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda *_: missed.append(1))
    ask()
    while True:
        call, found, trace = bench._start(), Found(raised=True), ""
        if missed or time.monotonic() - asked > 20 + 10 * seconds:
            ask()  # it came between two runs, or something swallowed it
        heard_of.clear()
        noting = signal.getsignal(signal.SIGINT)
        around, left = surroundings(), None
        try:
            signal.signal(signal.SIGINT, heard)
            try:
                back = call()
            except BaseException as error:
                if not heard_of:
                    raise
                walked = traceback.extract_tb(error.__traceback__)
                frames = [f for f in walked if f.name != heard.__name__]
                trace = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1])
                if not isinstance(error, KeyboardInterrupt):  # NumPy makes a TypeError of some
                    trace += f" {error!r} as another error"
                found.passed = not frames[-1].filename.startswith(HERE)
                left = signal.getsignal(signal.SIGINT)
                traceback.clear_frames(error.__traceback__)
                del error
                break
            finally:
                signal.signal(signal.SIGINT, noting)
        except KeyboardInterrupt:
            break  # it came before the verb began, or when it was over
        bench._finish(back)
        if heard_of:  # and the verb went on: code that it runs dropped the exception
            found.changed = [] if bench.stays else bench._changed_beyond_training()
            trace = f"dropped at {heard_of[0]}"
            break
        if not bench.fresh():
            bench._build()
    signal.signal(signal.SIGINT, before)
    gc.collect(0)
    now = _settled(around)
    if not found.passed:
        found.around = [n for n in changed(around, now) if n not in (*DRAWN, "handlers")]
        if found.around:
            reset()
        bench._build()
        return found, trace
    around["handlers"], now["handlers"] = heard, left
    bench._judge(found, lambda: changed(around, now))
    return found, trace


# --- files and tables -----------------------------------------------------------------------------


def smallest(trial: Trial) -> Trial:
    """The same failure on the small network and without a second exception, where it shows so."""
    best = trial
    for simpler in (
        {"network": "small"}, {"second": 0}, {"fault": False}, {"occurrence": 1},
    ):  # fmt: skip
        candidate = Trial(**{**asdict(best), **simpler})
        if candidate != best and again(candidate).failed:
            best = candidate
    return best


def again(trial: Trial) -> Found:
    """Run one trial by itself."""
    bench = Bench(trial.framework, trial.network, trial.verb)
    bench.places(trial.mode)
    return bench.trial(trial)


def keep(trial: Trial, found: Found, folder: Path) -> Path:
    """Write a failure as a file that the tests run again."""
    name = "".join(c if c.isalnum() else "_" for c in f"{trial.verb} {trial.where}")[:80]
    path = folder / f"inject_{trial.framework}_{name.strip('_').lower()}.json"
    content = {"trial": asdict(trial), "showed": asdict(found)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


COLUMNS = ("exceptions", "changed", "around", "broken", "in clean-up", "changed in clean-up",
           "broken in clean-up", "not reached", "signals", "signals changed", "signals around",
           "signals broken", "signals too late", "signals dropped",
           "signals as another error")  # fmt: skip


def table(outcome: Outcome) -> str:
    """Counts as text."""
    rows = {**outcome.counts, "all": sum(outcome.counts.values(), Counter())}
    width = max(map(len, rows))
    shown = [name for name in COLUMNS if rows["all"][name]]
    lines = [" " * width + "  " + "  ".join(shown)]
    for name, row in rows.items():
        numbers = "  ".join(str(row[column]).rjust(len(column)) for column in shown)
        lines.append(f"{name.ljust(width)}  {numbers}")
    return "\n".join(lines)


def _told(trial: Trial | dict[str, Any], found: Found) -> dict[str, Any]:
    """A failure in words: where, and what differed."""
    where = asdict(trial) if isinstance(trial, Trial) else trial
    names = ("verb", "mode", "where", "second", "trace")
    return {
        **{name: where[name] for name in names if where.get(name)},
        "in clean-up": found.cleaning, "differs": [*found.changed, *found.around][:8],
        "broken": re.sub(r"[^\"]*/(site-packages|src)/", "", found.broken)[-300:],
    }  # fmt: skip


def _write(options: argparse.Namespace, outcome: Outcome, seconds: float) -> None:
    """Add a run to a file, or replace what it had found a minute ago."""
    backend = os.environ.get("KERAS_BACKEND", "")
    named = ("framework", "network", "exceptions", "signals", "seed")
    command = " ".join(
        [
            f"KERAS_BACKEND={backend} python scripts/inject.py",
            *(f"--{name} {getattr(options, name)}" for name in named),
            *(f"--verb '{name}'" for name in options.verb),
            *([] if options.minutes == math.inf else [f"--minutes {options.minutes:g}"]),
        ]
    )
    run = {
        "command": command,
        "sources": source_state.digest(),
        "seconds": round(seconds),
        "counts": {name: dict(row) for name, row in outcome.counts.items()},
        "failures": [_told(*failure) for failure in outcome.failures],
    }
    _added(options.json, [run])


def _added(file: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write runs at the end of a file, in the place of what they had found earlier."""

    def same(run: dict[str, Any]) -> tuple[str, str]:
        return run["command"], run.get("sources", "")

    earlier = json.loads(file.read_text("utf-8"))["runs"] if file.exists() else []
    kept = [run for run in earlier if same(run) not in map(same, runs)]
    file.write_text(json.dumps({"runs": [*kept, *runs]}, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Read the options, run, print the table, and keep the failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--framework", choices=["torch", "keras"], default="torch")
    parser.add_argument("--network", choices=["small", "lite0"], default="small")
    parser.add_argument("--exceptions", type=int, default=0)
    parser.add_argument("--signals", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--json", type=Path, help="also add the counts to this file")
    parser.add_argument("--add", type=Path, nargs="+", help="only add the runs of these files")
    parser.add_argument("--keep", type=Path, help="folder for failures, to run them again")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    for file in options.add or ():
        _added(options.json, json.loads(file.read_text("utf-8"))["runs"])
    if options.add:
        return 0
    # JAX: the same small programs again and again, for each model that is built anew.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="inject-jax-"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    started = time.monotonic()
    written = started

    def after(found: Outcome) -> None:
        nonlocal written
        if options.json and time.monotonic() > written + 60:
            written = time.monotonic()
            _write(options, found, written - started)

    outcome = inject(
        options.framework, options.network, options.exceptions, options.signals,
        seed=options.seed, only=options.verb, until=started + 60 * options.minutes, after=after,
    )  # fmt: skip
    print(table(outcome))
    for trial, found in outcome.failures:
        if isinstance(trial, Trial):
            print("FAILED", asdict(trial), asdict(found))
        else:
            print("FAILED", trial)
    distinct = {t.where: t for t, _ in outcome.failures if isinstance(t, Trial)}
    for trial in distinct.values() if options.keep else ():
        short = smallest(trial)
        print("kept", keep(short, again(short), options.keep))
    if options.json:
        _write(options, outcome, time.monotonic() - started)
    return bool(outcome.failures)


if __name__ == "__main__":
    sys.exit(main())
