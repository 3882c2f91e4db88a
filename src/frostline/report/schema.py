"""Dataclasses to plain JSON types and back, driven by their type hints.

Values that JSON cannot express:

=====================  =========================================================================
an array of float64    nested lists of numbers
any other array        ``{"dtype": "int64", "shape": [2, 2], "values": [...]}`` with flat values;
                       also an empty array of several axes, whose shape a list would lose
a tuple                a list
NaN, infinities        the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``, which ``float`` and
                       JavaScript's ``Number`` read. A text in a finding's or cause's *evidence*
                       that equals one of these three words is read as the number
=====================  =========================================================================

Reading is strict about types and lenient about fields: a missing field takes its default and an
unknown field is ignored, so that a report of a later version with one more field still reads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from frostline.types import DataError
from frostline.types.report import Report

#: Raised when a field of the JSON form is renamed, removed or changes its meaning.
SCHEMA_VERSION = 2

_Report = TypeVar("_Report", bound=Report)

#: Numbers that JSON has no literal for.
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def as_dict(report: Report) -> dict[str, Any]:
    """Return a report as plain types for JSON."""
    return {"schema_version": SCHEMA_VERSION, "clean": report.clean, **encode(report)}


def from_dict(kind: type[_Report], plain: Mapping[str, Any]) -> _Report:
    """Return the report that :func:`as_dict` was given.

    Raises:
        DataError: Another schema version, or not a report.
    """
    version = plain.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"a report of schema version {SCHEMA_VERSION} is needed. "
            f"Received: schema_version={version!r}"
        )
    read: _Report = decode(kind, plain)
    return read


def encode(value: Any) -> Any:
    """Return dataclasses, arrays, tuples and mappings as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, np.ndarray):
        return _encode_array(value)
    if isinstance(value, np.generic):
        return encode(value.item())
    if isinstance(value, Mapping):
        return {str(key): encode(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _word(value)
    return value


def decode(kind: Any, plain: Any, *, where: str = "report") -> Any:
    """Return the value that :func:`encode` was given.

    Args:
        kind: The type, as a type hint.
        plain: What was read from JSON.
        where: Place in the document, for the error message.

    Raises:
        DataError: ``plain`` is not of this type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_fields(kind, plain, where)
    if origin is np.ndarray:
        return _decode_array(plain, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, plain, where)
    if origin is tuple:
        return _decode_tuple(arguments, plain, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _demand(isinstance(plain, Mapping), "an object", plain, where)
        return {
            key: decode(arguments[1], inner, where=f"{where}.{key}") for key, inner in plain.items()
        }
    if origin is typing.Literal:
        _demand(plain in arguments, f"one of {', '.join(map(str, arguments))}", plain, where)
        return plain
    return _decode_leaf(kind, plain, where)


def _encode_array(value: Any) -> Any:
    if value.dtype == np.float64 and (value.size or value.ndim == 1):
        return encode(value.tolist())
    return {
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "values": encode(value.ravel().tolist()),
    }


def _word(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode_fields(kind: type, plain: Any, where: str) -> Any:
    _demand(isinstance(plain, Mapping), "an object", plain, where)
    hints = _hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in plain:
            inner = plain[field.name]
            values[field.name] = decode(hints[field.name], inner, where=f"{where}.{field.name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise DataError(f"this is not a report: {where} has no {field.name!r}")
    return kind(**values)


def _decode_array(plain: Any, where: str) -> Any:
    dtype: Any = np.float64
    shape: Any = None
    values = plain
    if isinstance(plain, Mapping):
        dtype, shape, values = (plain.get(name) for name in ("dtype", "shape", "values"))
    _demand(isinstance(values, list), "an array of numbers", plain, where)
    try:
        kind = np.dtype(dtype)
        _demand(kind.kind in "fiub", "an array of numbers", plain, where)
        array = np.array(_numbers(values), dtype=kind)
        return array if shape is None else array.reshape(shape)
    except (TypeError, ValueError, OverflowError):
        raise DataError(_complaint("an array of numbers", plain, where)) from None


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    raise TypeError


def _decode_union(arguments: tuple[Any, ...], plain: Any, where: str) -> Any:
    if plain is None and type(None) in arguments:
        return None
    kinds = [kind for kind in arguments if kind is not type(None)]
    if len(kinds) > 1 and isinstance(plain, str) and plain not in _WORDS and str in kinds:
        return plain
    return decode(kinds[0], plain, where=where)


def _decode_tuple(arguments: tuple[Any, ...], plain: Any, where: str) -> tuple[Any, ...]:
    _demand(isinstance(plain, list), "an array", plain, where)
    if arguments[-1] is Ellipsis:
        kinds = [arguments[0]] * len(plain)
    else:
        kinds = list(arguments)
        _demand(len(plain) == len(kinds), f"an array of {len(kinds)}", plain, where)
    return tuple(
        decode(kind, inner, where=f"{where}[{index}]")
        for index, (kind, inner) in enumerate(zip(kinds, plain, strict=True))
    )


def _decode_leaf(kind: Any, plain: Any, where: str) -> Any:
    if kind is float:
        if isinstance(plain, str) and plain in _WORDS:
            return _WORDS[plain]
        _demand(isinstance(plain, (int, float)), "a number", plain, where)
    elif kind is int:
        _demand(isinstance(plain, int), "a whole number", plain, where)
    else:
        _demand(isinstance(plain, kind), f"a {kind.__name__}", plain, where)
    return plain


def _demand(holds: bool, wanted: str, plain: Any, where: str) -> None:
    if not holds:
        raise DataError(_complaint(wanted, plain, where))


def _complaint(wanted: str, plain: Any, where: str) -> str:
    shown = repr(plain)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"this is not a report: {where} should be {wanted}. Received: {shown}"
