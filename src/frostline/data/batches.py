"""Anything a user has -> batches of numpy arrays, in order, without shuffling.

Data is ``(x, y)`` or ``(x, y, sample_weight)`` arrays, a bare ``x``, a ``tf.data.Dataset``, a Keras
``PyDataset``, a torch ``DataLoader``, or any iterable of ``(x, y[, sample_weight])``. ``x`` and
``y`` may be a dict, tuple or list of arrays for models with several inputs or outputs.

Frameworks are recognised by type name and module along the MRO, never by importing them, and
tensors become numpy by duck typing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from frostline.types import Array, DataError
from frostline.types.reasons import first_line

_ACCEPTED = (
    "Data must be (x, y) or (x, y, sample_weight) arrays, a bare x, a tf.data.Dataset, a Keras "
    "PyDataset, a torch DataLoader, or an iterable of (x, y[, sample_weight])."
)


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that go through the model together.

    Attributes:
        x: Array of shape ``(n, ...)``, or a dict, tuple or list of such arrays.
        y: Targets, nested like ``x`` may be; ``None`` when there are none.
        sample_weight: Shape ``(n,)``, nested like ``y`` may be; ``None`` when there are none.
        whole: Exactly what the loader yielded; ``None`` for batches that are cut from arrays.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    whole: Any = None

    def __len__(self) -> int:
        return len(leaves(self.x)[0][1])


def batches(
    data: Any,
    *,
    batch_size: int = 32,
    max_samples: int | None = None,
    check_finite: bool = False,
) -> Iterator[Batch]:
    """Iterate over ``data`` once, in its own order.

    Arrays are cut into batches of ``batch_size``; data that come in batches keep theirs.
    Array-likes on disk (memory maps, HDF5) are read one batch at a time.

    Args:
        data: See the module's docstring.
        batch_size: Samples per batch for data given as arrays.
        max_samples: Stop after this many samples; the last batch is cut. ``None`` reads to the end,
            and refuses data that say that they have none (``dataset.repeat()``).
        check_finite: Raise when ``x`` has a NaN or an infinite value.

    Yields:
        One :class:`Batch` of numpy arrays at a time; never an empty one.

    Raises:
        DataError: The data are of an unknown type, empty, ragged, of object dtype, or their lengths
            differ; or not finite, if that is checked. The batch and the sample are named.

    Example:
        >>> [len(batch) for batch in batches(np.zeros((5, 2)), batch_size=2)]
        [2, 2, 1]
    """
    for name, value in (("batch_size", batch_size), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1. Received: {name}={value}")
    if max_samples is None and _is_endless(data):
        raise DataError(
            f"The data never end; bound them, for example with dataset.take(n). "
            f"Received: {_describe(data)}"
        )
    return _checked(_raw(data, batch_size), data, max_samples, check_finite)


def is_reiterable(data: Any) -> bool:
    """Whether ``data`` can be read more than once; ``False`` for generators and iterators."""
    return not hasattr(data, "__next__")


def require_reiterable(data: Any, verb: str) -> None:
    """Raise when ``data`` is a one-shot iterator and ``verb`` reads it more than once.

    Args:
        data: What the user passed.
        verb: Name of the calling verb, for the message.

    Raises:
        DataError: ``data`` is a generator or another iterator.
    """
    if not is_reiterable(data):
        raise DataError(
            f"{verb} reads the data more than once, and an iterator can be read only once: pass "
            f"arrays, a list of batches, or a dataset. Received: {_describe(data)}"
        )


def collect(
    data: Any, *, max_samples: int | None = None, batch_size: int = 32, check_finite: bool = False
) -> Batch:
    """Read the first ``max_samples`` samples of ``data`` into memory.

    Args:
        data: See the module's docstring; one-shot iterators too.
        max_samples: At most this many samples, in order; ``None`` for all.
        batch_size: Samples read at a time from data given as arrays.
        check_finite: Raise when ``x`` has a NaN or an infinite value.

    Returns:
        One :class:`Batch` with all of them.

    Raises:
        DataError: As :func:`batches`; or batches whose arrays do not fit together.
    """
    parts = list(
        batches(data, batch_size=batch_size, max_samples=max_samples, check_finite=check_finite)
    )
    return Batch(
        _concatenate([part.x for part in parts], "x"),
        _concatenate([part.y for part in parts], "y"),
        _concatenate([part.sample_weight for part in parts], "sample_weight"),
    )


def to_numpy(value: Any) -> Array:
    """Convert a tensor of any framework, or nested lists of numbers, to a numpy array.

    bfloat16 and the 8-bit floats, which numpy lacks, become float32; that is exact.

    Raises:
        DataError: The value has no rectangular numeric form (ragged, sparse, object dtype).
    """
    if isinstance(value, np.ndarray):
        array = value
    else:
        if hasattr(value, "detach"):  # torch: off the tape, off the device, dtypes numpy knows
            value = value.detach().cpu()
            if "float8" in str(value.dtype) or "bfloat16" in str(value.dtype):
                value = value.float()
        try:
            array = np.asarray(value.numpy() if _has_numpy(value) else value)
        except Exception as error:
            raise DataError(
                f"Cannot convert to a rectangular array of numbers ({first_line(error)}). "
                f"Received: {_describe(value)}"
            ) from error
    if array.dtype.kind == "V" and "float" in array.dtype.name:  # ml_dtypes: jax, tensorflow
        array = array.astype(np.float32)
    if array.dtype.kind in "OV":
        raise DataError(
            "Arrays must hold numbers of one type and rows of one length. "
            f"Received: {_describe(value)} of dtype {array.dtype}"
        )
    return array


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
    elif isinstance(value, (list, tuple)) and not _is_numbers(value):
        items = enumerate(value)
    else:
        return [(name, value)]
    return [leaf for key, item in items for leaf in leaves(item, f"{name}[{key!r}]")]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to every array of a nested structure and keep the structure."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: map_leaves(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not _is_numbers(value):
        items = [map_leaves(function, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return function(value)


def _raw(data: Any, batch_size: int) -> Iterator[Any]:
    """Pick the reader for the type of ``data``; yields ``Batch`` or ``(x, y, sample_weight)``."""
    if isinstance(data, (str, bytes)) or hasattr(data, "__fspath__") or data is None:
        raise DataError(f"{_ACCEPTED} Received: {_describe(data)}")
    if _is_a(data, ("PyDataset", "Sequence"), "keras"):
        # Not iter(): it would never end, as items beyond the last one raise nothing.
        endless = _is_endless(data)
        return (data[index] for index in (itertools.count() if endless else range(len(data))))
    if _is_loader(data):
        return iter(data)
    if isinstance(data, Batch):
        return _cut(data, batch_size)
    if isinstance(data, tuple):
        return _cut(_unpack(data), batch_size)
    if isinstance(data, list):
        return _from_list(data, batch_size)
    if isinstance(data, Mapping) or hasattr(data, "shape"):
        return _cut(Batch(data), batch_size)
    if hasattr(data, "__iter__"):
        return iter(data)
    raise DataError(f"{_ACCEPTED} Received: {_describe(data)}")


def _from_list(data: list[Any], batch_size: int) -> Iterator[Any]:
    if not data:
        raise DataError("The data hold no samples. Received: an empty list")
    if all(isinstance(item, (tuple, Batch)) for item in data):
        return iter(data)
    if _is_numbers(data):
        return _cut(Batch(to_numpy(data)), batch_size)
    raise DataError(
        "A list must hold batches, (x, y) tuples. For a model with several inputs pass "
        f"((a, b), y) or ((a, b),). Received: a list of {_describe(data[0])}"
    )


def _unpack(item: Any) -> Batch:
    """``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)``, as tuple or list, or a bare ``x``."""
    if isinstance(item, Batch):
        return item
    if not isinstance(item, tuple) and not (isinstance(item, list) and not _is_numbers(item)):
        return Batch(item)
    if not 1 <= len(item) <= 3:
        raise DataError(
            "A tuple of data must be (x,), (x, y) or (x, y, sample_weight). "
            f"Received: {len(item)} items"
        )
    if _is_loader(item[0]) or hasattr(item[0], "__next__"):
        raise DataError(
            "A dataset brings its own labels: pass it alone, not in a tuple. "
            f"Received: ({_describe(item[0])}, ...)"
        )
    return Batch(*item)


def _cut(whole: Batch, batch_size: int) -> Iterator[Batch]:
    """Cut arrays into batches; lengths are checked before the first one is handed out."""
    whole = Batch(
        map_leaves(_sliceable, whole.x),
        map_leaves(_sliceable, whole.y),
        map_leaves(_sliceable, whole.sample_weight),
    )
    count = _common_length(whole, "the data")

    def cut() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            yield _rows(whole, slice(start, start + batch_size))

    return cut()


def _sliceable(value: Any) -> Any:
    """Leave what can be cut row by row as it is (disk arrays stay on disk); convert the rest."""
    if type(value).__module__.split(".")[0] == "pandas" or not hasattr(value, "shape"):
        return to_numpy(value)
    return value


def _rows(batch: Batch, rows: slice) -> Batch:
    return Batch(
        map_leaves(lambda leaf: leaf[rows], batch.x),
        map_leaves(lambda leaf: leaf[rows], batch.y),
        map_leaves(lambda leaf: leaf[rows], batch.sample_weight),
    )


def _checked(
    raw: Iterator[Any], data: Any, max_samples: int | None, check_finite: bool
) -> Iterator[Batch]:
    seen = 0
    for index, item in enumerate(raw):
        batch = _unpack(item)
        where = f"batch {index}"
        try:
            batch = Batch(
                map_leaves(to_numpy, batch.x),
                map_leaves(to_numpy, batch.y),
                map_leaves(to_numpy, batch.sample_weight),
            )
        except DataError as error:
            raise DataError(f"In {where} (from sample {seen}): {error}") from error
        count = _common_length(batch, where)
        if count == 0:
            continue
        if max_samples is not None and seen + count > max_samples:
            batch = _rows(batch, slice(max_samples - seen))
            count = len(batch)
        if check_finite:
            _require_finite(batch, where, seen)
        seen += count
        yield batch
        if seen == max_samples:
            return
    if seen == 0:
        raise DataError(f"The data hold no samples. Received: {_describe(data)}")


def _common_length(batch: Batch, where: str) -> int:
    """First dimension shared by every array of the batch."""
    named = [
        (f"{field}{name}", leaf)
        for field in ("x", "y", "sample_weight")
        for name, leaf in leaves(getattr(batch, field))
    ]
    if not leaves(batch.x):
        raise DataError(f"In {where}: x holds no array. Received: x={batch.x!r}")
    for name, leaf in named:
        if len(leaf.shape) == 0:
            raise DataError(
                f"In {where}: {name} is a single number, not a batch; batch the data first, for "
                "example with dataset.batch(32)."
            )
    lengths = {int(leaf.shape[0]) for _, leaf in named}
    if len(lengths) > 1:
        sizes = ", ".join(f"{name}: {int(leaf.shape[0])}" for name, leaf in named)
        raise DataError(
            f"In {where}: all arrays must have the same number of samples. Received: {sizes}"
        )
    return lengths.pop()


def _require_finite(batch: Batch, where: str, start: int) -> None:
    for name, leaf in leaves(batch.x):
        if leaf.dtype.kind not in "fc":
            continue
        bad = ~np.isfinite(leaf)
        if bad.any():
            rows = np.flatnonzero(bad.reshape(len(leaf), -1).any(axis=1))
            shown = ", ".join(str(start + row) for row in rows[:5])
            raise DataError(
                f"x{name} of {where} has {int(bad.sum())} value(s) that are NaN or infinite, in "
                f"sample(s) {shown}{', ...' if len(rows) > 5 else ''}."
            )


def _concatenate(parts: list[Any], name: str) -> Any:
    first = parts[0]
    if any((part is None) != (first is None) for part in parts):
        raise DataError(f"Some batches have {name} and others do not.")
    columns = [leaves(part) for part in parts]
    if any([key for key, _ in column] != [key for key, _ in columns[0]] for column in columns):
        raise DataError(f"The batches nest {name} in different ways.")
    joined = []
    for position, (key, _) in enumerate(columns[0]):
        arrays = [column[position][1] for column in columns]
        try:
            joined.append(np.concatenate(arrays) if len(arrays) > 1 else arrays[0])
        except ValueError as error:
            shapes = sorted({array.shape[1:] for array in arrays})
            raise DataError(
                f"The batches' arrays {name}{key} do not fit together. "
                f"Received: samples of shape {', '.join(map(str, shapes))}"
            ) from error
    remaining = iter(joined)
    return map_leaves(lambda _: next(remaining), first)


def _is_a(value: Any, names: tuple[str, ...], module: str) -> bool:
    """Whether a class along the MRO has one of these names and lives in that package."""
    return any(
        parent.__name__ in names and parent.__module__.split(".")[0] == module
        for parent in type(value).__mro__
    )


def _is_loader(value: Any) -> bool:
    """A data set of a framework, which yields its own batches."""
    return (
        _is_a(value, ("PyDataset", "Sequence"), "keras")
        or _is_a(value, ("DatasetV2", "DistributedDataset"), "tensorflow")
        or _is_a(value, ("DataLoader",), "torch")
        or _is_a(value, ("MapDataset", "IterDataset", "DataLoader"), "grain")
    )


def _is_endless(data: Any) -> bool:
    if _is_a(data, ("PyDataset",), "keras"):
        return bool(data.num_batches is None)
    if _is_a(data, ("DatasetV2",), "tensorflow"):
        infinite = -1  # tf.data.INFINITE_CARDINALITY
        return int(data.cardinality()) == infinite
    return False


def _is_numbers(value: Any) -> bool:
    """A nested list of plain numbers or strings: one array, not a structure of arrays."""
    while isinstance(value, (list, tuple)):
        if not value:
            return True
        value = value[0]
    return isinstance(value, (int, float, complex, str, np.generic))


def _has_numpy(value: Any) -> bool:
    return callable(getattr(value, "numpy", None))


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    if isinstance(value, (str, bytes)):
        return f"{name} {value!r}"
    return name if shape is None else f"{name} of shape {tuple(shape)}"
