"""The table of the learning phases as ``print`` and a notebook show it."""

from __future__ import annotations

from frostline.report import escaping
from frostline.types import PhaseTable


def as_text(table: PhaseTable) -> str:
    """Return the table in aligned columns, its caption and its tell-tale patterns."""
    cells = [[escaping.printable(cell) for cell in row] for row in _cells(table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])],
        ).rstrip()
        for row in cells
    ]
    return "\n".join([*lines, _caption(table), *map(escaping.printable, table.patterns)])


def as_html(table: PhaseTable) -> str:
    """Return the table for a notebook."""
    head, *body = _cells(table)

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escaping.html(c)}</{tag}>" for c in cells) + "</tr>"

    rows = "".join(row(cells, "td") for cells in body)
    notes = "".join(f"<p>{escaping.html(pattern)}</p>" for pattern in table.patterns)
    return (
        f"<table><caption>{escaping.html(_caption(table))}</caption>"
        f"<thead>{row(head, 'th')}</thead><tbody>{rows}</tbody></table>{notes}"
    )


def _cells(table: PhaseTable) -> list[list[str]]:
    names = list(dict.fromkeys(name for row in table.rows for name in row.metrics))
    rows = [[row.loss, *map(row.metrics.get, names)] for row in table.rows]
    return [
        ["phase", "loss", *names],
        *(
            [row.phase, *("–" if value is None else f"{value:.4g}" for value in values)]
            for row, values in zip(table.rows, rows, strict=True)
        ),
    ]


def _caption(table: PhaseTable) -> str:
    return f"{table.samples} samples, {table.task} task, {table.sites} BN layers"
