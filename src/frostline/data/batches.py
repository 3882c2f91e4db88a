"""Anything a user has -> batches, in order, without shuffling.

Data is ``(x, y)`` or ``(x, y, sample_weight)`` arrays, a bare ``x``, a ``tf.data.Dataset``, a Keras
``PyDataset``, a torch ``DataLoader`` or ``Dataset``, or any iterable of batches. A batch is what
the loader yields: ``(x, y)`` arrays, a mapping, a list of images, an object with tensors inside. It
becomes numpy, and may be cut, only where it is arrays of one length; otherwise it stays whole.

Frameworks are recognised by type name and module along the MRO, never by importing them, and
tensors become numpy by duck typing.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from frostline.types import Array, DataError, FrostlineError, ModelError
from frostline.types.reasons import first_line

_ACCEPTED = (
    "Data must be (x, y) or (x, y, sample_weight) arrays, a bare x, a tf.data.Dataset, a Keras "
    "PyDataset, a torch DataLoader or Dataset, or an iterable of batches."
)


#: Channels that an image in a list may have in its first axis.
_MOST_COLOURS = 4


class NoSamplesError(DataError):
    """The data hold nothing, which one shard of several may."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that go through the model together.

    Attributes:
        x: Model inputs: arrays of shape ``(n, ...)``, or a mapping, tuple or list of them, where
            the inputs are arrays of one length; otherwise what the loader yielded.
        y: Targets, as ``x``; ``None`` when there are none beside the inputs.
        sample_weight: Shape ``(n,)``, nested like ``y`` may be; ``None`` when there are none.
        whole: Exactly what the loader yielded; ``None`` for batches that are cut from arrays.
        inputs: So many first items of ``whole`` are what ``x`` holds.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    whole: Any = None
    inputs: int = 1

    @property
    def count(self) -> int | None:
        """Number of samples; ``None`` where the batch does not tell."""
        if _one_each(self.x, self.y):
            return len(self.x)
        return next((n for n in map(_count, (self.x, self.y)) if n is not None), None)

    def __len__(self) -> int:
        number = self.count
        if number is None:
            raise DataError(
                "the number of samples of this batch is not known. "
                f"Received: {_describe(self.whole if self.whole is not None else self.x)}"
            )
        return number

    @property
    def regular(self) -> bool:
        """Inputs, targets and weights are arrays of one length."""
        if _is_images(self.x) or _one_each(self.x, self.y):
            return False
        named = leaves((self.x, self.y, self.sample_weight))
        if not named or any(not isinstance(leaf, np.ndarray) or not leaf.ndim for _, leaf in named):
            return False
        return len({len(leaf) for _, leaf in named}) == 1

    @property
    def divisible(self) -> bool:
        """Arrays of one length and nothing else: the batch may be cut by sample."""
        return self.regular and not self.rest

    @property
    def named(self) -> bool:
        """The loader yields mappings; an entry may be an index into its own batch."""
        return isinstance(self.whole, Mapping)

    @property
    def rest(self) -> tuple[Any, ...]:
        """Items of ``whole`` that are neither inputs, nor targets, nor weights."""
        if not isinstance(self.whole, (tuple, list)) or _is_numbers(self.whole):
            return ()
        known = (self.x, self.y, self.sample_weight)
        used = max(1, sum(part is not None for part in known)) + self.inputs - 1
        if self.y is None and _is_images(self.whole):
            return ()
        return tuple(item for item in self.whole[used:] if item is not None)

    @property
    def given(self) -> Any:
        """What a user's ``step(model, batch)`` gets: ``whole``, or the tuple of the arrays."""
        if self.whole is not None:
            return self.whole
        if self.y is None:
            return self.x
        pair = (self.x, self.y)
        return pair if self.sample_weight is None else (*pair, self.sample_weight)


def take(batch: Batch, rows: Any) -> Batch:
    """The rows of a batch of arrays: a slice, or an array of indices.

    Raises:
        DataError: The batch is not arrays of one length.
    """
    require_arrays(batch, "the batch")
    return _mapped(batch, lambda leaf: leaf[rows])


