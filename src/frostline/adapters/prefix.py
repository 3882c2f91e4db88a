"""The frozen part of a model as the feature cache and the engines see it.

A prefix is a built Keras model, a torch module, or a callable with an ``identity`` of its own. The
room of its framework has a module ``prefix`` with the functions used here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np

from frostline.adapters import adapter_of, part, room_of, rooms
from frostline.adapters.computation import Identity, identity_of
from frostline.data.arrays import Table, leaves, map_leaves
from frostline.numerics.compare import relative_difference
from frostline.types import Array, ModelError
from frostline.types.reasons import first_line

#: Largest difference between what a sample gives alone and beside others, as a share of the largest
#: value: other numbers of samples are added up in another order.
_SAME = 1e-4
#: What is no rounding, in half precision either.
_APART = 2e-2


def _role(prefix: Any) -> Any:
    """The module of its framework that answers for a prefix."""
    for room in rooms():
        if room.is_model(prefix):
            return part(room, "prefix")
    raise ModelError(
        "a prefix is a Keras model or a torch module, for example fl.split(model).prefix, or a "
        "callable with an `identity` that changes whenever what it computes does. Received: "
        f"{type(prefix).__name__}"
    )


def identity(prefix: Any) -> Identity:
    """Tell what a prefix computes, weights and stored statistics included.

    Args:
        prefix: A built Keras model, a torch module, or anything with an ``identity`` of its own.

    Raises:
        ModelError: Neither.
    """
    if is_callable_prefix(prefix):
        return Identity(prefix.identity)
    found: Identity = _role(prefix).identity(prefix)
    return found


def snapshot(prefix: Any) -> Callable[[], None]:
    """Remember what running a prefix may touch; returns what puts it back, and can be repeated.

    Raises:
        ModelError: As :func:`identity`.
    """
    if is_callable_prefix(prefix):
        return lambda: None
    _role(prefix)  # says what a prefix is, where a function is given
    return adapter_of(prefix).snapshot()


def function_identity(function: Any) -> Identity:
    """Tell what any function, callable object or layer computes."""
    room = room_of(function)
    if room is None:
        return identity_of(function)
    found: Identity = part(room, "prefix").layer_identity(function)
    return found


def native(prefix: Any, precision: str = "float32") -> Callable[[Any], list[Array]]:
    """Return what runs a prefix on its own framework: a batch of inputs -> arrays.

    Args:
        prefix: As for :func:`identity`.
        precision: ``"float32"`` is what the prefix computes in by itself; or ``"bfloat16"``.

    Raises:
        ModelError: Its framework, or its dtype, has no ``"bfloat16"`` to offer.
        BackendError: The processor has not.
    """
    role = _role(prefix)
    make = role.native if precision == "float32" else role.lower
    run: Callable[[Any], list[Array]] = make(prefix)
    return run


def reference(prefix: Any) -> Callable[[Any], list[Array]]:
    """As :func:`native`, but for a few samples, to compare with: in full float32 precision.

    Nothing is compiled for them. An NVIDIA card rounds the factors of a convolution to 10 bits
    where a framework lets it (TF32), which alone makes a difference of 1e-3.
    """
    if is_callable_prefix(prefix):
        chosen: Callable[[Any], list[Array]] = prefix
        return chosen
    role = _role(prefix)
    run = role.uncompiled(prefix)

    def precise(batch: Any) -> list[Array]:
        with role.full_precision(prefix):
            found: list[Array] = run(batch)
        return found

    return precise


def placed(prefix: Any) -> Any:
    """The prefix on the accelerator that this process may use; frameworks that see to it do."""
    move = getattr(_role(prefix), "placed", None)
    return prefix if move is None else move(prefix)


def exactly(model: Any) -> AbstractContextManager[None]:
    """A block that pickles a model for a process with Frostline: there it is what it is here."""
    room = room_of(model)
    exact = None if room is None else getattr(part(room, "prefix"), "exactly", None)
    block: AbstractContextManager[None] = nullcontext() if exact is None else exact()
    return block


def to_onnx(prefix: Any, batch: Any) -> bytes:
    """Serialize a prefix as an ONNX model; ``batch`` is a batch of its inputs."""
    graph: bytes = _role(prefix).to_onnx(prefix, batch)
    return graph


def takes_any_number(prefix: Any) -> bool:
    """Whether a prefix is known to take any number of samples at once: Keras models say so."""
    return _role(prefix).takes_any_number(prefix) is True


def takes_fewer(prefix: Any, batch: Any) -> bool:
    """Whether a prefix computes of a few samples what it computes of them beside others.

    One that does not say so is tried: the first of two samples has to give what it gives alone.

    Args:
        prefix: As for :func:`native`.
        batch: A batch of its inputs.
    """
    said: bool | None = _role(prefix).takes_any_number(prefix)
    if said is not None:
        return said
    if _samples(batch) < 2:
        return False
    run = reference(prefix)
    try:
        one = run(map_leaves(lambda leaf: leaf[:1], batch))
        two = run(map_leaves(lambda leaf: leaf[:2], batch))
    except Exception:  # its own, of so few samples; one of the whole batch is raised there
        return False
    together = [np.shape(both)[:1] == (2,) for both in two]
    return all(together) and relative_difference([both[:1] for both in two], one) <= _SAME


def require_apart(prefix: Any, batch: Any) -> None:
    """Refuse a prefix that is random, or by which a sample depends on the others of its batch.

    Args:
        prefix: As for :func:`native`.
        batch: A batch of its inputs.

    Raises:
        ModelError: It is one: the first sample gives something else beside copies of itself.
    """
    count = _samples(batch)
    if count < 2:
        return
    if isinstance(batch, Table):
        _require_rows(prefix, batch, count)
    if takes_fewer(prefix, batch):
        return
    run = reference(prefix)
    first = np.zeros(count, dtype=np.int64)
    given, other = run(batch), run(map_leaves(lambda leaf: leaf[first], batch))
    pairs = [pair for pair in zip(given, other, strict=True) if np.shape(pair[0])[:1] == (count,)]
    moved = relative_difference([b[:1] for _, b in pairs], [a[:1] for a, _ in pairs])
    if moved > _APART:
        raise ModelError(
            "what this prefix computes of a sample differs with the other samples of the batch, or "
            "from call to call, so it cannot be kept: pass fl.split(model).prefix, which ends "
            f"before such a layer. Received: outputs of one sample that differ by {moved:.1e}"
        )


def _require_rows(prefix: Any, table: Table, count: int) -> None:
    """Refuse what depends on the order of a table, or on the size of another picture in it."""
    run = reference(prefix)
    given = run(table)
    if any(len(array) != count for array in given):
        raise ModelError(_TIED.format(received=f"outputs of {len(given[0])} rows for {count}"))
    order = np.arange(count)[::-1]
    smallest = min(range(count), key=lambda row: sum(_sizes(_rows(table, np.array([row])))))
    alone = np.array([smallest, smallest])
    try:
        pairs = [
            (run(_rows(table, rows)), [array[rows] for array in given]) for rows in (order, alone)
        ]
    except Exception as problem:  # the prefix's own
        raise ModelError(_TIED.format(received=first_line(problem))) from problem
    for more in (max(_sizes(table), default=0), 1):
        with suppress(Exception):  # where it takes no pictures of such sizes
            larger = run(map_leaves(partial(_with_a_larger, more=more), _rows(table, alone)))
            pairs.append(([array[:1] for array in larger], [array[alone[:1]] for array in given]))
    if any(relative_difference(one, other) > _SAME for one, other in pairs):
        raise ModelError(_TIED.format(received="outputs that change with the other samples"))


_TIED = (
    "what this prefix computes of a sample depends on the others in its batch: on their order, or "
    "on the largest picture among them, to which all are padded. So it cannot be kept sample by "
    "sample: train with fl.cached. Received: {received}"
)


def _rows(batch: Any, rows: Array) -> Any:
    return map_leaves(lambda leaf: leaf[rows], batch)


def _sizes(table: Any) -> list[int]:
    """Sides of all pictures in lists of samples."""
    lists = [column for _, column in leaves(table) if column.dtype.kind == "O"]
    held = [leaf for column in lists for sample in column for _, leaf in leaves(sample)]
    return [side for leaf in held if np.ndim(leaf) == 3 for side in leaf.shape[1:]]


def _with_a_larger(column: Array, more: int) -> Array:
    """A list of samples, the last one with its pictures on a ground that is larger than any."""
    if column.dtype.kind != "O":
        return column
    side = max(_sizes({"": column}), default=0) + more

    def larger(leaf: Any) -> Any:
        if np.ndim(leaf) != 3:
            return leaf
        _, height, width = leaf.shape
        return np.pad(leaf, ((0, 0), (0, side - height), (0, side - width)))

    made = column.copy()
    made[-1] = map_leaves(larger, column[-1])
    return made


def _samples(batch: Any) -> int:
    """Samples in a batch of inputs; 0 where its arrays are not of one length."""
    sizes = {np.shape(leaf)[:1] for _, leaf in leaves(batch)}
    return sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 0


def accelerator(prefix: Any) -> str:
    """What a prefix runs on where that is not the processor, such as ``"gpu"``; else empty."""
    found = str(_role(prefix).device(prefix))
    return "" if found == "cpu" else found


def hands_out_labels(prefix: Any) -> bool:
    """Whether :func:`handed_out` wants the labels of all batches."""
    return not is_callable_prefix(prefix) and bool(_role(prefix).HANDS_OUT_LABELS)


def readable(prefix: Any, data: Any, batch_size: int) -> Any:
    """Data as the cache reads them: torch's data sets in the order of their samples."""
    return data if is_callable_prefix(prefix) else _role(prefix).readable(data, batch_size)


def columns(prefix: Any, x: Any) -> Any:
    """Inputs with one entry per sample in each array, as far as the framework can make them so."""
    made = None if is_callable_prefix(prefix) else getattr(_role(prefix), "columns", None)
    return x if made is None else made(prefix, x)


def handed_out(prefix: Any, cache: Any, labels: Sequence[Any]) -> Any:
    """What the user gets: the cache, or for a torch module a data set of features and labels.

    Args:
        prefix: As for :func:`identity`.
        cache: The features.
        labels: Those of each batch.
    """
    return cache if is_callable_prefix(prefix) else _role(prefix).handed_out(cache, labels)


def is_callable_prefix(prefix: Any) -> bool:
    """Whether a prefix is a function with an ``identity`` of its own, which runs as it is."""
    return isinstance(getattr(prefix, "identity", None), str)


def augmenter(augment: Any) -> Callable[[Any, int], Any]:
    """Return ``(x, seed) -> x`` on numpy batches, for a function or for a Keras layer."""
    room = room_of(augment)
    seeded = None if room is None else getattr(part(room, "prefix"), "seeded", None)
    chosen: Callable[[Any, int], Any] = augment if seeded is None else seeded(augment)
    return chosen
