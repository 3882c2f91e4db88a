"""Two reports of one model, before and after a change: what went, what came, and the numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from frostline.report import wording
from frostline.types.report import Report

_WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """What differs between two reports.

    Attributes:
        numbers: Label -> before and after, as text; ``–`` where a report has no such number.
        gone: Causes, errors and warnings of the first report that the second does not have.
        new: Those of the second that the first does not have.
        left: Those of both.
        notes: Why the two may not be comparable.
    """

    numbers: dict[str, tuple[str, str]]
    gone: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Nothing new was found."""
        return not self.new

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain types for JSON."""
        return {**asdict(self), "clean": self.clean}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield self._sentence()
        if self.numbers:
            yield ""
            width = max(map(len, self.numbers))
            before = max(len("before"), *(len(first) for first, _ in self.numbers.values()))
            yield f"{'':{width}}  {'before':>{before}}  after"
            for label, (first, second) in self.numbers.items():
                yield f"{label:{width}}  {first:>{before}}  {second}"
        for mark, word, names in (
            ("✓", "gone", self.gone),
            ("✗", "new", self.new),
            ("!", "still there", self.left),
        ):
            if names:
                yield ""
                yield f"{mark} {word}"
                for name in names:
                    yield from textwrap.wrap(
                        name, _WIDTH, initial_indent="  ", subsequent_indent="    ",
                        break_long_words=False, break_on_hyphens=False,
                    )  # fmt: skip
        for note in self.notes:
            yield ""
            yield from textwrap.wrap(f"note: {note}", _WIDTH)

    def _sentence(self) -> str:
        if not (self.gone or self.new or self.left):
            return "Neither report has a cause, an error or a warning."
        words = [f"{len(self.gone)} gone", f"{len(self.new)} new", f"{len(self.left)} still there"]
        return f"Causes, errors and warnings: {', '.join(words)}."


def compare(before: Report, after: Report) -> BeforeAfter:
    """Compare two reports.

    Args:
        before: The earlier one.
        after: The later one, best on the same samples.
    """
    first, second = dict(_found(before)), dict(_found(after))
    return BeforeAfter(
        numbers=dict(_numbers(before, after)),
        gone=tuple(text for key, text in first.items() if key not in second),
        new=tuple(text for key, text in second.items() if key not in first),
        left=tuple(text for key, text in second.items() if key in first),
        notes=tuple(_notes(before, after)),
    )


def _found(report: Report) -> Iterator[tuple[tuple[str, ...], str]]:
    for cause in report.causes:
        if cause.code != "NONE":
            share = "" if cause.share is None else f" ({wording.percent(cause.share)} of the gap)"
            yield ("cause", cause.code), f"{cause.code}{share}"
    for finding in report.findings:
        if finding.severity != "info":
            where = wording.listed(finding.sites, 3)
            name = f"{finding.severity} {finding.code} {finding.name}"
            yield (finding.code, *finding.sites), f"{name} at {where}"


def _numbers(before: Report, after: Report) -> Iterator[tuple[str, tuple[str, str]]]:
    first, second = _values(before), _values(after)
    for label in dict.fromkeys([*first, *second]):
        yield label, (first.get(label, wording.MISSING), second.get(label, wording.MISSING))


def _values(report: Report) -> dict[str, str]:
    measured = report.measurement
    if measured is None:
        return {}
    shown = {}
    for name, label in (("inference", "in use"), ("training", "in training mode")):
        probe = measured.probes.get(name)
        if probe is not None:
            shown[f"loss {label}"] = wording.number(probe.loss)
            if probe.accuracy is not None:
                shown[f"accuracy {label}"] = wording.number(probe.accuracy)
    if report.gap is not None:
        shown["gap in loss, 95%"] = wording.interval(report.gap.loss)
    return shown


def _notes(before: Report, after: Report) -> Iterator[str]:
    for name in ("model", "samples", "seed"):
        first, second = before.origin.get(name), after.origin.get(name)
        if first != second:
            yield f"{name} differs: {first or 'not known'} before, {second or 'not known'} after"
    if (before.measurement is None) != (after.measurement is None):
        yield "one report is a diagnosis with data, the other a lint without"
