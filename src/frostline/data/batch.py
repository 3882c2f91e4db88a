"""A batch: what a loader yields, and its inputs, targets and weights as far as they are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    shape_of,
    to_numpy,
)
from frostline.types import DataError, ModelError
from frostline.types.reasons import first_line

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
        inputs: So many first items of what a step gets are what ``x`` holds.
        single: It is cut from tuples ``(x,)``, and a step gets one.
        kind: It is cut from named tuples of this class, and a step gets one.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    whole: Any = None
    inputs: int = 1
    single: bool = False
    kind: Any = None

    @property
    def count(self) -> int | None:
        """Number of samples; ``None`` where the batch does not tell."""
        if one_each(self.x, self.y):
            return len(self.x)
        owners = None if is_images(self.x) else _owners(self.given)
        if owners is not None:
            return owners
        return next((n for n in map(_count, (self.x, self.y)) if n is not None), None)

    def __len__(self) -> int:
        number = self.count
        if number is None:
            raise DataError(
                "the number of samples of this batch is not known. "
                f"Received: {description(self.whole if self.whole is not None else self.x)}"
            )
        return number

    @property
    def regular(self) -> bool:
        """Inputs, targets and weights are arrays of one length."""
        if is_images(self.x) or one_each(self.x, self.y):
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
        if not isinstance(self.whole, (tuple, list)) or is_numbers(self.whole):
            return ()
        known = (self.x, self.y, self.sample_weight)
        used = max(1, sum(part is not None for part in known)) + self.inputs - 1
        if self.y is None and is_images(self.whole):
            return ()
        return tuple(item for item in self.whole[used:] if item is not None)

    @property
    def given(self) -> Any:
        """What a user's ``step(model, batch)`` gets: ``whole``, or the tuple of the arrays."""
        if self.whole is not None:
            return self.whole
        items = tuple(self.x) if self.inputs > 1 else (self.x,)
        items += tuple(part for part in (self.y, self.sample_weight) if part is not None)
        if self.kind is not None:
            return self.kind(*items, *[None] * (len(self.kind._fields) - len(items)))
        return items if len(items) > 1 or self.single else items[0]


def take(batch: Batch, rows: Any) -> Batch:
    """The rows of a batch of arrays: a slice, or an array of indices.

    Raises:
        DataError: The batch is not arrays of one length.
    """
    require_arrays(batch, "the batch")
    return mapped(batch, lambda leaf: leaf[rows])


