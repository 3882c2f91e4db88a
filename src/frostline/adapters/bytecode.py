"""The code of a user's own class: part of what a prefix computes, beside settings and weights."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any


def code_of(kind: type, library: str) -> str:
    """Describe the functions of a class and of its parents, but for those of a library.

    Args:
        kind: A class of layers or modules.
        library: First part of the module names of classes that are known by their version, such as
            ``"keras"``.

    Returns:
        Text that changes with the code; empty for a class of the library's own.
    """
    parts = []
    for parent in kind.__mro__:
        if parent.__module__.partition(".")[0] in (library, "builtins"):
            continue
        for name, value in sorted(vars(parent).items()):
            held = getattr(value, "fget", None) or getattr(value, "__func__", value)
            function = inspect.unwrap(held) if callable(held) else held
            if isinstance(function, types.FunctionType):
                parts.append(f"{name}:{fingerprint(function.__code__, _described)}")
    return ";".join(parts)


def fingerprint(code: types.CodeType, describe: Callable[[Any], str]) -> str:
    """Text that changes with what the code does: its bytecode, names and constants.

    Args:
        code: The code of a function.
        describe: Text of a constant that is not code itself.
    """
    constants = [
        fingerprint(each, describe) if isinstance(each, types.CodeType) else describe(each)
        for each in code.co_consts
    ]
    return f"code({code.co_code.hex()},{code.co_names},{','.join(constants)})"


def _described(value: object) -> str:
    if isinstance(value, frozenset):  # in no order that another process would have
        return f"set({','.join(sorted(map(_described, value)))})"
    if isinstance(value, tuple):
        return f"({','.join(map(_described, value))})"
    return repr(value)
