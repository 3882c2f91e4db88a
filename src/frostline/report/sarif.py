"""The report as SARIF 2.1.0, which code scanning services and editors read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from frostline.report import wording
from frostline.report.escaping import printable
from frostline.types.report import Report

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def as_sarif(report: Report, *, artifact: str | None = None) -> str:
    """Return one run with a result for each cause and each finding, as JSON text.

    Args:
        report: Of ``lint`` or ``diagnose``.
        artifact: Path of the file that the results are about, as services show it. Layers are
            logical locations: a network has no lines.
    """
    from frostline.rules import all_rules

    rules = [
        _descriptor(
            entry.code, entry.name, entry.summary, entry.documentation, _LEVELS[entry.severity]
        )
        for entry in all_rules()
        if entry.code in report.rules
    ]
    results = []
    for cause in report.causes:
        if cause.code == "NONE":
            continue
        level = "error" if cause.certainty == "is" else "warning"
        rules.append(_descriptor(cause.code, cause.code, *_explained(cause.code), level))
        share = {} if cause.share is None else {"share": cause.share}
        text = cause.message
        results.append(_result(cause.code, level, text, cause.sites, artifact, share))
    for finding in report.findings:
        fix = {} if finding.fix is None else {"fix": finding.fix}
        level, text = _LEVELS[finding.severity], wording.sentence(finding)
        results.append(_result(finding.code, level, text, finding.sites, artifact, fix))
    driver = {"name": "frostline", "version": metadata.version("frostline"), "rules": rules}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _descriptor(
    code: str, name: str, summary: str, documentation: str, level: str
) -> dict[str, Any]:
    return {
        "id": code,
        "name": name,
        "shortDescription": {"text": summary},
        "help": {"text": documentation, "markdown": documentation},
        "defaultConfiguration": {"level": level},
    }


def _explained(code: str) -> tuple[str, str]:
    from frostline.causes.registry import all_causes

    return next(
        ((entry.summary, entry.documentation) for entry in all_causes() if entry.code == code),
        (code, code),
    )


def _result(
    code: str,
    level: str,
    text: str,
    sites: Iterable[str],
    artifact: str | None,
    properties: dict[str, Any],
) -> dict[str, Any]:
    paths = [printable(path) for path in sites]
    where: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": path, "kind": "member"} for path in paths]
    }
    if artifact is not None:
        where["physicalLocation"] = {
            "artifactLocation": {"uri": _uri(artifact)},
            "region": {"startLine": 1},
        }
    message = printable(f"{wording.listed(paths)}: {text}" if paths else text)
    return {
        "ruleId": code,
        "level": level,
        "message": {"text": message},
        "locations": [where],
        "properties": properties,
    }


def _uri(path: str) -> str:
    from urllib.parse import quote

    return quote(path.replace("\\", "/"))
