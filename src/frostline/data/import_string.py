"""``module:function``: what a person names on the command line instead of a file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from frostline.types import ModelError
from frostline.types.reasons import first_line


def named(source: str) -> Any:
    """Import what ``module:name`` names; the module may be in the current folder.

    Raises:
        ModelError: It cannot be imported, or has nothing of this name that can be called.
    """
    name, _, attribute = source.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's module runs: anything can happen
        raise ModelError(f"{source}: cannot import {name!r} ({first_line(error)})") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ModelError(f"{source}: module {name!r} has no function {attribute!r}")
    return found


def built(source: str) -> Any:
    """Call the function, which takes no arguments.

    Raises:
        ModelError: As :func:`named`, or the function raises.
    """
    build = named(source)
    try:
        return build()
    except (Exception, SystemExit) as error:  # also where it ends the program with exit code 0
        raise ModelError(f"{source}: the function failed ({first_line(error)})") from error
