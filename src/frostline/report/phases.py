"""Tables of the learning phases, for ``print``, a notebook, the terminal and experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from frostline.report import escaping, wording
from frostline.report.escaping import line, printable
from frostline.report.text import number
from frostline.types import PhaseRow, PhaseTable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

#: Metric name -> its usual heading.
_HEADINGS = {"accuracy": "accuracy", "auc": "AUC", "mse": "MSE", "spearman": "Spearman"}

_PHASE_WORDS = {
    "dynamic": "dynamic (the model's own evaluate)",
    "0": "phase 0 (inference)",
    "1": "phase 1 (training)",
}


def as_text(table: PhaseTable) -> str:
    """Return the table in aligned columns, its caption and its tell-tale patterns."""
    cells = [[escaping.printable(cell) for cell in row] for row in _cells(table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
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


def phases_table(table: PhaseTable) -> RenderableType:
    """Return the essay's table: dynamic, phase 0, phase 1, their gap, and telling patterns."""
    from rich.console import Group

    names = list(dict.fromkeys(name for row in table.rows for name in row.metrics))
    grid = _table(["phase", "loss", *[_HEADINGS.get(name) or printable(name) for name in names]])
    for row in table.rows:
        grid.add_row(
            _PHASE_WORDS[row.phase],
            number(row.loss),
            *[number(row.metrics.get(name)) for name in names],
        )
    gaps = phase_gaps(table["0"], table["1"])
    grid.add_section()
    grid.add_row(
        "gap (phase 1 − phase 0)",
        *[number(gaps.get(name), signed=True) for name in ("loss", *names)],
        style="bold",
    )
    layers = wording.count(table.sites, "BN layer")
    caption = f"{table.task}, {table.samples} samples, {layers}"
    words = [line(f"▶ {pattern}", style="bold yellow") for pattern in table.patterns]
    return Group(line(caption, style="dim"), grid, *words)


def phase_gaps(inference: PhaseRow, training: PhaseRow) -> dict[str, float]:
    """Return metric at phase 1 minus metric at phase 0, for every metric of both."""
    gaps: dict[str, float] = {}
    if inference.loss is not None and training.loss is not None:
        gaps["loss"] = training.loss - inference.loss
    for name, value in training.metrics.items():
        if name in inference.metrics:
            gaps[name] = value - inference.metrics[name]
    return gaps


def comparison_table(tables: Mapping[str, PhaseTable]) -> RenderableType:
    """Return an experiment's table: loss, accuracy and AUC of each row in the three phases.

    Args:
        tables: Name of the row -> its phases; a phase that is missing is shown as such.
    """
    rows = {name: {row.phase: row for row in table.rows} for name, table in tables.items()}
    every = [phase for phases in rows.values() for phase in phases.values()]
    metrics = [m for m in ("accuracy", "auc") if any(m in phase.metrics for phase in every)]
    words = ["loss", *["acc" if name == "accuracy" else _HEADINGS[name] for name in metrics]]
    unit = " ".join(f"{word:>4}" for word in words)
    grid = _table(
        ["row\n", *(f"{word}\n{unit}" for word in ("dynamic", "phase 0", "phase 1")), "gap\nacc"]
    )
    for name, phases in rows.items():
        cells = [_phase_cell(phases.get(phase), metrics) for phase in ("dynamic", "0", "1")]
        gap: float | None = None
        if "0" in phases and "1" in phases:
            gap = phase_gaps(phases["0"], phases["1"]).get("accuracy")
        grid.add_row(line(name), *cells, _short(gap, signed=True))
    return grid


def _table(headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False, show_edge=False)
    grid.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        grid.add_column(heading, justify="right", no_wrap=True)
    return grid


def _phase_cell(row: PhaseRow | None, metrics: Sequence[str]) -> str:
    if row is None:
        return wording.MISSING
    cells = [_short(row.loss), *[_short(row.metrics.get(name)) for name in metrics]]
    return " ".join(f"{cell:>4}" for cell in cells)


def _short(value: float | None, *, signed: bool = False) -> str:
    """Return ``.785`` for 0.785: three times three numbers fit into 80 columns."""
    if value is None:
        return wording.MISSING
    sign = "+" if signed else ""
    size = abs(value)
    if size != size or size >= 1000:
        return f"{value:{sign}.1e}"
    if size < 0.9995:
        return f"{value:{sign}.3f}".replace("0.", ".", 1)
    return f"{value:{sign}.2f}" if size < 10 else f"{value:{sign}.1f}"