def _mapped(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """Inputs, targets and weights with ``function`` applied to every array."""
    x, y, weight = (map_leaves(function, v) for v in (batch.x, batch.y, batch.sample_weight))
    return Batch(x, y, weight)


def left_out(batch: Batch) -> str | None:
    """What a loss of ``(x, y)`` does not see of this batch, for a person; ``None``: nothing."""
    rest = batch.rest
    if not rest:
        return None
    shown = ", ".join(_describe(item) for item in rest[:3])
    return (
        f"beside inputs and labels each batch holds {shown}, which are no sample weights (floating "
        "numbers, none negative, one per sample) and are not used; pass step= to use them"
    )


def described(batch: Batch) -> str:
    """What a batch is made of, in a few words."""
    value = batch.given
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(repr, list(value)[:6]))}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(type(item).__name__ for item in value[:4])}"
    return type(value).__name__


def failure(error: Exception, batch: Batch) -> ModelError:
    """What a user's model, loss or step raised on a batch, as one of our errors."""
    return ModelError(
        f"the model or its loss fails on a batch as the data give it: {first_line(error)}. "
        "Where the model takes a batch in its own way, pass step=, a function (model, batch) "
        f"that returns the loss. Received: a batch of {described(batch)}"
    )


def batches(
    data: Any,
    *,
    batch_size: int = 32,
    max_samples: int | None = None,
    check_finite: bool = False,
    inputs: int = 1,
) -> Iterator[Batch]:
    """Iterate over ``data`` once, in its own order.

    Arrays are cut into batches of ``batch_size``, a torch ``Dataset`` is collated into them; data
    that come in batches keep theirs. Array-likes on disk (memory maps, HDF5) are read one batch at
    a time.

    Args:
        data: See the module's docstring.
        batch_size: Samples per batch for data given as arrays or as a torch ``Dataset``.
        max_samples: Stop after this many samples; a last batch of arrays is cut, another one stays
            whole. ``None`` reads to the end, and refuses data that say that they have none
            (``dataset.repeat()``).
        check_finite: Raise when ``x`` is arrays with a NaN or an infinite value.
        inputs: So many first items of a longer tuple are inputs: the arguments that the model
            needs.

    Yields:
        One :class:`Batch` at a time; never an empty one.

    Raises:
        DataError: The data are of an unknown type or empty; or arrays that are ragged, of object
            dtype, or of different lengths; or not finite, if that is checked. The batch and the
            sample are named.

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
    return _checked(_read(data, batch_size, inputs), data, max_samples, check_finite, inputs)


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
        data: See the module's docstring; one-shot iterators too. The batches must be arrays.
        max_samples: At most this many samples, in order; ``None`` for all.
        batch_size: Samples read at a time from data given as arrays.
        check_finite: Raise when ``x`` has a NaN or an infinite value.

    Returns:
        One :class:`Batch` with all of them.

    Raises:
        DataError: As :func:`batches`; or batches that are not arrays of one length, or whose
            arrays do not fit together.
    """
    parts = []
    stream = batches(
        data, batch_size=batch_size, max_samples=max_samples, check_finite=check_finite
    )
    for index, part in enumerate(stream):
        require_arrays(part, f"batch {index}")
        parts.append(part)
    return joined(parts)


def joined(parts: list[Batch]) -> Batch:
    """Batches of arrays in one.

    Raises:
        DataError: Their arrays do not fit together.
    """
    return Batch(
        _concatenate([part.x for part in parts], "x"),
        _concatenate([part.y for part in parts], "y"),
        _concatenate([part.sample_weight for part in parts], "sample_weight"),
    )


def require_arrays(batch: Batch, where: str) -> None:
    """Raise unless the batch's inputs, targets and weights are arrays of one length.

    Raises:
        DataError: They are not; the one that is not is named.
    """
    if batch.regular:
        return
    for value in (batch.x, batch.y, batch.sample_weight):
        try:
            map_leaves(to_numpy, value)
        except DataError as error:
            raise DataError(f"In {where}: {error}") from error
    _common_length(batch, where)
    raise DataError(f"In {where}: arrays of one length are needed. Received: {_describe(batch.x)}")


