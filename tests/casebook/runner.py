"""Build a case, ask ``fl.diagnose``, and compare the answer with the book's."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import keras

import frostline as fl
from frostline.measurement import BN_CAUSES

from . import batches, compound, frozen, held_out, lagging, other
from .bench import Case, Scenario

#: Cases of the book that no scenario here rebuilds, and why.
NOT_COVERED: Mapping[str, str] = {
    "7": "native torch: model.train() undoes eval(); the flag of the freeze has no twin in Keras",
}

#: A remedy closes a gap when it closes this share of it.
CLOSED = 0.8

CASES: tuple[Case, ...] = tuple(
    case
    for module in (frozen, lagging, batches, other, compound, held_out)
    for case in module.CASES
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was expected of one case and what came.

    Attributes:
        number: Of the case.
        title: Of the case.
        expected: Codes that the book gives.
        also: Codes that count as right, too.
        answers: Codes of the causes, in order.
        shares: Of these causes.
        right: The first answer is right; for compound cases both causes are named.
        blamed: BN causes among the answers of a case that is not BN's fault.
        overlap: Intersection over union of the layers that the right cause names with those
            expected; ``None`` where the book names none, or the cause is missing.
        remedy: Name of the remedy named first; ``None`` without one.
        before: Loss before it.
        after: Loss after it.
        closed: Share of the closable gap that it closes.
        closable: A repair is known to exist.
        verdict: The report's sentence.
        seconds: Of building and of the diagnosis.
    """

    number: str
    title: str
    expected: tuple[str, ...]
    also: tuple[str, ...]
    answers: tuple[str, ...]
    shares: tuple[float | None, ...]
    right: bool
    blamed: tuple[str, ...]
    overlap: float | None
    remedy: str | None
    before: float | None
    after: float | None
    closed: float | None
    closable: bool
    verdict: str
    seconds: tuple[float, float] = field(default=(0.0, 0.0), compare=False)

    @property
    def held_out(self) -> bool:
        """Not in the book."""
        return self.number.startswith("H")

    @property
    def kind(self) -> str:
        """``"compound"``, ``"BN"`` or ``"not BN"``."""
        if len(self.expected) > 1:
            return "compound"
        return "BN" if self.expected[0] in fl.measurement.BN_CAUSES else "not BN"

    @property
    def closes(self) -> bool:
        """The remedy named first closes the gap, where one can be closed."""
        return not self.closable or (self.closed is not None and self.closed >= CLOSED)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without the seconds, which differ from run to run."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


def chosen(numbers: Sequence[str] = (), *, backend: str, lean: bool = False) -> tuple[Case, ...]:
    """The cases that run on a backend: all on TensorFlow, a third on the others; or those named.

    Lean: a third everywhere, and each of the others on one backend.
    """
    known = {case.number: case for case in CASES}
    unknown = [number for number in numbers if number not in known]
    if unknown:
        raise SystemExit(f"no case {unknown[0]!r}; there are {', '.join(known)}")
    if lean:
        return tuple(case for case in CASES if case.everywhere or home(case) == backend)
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


def judged(case: Case, scenario: Scenario, report: Any, seconds: tuple[float, float]) -> Row:
    """Compare a report with the answer of the book."""
    answers = tuple(cause.code for cause in report.causes)
    accepted = {*case.expected, *case.also}
    compound = len(case.expected) > 1
    right = bool(answers) and answers[0] in accepted
    right = right and (not compound or set(case.expected) <= set(answers))
    cause = next((each for each in report.causes if each.code in accepted), None)
    overlap = None
    if case.sites is not None and cause is not None and cause.is_bn:
        named = {path.rpartition("/")[2] for path in cause.sites}
        overlap = len(named & case.sites) / len(named | case.sites)
    bn_expected = any(code in fl.measurement.BN_CAUSES for code in case.expected)
    remedy = report.remedies[0] if report.remedies else None
    return Row(
        number=case.number,
        title=case.title,
        expected=case.expected,
        also=case.also,
        answers=answers,
        shares=tuple(cause.share for cause in report.causes),
        right=right,
        blamed=() if bn_expected else tuple(c.code for c in report.causes if c.is_bn),
        overlap=overlap,
        remedy=None if remedy is None else remedy.name,
        before=None if remedy is None else remedy.before.get("loss"),
        after=None if remedy is None else remedy.after.get("loss"),
        closed=None if remedy is None else remedy.closed,
        closable=scenario.closable,
        verdict=report.verdict,
        seconds=seconds,
    )


def score(rows: Iterable[Row]) -> dict[str, str]:
    """Counts in words, the cases of the book apart from the others."""
    lines: dict[str, str] = {}
    rows = tuple(rows)
    for name, members in (
        ("casebook", tuple(row for row in rows if not row.held_out)),
        ("held out", tuple(row for row in rows if row.held_out)),
    ):
        for kind in ("BN", "compound", "not BN"):
            of = [row for row in members if row.kind == kind]
            if of:
                lines[f"{name}, {kind}: right"] = f"{sum(row.right for row in of)} of {len(of)}"
        innocent = [row for row in members if row.kind == "not BN"]
        if innocent:
            falsely = sum(bool(row.blamed) for row in innocent)
            lines[f"{name}, not BN: BN blamed"] = f"{falsely} of {len(innocent)}"
        overlaps = [row.overlap for row in members if row.overlap is not None]
        if overlaps:
            lines[f"{name}: mean IoU of the layers"] = f"{sum(overlaps) / len(overlaps):.2f}"
        closable = [row for row in members if row.closable]
        if closable:
            lines[f"{name}: first remedy closes {CLOSED:.0%}"] = (
                f"{sum(row.closes for row in closable)} of {len(closable)}"
            )
    return lines
