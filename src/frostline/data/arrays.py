"""Nested arrays: their leaves, their shapes, and the way from any framework's tensors to numpy.

Nothing here imports a framework: tensors become numpy by duck typing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from frostline.types import Array, DataError
from frostline.types.reasons import first_line


def to_numpy(value: Any) -> Array:
    """Convert a tensor of any framework, or nested lists of numbers, to a numpy array.

    bfloat16 and the 8-bit floats, which numpy lacks, become float32; that is exact.

    Raises:
        DataError: The value has no rectangular numeric form (ragged, sparse, object dtype).
    """
    if isinstance(value, np.ndarray):
        array = value
    else:
        if hasattr(value, "detach") and hasattr(value, "dtype"):
            # torch: off the tape, off the device, dtypes that numpy knows
            value = value.detach().cpu()
            if "float8" in str(value.dtype) or "bfloat16" in str(value.dtype):
                value = value.float()
        try:
            array = np.asarray(value.numpy() if callable(getattr(value, "numpy", None)) else value)
        except Exception as error:
            raise DataError(
                f"Cannot convert to a rectangular array of numbers ({first_line(error)}). "
                f"Received: {description(value)}"
            ) from error
    if array.dtype.kind == "V" and "float" in array.dtype.name:  # ml_dtypes: jax, tensorflow
        array = array.astype(np.float32)
    if array.dtype.kind in "OV":
        raise DataError(
            "Arrays must hold numbers of one type and rows of one length. "
            f"Received: {description(value)} of dtype {array.dtype}"
        )
    return array


class Table(dict[str, Any]):
    """Inputs that are no structure of arrays, as columns by name: one entry per sample in each.

    A column is an array, or a list of samples as an array of objects. Names tell what belongs to
    all samples, too: tables with the same names may be joined.

    Attributes:
        restored: The columns -> the inputs.
    """

    def __init__(self, columns: Mapping[str, Any], restored: Callable[[Any], Any]) -> None:
        super().__init__(columns)
        self.restored = restored


def leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Flatten nested dicts, tuples and lists of arrays into ``(name, array)`` pairs, in order.

    Example:
        >>> [name for name, _ in leaves({"a": np.zeros(1), "b": (np.zeros(1), np.zeros(1))})]
        ["['a']", "['b'][0]", "['b'][1]"]
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif is_sequence(value):
        items = enumerate(value)
    else:
        return [(name, value)]
    return [leaf for key, item in items for leaf in leaves(item, f"{name}[{key!r}]")]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to every array of a nested structure and keep the structure."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        made = {key: map_leaves(function, item) for key, item in value.items()}
        return Table(made, value.restored) if isinstance(value, Table) else made
    if is_sequence(value):
        items = [map_leaves(function, item) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    return function(value)


def owned(value: Any) -> Any:
    """The same structure with memory of its own, so that its loader may write into what it gave.

    What has no memory that can be written to, and what cannot be copied, stays as it is.
    """
    if isinstance(value, np.ndarray):
        return np.array(value)
    if callable(getattr(value, "clone", None)):
        if not hasattr(value, "requires_grad"):
            return value.clone()
        # Off its tape: the copy is no step of a computation.
        made = value.detach().clone()
        return made.requires_grad_() if value.requires_grad else made
    if type(value) in (list, tuple):
        return type(value)(map(owned, value))
    if hasattr(value, "_fields"):
        return type(value)(*map(owned, value))
    try:
        if isinstance(value, Mapping):
            made = copy.copy(value)
            for key, item in value.items():
                made[key] = owned(item)  # type: ignore[index]
            return made
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            made = copy.copy(value)
            for name, item in vars(value).items():
                object.__setattr__(made, name, owned(item))
            return made
    except Exception:  # a class of its own that is not written to
        return value
    return value


def shape_of(value: Any) -> tuple[int, ...]:
    """Its shape; −1 for a side that is open, as in ragged and nested tensors."""
    if getattr(value, "is_nested", False):
        return (int(value.size(0)), *[-1] * (value.dim() - 1))
    shape = value.shape if hasattr(value, "shape") else np.shape(value)
    return tuple(-1 if side is None else int(side) for side in shape)


def has_shape(value: Any) -> bool:
    """Whether it is an array of some kind; a nested tensor raises an error when asked."""
    return bool(getattr(value, "is_nested", False)) or hasattr(value, "shape")


def is_sequence(value: Any) -> bool:
    """A list or tuple of parts; a tuple with methods of a tensor (PackedSequence) is one part."""
    plain = isinstance(value, (list, tuple)) and not callable(getattr(value, "to", None))
    return plain and not is_numbers(value)


def is_numbers(value: Any) -> bool:
    """A nested list of plain numbers or strings: one array, not a structure of arrays."""
    while isinstance(value, (list, tuple)):
        if not value:
            return True
        value = value[0]
    return isinstance(value, (int, float, complex, str, np.generic))


def description(value: Any) -> str:
    """Type and shape of a value, for a message."""
    nested = getattr(value, "is_nested", False)
    shape = shape_of(value) if nested else getattr(value, "shape", None)
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    if isinstance(value, (str, bytes)):
        return f"{name} {value!r}"
    return name if shape is None else f"{name} of shape {tuple(shape)}"
