"""The forms in which a report is saved: the ending of the file decides."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    _write(path, _FORMS[path.suffix](report))
    return path


def _indented(value: Any, indent: str = "") -> str:
    """Return JSON, indented, but with an array of plain values on one line."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        inner = [
            f"{deeper}{json.dumps(key)}: {_indented(each, deeper)}" for key, each in value.items()
        ]
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        rows = [deeper + _indented(each, deeper) for each in value]
        return "[\n" + ",\n".join(rows) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def _write(path: Path, content: str) -> None:
    """Write beside the target and rename: no reader ever sees half a file."""
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
