"""The BN layers of a model as a tuple that prints as a table, with a line where freezing ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from frostline.report import escaping, text
from frostline.types import Site

if TYPE_CHECKING:
    from rich.console import RenderableType


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
        return text.sites_table(self, boundary=self.boundary, before=self.before, width=width)

    def __str__(self) -> str:
        if not self:
            return "no BN layer"
        width = text.console().width
        return text.render(self.table(width), width=width).rstrip("\n")

    def _repr_html_(self) -> str:
        table = escaping.html(str(self), keep="\n")
        return f"<pre>{table}</pre>"
