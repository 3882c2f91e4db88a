"""What an exception says, cut down to one line that fits into another message; warnings."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

from frostline.types import FrostlineError

_OURS = Path(__file__).parents[1]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 200
#: Longest word at whose beginning a line is cut.
_WORD = 30
_OF_A_LAYER = "Exception encountered when calling "


def first_line(error: BaseException) -> str:
    r"""Say what went wrong in one line of at most 200 characters.

    Keras' own words around the error of a layer, and TensorFlow's around that of a traced
    function, are skipped: the line that names the error is shown.

    Args:
        error: The exception.

    Returns:
        The line with the name of the class in front, which Frostline's own errors go without; the
        name alone where the exception says nothing.

    Example:
        >>> first_line(ValueError("no such shape\nand much more")), first_line(KeyError())
        ('ValueError: no such shape', 'KeyError')
    """
    name = type(error).__name__
    plain = (_COLOURS.sub("", line) for line in str(error).splitlines())
    lines = [text for line in plain if (text := " ".join(line.split()))]
    if not lines:
        return name
    text = lines[0]
    if text == "in user code:":
        named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
        text = (named or lines[-1:])[0]
    elif text.startswith(_OF_A_LAYER) and len(lines) > 1:
        text = f"{text.removeprefix(_OF_A_LAYER).rstrip('.')}: {lines[1]}"
    if not isinstance(error, FrostlineError) and not text.startswith(f"{name}: "):
        text = f"{name}: {text}"
    if len(text) <= _LONGEST:
        return text
    cut = text[: _LONGEST - 3]
    space = cut.rfind(" ", -_WORD) if text[len(cut)] != " " else -1
    return (cut if space < 0 else cut[:space]).rstrip() + "..."


def warn(message: str) -> None:
    """Warn at the line of the user's that called Frostline, however deep this is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _is_ours(file: str) -> bool:
    """The command line is none of these: it shows warnings as it shows errors."""
    return Path(file).is_relative_to(_OURS) and not Path(file).is_relative_to(_OURS / "cli")