def mapped(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """Inputs, targets and weights with ``function`` applied to every array."""
    x, y, weight = (map_leaves(function, v) for v in (batch.x, batch.y, batch.sample_weight))
    return Batch(x, y, weight, **_as_yielded(batch))


def _as_yielded(batch: Batch) -> dict[str, Any]:
    """How a step gets arrays that are cut from a batch: in the tuple that the loader yields."""
    whole = batch.whole
    return {
        "inputs": batch.inputs,
        "single": batch.single or (isinstance(whole, tuple) and len(whole) == 1),
        "kind": type(whole) if hasattr(whole, "_fields") and batch.x is not whole else batch.kind,
    }


def all_inputs(batch: Batch, needed: int) -> Batch:
    """The batch without labels where a call of the model needs as many arguments as it holds."""
    items = batch.given
    several = isinstance(items, tuple) and not hasattr(items, "to") and len(items) == needed > 1
    several = several and not isinstance(items[0], (tuple, list, Mapping))
    return replace(batch, x=items, y=None, sample_weight=None, inputs=needed) if several else batch


def left_out(batch: Batch) -> str | None:
    """What a loss of ``(x, y)`` does not see of this batch, for a person; ``None``: nothing."""
    rest = batch.rest
    if not rest:
        return None
    shown = ", ".join(description(item) for item in rest[:3])
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


def failure(error: Exception, batch: Batch, *, step: bool = False) -> ModelError:
    """What a user's model, loss or (with ``step``) step raised on a batch, as one of our errors."""
    if step:
        text = first_line(error)
        text = text if text.endswith("...") else f"{text.rstrip('.')}."
        return ModelError(
            f"the step fails on a batch as the data give it: {text} It "
            "is called as step(model, batch), must not train the model, and returns the loss; call "
            f"it by hand on one batch to see where. Received: a batch of {described(batch)}"
        )
    return ModelError(
        f"the model or its loss fails on a batch as the data give it: {first_line(error)}. "
        "Where the model takes a batch in its own way, pass step=, a function (model, batch) "
        f"that returns the loss. Received: a batch of {described(batch)}"
    )


def joined(parts: list[Batch]) -> Batch:
    """Batches of arrays in one.

    Raises:
        DataError: Their arrays do not fit together.
    """
    return Batch(
        _concatenate([part.x for part in parts], "x"),
        _concatenate([part.y for part in parts], "y"),
        _concatenate([part.sample_weight for part in parts], "sample_weight"),
        **_as_yielded(parts[0]),
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
    common_length(batch, where)
    raise DataError(
        f"In {where}: arrays of one length are needed. Received: {description(batch.x)}"
    )


def _count(value: Any) -> int | None:
    """Samples in a part of a batch."""
    graphs = getattr(value, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    packed = getattr(value, "batch_sizes", None)  # of a PackedSequence, step by step
    if packed is not None and len(packed):
        return int(packed[0])
    shapes = [shape_of(leaf) if has_shape(leaf) else () for _, leaf in leaves(value)]
    sides = {shape[0] if shape else None for shape in shapes}
    if is_sequence(value):
        samples = all(has_shape(item) or isinstance(item, Mapping) for item in value)
        if is_images(value) or (samples and len(sides) > 1):
            return len(value)
    if shapes == [()] and hasattr(value, "__dict__"):  # an object with tensors inside
        held = [shape_of(item) for item in vars(value).values() if has_shape(item)]
        shapes = held if len({shape[:1] for shape in held}) == 1 else []
    return next((shape[0] for shape in shapes if shape), None)


def _owners(value: Any) -> int | None:
    """Samples of a batch whose points lie one behind the other: clouds, graphs, bags of words.

    An index tells the sample of each point: whole numbers in order, from 0 on and none left out,
    as many different ones as another array has rows.
    """
    arrays = [leaf for _, leaf in leaves(value) if has_shape(leaf) and shape_of(leaf)]
    lengths = [shape_of(leaf)[0] for leaf in arrays]
    if len(set(lengths)) < 2:
        return None
    whole = ["int" in str(getattr(leaf, "dtype", "")) for leaf in arrays]
    flat = [len(shape_of(leaf)) == 1 for leaf in arrays]
    # Whole numbers in two rows may be pairs of points that an edge joins.
    rows = {n for n, single, integers in zip(lengths, flat, whole, strict=True)
            if single or not integers}  # fmt: skip
    for leaf, length, single, integers in zip(arrays, lengths, flat, whole, strict=True):
        if not (single and integers and length) or lengths.count(length) < 2:
            continue
        index = to_numpy(leaf)
        number = int(index[-1]) + 1
        in_order = not index[0] and set(np.unique(np.diff(index))) <= {0, 1}
        if in_order and number < length and number in rows:
            return number
    return None


def is_images(value: Any) -> bool:
    """A list of tensors of different sizes, one per sample, as detectors take it.

    Two or three of them could also be inputs and targets, which have the number of samples in
    common. As samples they differ in the first axis, or have three axes with few channels first.
    """
    if not is_sequence(value):
        return False
    if not all(has_shape(item) and hasattr(item, "dtype") for item in value):
        return False
    shapes = [shape_of(item) for item in value]
    if isinstance(value, tuple) and len(value) <= 3:
        return False
    if len({len(shape) for shape in shapes}) > 1 or not shapes[0]:
        return False
    if len({shape[0] for shape in shapes}) > 1:
        return True
    image = len(shapes[0]) == 3 and shapes[0][0] <= _MOST_COLOURS
    return image and (len(value) > 3 or len(set(shapes)) > 1)


def one_each(x: Any, y: Any) -> bool:
    """A list of samples with a list of as many mappings, as detectors take them."""
    both = isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)) and len(x) == len(y)
    return both and bool(len(y)) and all(isinstance(item, Mapping) for item in y)


def not_a_batch(where: str, name: str) -> DataError:
    """The error for a single number where a batch is expected."""
    return DataError(
        f"In {where}: {name} is a single number, not a batch; batch the data first, for example "
        "with dataset.batch(32)."
    )


def common_length(batch: Batch, where: str) -> int:
    """First dimension shared by every array of the batch."""
    named = [
        (f"{field}{name}", leaf)
        for field in ("x", "y", "sample_weight")
        for name, leaf in leaves(getattr(batch, field))
    ]
    if not leaves(batch.x):
        raise DataError(f"In {where}: x holds no array. Received: x={batch.x!r}")
    for name, leaf in named:
        if len(shape_of(leaf)) == 0:
            raise not_a_batch(where, name)
    lengths = {shape_of(leaf)[0] for _, leaf in named}
    if len(lengths) > 1:
        sizes = ", ".join(f"{name}: {shape_of(leaf)[0]}" for name, leaf in named)
        hint = " (one batch as it is goes in a list: [batch])" if where == "the data" else ""
        raise DataError(
            f"In {where}: all arrays must have the same number of samples{hint}. Received: {sizes}"
        )
    return lengths.pop()


def require_finite(batch: Batch, where: str, start: int) -> None:
    """Raise where an input is NaN or infinite; ``start`` is the number of the first sample."""
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


def as_arrays(value: Any) -> Any:
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
    return arrays if same and not is_images(value) else value
