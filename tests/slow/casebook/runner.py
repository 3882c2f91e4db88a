"""Build a Keras case, ask ``fl.diagnose``, and compare the answer with the book's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import keras

import frostline as fl
from frostline.types.measured import BN_CAUSES

from . import batches, compound, frozen, held_out, lagging, other, unseen
from .judging import Row, judged, score
from .scenario import Case, Scenario

__all__ = ["CASES", "NOT_COVERED", "Row", "Scenario", "chosen", "judged", "run", "score"]

#: Cases of the book that no scenario here rebuilds, and why.
NOT_COVERED: Mapping[str, str] = {
    "7": "native torch (T7): model.train() undoes eval(); the freeze has no twin in Keras",
}

CASES: tuple[Case, ...] = tuple(
    case
    for module in (frozen, lagging, batches, other, compound, held_out, unseen)
    for case in module.CASES
)


def chosen(numbers: Sequence[str] = (), *, backend: str, lean: bool = False) -> tuple[Case, ...]:
    """The cases that run on a backend: all on TensorFlow, a third on the others; or those named.

    Lean: a third everywhere, and each of the others that are tests on one backend.
    """
    known = {case.number: case for case in CASES}
    unknown = [number for number in numbers if number not in known]
    if unknown:
        raise SystemExit(f"no case {unknown[0]!r}; there are {', '.join(known)}")
    if lean:
        here = (case for case in CASES if case.everywhere or home(case) == backend)
        return tuple(case for case in here if case.in_suite)
    return tuple(
        case
        for case in (known[number] for number in numbers or known)
        if backend in case.backends and (numbers or case.everywhere or backend == "tensorflow")
    )


def is_bn(case: Case) -> bool:
    """BN alone is to blame."""
    return len(case.expected) == 1 and case.expected[0] in BN_CAUSES


def home(case: Case) -> str:
    """The one backend of a case that does not run everywhere: TensorFlow where it can."""
    return "tensorflow" if "tensorflow" in case.backends else case.backends[0]


def run(case: Case, *, seed: int = 0) -> Row:
    """Build and diagnose one case."""
    start = time.perf_counter()
    scenario = case.build(seed)
    built = time.perf_counter()
    report = fl.diagnose(scenario.model, scenario.data, verbose=0, **scenario.options)
    row = judged(case, scenario, report, (built - start, time.perf_counter() - built))
    keras.utils.clear_session()
    return row