def paired(stream: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches, but none of a single sample at the end where others come before it.

    A layer that normalises with the batch cannot do so with one value. The lone sample joins the
    batch before it where both are arrays; otherwise it is left out.
    """
    before: Batch | None = None
    for batch in stream:
        if before is not None and batch.count == 1 and (before.count or 0) > 1:
            if batch.regular and before.regular and not batch.named:
                with contextlib.suppress(DataError):
                    before = joined([before, batch])
            continue
        if before is not None:
            yield before
        before = batch
    if before is not None:
        yield before


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
    elif _is_sequence(value):
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
    if _is_sequence(value):
        items = [map_leaves(function, item) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    return function(value)


@dataclass(frozen=True, eq=False)
class Collation:
    """Single samples, and what makes a batch of them.

    Attributes:
        dataset: Sample ``i`` is ``dataset[i]``.
        indices: Of the samples to draw from.
        collate: Samples -> what a loader yields.
        batch_size: The loader's; ``None`` where it has none.
    """

    dataset: Any
    indices: Any
    collate: Callable[[list[Any]], Any]
    batch_size: int | None = None
    inputs: int = 1

    def items(self, indices: Iterable[Any]) -> list[Any]:
        """The samples of these indices."""
        return [self.dataset[index] for index in indices]

    def batch(self, items: list[Any]) -> Batch:
        """Samples in one batch."""
        batch = _unpack(self.collate(items), inputs=self.inputs)
        return _converted(batch, "a batch of collated samples", 0)


def collation_of(data: Any, inputs: int = 1) -> Collation | None:
    """Samples and collate function of a torch loader or dataset; ``None`` where there are none.

    A loader whose own sampler makes the batches has none: which samples meet is its business.
    """
    if _is_indexed(data):
        return Collation(data, range(len(data)), _collated, inputs=inputs)
    if not _is_a(data, ("DataLoader",), "torch") or data.batch_size is None:
        return None
    dataset, sampler = data.dataset, data.sampler
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    if _is_a(sampler, ("SequentialSampler", "RandomSampler"), "torch"):
        indices: Any = range(len(dataset))
    else:
        indices = list(sampler)
    return Collation(dataset, indices, data.collate_fn, data.batch_size, inputs)


def _read(data: Any, batch_size: int, inputs: int) -> Iterator[Any]:
    """What :func:`_raw` yields; what the user's own code raises meanwhile is said as such.

    What the system says (no memory, no disk) goes through as it is.
    """
    try:
        stream = _raw(data, batch_size, inputs)
    except (FrostlineError, MemoryError, OSError):
        raise
    except Exception as error:
        raise _broken(error, data) from error
    return _going_on(stream, data)


def _going_on(stream: Iterator[Any], data: Any) -> Iterator[Any]:
    try:
        yield from stream
    except (FrostlineError, MemoryError, OSError):
        raise
    except Exception as error:
        raise _broken(error, data) from error


def _broken(error: Exception, data: Any) -> DataError:
    return DataError(
        f"Reading the data raised {first_line(error).rstrip('.')}. Received: {_describe(data)}"
    )


def _raw(data: Any, batch_size: int, inputs: int = 1) -> Iterator[Any]:
    """Pick the reader for the type of ``data``; yields what a loader yields, or ``Batch``."""
    if isinstance(data, (str, bytes)) or hasattr(data, "__fspath__") or data is None:
        raise DataError(f"{_ACCEPTED} Received: {_describe(data)}")
    if _is_a(data, ("PyDataset", "Sequence"), "keras"):
        # Not iter(): it would never end, as items beyond the last one raise nothing.
        endless = _is_endless(data)
        indices = itertools.count() if endless else range(len(data))
        return (_unpack(data[index], strict=True) for index in indices)
    if _is_a(data, ("DatasetV2", "DistributedDataset"), "tensorflow"):
        return (_unpack(item, strict=True) for item in data)
    if _is_a(data, ("IterableDataset", "IterDataPipe"), "torch"):
        return _grouped(iter(data), batch_size)
    if _is_a(data, ("DataLoader",), "torch"):
        return _loaded(data)
    if _is_loader(data):
        return iter(data)
    if _is_indexed(data):
        return _grouped((data[index] for index in range(len(data))), batch_size)
    if isinstance(data, Batch):
        return iter([data]) if data.whole is not None else _cut(data, batch_size)
    if isinstance(data, tuple):
        return _cut(_unpack(data, strict=True, cut=True, inputs=inputs), batch_size)
    if isinstance(data, list):
        return _from_list(data, batch_size)
    if isinstance(data, Mapping) or _has_shape(data):
        return _cut(Batch(data), batch_size)
    if _is_object(data):
        return iter([data])
    if hasattr(data, "__iter__"):
        return iter(data)
    raise DataError(f"{_ACCEPTED} Received: {_describe(data)}")


def _loaded(loader: Any) -> Iterator[Any]:
    """What a torch loader yields; its default collation makes lists of tuples' items."""
    own = getattr(loader.collate_fn, "__name__", "") == "default_collate"
    for item in loader:
        yield tuple(item) if own and isinstance(item, list) else item


def _grouped(items: Iterator[Any], batch_size: int) -> Iterator[Any]:
    while group := list(itertools.islice(items, batch_size)):
        yield _collated(group)


def _collated(items: list[Any]) -> Any:
    """Samples in one batch, as torch's loader does it by default."""
    loading = sys.modules.get("torch.utils.data")
    try:
        if loading is None:
            return _stacked(items)
        made = loading.default_collate(items)
    except Exception as error:
        raise DataError(
            f"the samples of this dataset do not fit in one batch ({first_line(error)}); pass a "
            "loader with a collate function, for example torch.utils.data.DataLoader(dataset, "
            f"collate_fn=...). Received: samples of type {_describe(items[0])}"
        ) from error
    return tuple(made) if isinstance(items[0], tuple) else made


def _stacked(items: list[Any]) -> Any:
    columns = [leaves(item) for item in items]
    stacked = iter([np.stack([to_numpy(leaf) for _, leaf in rows]) for rows in zip(*columns)])  # noqa: B905
    return map_leaves(lambda _: next(stacked), items[0])


def _from_list(data: list[Any], batch_size: int) -> Iterator[Any]:
    if not data:
        raise NoSamplesError("The data hold no samples. Received: an empty list")
    if _is_numbers(data):
        return _cut(Batch(to_numpy(data)), batch_size)
    if not any(_has_shape(item) or isinstance(item, (str, bytes)) for item in data):
        return iter(data)
    raise DataError(
        "A list must hold batches, (x, y) tuples. For a model with several inputs pass "
        "((a, b), y) or ((a, b),); for batches without labels pass [(x,), (x,)]. "
        f"Received: a list of {_describe(data[0])}"
    )


def _unpack(item: Any, *, strict: bool = False, cut: bool = False, inputs: int = 1) -> Batch:
    """What a loader yields -> inputs, targets and weights, as far as they can be told apart.

    ``strict``: the third item can only be sample weights, as Keras has it. ``cut``: the tuple holds
    the arrays of all samples. ``inputs``: so many first items of a longer one are inputs.
    """
    if isinstance(item, Batch):
        return item
    whole = None if cut else item
    positional = _is_sequence(item) or (isinstance(item, tuple) and not hasattr(item, "to"))
    if not positional or _is_images(item):
        return Batch(item, whole=whole)
    if len(item) > inputs > 1 and not isinstance(item[0], (tuple, list, Mapping)):
        item = (tuple(item[:inputs]), *item[inputs:])
    else:
        inputs = 1
    if strict and not 1 <= len(item) <= 3:
        raise DataError(
            "A tuple of data must be (x,), (x, y) or (x, y, sample_weight). "
            f"Received: {len(item)} items"
        )
    if not item:
        raise DataError("A batch holds nothing. Received: an empty tuple")
    if _is_loader(item[0]) or hasattr(item[0], "__next__"):
        raise DataError(
            "A dataset brings its own labels: pass it alone, not in a tuple. "
            f"Received: ({_describe(item[0])}, ...)"
        )
    if len(item) > 3:  # several inputs, several labels: only the user's step knows
        return Batch(item[0], whole=whole, inputs=inputs)
    x, y, third = (*item, None, None)[:3]
    if third is None:
        return Batch(x, y, whole=whole, inputs=inputs)
    if _is_weights(third, y, temporal=strict):
        return Batch(x, y, third, whole=whole, inputs=inputs)
    if strict:
        described = ", ".join(
            f"{getattr(leaf, 'dtype', type(leaf).__name__)} of shape {_shape(leaf)}"
            for _, leaf in leaves(third)
        )
        raise DataError(
            "The third item must be sample weights: floating numbers, none negative, one per "
            "sample. Pass (x, y), or weights.astype('float32') if they are weights. "
            f"Received: {described or _describe(third)}"
        )
    return Batch(x, y, whole=whole, inputs=inputs)


def _is_weights(value: Any, y: Any, *, temporal: bool) -> bool:
    """Floating, finite, not negative, shape ``(n,)`` or ``(n, 1)``; nested like ``y`` may be.

    ``temporal``: also one weight per time step, in the leading shape of ``y``.
    """
    nested = isinstance(value, (Mapping, tuple, list)) and not _is_numbers(value)
    if nested and not isinstance(y, type(value)):
        return False
    found = leaves(value)
    for _, leaf in found:
        try:
            array = leaf if _has_shape(leaf) and hasattr(leaf, "dtype") else to_numpy(leaf)
            if "float" not in str(array.dtype):
                return False
            shape = tuple(int(side) for side in array.shape)
            flat = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
            if not flat and not (temporal and shape == _leading_shape(y, len(shape))):
                return False
            if not hasattr(array, "read_direct"):  # HDF5: the values are checked batch by batch
                numbers = to_numpy(array)
                if not (np.isfinite(numbers) & (numbers >= 0)).all():
                    return False
        except (DataError, TypeError):
            return False
    return bool(found)


def _leading_shape(y: Any, axes: int) -> tuple[int, ...]:
    found = leaves(y)
    return _shape(found[0][1])[:axes] if found else ()


def _shape(value: Any) -> tuple[int, ...]:
    """Its shape; −1 for a side that is open, as in ragged and nested tensors."""
    if getattr(value, "is_nested", False):
        return (int(value.size(0)), *[-1] * (value.dim() - 1))
    shape = value.shape if hasattr(value, "shape") else np.shape(value)
    return tuple(-1 if side is None else int(side) for side in shape)


def _cut(whole: Batch, batch_size: int) -> Iterator[Batch]:
    """Cut arrays into batches; lengths are checked before the first one is handed out."""
    whole = _mapped(whole, _sliceable)
    count = _common_length(whole, "the data")

    def cut() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            yield _mapped(whole, operator.itemgetter(rows))

    return cut()


def _sliceable(value: Any) -> Any:
    """Leave what can be cut row by row as it is (disk arrays stay on disk); convert the rest."""
    if type(value).__module__.split(".")[0] == "pandas" or not _has_shape(value):
        return to_numpy(value)
    return value


def _checked(
    raw: Iterator[Any], data: Any, max_samples: int | None, check_finite: bool, inputs: int
) -> Iterator[Batch]:
    seen, weighted = 0, None
    for index, item in enumerate(raw):
        where = f"batch {index}"
        batch = _converted(_unpack(item, inputs=inputs), where, seen)
        count = batch.count
        if count == 0:
            continue
        if weighted not in (None, batch.sample_weight is not None):
            raise DataError(
                f"In {where}: the third item is sample weights in some batches and not in others: "
                "weights are floating numbers, none negative, one per sample. Pass (x, y) batches, "
                f"or step=. Received: {_describe(item)}"
            )
        weighted = batch.sample_weight is not None
        count = 1 if count is None else count
        if max_samples is not None and seen + count > max_samples and batch.regular:
            batch = take(batch, slice(max_samples - seen))
            count = len(batch)
        if check_finite:
            _require_finite(batch, where, seen)
        seen += count
        yield batch
        if max_samples is not None and seen >= max_samples:
            return
    if seen == 0:
        raise NoSamplesError(f"The data hold no samples. Received: {_describe(data)}")


def _converted(batch: Batch, where: str, seen: int) -> Batch:
    """Arrays become numpy where a part is arrays of one length; all else stays as it is."""
    found = leaves(batch.x)
    if not found:
        raise DataError(f"In {where}: x holds no array. Received: x={batch.x!r}")
    alone = len(found) == 1 and batch.x is found[0][1]
    for name, leaf in ((f"x{found[0][0]}", found[0][1]), ("y", batch.y)):
        if (alone or batch.whole is None) and _is_scalar(leaf):
            raise _not_a_batch(where, name)
    if batch.whole is None:
        try:
            batch = _mapped(batch, to_numpy)
        except DataError as error:
            raise DataError(f"In {where} (from sample {seen}): {error}") from error
        _common_length(batch, where)
        return batch
    return replace(
        batch,
        x=batch.x if _one_each(batch.x, batch.y) else _as_arrays(batch.x),
        y=_as_arrays(batch.y),
        sample_weight=_as_arrays(batch.sample_weight),
    )


def _not_a_batch(where: str, name: str) -> DataError:
    return DataError(
        f"In {where}: {name} is a single number, not a batch; batch the data first, for example "
        "with dataset.batch(32)."
    )


def _as_arrays(value: Any) -> Any:
    """The value in numpy if it is arrays of one length, else the value itself."""
    if value is None:
        return None
    try:
        arrays = map_leaves(to_numpy, value)
    except DataError:
        return value
    found = [leaf for _, leaf in leaves(arrays)]
    numeric = all(leaf.ndim and leaf.dtype.kind in "buifcUS" for leaf in found)
    same = found and numeric and len({len(leaf) for leaf in found}) == 1
    return arrays if same and not _is_images(value) else value


def _count(value: Any) -> int | None:
    """Samples in a part of a batch."""
    graphs = getattr(value, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    packed = getattr(value, "batch_sizes", None)  # of a PackedSequence, step by step
    if packed is not None and len(packed):
        return int(packed[0])
    shapes = [_shape(leaf) if _has_shape(leaf) else () for _, leaf in leaves(value)]
    sides = {shape[0] if shape else None for shape in shapes}
    if _is_sequence(value):
        samples = all(_has_shape(item) or isinstance(item, Mapping) for item in value)
        if _is_images(value) or (samples and len(sides) > 1):
            return len(value)
    return next((shape[0] for shape in shapes if shape), None)


def _is_images(value: Any) -> bool:
    """A list of tensors of different sizes, one per sample, as detectors take it.

    Two or three of them could also be inputs and targets, which have the number of samples in
    common. As samples they differ in the first axis, or have three axes with few channels first.
    """
    if not _is_sequence(value):
        return False
    if not all(_has_shape(item) and hasattr(item, "dtype") for item in value):
        return False
    shapes = [_shape(item) for item in value]
    if isinstance(value, tuple) and len(value) <= 3:
        return False
    if len({len(shape) for shape in shapes}) > 1 or not shapes[0]:
        return False
    if len({shape[0] for shape in shapes}) > 1:
        return True
    image = len(shapes[0]) == 3 and shapes[0][0] <= _MOST_COLOURS
    return image and (len(value) > 3 or len(set(shapes)) > 1)


def _one_each(x: Any, y: Any) -> bool:
    """A list of samples with a list of as many mappings, as detectors take them."""
    both = isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)) and len(x) == len(y)
    return both and bool(len(y)) and all(isinstance(item, Mapping) for item in y)


