"""The report for a terminal: verdict first, then what leads to it, in at most 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from frostline.report import wording
from frostline.types import Finding, Skipped

if TYPE_CHECKING:
    from rich.console import RenderableType

    from frostline.report.report import Report

#: Severity -> symbol, colour; the word is always there too.
_LOOKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "info": ("i", "cyan")}

#: Severity -> sites listed in a group before "and n more".
_LISTED = {"error": 5, "warning": 5, "info": 2}


def as_text(report: Report) -> RenderableType:
    """Return the report for a terminal: verdict, findings by rule, what was not checked."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(wording.printable(report.verdict), style="bold")]
    if report.origin:
        facts = " · ".join(f"{name} {value}" for name, value in report.origin.items())
        parts.append(Text(wording.printable(facts), style="dim"))
    for group in wording.by_code(report.findings):
        parts += [Text(""), *_group_lines(group)]
    if report.skipped:
        parts += [Text(""), *_skipped_lines(report.skipped)]
    return Group(*parts)


def _group_lines(group: Sequence[Finding]) -> list[RenderableType]:
    from rich.padding import Padding
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
    return [head, *(Padding(Text(line), (0, 0, 0, 2), expand=False) for line in body)]


def _skipped_lines(skipped: Sequence[Skipped]) -> list[RenderableType]:
    from rich.text import Text

    return [
        Text(f"not checked: {', '.join(names)}: {wording.printable(reason)}", style="dim")
        for reason, names in wording.by_reason(skipped).items()
    ]
