"""The report of rules: one object, printed as text, written as JSON or text, or as annotations.

Renderers compute nothing: what they show is in the :class:`Report`. Names come from the user's
model, so they are never read as markup, and what does not print is shown as an escape.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from frostline.report import text
from frostline.types import DataError, Finding, OutputError, Site, Skipped

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Raised when a field of the JSON form is renamed, removed or changes its meaning.
SCHEMA_VERSION = 1

#: Severity -> symbol, colour; the word is always there too.
_LOOKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "info": ("i", "cyan")}

#: Severity -> sites listed in a group before "and n more".
_LISTED = {"error": 5, "warning": 5, "info": 2}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What rules found in a model.

    Attributes:
        verdict: One sentence with the number that decides it.
        findings: Errors first, then warnings, then notes; by code within them.
        sites: Every BN layer of the model, in execution order.
        rules: Codes of the rules that were applied.
        skipped: Rules that were not applied, each with the reason.
        origin: Where the report comes from: model, backend, versions.
    """

    verdict: str
    findings: tuple[Finding, ...] = ()
    sites: tuple[Site, ...] = ()
    rules: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Nothing but notes was found."""
        return all(finding.severity == "info" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain types for JSON; numbers that are not finite are null."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "origin": dict(self.origin),
            "findings": [_plain(asdict(finding)) for finding in self.findings],
            "sites": [_plain(asdict(site)) for site in self.sites],
            "rules": list(self.rules),
            "skipped": [asdict(each) for each in self.skipped],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Read what :meth:`as_dict` gave.

        Raises:
            DataError: Another schema version, or not a report.
        """
        if plain.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"a report of schema version {SCHEMA_VERSION} is needed. "
                f"Received: schema_version={plain.get('schema_version')!r}"
            )
        try:
            findings = [{**each, "sites": tuple(each["sites"])} for each in plain["findings"]]
            return cls(
                verdict=plain["verdict"],
                origin=dict(plain["origin"]),
                findings=tuple(Finding(**each) for each in findings),
                sites=tuple(Site(**each) for each in plain["sites"]),
                rules=tuple(plain["rules"]),
                skipped=tuple(Skipped(**each) for each in plain["skipped"]),
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"this is not a report ({error}). Received: {sorted(plain)}") from None

    def save(self, path: str | Path) -> Path:
        """Write the report; the ending decides the form. The file is complete or not there.

        Args:
            path: ``report.json`` or ``report.txt``.

        Returns:
            The path.

        Raises:
            OutputError: Another ending, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".json":
            content = json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"
        elif path.suffix == ".txt":
            content = str(self)
        else:
            raise OutputError(f"a report is written as .json or .txt. Received: {path}")
        _write(path, content)
        return path

    def __str__(self) -> str:
        return text.render(as_text(self), width=80)


def as_text(report: Report) -> RenderableType:
    """Return the report for a terminal: verdict, findings by rule, what was not checked."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(_printable(report.verdict), style="bold")]
    if report.origin:
        facts = " · ".join(f"{name} {value}" for name, value in report.origin.items())
        parts.append(Text(_printable(facts), style="dim"))
    for group in _groups(report.findings):
        parts += [Text(""), *_group_lines(group)]
    if report.skipped:
        parts += [Text(""), *_skipped_lines(report.skipped)]
    return Group(*parts)


def as_github(report: Report) -> str:
    """Return one workflow command per finding, which GitHub shows as an annotation."""
    kinds = {"error": "error", "warning": "warning", "info": "notice"}
    lines = [
        f"::{kinds[finding.severity]} title={_property(f'{finding.code} {finding.name}')}::"
        + _data(f"{', '.join(_printable(path) for path in finding.sites)}: {_sentence(finding)}")
        for finding in report.findings
    ]
    return "".join(line + "\n" for line in lines)


def _groups(findings: Sequence[Finding]) -> list[list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.code, []).append(finding)
    return list(groups.values())


def _group_lines(group: Sequence[Finding]) -> list[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    first = group[0]
    symbol, colour = _LOOKS[first.severity]
    paths = [path for finding in group for path in finding.sites]
    most = _LISTED[first.severity]
    count = f"{len(paths)} site{'s' if len(paths) != 1 else ''}"
    head = Text.assemble(
        (f"{symbol} {first.severity} ", f"bold {colour}"),
        (f"{first.code} {first.name}", "bold"),
        f" ({count})",
    )
    body: list[str] = []
    if len({finding.message for finding in group}) == 1:
        shown = ", ".join(_printable(path) for path in paths[:most])
        more = f" and {len(paths) - most} more" if len(paths) > most else ""
        body += [_sentence(first), f"at {shown}{more}"]
    else:
        body += [
            f"{', '.join(_printable(path) for path in finding.sites)}: {_sentence(finding)}"
            for finding in group[:most]
        ]
        if len(group) > most:
            body.append(f"and {len(group) - most} more")
    fix = "" if first.fix is None else f"fix: {first.fix}; "
    body.append(f"{fix}why: frostline rule {first.code}")
    return [head, *(Padding(Text(line), (0, 0, 0, 2), expand=False) for line in body)]


def _skipped_lines(skipped: Sequence[Skipped]) -> list[RenderableType]:
    from rich.text import Text

    reasons: dict[str, list[str]] = {}
    for each in skipped:
        reasons.setdefault(each.reason, []).append(each.code)
    return [
        Text(f"not checked: {', '.join(codes)}: {_printable(reason)}", style="dim")
        for reason, codes in reasons.items()
    ]


def _sentence(finding: Finding) -> str:
    return finding.message if finding.certainty == "is" else f"{finding.message} (inferred)"


def _printable(name: str) -> str:
    """Show what does not print as an escape: a terminal would obey it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


def _plain(value: Any) -> Any:
    """Replace what JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: str) -> None:
    """Write beside the target and rename, so that no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(content)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
