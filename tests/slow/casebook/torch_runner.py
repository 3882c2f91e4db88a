"""Build a case in native torch, ask ``fl.diagnose``, and compare; needs no Keras."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

import frostline as fl

from . import torch_any, torch_averages, torch_frozen, torch_other
from .judging import Row, judged, score, unanswered
from .scenario import Case, Scenario

__all__ = ["CASES", "NOT_COVERED", "Row", "Scenario", "chosen", "judged", "run", "score"]

#: Cases of torch that no scenario here rebuilds; the Keras half has the others of the book.
NOT_COVERED: Mapping[str, str] = {}

CASES: tuple[Case, ...] = tuple(
    case
    for module in (torch_frozen, torch_averages, torch_other, torch_any)
    for case in module.CASES
)


def chosen(numbers: Sequence[str] = (), *, backend: str = "native") -> tuple[Case, ...]:
    """All cases, or those named."""
    del backend
    known = {case.number: case for case in CASES}
    unknown = [number for number in numbers if number not in known]
    if unknown:
        raise SystemExit(f"no case {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(known[number] for number in numbers or known)


def run(case: Case, *, seed: int = 0) -> Row:
    """Build and diagnose one case; the loss is given as a callable."""
    start = time.perf_counter()
    scenario = case.build(seed)
    built = time.perf_counter()
    options = {"loss": torch.nn.functional.cross_entropy, **scenario.options}
    try:
        report = fl.diagnose(scenario.model, scenario.data, verbose=0, **options)
    except Exception as problem:  # the table has a line for it; no answer is a wrong one
        return unanswered(case, scenario, problem, (built - start, time.perf_counter() - built))
    return judged(case, scenario, report, (built - start, time.perf_counter() - built))