def _is_scalar(value: Any) -> bool:
    shape = None if getattr(value, "is_nested", False) else getattr(value, "shape", None)
    return (shape is not None and len(shape) == 0) or isinstance(value, (bool, int, float, complex))


def _is_indexed(data: Any) -> bool:
    """A dataset of single samples, read by index."""
    if _is_a(data, ("Dataset",), "datasets"):
        return True
    named = _is_a(data, ("Dataset",), "torch")
    if not named or hasattr(data, "__iter__") or _is_a(data, ("IterableDataset",), "torch"):
        return False
    if not hasattr(data, "__len__"):
        raise DataError(
            "the dataset has no length; pass a DataLoader, or an iterable of batches. "
            f"Received: {_describe(data)}"
        )
    return True


def _is_object(data: Any) -> bool:
    """One batch that is an object with tensors inside, such as a graph."""
    return callable(getattr(data, "to", None)) and not hasattr(data, "__next__")


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
        if len(_shape(leaf)) == 0:
            raise _not_a_batch(where, name)
    lengths = {_shape(leaf)[0] for _, leaf in named}
    if len(lengths) > 1:
        sizes = ", ".join(f"{name}: {_shape(leaf)[0]}" for name, leaf in named)
        hint = " (one batch as it is goes in a list: [batch])" if where == "the data" else ""
        raise DataError(
            f"In {where}: all arrays must have the same number of samples{hint}. Received: {sizes}"
        )
    return lengths.pop()


def _require_finite(batch: Batch, where: str, start: int) -> None:
    for name, leaf in leaves(batch.x):
        if not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "fc":
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


def _is_sequence(value: Any) -> bool:
    """A list or tuple of parts; a tuple with methods of a tensor (PackedSequence) is one part."""
    plain = isinstance(value, (list, tuple)) and not callable(getattr(value, "to", None))
    return plain and not _is_numbers(value)


def _has_shape(value: Any) -> bool:
    """Whether it is an array of some kind; a nested tensor raises an error when asked."""
    return bool(getattr(value, "is_nested", False)) or hasattr(value, "shape")


def _is_numbers(value: Any) -> bool:
    """A nested list of plain numbers or strings: one array, not a structure of arrays."""
    while isinstance(value, (list, tuple)):
        if not value:
            return True
        value = value[0]
    return isinstance(value, (int, float, complex, str, np.generic))


def _describe(value: Any) -> str:
    nested = getattr(value, "is_nested", False)
    shape = _shape(value) if nested else getattr(value, "shape", None)
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    if isinstance(value, (str, bytes)):
        return f"{name} {value!r}"
    return name if shape is None else f"{name} of shape {tuple(shape)}"
