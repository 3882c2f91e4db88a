"""The BN layers of a model as a tuple that prints as a table, with a line where freezing ends."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

from frostline.report import escaping, text, wording
from frostline.report.escaping import line, lines, printable
from frostline.types import Site

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SITE_HEADINGS = ("#", "site", "chan.", "gamma/beta", "statistics", "decay", "in training")
#: Columns of numbers.
_RIGHT = (0, 2, 5)


class Sites(tuple[Site, ...]):
    """Sites in execution order; ``print`` shows the table, a notebook shows it by itself.

    Attributes:
        before: Number of sites in the frozen prefix; ``None`` without a prefix, because the first
            layer with weights trains.
        boundary: Path of the first layer behind the prefix; ``None`` where every layer is frozen.
    """

    before: int | None
    boundary: str | None

    def __new__(
        cls, sites: Iterable[Site], *, before: int | None = None, boundary: str | None = None
    ) -> Self:
        """Keep the sites and where the frozen prefix ends."""
        made = super().__new__(cls, sites)
        made.before, made.boundary = before, boundary
        return made

    def table(self, width: int = 80) -> RenderableType:
        """Return the table for a terminal of ``width`` columns."""
        return sites_table(self, boundary=self.boundary, before=self.before, width=width)

    def __str__(self) -> str:
        if not self:
            return "no BN layer"
        width = text.console().width
        return text.render(self.table(width), width=width).rstrip("\n")

    def _repr_html_(self) -> str:
        table = escaping.html(str(self), keep="\n")
        return f"<pre>{table}</pre>"


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
    parts.append(_fixed_table(rows[:cut], headings=headings, widths=widths, width=width))
    if before is not None:
        text = (
            f"boundary: {boundary} is the first layer that trains"
            if boundary is not None
            else "boundary: none, every layer is frozen"
        )
        parts.append(Rule(line(text), style="bold", align="left", characters="─"))
    if rows[cut:]:
        parts.append(_fixed_table(rows[cut:], headings=None, widths=widths, width=width))
    parts.append(_sites_summary(sites))
    return Group(*parts)


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
    rows: Sequence[Sequence[str]],
    *,
    headings: Sequence[str] | None,
    widths: Sequence[int],
    width: int,
) -> RenderableType:
    """Return a borderless table of fixed column widths; two of them line up.

    ``rich`` takes half a millisecond for each row, and a network has thousands: rows that fit
    become lines of one text. Those that are folded, and all in too narrow a terminal, are left to
    its ``Table``.
    """
    from rich.cells import cell_len
    from rich.console import Group

    narrow = sum(widths) + 2 * (len(widths) - 1) > width

    def folded(row: Sequence[str]) -> bool:
        return narrow or any(map(operator.gt, map(cell_len, row), widths))

    parts: list[RenderableType] = (
        [] if headings is None else [_folded_rows((), headings=headings, widths=widths)]
    )
    for apart, group in itertools.groupby(rows, folded):
        if apart:
            parts.append(_folded_rows(tuple(group), headings=None, widths=widths))
        else:
            parts.append(lines(_pieces(row, widths) for row in group))
    return Group(*parts)


def _pieces(row: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, str]]:
    """A row that fits, as pieces of a line and their styles."""
    from rich.cells import cell_len

    for column, (cell, wide) in enumerate(zip(row, widths, strict=True)):
        blanks = " " * (wide - cell_len(cell))
        yield blanks if column in _RIGHT else "", ""
        yield cell, "cyan" if cell == "frozen" else ""
        end = "" if column + 1 == len(row) else "  "
        yield ("" if column in _RIGHT else blanks) + end, ""


def _folded_rows(
    rows: Sequence[Sequence[str]], *, headings: Sequence[str] | None, widths: Sequence[int]
) -> Table:
    from rich.table import Table

    grid = Table(box=None, padding=(0, 2, 0, 0), show_header=headings is not None, pad_edge=False)
    for column, wide in enumerate(widths):
        grid.add_column(
            headings[column] if headings is not None else "",
            width=wide,
            overflow="fold",
            justify="right" if column in _RIGHT else "left",
            header_style="dim",
        )
    for row in rows:
        grid.add_row(*[line(cell, style="cyan" if cell == "frozen" else "") for cell in row])
    return grid
