"""A comparison of treatments as text, page, JSON and picture. Everything shown is computed."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.data import files
from frostline.report import escaping, figures, schema, text, wording
from frostline.types import OutputError
from frostline.types.comparison import Comparison, TreatmentRow
from frostline.types.measured import Interval

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Grows when a reader of the JSON form would have to change.
SCHEMA_VERSION = 1

#: Endings that :func:`save` knows.
ENDINGS = (".html", ".json", ".txt", ".png", ".svg")


def as_dict(result: Comparison) -> dict[str, Any]:
    """Return a comparison as plain types for JSON; see :meth:`Comparison.as_dict`."""
    plain = schema.encode(result)
    for row in plain["rows"]:
        del row["values"]
    return {"schema_version": SCHEMA_VERSION, **plain, "line": result.line}


def as_json(result: Comparison) -> str:
    """Return a comparison as JSON text."""
    return json.dumps(as_dict(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_text(result: Comparison) -> str:
    """Return a comparison as a terminal of 100 columns shows it."""
    return text.render(table(result), width=100)


def headings(result: Comparison) -> list[str]:
    """Return the headings of the columns."""
    return ["treatment", result.metric, "the best leads by", "loss", "epochs", "seeds", "seconds"]


def cells(result: Comparison, row: TreatmentRow) -> list[str]:
    """Return what a row shows."""
    behind = "–" if row.behind is None else _give_or_take(row.behind)
    if row.name not in (*result.tied, result.winner) and row.behind is not None:
        behind += " *"
    ran = row.stopped if row.stopped is not None else result.epochs
    return [
        escaping.printable(row.name),
        _give_or_take(row.value),
        behind,
        wording.number(row.loss),
        f"{ran} of {result.epochs}, given up" if row.stopped is not None else str(ran),
        str(row.seeds),
        f"{row.seconds:.1f}",
    ]


def _give_or_take(value: Interval) -> str:
    """The estimate with half its interval, or with both ends where it is not in the middle."""
    below, above = value.estimate - value.low, value.high - value.estimate
    estimate = wording.number(value.estimate, digits=4)
    if math.isinf(below):
        return f"{estimate} (no interval)"
    if math.isclose(below, above, rel_tol=1e-6):
        return f"{estimate} ± {wording.number((below + above) / 2, digits=4)}"
    low, high = (wording.number(end, digits=4) for end in (value.low, value.high))
    return f"{estimate} [{low}, {high}]"


def facts(result: Comparison) -> list[tuple[str, str]]:
    """Return what the trainings had in common, as pairs of name and value."""
    cached = f"{result.cache_seconds:.1f} s" if result.cache_seconds else "nothing is cached"
    shared = {"validation": f"{result.samples} samples", "frozen part, once": cached}
    return list({**result.settings, **shared}.items())


def table(result: Comparison) -> RenderableType:
    """Return the whole comparison for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    grid = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings(result)):
        grid.add_column(heading, justify="right" if number else "left")
    for row in result.rows:
        style = "bold" if row.name == result.winner else ""
        grid.add_row(*[escaping.line(cell) for cell in cells(result, row)], style=style)
    parts: list[Any] = [escaping.line(result.verdict, style="bold"), "", grid, ""]
    if any(row.name not in (*result.tied, result.winner) for row in result.rows[1:]):
        parts.append(escaping.line("* certain: its interval is above zero", style="dim"))
    parts += [
        escaping.line((f"{name}: ", "dim"), (reason, "dim"))
        for name, reason in result.skipped.items()
    ]
    parts += [escaping.line(f"note: {note}", style="dim") for note in result.notes]
    shared = "; ".join(f"{name} {value}" for name, value in facts(result))
    parts.append(escaping.line(shared, style="dim"))
    if result.line is not None:
        parts += ["", *(escaping.line(line) for line in result.line.splitlines())]
    return Group(*parts)


def fragment(result: Comparison) -> str:
    """Return a comparison for a notebook: one ``<div>`` with its own style sheet."""
    from importlib import resources

    from markupsafe import Markup

    from frostline.report import html, palette, vector

    style = (resources.files("frostline.report") / "page.css").read_text(encoding="utf-8")
    width, height = figures.size_of_comparison(result)
    picture = vector.drawn(
        lambda figure: figures.comparison(figure, result),
        (width, height),
        salt="frostline-comparison",
        label="treatments with their intervals, and the metric over the epochs",
    )
    return html.environment().get_template("comparison.html.jinja").render(
        style=Markup(palette.stylesheet() + style),
        result=result,
        facts=facts(result),
        headings=headings(result),
        rows=[(row, cells(result, row)) for row in result.rows],
        picture=Markup(picture),
    )  # fmt: skip


def page(result: Comparison) -> str:
    """Return a comparison as a complete HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>Frostline: treatments of BN compared</title>\n</head>\n"
        f'<body style="margin: 0">\n{fragment(result)}\n</body>\n</html>\n'
    )


def save(result: Comparison, path: Path) -> Path:
    """Write a comparison; see :meth:`Comparison.save`."""
    if path.suffix not in ENDINGS:
        known = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        raise OutputError(f"a comparison is written as {known}. Received: {path}")
    if path.suffix in (".png", ".svg"):
        stream = io.BytesIO()
        figures.compared(result).savefig(stream, format=path.suffix[1:], dpi=150)
        content = stream.getvalue()
    else:
        form = {".html": page, ".json": as_json, ".txt": as_text}[path.suffix]
        content = form(result).encode()
    files.write(path, content)
    return path
