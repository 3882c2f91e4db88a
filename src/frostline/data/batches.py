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

from frostline.data.arrays import (
    description,
    has_shape,
    is_numbers,
    is_sequence,
    leaves,
    map_leaves,
    owned,
    shape_of,
    to_numpy,
)
from frostline.data.batch import (
    Batch,
    NoSamplesError,
    as_arrays,
    common_length,
    is_images,
    joined,
    mapped,
    not_a_batch,
    one_each,
    require_arrays,
    require_finite,
    take,
)
from frostline.types import DataError, FrostlineError
from frostline.types.reasons import first_line

_ACCEPTED = (
    "Data must be (x, y) or (x, y, sample_weight) arrays, a bare x, a tf.data.Dataset, a Keras "
    "PyDataset, a torch DataLoader or Dataset, or an iterable of batches."
)

#: Iterators of a list or tuple, whose items all exist: none is filled anew.
_OF_HELD: tuple[Any, ...] = (type(iter([])), type(iter(())))


def batches(
    data: Any,
    *,
    batch_size: int = 32,
    max_samples: int | None = None,
    check_finite: bool = False,
    inputs: int = 1,
    whole: bool = False,
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
        whole: A user's step takes batches as they come: a last one that the loader yields is not
            cut, and a list of tensors is one of batches, however many the model takes.

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
            f"Received: {description(data)}"
        )
    read = _read(data, batch_size, inputs, whole)
    return _checked(read, data, max_samples, check_finite, inputs, whole)


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
            f"arrays, a list of batches, or a dataset. Received: {description(data)}"
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


def _read(data: Any, batch_size: int, inputs: int, whole: bool) -> Iterator[Any]:
    """What :func:`_raw` yields; what the user's own code raises meanwhile is said as such.

    What the system says (no memory, no disk) goes through as it is.
    """
    try:
        stream = _raw(data, batch_size, inputs, whole)
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
        f"Reading the data raised {first_line(error).rstrip('.')}. Received: {description(data)}"
    )


def _raw(data: Any, batch_size: int, inputs: int, whole: bool) -> Iterator[Any]:
    """Pick the reader for the type of ``data``; yields what a loader yields, or ``Batch``.

    Code of a user's own may fill the same memory anew for each batch, and batches are read ahead
    and kept here: each has memory of its own. Torch's collation makes new tensors anyway.
    """
    if isinstance(data, (str, bytes)) or hasattr(data, "__fspath__") or data is None:
        raise DataError(f"{_ACCEPTED} Received: {description(data)}")
    if _is_a(data, ("PyDataset", "Sequence"), "keras"):
        # Not iter(): it would never end, as items beyond the last one raise nothing.
        endless = _is_endless(data)
        indices = itertools.count() if endless else range(len(data))
        return (_unpack(owned(data[index]), strict=True) for index in indices)
    if _is_a(data, ("DatasetV2", "DistributedDataset"), "tensorflow"):
        return (_unpack(item, strict=True) for item in data)
    if _is_a(data, ("IterableDataset", "IterDataPipe"), "torch"):
        return _grouped(iter(data), batch_size)
    if _is_a(data, ("DataLoader",), "torch"):
        return _loaded(data)
    if _is_loader(data):
        return map(owned, data)
    if _is_indexed(data):
        return _grouped((data[index] for index in range(len(data))), batch_size)
    if isinstance(data, Batch):
        return iter([data]) if data.whole is not None else _cut(data, batch_size)
    if isinstance(data, tuple):
        return _cut(_unpack(data, strict=True, cut=True, inputs=inputs), batch_size)
    if isinstance(data, list):
        return _from_list(data, batch_size, 1 if whole else inputs)
    if isinstance(data, Mapping) or has_shape(data):
        return _cut(Batch(data), batch_size)
    if _is_object(data):
        return iter([data])
    if hasattr(data, "__iter__"):
        return iter(data) if isinstance(data, _OF_HELD) else map(owned, data)
    raise DataError(f"{_ACCEPTED} Received: {description(data)}")


def _loaded(loader: Any) -> Iterator[Any]:
    """What a torch loader yields; its default collation makes lists of tuples' items."""
    own = getattr(loader.collate_fn, "__name__", "") == "default_collate"
    for item in loader:
        if own:
            yield tuple(item) if isinstance(item, list) else item
        else:
            yield owned(item)


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
            f"collate_fn=...). Received: samples of type {description(items[0])}"
        ) from error
    return tuple(made) if isinstance(items[0], tuple) else made


def _stacked(items: list[Any]) -> Any:
    columns = [leaves(item) for item in items]
    stacked = iter([np.stack([to_numpy(leaf) for _, leaf in rows]) for rows in zip(*columns)])  # noqa: B905
    return map_leaves(lambda _: next(stacked), items[0])


