"""Text for the terminal: the console, `rich` renderables as text, numbers and facts.

Colour never carries meaning alone: the coloured word says the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frostline.report import wording
from frostline.report.escaping import line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def console(width: int | None = None, *, stderr: bool = False) -> Console:
    """Return a console that honours ``NO_COLOR``, ``FORCE_COLOR`` and ``COLUMNS``.

    Args:
        width: Number of columns; default is the terminal's, or 80 in a pipe.
        stderr: Write to standard error.
    """
    from rich.console import Console

    return Console(
        width=width, stderr=stderr, highlight=False, markup=False, emoji=False,
        force_jupyter=False,  # in a notebook rich would show the text instead of writing it
    )  # fmt: skip


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
        force_jupyter=False,
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


def facts(pairs: Mapping[str, Any]) -> RenderableType:
    """Return a two-column list of facts: name, value."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        grid.add_row(line(name), line(str(value)))
    return grid
