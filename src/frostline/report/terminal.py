"""The report for a terminal: verdict first, then what leads to it, in at most 80 columns."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frostline.report import excerpts, palette, wording
from frostline.report.escaping import line, printable
from frostline.types import Finding
from frostline.types.measured import Attribution, Cause, Gap, Measurement, Remedy
from frostline.types.report import Report

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

#: Severity -> sites listed in a group before "and n more".
_LISTED = {"error": 5, "warning": 5, "info": 2}

#: Cells of the strip of shares; in deeper models neighbouring sites share a cell.
_CELLS = 72
_HEIGHTS = "▁▂▃▄▅▆▇█"

_SPACE_IN_INTERVAL = re.compile(r" (?=to [+−]?[\d∞i])|(?<= to) (?=[+−]?[\d∞i])")


def as_text(report: Report) -> RenderableType:
    """Return the report for a terminal; parts without numbers are left out."""
    from rich.console import Group

    parts: list[RenderableType] = [_Paragraph(report.verdict, style="bold")]
    facts = wording.origin(report)
    if facts:
        parts.append(line(" · ".join(f"{name} {value}" for name, value in facts), style="dim"))
    if report.measurement is not None:
        parts += ["", _gap_table(report.measurement)]
    for cause in report.causes:
        if cause.code != "NONE":
            parts += ["", *_cause_lines(cause)]
    rest = excerpts.unexplained(report)
    if rest:
        parts.append(line(f"{wording.percent(rest)} of the gap is not explained", style="dim"))
    if report.attribution is not None:
        parts += ["", *_where_lines(report, report.attribution)]
    if report.remedies:
        parts += ["", *_remedy_lines(report.remedies)]
    for group in wording.by_code(report.findings):
        parts += ["", *_group_lines(group)]
    if report.measurement is not None or report.skipped:
        parts += ["", *_unchecked_lines(report)]
    return Group(*parts)


@dataclass(frozen=True)
class _Paragraph:
    """Text of any length, broken into lines between words but never inside an interval."""

    text: str
    style: str = ""
    indent: str = ""

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Text]:
        # textwrap breaks lines at ordinary blanks only, so a no-break space holds an interval.
        whole = _SPACE_IN_INTERVAL.sub("\N{NO-BREAK SPACE}", printable(self.text))
        for part in textwrap.wrap(
            whole, options.max_width, break_on_hyphens=False,
            initial_indent=self.indent, subsequent_indent=self.indent,
        ):  # fmt: skip
            yield line(part.replace("\N{NO-BREAK SPACE}", " "), style=self.style)


def _inset(text: str) -> _Paragraph:
    return _Paragraph(text, indent="  ")


def _gap_table(measured: Measurement) -> RenderableType:
    from rich.table import Table

    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column("the same samples", header_style="dim")
    for heading in ("loss", "accuracy", "difference in loss, 95%"):
        left = heading.endswith("%")
        grid.add_column(
            heading, header_style="dim", justify="left" if left else "right", no_wrap=True
        )
    for probe, gap in excerpts.probes(measured):
        broken = f" ({wording.count(probe.broken, 'sample')} not finite)" if probe.broken else ""
        numbers = map(line, (wording.number(probe.loss), wording.number(probe.accuracy)))
        grid.add_row(line(wording.probe(probe.name) + broken), *numbers, _difference(gap))
    return grid


def _difference(gap: Gap | None) -> Text:
    from rich.text import Text

    if gap is None:
        return Text()
    lines = [line(wording.interval(gap.loss))]
    if not gap.loss.excludes_zero:
        lines.append(line("may be 0"))
    if gap.minus != "inference":
        lines.append(line(f"against {gap.minus}"))
    return Text("\n").join(lines)


def _cause_lines(cause: Cause) -> list[RenderableType]:
    share = "" if cause.share is None else f"{wording.percent(cause.share)} of the gap, "
    head = line(
        ("✗ cause ", "bold red"),
        (cause.code, "bold"),
        f" ({share}{wording.certainty(cause.certainty)})",
    )
    body = [cause.message]
    if cause.sites:
        body.append(f"at {wording.listed(cause.sites, 3)}")
    if cause.settle:
        body.append(f"to settle it: {cause.settle}")
    return [head, *map(_inset, body)]


def _where_lines(report: Report, found: Attribution) -> list[RenderableType]:
    shares = excerpts.relative_shares(found)
    lines: list[RenderableType] = [line("shares of the gap over depth", style="bold")]
    if len(found.paths) > 1 and shares.any() and all(map(math.isfinite, shares)):
        frozen = excerpts.frozen_paths(report)
        cells = min(len(shares), _CELLS)
        edges = [round(i * len(shares) / cells) for i in range(cells + 1)]
        pairs = list(itertools.pairwise(edges))
        sums = [float(shares[start:stop].sum()) for start, stop in pairs]
        top = max(map(abs, sums)) or 1.0
        strip = "".join(
            " " if abs(x) < top / 50 else "▾" if x < 0 else _HEIGHTS[round(7 * x / top)]
            for x in sums
        )
        marks = "".join("=" if found.paths[start] in frozen else "-" for start, _ in pairs)
        lines += [line(f"  {strip}"), line(f"  {marks}", style="dim")]
        lines.append(line("  = frozen, - trains, ▾ against the gap", style="dim"))
    for rank, (path, share, alone) in enumerate(excerpts.top_sites(found), start=1):
        effect = "" if alone is None else f"; alone: loss {wording.number(alone, signed=True)}"
        lines.append(_inset(f"{rank}. {path}: {wording.percent(share)}{effect}"))
    lines.append(_Paragraph(wording.completeness(found), style="dim", indent="  "))
    return lines


def _remedy_lines(remedies: Sequence[Remedy]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    best = excerpts.first_choice(remedies)
    if best is None:
        lines.append(line("none of the remedies that were tried helps on these samples",
                          style="bold"))  # fmt: skip
    for remedy in remedies:
        mark = "★" if remedy is best else "✓" if remedy.recommended else " "
        effects = [
            f"{name} {wording.number(before)} → {wording.number(after)}"
            for name, before, after in excerpts.effects(remedy)
        ]
        lines.append(
            line(
                (f"{mark} remedy ", "bold green"),
                (remedy.name, "bold"),
                f": {', '.join(effects) or 'not measured'}",
            )
        )
        if remedy.change is not None:
            lines.append(_inset(f"change in loss {wording.interval(remedy.change)}"))
        lines += [_whole(command) for command in (remedy.python, remedy.shell) if command]
        if remedy.note:
            lines.append(_inset(remedy.note))
    return lines


def _whole(command: str) -> Text:
    """Return a line to paste: a terminal wraps it without putting a line break into it."""
    text = line(f"  {command}")
    text.no_wrap, text.overflow = True, "ignore"
    return text


def _group_lines(group: Sequence[Finding]) -> list[RenderableType]:
    first = group[0]
    paths = [path for finding in group for path in finding.sites]
    most = _LISTED[first.severity]
    head = line(
        (f"{wording.SEVERITIES[first.severity]} {first.severity} ",
         f"bold {palette.TERMINAL[first.severity]}"),
        (f"{first.code} {first.name}", "bold"),
        f" ({wording.count(len(paths), 'site')})",
    )  # fmt: skip
    if wording.alike(group):
        body = [wording.sentence(first), f"at {wording.listed(paths, most)}"]
    else:
        body = [
            f"{wording.listed(finding.sites)}: {wording.sentence(finding)}"
            for finding in group[:most]
        ]
        if len(group) > most:
            body.append(f"and {len(group) - most} more")
    fix = "" if first.fix is None else f"fix: {first.fix}; "
    body.append(f"{fix}why: frostline rule {first.code}")
    return [head, *map(_inset, body)]


def _unchecked_lines(report: Report) -> list[RenderableType]:
    return [
        _Paragraph(f"not checked: {name}: {why}", style="dim")
        for name, why in wording.unchecked(report)
    ]
