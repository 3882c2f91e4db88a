"""The report for a terminal: verdict first, then what leads to it, in at most 80 columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from frostline.report import excerpts, wording
from frostline.types import Finding
from frostline.types.measured import Attribution, Cause, Measurement, Remedy

if TYPE_CHECKING:
    from rich.console import RenderableType

    from frostline.report.report import Report

#: Severity -> symbol, colour; the word is always there too.
_LOOKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "info": ("i", "cyan")}

#: Severity -> sites listed in a group before "and n more".
_LISTED = {"error": 5, "warning": 5, "info": 2}


#: Cells of the strip of shares; deeper models are summed up, neighbours in one cell.
_CELLS = 72
_HEIGHTS = "▁▂▃▄▅▆▇█"


def as_text(report: Report) -> RenderableType:
    """Return the report for a terminal; parts without numbers are left out."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(wording.printable(report.verdict), style="bold")]
    facts = wording.origin(report)
    if facts:
        line = " · ".join(f"{name} {value}" for name, value in facts)
        parts.append(Text(wording.printable(line), style="dim"))
    if report.measurement is not None:
        parts += [Text(""), _gap_table(report.measurement)]
    for cause in report.causes:
        if cause.code != "NONE":
            parts += [Text(""), *_cause_lines(cause)]
    rest = excerpts.unexplained(report)
    if rest:
        parts.append(Text(f"{wording.percent(rest)} of the gap is not explained", style="dim"))
    if report.attribution is not None:
        parts += [Text(""), *_where_lines(report, report.attribution)]
    if report.remedies:
        parts += [Text(""), *_remedy_lines(report.remedies)]
    for group in wording.by_code(report.findings):
        parts += [Text(""), *_group_lines(group)]
    if report.measurement is not None or report.skipped:
        parts += [Text(""), *_unchecked_lines(report)]
    return Group(*parts)


def _gap_table(measured: Measurement) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("the same samples", "loss", "accuracy", "difference in loss, 95%"):
        grid.add_column(heading, header_style="dim", justify="left" if " s" in heading else "right")
    for probe in measured.probes.values():
        gap = excerpts.gap_of_probe(measured, probe.name)
        told = "" if gap is None else wording.interval(gap.loss)
        if gap is not None and not gap.loss.excludes_zero:
            told += "\nmay be 0"
        if gap is not None and gap.minus != "inference":
            told += f"\nagainst {gap.minus}"
        name = wording.printable(wording.probe(probe.name))
        broken = f" ({wording.count(probe.broken, 'sample')} not finite)" if probe.broken else ""
        cells = (wording.number(probe.loss), wording.number(probe.accuracy), told)
        grid.add_row(Text(name + broken), *map(Text, cells))
    return grid


def _cause_lines(cause: Cause) -> list[RenderableType]:
    from rich.text import Text

    share = "" if cause.share is None else f"{wording.percent(cause.share)} of the gap, "
    head = Text.assemble(
        ("✗ cause ", "bold red"),
        (cause.code, "bold"),
        f" ({share}{wording.certainty(cause.certainty)})",
    )
    body = [wording.printable(cause.message)]
    if cause.sites:
        body.append(f"at {wording.listed(cause.sites, 3)}")
    if cause.settle:
        body.append(f"to settle it: {wording.printable(cause.settle)}")
    return [head, *map(_inset, body)]


def _where_lines(report: Report, found: Attribution) -> list[RenderableType]:
    from rich.text import Text

    shares = excerpts.relative_shares(found)
    frozen = {site.path for site in report.sites if site.stats_frozen or site.params_frozen}
    lines: list[RenderableType] = [Text("shares of the gap over depth", style="bold")]
    if len(found.paths) > 1 and shares.any() and all(map(math.isfinite, shares)):
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
        lines += [Text(f"  {strip}"), Text(f"  {marks}", style="dim")]
        lines.append(Text("  = frozen, - trains, ▾ against the gap", style="dim"))
    for rank, index in enumerate(excerpts.largest(shares), start=1):
        path, alone = found.paths[index], found.alone.get(found.paths[index])
        told = "" if alone is None else f"; alone: loss {wording.number(alone, signed=True)}"
        name = wording.printable(path)
        lines.append(_inset(f"{rank}. {name}: {wording.percent(float(shares[index]))}{told}"))
    missing = wording.percent(found.residual)
    told = f"  the shares, of {wording.differentiated(found)}, miss {missing} of their gap"
    lines.append(Text(told, style="dim"))
    return lines


def _remedy_lines(remedies: Sequence[Remedy]) -> list[RenderableType]:
    from rich.text import Text

    lines: list[RenderableType] = []
    if not any(each.recommended for each in remedies):
        lines.append(Text("no remedy that was tried helps on these samples", style="bold"))
    best = excerpts.first_choice(remedies)
    for each in remedies:
        mark = "★" if each is best else "✓" if each.recommended else " "
        effects = [
            f"{name} {wording.number(each.before[name])} → {wording.number(value)}"
            for name, value in each.after.items()
            if name in each.before
        ]
        head = Text.assemble(
            (f"{mark} remedy ", "bold green"),
            (wording.printable(each.name), "bold"),
            f": {', '.join(effects) or 'not measured'}",
        )
        lines.append(head)
        change = "" if each.change is None else f"change in loss {wording.interval(each.change)}"
        if change:
            lines.append(_inset(change))
        lines += [_whole(line) for line in (each.python, each.shell) if line]
        if each.note:
            lines.append(_inset(wording.printable(each.note)))
    return lines


def _whole(line: str) -> RenderableType:
    """Return a line to paste: a terminal wraps it without putting a line break into it."""
    from rich.text import Text

    return Text(f"  {wording.printable(line)}", no_wrap=True, overflow="ignore")


def _inset(line: str) -> RenderableType:
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(line), (0, 0, 0, 2), expand=False)


def _group_lines(group: Sequence[Finding]) -> list[RenderableType]:
    from rich.text import Text

    first = group[0]
    symbol, colour = _LOOKS[first.severity]
    paths = [path for finding in group for path in finding.sites]
    most = _LISTED[first.severity]
    head = Text.assemble(
        (f"{symbol} {first.severity} ", f"bold {colour}"),
        (f"{first.code} {first.name}", "bold"),
        f" ({wording.count(len(paths), 'site')})",
    )
    body: list[str] = []
    if len({finding.message for finding in group}) == 1:
        body += [wording.sentence(first), f"at {wording.listed(paths, most)}"]
    else:
        body += [
            f"{wording.listed(finding.sites)}: {wording.sentence(finding)}"
            for finding in group[:most]
        ]
        if len(group) > most:
            body.append(f"and {len(group) - most} more")
    fix = "" if first.fix is None else f"fix: {first.fix}; "
    body.append(f"{fix}why: frostline rule {first.code}")
    return [head, *map(_inset, body)]


def _unchecked_lines(report: Report) -> list[RenderableType]:
    from rich.text import Text

    rows = wording.unchecked(report)
    return [
        Text(f"not checked: {wording.printable(name)}: {wording.printable(why)}", style="dim")
        for name, why in rows
    ]
