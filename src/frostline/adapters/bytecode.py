"""The code of a user's own class: part of what a prefix computes, beside settings and weights."""

from __future__ import annotations

import inspect
import types


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
                parts.append(f"{name}:{_described(function.__code__)}")
    return ";".join(parts)


def _described(value: object) -> str:
    if isinstance(value, types.CodeType):
        constants = ",".join(map(_described, value.co_consts))
        return f"code({value.co_code.hex()},{value.co_names},{constants})"
    if isinstance(value, frozenset):  # in no order that another process would have
        return f"set({','.join(sorted(map(_described, value)))})"
    if isinstance(value, tuple):
        return f"({','.join(map(_described, value))})"
    return repr(value)