def _from_list(data: list[Any], batch_size: int, inputs: int) -> Iterator[Any]:
    if not data:
        raise NoSamplesError("The data hold no samples. Received: an empty list")
    if is_numbers(data):
        return _cut(Batch(to_numpy(data)), batch_size)
    if not any(has_shape(item) or isinstance(item, (str, bytes)) for item in data):
        return iter(data)
    if len(data) == inputs > 1 and all(map(has_shape, data)):  # what the model takes, in order
        return _cut(Batch(tuple(data)), batch_size)
    if inputs == 1 and _are_batches(data):
        return iter(data)
    raise DataError(
        "A list must hold batches, (x, y) tuples. For a model with several inputs pass "
        "((a, b), y) or ((a, b),); for batches without labels pass [(x,), (x,)]. "
        f"Received: a list of {description(data[0])}"
    )


def _are_batches(data: list[Any]) -> bool:
    """Whether a list holds torch tensors of one kind of samples, and no images of a detector.

    Keras takes a list of arrays as several inputs; a torch module that has one input cannot.
    """
    if is_images(data) or not all(_is_a(item, ("Tensor",), "torch") for item in data):
        return False
    return len({(tuple(item.shape[1:]), item.dtype) for item in data}) == 1


def _unpack(item: Any, *, strict: bool = False, cut: bool = False, inputs: int = 1) -> Batch:
    """What a loader yields -> inputs, targets and weights, as far as they can be told apart.

    ``strict``: the third item can only be sample weights, as Keras has it. ``cut``: the tuple holds
    the arrays of all samples. ``inputs``: so many first items of a longer one are inputs.
    """
    if isinstance(item, Batch):
        return item
    whole = None if cut else item
    positional = is_sequence(item) or (isinstance(item, tuple) and not hasattr(item, "to"))
    if not positional or is_images(item):
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
            f"Received: ({description(item[0])}, ...)"
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
            f"{getattr(leaf, 'dtype', type(leaf).__name__)} of shape {shape_of(leaf)}"
            for _, leaf in leaves(third)
        )
        raise DataError(
            "The third item must be sample weights: floating numbers, none negative, one per "
            "sample. Pass (x, y), or weights.astype('float32') if they are weights. "
            f"Received: {described or description(third)}"
        )
    return Batch(x, y, whole=whole, inputs=inputs)


def _is_weights(value: Any, y: Any, *, temporal: bool) -> bool:
    """Floating, finite, not negative, shape ``(n,)`` or ``(n, 1)``; nested like ``y`` may be.

    ``temporal``: also one weight per time step, in the leading shape of ``y``.
    """
    nested = isinstance(value, (Mapping, tuple, list)) and not is_numbers(value)
    if nested and not isinstance(y, type(value)):
        return False
    found = leaves(value)
    for _, leaf in found:
        try:
            array = leaf if has_shape(leaf) and hasattr(leaf, "dtype") else to_numpy(leaf)
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
    return shape_of(found[0][1])[:axes] if found else ()


def _cut(whole: Batch, batch_size: int) -> Iterator[Batch]:
    """Cut arrays into batches; lengths are checked before the first one is handed out."""
    whole = mapped(whole, _sliceable)
    count = common_length(whole, "the data")

    def cut() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            yield mapped(whole, operator.itemgetter(rows))

    return cut()


def _sliceable(value: Any) -> Any:
    """Leave what can be cut row by row as it is (disk arrays stay on disk); convert the rest."""
    if type(value).__module__.split(".")[0] == "pandas" or not has_shape(value):
        return to_numpy(value)
    return value


def _checked(
    raw: Iterator[Any],
    data: Any,
    max_samples: int | None,
    check_finite: bool,
    inputs: int,
    whole: bool,
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
                f"or step=. Received: {description(item)}"
            )
        weighted = batch.sample_weight is not None
        count = 1 if count is None else count
        may_cut = batch.regular and not (whole and batch.whole is not None)
        if max_samples is not None and seen + count > max_samples and may_cut:
            batch = take(batch, slice(max_samples - seen))
            count = len(batch)
        if check_finite:
            require_finite(batch, where, seen)
        seen += count
        yield batch
        if max_samples is not None and seen >= max_samples:
            return
    if seen == 0:
        raise NoSamplesError(f"The data hold no samples. Received: {description(data)}")


def _converted(batch: Batch, where: str, seen: int) -> Batch:
    """Arrays become numpy where a part is arrays of one length; all else stays as it is."""
    found = leaves(batch.x)
    if not found:
        raise DataError(f"In {where}: x holds no array. Received: x={batch.x!r}")
    alone = len(found) == 1 and batch.x is found[0][1]
    for name, leaf in ((f"x{found[0][0]}", found[0][1]), ("y", batch.y)):
        if (alone or batch.whole is None) and _is_scalar(leaf):
            raise not_a_batch(where, name)
    if batch.whole is None:
        try:
            batch = mapped(batch, to_numpy)
        except DataError as error:
            raise DataError(f"In {where} (from sample {seen}): {error}") from error
        common_length(batch, where)
        return batch
    return replace(
        batch,
        x=batch.x if one_each(batch.x, batch.y) else as_arrays(batch.x),
        y=as_arrays(batch.y),
        sample_weight=as_arrays(batch.sample_weight),
    )


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
            f"Received: {description(data)}"
        )
    return True


def _is_object(data: Any) -> bool:
    """One batch that is an object with tensors inside, such as a graph."""
    return callable(getattr(data, "to", None)) and not hasattr(data, "__next__")


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
