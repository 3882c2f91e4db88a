"""Give every argument of every public verb wrong values, and count what does not answer in words.

    KERAS_BACKEND=torch python scripts/probe_arguments.py --framework keras --json probe.json

Strings for numbers, floats for counts, bytes for paths, generators that raise, functions that
return nothing, and more, one at a time in a call that is otherwise sound. A call may succeed or
raise a ``FrostlineError``. Anything else is a fault: an error of Python or of the framework that
comes from inside, or a call of more than 40 seconds. Errors that do not name their argument are
counted, too; ``model``, ``data`` and other arguments that a sentence calls by what they are do not
count there.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import source_state
from injected_verbs import Network, networks

import frostline as fl

LONGEST = 40
#: Arguments that a message calls by what they are.
CALLED_OTHERWISE = frozenset(
    {"model", "model_or_layers", "models_or_states", "data", "x", "y", "prefix", "sample",
     "validation", "validation_data", "loader", "until", "since", "at"}
)  # fmt: skip
#: Keras' own arguments of ``fit``, which ``fl.fit`` hands on.
OF_FIT = ("batch_size", "epochs", "validation_data", "validation_split", "callbacks",
          "steps_per_epoch", "shuffle", "initial_epoch", "verbose", "class_weight", "sample_weight",
          "validation_steps", "validation_batch_size", "validation_freq")  # fmt: skip


def _broken() -> Iterator[Any]:
    yield np.zeros((4, 8, 8, 2), "float32")
    raise RuntimeError("the disk is gone")


class _Odd:
    """Neither its length nor its content can be read."""

    def __len__(self) -> int:
        raise RuntimeError("no length")

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no content")


def _nothing(*_: Any, **__: Any) -> None:
    """Takes anything and returns nothing."""


#: Wrong for most arguments, and sound for some; each made anew.
VALUES: dict[str, Callable[[], Any]] = {
    "text": lambda: "3", "float": lambda: 2.5, "NaN": lambda: float("nan"),
    "infinite": lambda: float("inf"), "negative": lambda: -1, "zero": lambda: 0,
    "huge": lambda: 10**30, "True": lambda: True, "None": lambda: None, "bytes": lambda: b"abc",
    "null byte": lambda: "a\0b", "surrogate": lambda: "\udce4", "list": lambda: [1, "a"],
    "set": lambda: {1, 2}, "mapping": lambda: {"a": 1}, "object": object, "class": lambda: int,
    "function of nothing": lambda: _nothing, "generator that raises": _broken, "odd": _Odd,
    "array": lambda: np.zeros((2, 3, 4)), "words": lambda: np.array(["a", "b"]),
    "objects": lambda: np.array([None, 1], object),
}  # fmt: skip


@dataclass
class Tried:
    """What was tried, and what did not answer in words."""

    calls: int = 0
    succeeded: int = 0
    refused: int = 0
    unnamed: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class _Late(BaseException):
    """A call took too long."""


def sound_calls(network: Network, framework: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Verb -> arguments with which it works, on a small network."""
    model, x, y = network.model, network.x, network.y
    more: dict[str, Any] = {"batch_size": 4}
    training: dict[str, Any] = {}
    if framework == "torch":
        torch = sys.modules["torch"]
        more["loss"] = torch.nn.functional.cross_entropy
        training["optimizer"] = lambda weights: torch.optim.SGD(weights, 0.01)
    cache = {"path": tempfile.mkdtemp(dir=folder), "engine": "native", "verbose": 0}
    calls: dict[str, dict[str, Any]] = {
        "sites": {"model": model}, "lint": {"model": model},
        "diagnose": {"model": model, "data": (x, y), "verbose": 0, "max_samples": 8, **more},
        "phases": {"model": model, "data": (x, y), **more},
        "freeze": {"model": model, "until": network.cut}, "unfreeze": {"model": model},
        "set_momentum": {"model": model, "momentum": 0.5},
        "recalibrate": {"model": model, "data": x, "batch_size": 4},
        "recalibrated": {"model": model, "data": x, "batch_size": 4},
        "watch": {"model": model, "data": (x, y), **more},
        "frozen": {"model_or_layers": model}, "assert_frozen": {"model": model, "data": x},
        "split": {"model": model, "sample": x}, "fold": {"model": model},
        "merge_statistics": {"models_or_states": [model, model], "weights": [1, 1]},
        "suggest_momentum": {"steps": 100, "learning_rate_ratio": 1.0},
        "cache_features": {"prefix": None, "data": x, "batch_size": 4, **cache},
        "compare": {"model": model, "data": (x, y), "validation": (x, y), "epochs": 1, "seeds": 1,
                    "treatments": ["recalibrated"], "cache": cache["path"], "engine": "native",
                    "verbose": 0, **more, **training},
    }  # fmt: skip
    if framework == "torch":
        calls["cached"] = {"model": model, "loader": [(x, y)]}
    else:
        calls["convert"] = {"model": model}
        calls["restore"] = {"model": model}
        calls["fit"] = {"model": model, "x": x, "y": y, "cache": cache["path"], "epochs": 1,
                        "engine": "native", "batch_size": 4, "verbose": 0}  # fmt: skip
    return calls


