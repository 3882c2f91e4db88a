"""What a command prints goes through here, unless a renderer of the report made it.

Names in a file belong to whoever made the file: what does not print is shown as an escape, so that
no layer's name moves the cursor or hides a line.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import typer

from frostline.report.escaping import printable


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text, with everything that a terminal would obey, except line ends, as an escape."""
    typer.echo(printable(text, keep="\n"), err=err, nl=nl)


def one_line(text: str) -> str:
    """Return text on one line that a terminal only shows."""
    return printable(" ".join(text.split()))


class _Stream:
    """Standard output for a library that prints names itself: they are shown, never obeyed."""

    _STYLE = re.compile("(\x1b\\[[0-9;]*m)")

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; colours reach a terminal only, anything else that it would obey none."""
        styled = self._stream.isatty()
        for number, part in enumerate(self._STYLE.split(text)):
            if number % 2 == 0:
                self._stream.write(printable(part, keep="\n\r\b" if styled else "\n"))
            elif styled:
                self._stream.write(part)
        return len(text)


@contextlib.contextmanager
def shown_only() -> Iterator[None]:
    """Let what a library prints within the block move no cursor and hide no line."""
    with contextlib.redirect_stdout(_Stream(sys.stdout)):
        yield
