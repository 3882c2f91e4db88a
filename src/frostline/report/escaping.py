r"""The one way in which a name reaches a page, a terminal or a log: as text, never as a command.

Layer, file, class, model and metric names come from the user's model, or from a report that
somebody sent. :func:`printable` shows escape sequences, line breaks and right-to-left marks as
escapes; :func:`line` and :func:`html` add what their medium needs.
"""

from __future__ import annotations

import html as _html
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


def printable(name: str, *, keep: str = "") -> str:
    r"""Return text in which every character that does not print is an escape.

    Args:
        name: Any text.
        keep: Characters to leave as they are.

    >>> printable("bn\x1b[31m"), printable("中文")
    ('bn\\x1b[31m', '中文')
    """
    if name.isprintable():
        return name
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in name
    )


def line(*parts: str | tuple[str, str], style: str = "") -> Text:
    """Return one line for a terminal; rich markup in it is plain text.

    Args:
        parts: Texts, or pairs of text and style.
        style: Style of the whole line.
    """
    from rich.text import Text

    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((printable(text), look) for text, look in pairs), style=style)


def lines(rows: Iterable[Iterable[tuple[str, str]]]) -> Text:
    """Return many lines for a terminal as one text, which is not folded.

    Args:
        rows: Pairs of text and style, for each line.
    """
    from rich.text import Text

    found = Text(no_wrap=True, overflow="ignore")
    for number, row in enumerate(rows):
        found.append_tokens([("\n" if number else "", "")])
        found.append_tokens((printable(text), look) for text, look in row)
    return found


def html(name: str, *, keep: str = "") -> str:
    r"""Return text for HTML, for its text nodes and its attributes.

    Args:
        name: Any text.
        keep: Characters that :func:`printable` leaves as they are.

    >>> html("bn\x1b[31m<b>")
    'bn\\x1b[31m&lt;b&gt;'
    """
    return _html.escape(printable(name, keep=keep))
