"""The report as workflow commands, which GitHub shows as annotations of a check."""

from __future__ import annotations

from frostline.report import wording
from frostline.report.escaping import printable
from frostline.types.report import Report

_KINDS = {"error": "error", "warning": "warning", "info": "notice"}


def as_github(report: Report) -> str:
    """Return one command per cause and per finding, causes first; one line each."""
    lines: list[str] = []
    for cause in report.causes:
        if cause.code == "NONE":
            continue
        kind = "error" if cause.certainty == "is" else "warning"
        title = cause.code if cause.share is None else f"{cause.code} {cause.share:.0%} of the gap"
        where = f"{wording.listed(cause.sites, 5)}: " if cause.sites else ""
        lines.append(_command(kind, title, where + cause.message))
    lines += [
        _command(
            _KINDS[finding.severity],
            f"{finding.code} {finding.name}",
            f"{wording.listed(finding.sites)}: {wording.sentence(finding)}",
        )
        for finding in report.findings
    ]
    return "".join(line + "\n" for line in lines)


def _command(kind: str, title: str, text: str) -> str:
    return f"::{kind} title={_property(title)}::{_data(text)}"


def _data(value: str) -> str:
    return printable(value).replace("%", "%25")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")
