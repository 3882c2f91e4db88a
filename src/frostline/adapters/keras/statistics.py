"""Sums, mean and variance per channel of what a BN layer sees, formed where the tensor is.

Sums are of deviations from a value near the mean, in float32, over chunks of at most :data:`CHUNK`
values: one pass over the tensor moves little, and channels whose mean is far larger than their
standard deviation keep their variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from frostline.types import ModelError

#: Values added up in float32 before float64 takes over. Random rounding of 256 terms stays below
#: 1e-6 of their sum and averages out over the chunks.
CHUNK = 256

#: Values in one sample from which on a batch of them does not fit into a processor's cache.
LARGE_SAMPLE = 1 << 15


def batch_statistics(x: Any, axis: int) -> Any:
    """Mean and biased variance per channel, shape ``(2, channels)``.

    The derivative is formed of the input and the mean: kept are no tensors of the input's size but
    the input, which would else take a third of the memory of a backward pass, and compile as long.
    """
    axes = reduced(x, axis)

    def formed(x: Any) -> tuple[Any, Any]:
        if keras.backend.backend() == "tensorflow" and axes == list(range(len(axes))):
            rows, near = rows_of(x)
            blocks = _blocks(tuple(x.shape[1:]))
            sums = _sums_of_rows(rows, near, blocks, squares=_squares_by_norm)
            offset, square = (ops.mean(each, axis=0) / rows.shape[1] for each in sums)
            return near + offset, ops.maximum(square - ops.square(offset), 0)
        # Around a value near the mean: neither E[x²] − E[x]² nor a float32 sum of large values is
        # right where the mean is far larger than the standard deviation.
        shift = ops.mean(x[:1], axis=axes, keepdims=True)
        deviations = x - shift
        offset = ops.mean(deviations, axis=axes, keepdims=True)
        if keras.backend.backend() == "torch":
            # In the deviations' own memory: two more tensors of that size cost more than the sums.
            squares = deviations.sub_(offset).square_()
        else:
            squares = ops.square(deviations - offset)
        return shift + offset, ops.mean(squares, axis=axes)

    @ops.custom_gradient  # type: ignore[untyped-decorator]
    def both(x: Any) -> tuple[Any, Any]:
        mean, variance = formed(x)

        def back(*given: Any, upstream: Any = None) -> Any:
            to_mean, to_variance = (
                ops.reshape(slope, mean.shape)
                for slope in ops.unstack(given[-1] if upstream is None else upstream, num=2)
            )
            count = ops.cast(ops.size(x), x.dtype) / math.prod(mean.shape)
            return (to_mean + 2 * to_variance * (x - mean)) / count

        return ops.stack([ops.reshape(mean, (-1,)), variance]), back

    return both(x)


def reduced(x: Any, axis: int) -> list[int]:
    """All axes but that of the channels."""
    rank = len(x.shape)
    return [position for position in range(rank) if position != axis % rank]


def of_batch(count: Any, shift: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """How far the mean is from ``shift``, and the biased variance."""
    rest = ops.maximum(ops.cast(count, shift.dtype), 1)
    offset = ops.sum(first, axis=0) / rest
    return offset, ops.maximum(ops.sum(second, axis=0) / rest - ops.square(offset), 0)


def rows_of(x: Any) -> tuple[Any, Any]:
    """``(chunks, values, channels)``, float32 at least, and a value near the mean.

    Any such value will do; the middle column spares a pass over the tensor.
    """
    x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
    size = _chunk(tuple(x.shape[1:-1]))
    rows = ops.reshape(x, (-1, size, x.shape[-1]))
    return rows, ops.mean(rows[:, size // 2], axis=0)


def chunk_sums(x: Any, axis: int, mask: Any) -> tuple[Any, Any, Any, Any]:
    """Count, shift ``(c,)`` and chunk sums of ``x - shift`` and of its square, ``(chunks, c)``."""
    rank = len(x.shape)
    if axis % rank != rank - 1:
        if mask is not None:
            raise ModelError(
                "a masked BN layer can be measured only with the channels on the last axis. "
                f"Received: axis={axis}"
            )
        x = ops.moveaxis(x, axis, -1)
    rows, shift = rows_of(x)
    size = rows.shape[1]
    if mask is None:
        count = ops.shape(rows)[0] * size
        first, second = _sums_of_rows(rows, shift, _blocks(tuple(x.shape[1:])))
    else:
        inside = ops.broadcast_to(ops.cast(mask, "bool"), ops.shape(x)[:-1])
        inside = ops.reshape(inside, (-1, size, 1))
        count = ops.sum(ops.cast(inside, "int32"))
        total = ops.sum(ops.where(inside, rows, 0), axis=(0, 1))
        shift = total / ops.maximum(ops.cast(count, rows.dtype), 1)
        deviations = ops.where(inside, rows - shift, 0)
        first = ops.sum(deviations, axis=1)
        second = ops.sum(ops.square(deviations), axis=1)
    return ops.convert_to_tensor(count, "int32"), shift, first, second


def _sum_of_squares(deviations: Any) -> Any:
    return ops.sum(ops.square(deviations), axis=1)


def _squares_by_norm(deviations: Any) -> Any:
    """The same on TensorFlow, whose norm makes no tensor of the squares; it rounds twice more.

    It is NaN where the squares overflow to infinity; neither is finite.
    """
    import tensorflow as tf

    return tf.square(tf.math.reduce_euclidean_norm(deviations, axis=1))


def _sums_of_rows(
    rows: Any, shift: Any, blocks: int, *, squares: Callable[[Any], Any] = _sum_of_squares
) -> tuple[Any, Any]:
    """Sums of the deviations and of their squares over axis 1, block by block."""
    if keras.backend.backend() == "torch" and not rows.requires_grad:
        from frostline.adapters.torch.calls import deviations as in_one_memory, pieces

        parts = [
            (part.sum(1), part.square_().sum(1)) for part in in_one_memory(pieces(rows), shift)
        ]
        first, second = map(list, zip(*parts, strict=True))
        return ops.concatenate(first), ops.concatenate(second)
    first, second = [], []
    for piece in [rows] if blocks == 1 else _cut(rows, blocks):
        deviations = piece - shift
        first.append(ops.sum(deviations, axis=1))
        second.append(squares(deviations))
    if blocks == 1:
        return first[0], second[0]
    return ops.concatenate(first), ops.concatenate(second)


def _cut(rows: Any, blocks: int) -> list[Any]:
    """TensorFlow: pieces of nearly the same length along axis 0, however long it is."""
    import tensorflow as tf

    ends = tf.shape(rows)[0] * tf.range(blocks + 1) // blocks
    return list(tf.split(rows, ends[1:] - ends[:-1], num=blocks))


def _blocks(sample: tuple[int | None, ...]) -> int:
    """Into how many pieces a batch is cut, so that its deviations stay in the processor's cache.

    For TensorFlow: XLA fuses the operations, and torch has pieces of its own.
    """
    if keras.backend.backend() != "tensorflow":
        return 1
    values = math.prod(length or 0 for length in sample)  # 0: an unknown size counts as small
    return 8 if values >= LARGE_SAMPLE else 1


def _chunk(spatial: tuple[int | None, ...]) -> int:
    """How many neighbouring values are added up in float32; divides the values per sample."""
    size = 1
    for length in reversed(spatial):
        if length is None:
            break
        if size * length > CHUNK:
            return size * max(n for n in range(1, CHUNK // size + 1) if length % n == 0)
        size *= length
    return size
