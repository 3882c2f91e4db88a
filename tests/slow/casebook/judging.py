"""Compare a report with the answer of the book, whatever the framework."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from frostline.types.measured import BN_CAUSES

from .scenario import Case, Scenario

#: A remedy closes a gap when it closes this share of it.
CLOSED = 0.8


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
    def origin(self) -> str:
        """``"casebook"``, or what is not in the book: ``"held out"`` (H), ``"unseen"`` (U), and
        ``"any model"`` (A).
        """
        if self.number.startswith("A"):
            return "any model"
        first = self.number.removeprefix("T")[0]
        if self.number.startswith("U"):
            return "unseen"
        return "held out" if first == "H" else "casebook"

    @property
    def kind(self) -> str:
        """``"compound"``, ``"BN"`` or ``"not BN"``."""
        if len(self.expected) > 1:
            return "compound"
        return "BN" if self.expected[0] in BN_CAUSES else "not BN"

    @property
    def closes(self) -> bool:
        """The remedy named first closes the gap, where one can be closed."""
        return not self.closable or (self.closed is not None and self.closed >= CLOSED)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without the seconds, which differ from run to run."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


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
    bn_expected = any(code in BN_CAUSES for code in case.expected)
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


def unanswered(
    case: Case, scenario: Scenario, problem: Exception, seconds: tuple[float, float]
) -> Row:
    """The row of a case that was refused, or that raised."""
    return Row(
        number=case.number,
        title=case.title,
        expected=case.expected,
        also=case.also,
        answers=(type(problem).__name__,),
        shares=(None,),
        right=False,
        blamed=(),
        overlap=None,
        remedy=None,
        before=None,
        after=None,
        closed=None,
        closable=scenario.closable,
        verdict=str(problem),
        seconds=seconds,
    )


def score(rows: Iterable[Row]) -> dict[str, str]:
    """Counts in words, the cases of the book apart from the others."""
    lines: dict[str, str] = {}
    rows = tuple(rows)
    for name in ("casebook", "held out", "unseen", "any model"):
        members = tuple(row for row in rows if row.origin == name)
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
