"""The forms in which a report is saved: the ending of the file decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frostline.data import files
from frostline.report import schema, terminal, text
from frostline.types import OutputError
from frostline.types.report import Report


def as_json(report: Report) -> str:
    """Return the report as JSON text: one line per array of numbers, the rest indented."""
    return _indented(schema.as_dict(report)) + "\n"


def as_plain_text(report: Report) -> str:
    """Return the report as a terminal of 80 columns shows it, without colour."""
    return text.render(terminal.as_text(report), width=80)


def _page(report: Report) -> str:
    from frostline.report import html  # jinja2 and matplotlib, only where a page is written

    return html.page(report)


_FORMS: dict[str, Callable[[Report], str]] = {
    ".html": _page,
    ".json": as_json,
    ".txt": as_plain_text,
}

#: Endings that :func:`save` knows.
ENDINGS = tuple(_FORMS)


def save(report: Report, path: Path) -> Path:
    """Write the report; see :meth:`frostline.types.report.Report.save`.

    Raises:
        OutputError: Another ending, or the file cannot be written.
    """
    if path.suffix not in _FORMS:
        known = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        raise OutputError(f"a report is written as {known}. Received: {path}")
    files.write(path, _FORMS[path.suffix](report).encode())
    return path


def _indented(value: Any, indent: str = "") -> str:
    """Return JSON, indented, but with an array of plain values on one line."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        inner = [
            f"{deeper}{json.dumps(key)}: {_indented(item, deeper)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        rows = [deeper + _indented(item, deeper) for item in value]
        return "[\n" + ",\n".join(rows) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
