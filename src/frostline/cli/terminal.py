"""What a command prints goes through here, unless a renderer of the report made it.

Names in a file belong to whoever made the file: what does not print is shown as an escape, so that
no layer's name moves the cursor or hides a line.
"""

from __future__ import annotations

import typer

from frostline.report.escaping import printable


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text, with everything that a terminal would obey, except line ends, as an escape."""
    typer.echo(printable(text, keep="\n"), err=err, nl=nl)


def one_line(text: str) -> str:
    """Return text on one line that a terminal only shows."""
    return printable(" ".join(text.split()))
