"""Tables for the terminal, as `rich` renderables; `render` turns them into text of a given width.

Colour never carries meaning alone: the coloured word says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from frostline.report import wording
from frostline.report.escaping import line, printable
from frostline.types import PhaseRow, PhaseTable, Site

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

#: Metric name -> its usual heading.
_HEADINGS = {"accuracy": "accuracy", "auc": "AUC", "mse": "MSE", "spearman": "Spearman"}

_PHASE_WORDS = {
    "dynamic": "dynamic (the model's own evaluate)",
    "0": "phase 0 (inference)",
    "1": "phase 1 (training)",
}


def console(width: int | None = None, *, stderr: bool = False) -> Console:
    """Return a console that honours ``NO_COLOR``, ``FORCE_COLOR`` and ``COLUMNS``.

    Args:
        width: Number of columns; default is the terminal's, or 80 in a pipe.
        stderr: Write to standard error.
    """
    from rich.console import Console

    return Console(width=width, stderr=stderr, highlight=False, markup=False, emoji=False)


def render(renderable: RenderableType, *, width: int = 80, color: bool = False) -> str:
    """Return ``renderable`` as text of at most ``width`` columns, without trailing blanks."""
    import io

    from rich.console import Console

    stream = io.StringIO()
    out = Console(
        file=stream,
        width=width,
        force_terminal=color,
        no_color=not color,
        color_system="standard" if color else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    out.print(renderable, crop=False)
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())


def number(value: float | None, *, signed: bool = False) -> str:
    """Return a measured number with three decimals, or four significant digits when large.

    >>> number(0.12345), number(1234.5), number(None), number(0.5, signed=True)
    ('0.123', '1.234e+03', '–', '+0.500')
    """
    if value is None:
        return wording.MISSING
    sign = "+" if signed else ""
    return f"{value:{sign}.3e}" if abs(value) >= 1000 else f"{value:{sign}.3f}"


def sites_table(
    sites: Sequence[Site],
    *,
    boundary: str | None = None,
    before: int | None = None,
    width: int = 80,
) -> RenderableType:
    """Return the table of BN sites, with a line where the frozen prefix ends.

    Args:
        sites: Sites in execution order.
        boundary: Path of the first layer behind the frozen prefix; ``None`` when all is frozen.
        before: Number of sites in the prefix; ``None`` draws no line (nothing is frozen).
        width: Columns available.
    """
    from rich.console import Group
    from rich.rule import Rule

    rows = [_site_cells(site) for site in sites]
    headings = _SITE_HEADINGS
    widths = _column_widths([headings, *rows], flexible=1, width=width)
    parts: list[RenderableType] = []
    cut = len(rows) if before is None else before
    parts.append(_fixed_table(rows[:cut], headings=headings, widths=widths))
    if before is not None:
        text = (
            f"boundary: {boundary} is the first layer that trains"
            if boundary is not None
            else "boundary: none, every layer is frozen"
        )
        parts.append(Rule(line(text), style="bold", align="left", characters="─"))
    if rows[cut:]:
        parts.append(_fixed_table(rows[cut:], headings=None, widths=widths))
    parts.append(_sites_summary(sites))
    return Group(*parts)


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


def facts(pairs: Mapping[str, Any]) -> RenderableType:
    """Return a two-column list of facts: name, value."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        grid.add_row(line(name), line(str(value)))
    return grid


_SITE_HEADINGS = ("#", "site", "chan.", "gamma/beta", "statistics", "decay", "in training")


def _site_cells(site: Site) -> tuple[str, ...]:
    uses = f" (used {site.calls}×)" if site.calls > 1 else ""
    if site.trained_by is not None:
        uses += f" (also trained by {site.trained_by})"
    return (
        str(site.index),
        printable(site.path + uses),
        wording.MISSING if site.channels is None else str(site.channels),
        "frozen" if site.params_frozen else "train",
        "frozen" if site.stats_frozen else "move",
        f"{site.decay:g}",
        _normalises_with(site),
    )


def _normalises_with(site: Site) -> str:
    """Return which statistics normalise a batch in training, by the site's present state."""
    frozen = site.params_frozen or site.stats_frozen
    if frozen and site.policy == "inference" and site.stats_frozen:
        return "stored"
    return "batch"


def _sites_summary(sites: Sequence[Site]) -> RenderableType:

    frozen = sum(site.stats_frozen for site in sites)
    fixed = sum(site.params_frozen for site in sites)
    return line(
        f"{wording.count(len(sites), 'BN layer')}: statistics frozen in {frozen}, "
        f"gamma/beta frozen in {fixed}.",
        style="bold",
    )


def _column_widths(rows: Sequence[Sequence[str]], *, flexible: int, width: int) -> tuple[int, ...]:
    """Return column widths: that of the longest cell, and for the flexible column the rest."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    spare = width - (sum(widths) - widths[flexible]) - 2 * (len(widths) - 1)
    widths[flexible] = max(12, min(widths[flexible], spare))
    return tuple(widths)


def _fixed_table(
    rows: Sequence[Sequence[str]], *, headings: Sequence[str] | None, widths: Sequence[int]
) -> Table:
    """Return a borderless table of fixed column widths; two of them line up."""
    from rich.table import Table

    grid = Table(box=None, padding=(0, 2, 0, 0), show_header=headings is not None, pad_edge=False)
    for column, wide in enumerate(widths):
        grid.add_column(
            headings[column] if headings is not None else "",
            width=wide,
            overflow="fold",
            justify="right" if column in (0, 2, 5) else "left",
            header_style="dim",
        )
    for row in rows:
        grid.add_row(*[line(cell, style="cyan" if cell == "frozen" else "") for cell in row])
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
