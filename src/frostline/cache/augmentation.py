"""Fingerprint of an augmentation, part of the cache key.

Functions are known by their code and by the plain values they use; what cannot be read off gets a
name from the user.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import numpy as np

from frostline.adapters.bytecode import fingerprint
from frostline.cache.files import sha256
from frostline.types import DataError

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis), np.generic)


def augmentation_identity(augment: Any, name: str | None = None) -> str:
    """Return a string that differs when the augmentation does.

    Args:
        augment: ``(x, seed) -> x``: a function, a ``functools.partial``, or an object with
            ``get_config`` (which Keras layers have).
        name: What the user calls it; then this alone counts.

    Raises:
        DataError: It uses a value that cannot be read off.
    """
    if name is not None:
        return sha256("named", name)
    try:
        return sha256("augment", _describe(augment, set()))
    except _UnreadableError as error:
        raise DataError(
            f"the augmentation uses {error}, so a change in it would go unseen and wrong features "
            "would be reused; pass augment_name='...' and change it when the augmentation changes. "
            f"Received: {augment!r}"
        ) from error


class _UnreadableError(Exception):
    """A value that has no readable identity."""


def _describe(value: Any, seen: set[int]) -> str:
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__}:{value!r}"
    if id(value) in seen:
        return "again"
    seen = seen | {id(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "uifbc":
        content = sha256(np.ascontiguousarray(value).tobytes())
        return f"array:{value.dtype}{value.shape}:{content}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({','.join(_describe(item, seen) for item in value)})"
    if isinstance(value, (set, frozenset)):
        return f"set({','.join(sorted(_describe(item, seen) for item in value))})"
    if isinstance(value, dict):
        items = (f"{_describe(k, seen)}={_describe(v, seen)}" for k, v in value.items())
        return f"dict({','.join(items)})"
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, dict(value.keywords))
        return f"partial({','.join(_describe(part, seen) for part in parts)})"
    if isinstance(value, types.ModuleType):
        return f"module:{value.__name__}:{getattr(value, '__version__', '')}"
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if isinstance(value, types.MethodType):
        return f"method({_describe(value.__func__, seen)},{_describe(value.__self__, seen)})"
    if inspect.isbuiltin(value) or inspect.isclass(value) or isinstance(value, np.ufunc):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"
    return _instance(value, seen)


def _function(function: types.FunctionType, seen: set[int]) -> str:
    """Code, defaults, and the values of the names that the code uses."""
    names = _names(function.__code__)
    used = {name: function.__globals__[name] for name in names if name in function.__globals__}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            used[name] = cell.cell_contents
        except ValueError:  # assigned later, as a function that refers to itself
            continue
    parts = (
        fingerprint(function.__code__, lambda each: _describe(each, seen)),
        _describe(function.__defaults__, seen),
        _describe(function.__kwdefaults__, seen),
        _describe(dict(sorted(used.items())), seen),
    )
    return f"function({','.join(parts)})"


def _names(code: types.CodeType) -> set[str]:
    """Every global name that the code or a function inside it may use."""
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _instance(value: Any, seen: set[int]) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if callable(getattr(value, "get_config", None)):
        # Keras numbers layers as they are made: a name says nothing about what is computed.
        config = {key: each for key, each in value.get_config().items() if key != "name"}
        weights = [np.asarray(each) for each in getattr(value, "weights", ())]
        return f"{kind}({_describe(config, seen)},{_describe(weights, seen)})"
    if isinstance(value, np.dtype):
        return f"dtype:{value.str}"
    raise _UnreadableError(f"a value of type {kind}")
