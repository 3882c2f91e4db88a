r"""The one way in which a name reaches a page, a terminal or a log: as text, never as a command.

Layer, file, class, model and metric names come from the user's model, or from a report that
somebody sent. :func:`printable` shows escape sequences, line breaks and right-to-left marks as
escapes; :func:`line` and :func:`html` add what their medium needs.
"""

from __future__ import annotations

import html as _html
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


def html(name: str, *, keep: str = "") -> str:
    r"""Return text for HTML, for its text nodes and its attributes.

    Args:
        name: Any text.
        keep: Characters that :func:`printable` leaves as they are.

    >>> html("bn\x1b[31m<b>")
    'bn\\x1b[31m&lt;b&gt;'
    """
    return _html.escape(printable(name, keep=keep))