#: Verbs that want a frozen part.
OF_FROZEN = ("split", "cached", "compare", "cache_features", "fit", "assert_frozen")


def prepared(verb: str, framework: str, folder: Path) -> dict[str, Any]:
    """A model in the state that a verb wants, and the other arguments."""
    network = networks(framework, "small")
    if verb in OF_FROZEN:
        fl.freeze(network.model, network.cut, dropout=True)
        if framework == "keras":
            network.model.compile("sgd", "sparse_categorical_crossentropy")
    call = sound_calls(network, framework, folder)[verb]
    if verb == "cache_features":
        call["prefix"] = fl.split(network.model, sample=network.x).prefix
    return call


def arguments_of(verb: str) -> list[str]:
    """Names of a verb's arguments."""
    known = inspect.signature(getattr(fl, verb)).parameters.values()
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [each.name for each in known if each.kind not in several]
    return names + [name for name in OF_FIT if verb == "fit" and name not in names]


def use(verb: str, call: dict[str, Any]) -> None:
    """Call a verb as a person does: blocks are entered, changes taken back."""
    made = getattr(fl, verb)(**call)
    if verb in ("watch", "frozen", "recalibrated") and hasattr(made, "__enter__"):
        with made:
            pass
    elif verb == "cached":
        _in_a_loop(made)
    if hasattr(made, "undo"):
        made.undo()


def _in_a_loop(loader: Any) -> None:
    """The user's own loop; what the user's own loader raises there is the user's."""
    try:
        for _ in loader:
            pass
    except RuntimeError as error:
        if str(error) not in ("the disk is gone", "no content", "no length"):
            raise


def probe(
    framework: str,
    verbs: Sequence[str] = (),
    values: Sequence[str] = (),
    told: Callable[[Tried], None] = lambda _: None,
) -> Tried:
    """Try everything.

    Args:
        framework: ``"keras"`` or ``"torch"``.
        verbs: Only these.
        values: Only these of :data:`VALUES`.
        told: Is given what was tried so far, after each verb.
    """
    tried = Tried()
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.chdir(name),  # a word for a path makes a folder
        _alarm(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        folder = Path(name)
        for verb in verbs or sound_calls(networks(framework, "small"), framework, folder):
            call = None
            for argument in arguments_of(verb):
                for value in values or VALUES:
                    # What is refused has changed nothing: its model serves again, since making
                    # one takes seconds on JAX.
                    call = call or prepared(verb, framework, folder)
                    if not _try(tried, verb, argument, value, dict(call)):
                        call = None
            told(tried)
    return tried


def _try(tried: Tried, verb: str, argument: str, value: str, call: dict[str, Any]) -> bool:
    """Make one call; returns whether it was refused in words."""
    refused = tried.refused
    call[argument] = VALUES[value]()
    tried.calls += 1
    line = f"{verb}, {argument}, {value}"
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            use(verb, call)
        tried.succeeded += 1
    except fl.FrostlineError as error:
        tried.refused += 1
        if argument not in str(error) and argument not in CALLED_OTHERWISE:
            tried.unnamed.append(f"{line}: {_short(error)}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        tried.faults.append(f"{line}: {type(error).__name__}: {_short(error)}")
    finally:
        signal.alarm(0)
    return tried.refused > refused


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe, print, and return 1 when there are faults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--framework", choices=("keras", "torch"), default="torch")
    parser.add_argument("--verbs", nargs="+", default=())
    parser.add_argument("--values", nargs="+", choices=list(VALUES), default=())
    parser.add_argument("--json", type=Path, help="file for the counts, written while it runs")
    options = parser.parse_args(arguments)
    place = None if options.json is None else options.json.resolve()
    # JAX: the same small programs again and again, for each model that is made anew.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="probe-jax-"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

    def write(tried: Tried) -> None:
        if place is None:
            return
        from frostline import environment

        record = {
            "framework": options.framework,
            "backend": os.environ.get("KERAS_BACKEND"),
            "versions": environment.facts()["versions"],
            "sources": source_state.digest(),
            "calls": tried.calls,
            "succeeded": tried.succeeded,
            "refused": tried.refused,
            "unnamed": tried.unnamed,
            "faults": tried.faults,
        }
        place.write_text(json.dumps(record, indent=2) + "\n")

    tried = probe(options.framework, options.verbs, options.values, write)
    for line in (*(f"unnamed: {each}" for each in tried.unnamed), *tried.faults):
        print(line)
    print(
        f"{tried.calls} calls: {tried.succeeded} succeeded, {tried.refused} refused in words "
        f"({len(tried.unnamed)} without the argument's name), {len(tried.faults)} faults"
    )
    return int(bool(tried.faults))


if __name__ == "__main__":
    sys.exit(main())
