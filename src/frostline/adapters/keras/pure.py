"""Which calls of a Keras model are pure: the same function of the sample in every phase and batch.

Two looks, because either can be fooled. By flags: frozen, no dropout or noise, stored statistics,
no state, no loss of its own. By behaviour: the calls that passed are run on a few samples, one of
which is in two different batches, in training mode and in inference.

This room reads only: it never changes a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np

from frostline.adapters.dropout_rate import TURN_OFF, all_off
from frostline.adapters.keras.calls import Call, Graph, Slot, run, takes_training
from frostline.adapters.keras.graph import is_site, walk, wrapped_module
from frostline.adapters.keras.noise import drops
from frostline.types import Array, ModelError

L = keras.layers

#: Largest difference, as a share of the largest value, that rounding may make.
_ROUNDING = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
_UNKNOWN_SIZE = 48  # stands for a size that the model leaves open, in the trial batches

Why = Literal["trains", "statistics", "random", "state", "loss"]


@dataclass(frozen=True, kw_only=True)
class Impurity:
    """Why a layer is no pure function of its input.

    Attributes:
        why: In one word.
        layer: The layer, which may be inside of the one that is called.
        text: In words, without the layer's name.
    """

    why: Why
    layer: Any
    text: str


def impurity(operation: Any, model: Any) -> Impurity | None:
    """What the flags say against the purity of a layer; ``None``: nothing.

    Args:
        operation: A layer or operation of the model's graph.
        model: The model; frozen as a whole it trains nothing.
    """
    if not isinstance(operation, keras.Layer):
        return None
    layers = [operation, *(place.layer for place in walk(operation))]
    training = [each for each in layers if any(v.trainable for v in each.weights)]
    if model.trainable and training:  # the last one is the innermost
        return Impurity(why="trains", layer=training[-1], text="it is trainable")
    found = (_impurity(layer) for layer in layers)
    return next((each for each in found if each is not None), None)


def _impurity(layer: Any) -> Impurity | None:
    if is_site(layer):
        policy = getattr(layer, "policy", "inference")
        if layer.trainable or policy != "inference":
            text = "in training it normalises with the statistics of the batch"
            return Impurity(why="statistics", layer=layer, text=text)
    module = wrapped_module(layer)
    if module is not None:
        inside = list(module.modules())
        if any("BatchNorm" in type(inner).__name__ for inner in inside):
            text = "Keras puts the BN inside of it into training mode in every step"
            return Impurity(why="statistics", layer=layer, text=text)
        if any("Dropout" in type(inner).__name__ and not all_off(inner) for inner in inside):
            text = f"its dropout is active in training{TURN_OFF}"
            return Impurity(why="random", layer=layer, text=text)
    if getattr(layer, "stateful", False) or isinstance(layer, L.SpectralNormalization):
        return Impurity(why="state", layer=layer, text="it carries state from batch to batch")
    if _random(layer):
        text = f"it is random in training{TURN_OFF if drops(layer) else ''}"
        return Impurity(why="random", layer=layer, text=text)
    if layer.activity_regularizer is not None:
        return Impurity(why="loss", layer=layer, text="it adds to the loss in every step")
    return None


def _random(layer: Any) -> bool:
    own = [*getattr(layer, "_seed_generators", ()), *vars(layer).values()]
    if not any(type(each).__name__ == "SeedGenerator" for each in own):
        return False
    return not all_off(layer)  # recurrent layers have a generator in any case


# --- behaviour ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a trial run of the pure calls showed.

    Attributes:
        shapes: Slot -> shape of one sample's tensor; only of tensors whose rows are the samples.
            ``None``: there was no trial run.
        reason: Why not.
    """

    shapes: Mapping[Slot, tuple[int, ...]] | None
    reason: str = ""


def observe(
    graph: Graph, calls: Sequence[Call], names: Mapping[int, str], sample: Any = None
) -> Observed:
    """Run calls on trial batches and refuse what turns out not to be pure.

    Every call runs three times: in training mode on two batches that share one sample, in another
    place and among others, and in inference; there, a call that is told no phase and reads what it
    has read in training is not made again. It must return the same for that sample, assign no
    variable and add no loss. Nothing of the model changes.

    Args:
        graph: The graph that the calls are from.
        calls: Calls in execution order, pure by their flags.
        names: ``id(layer)`` -> path, for the message.
        sample: A batch of the model's inputs, or ``None`` for random numbers.

    Raises:
        ModelError: A call is not pure; names the layer and says how it showed.
    """
    try:
        one, other = _batches(graph, sample)
    except ModelError as problem:
        return Observed(shapes=None, reason=str(problem))
    values: list[dict[Slot, Any]] = [
        dict(zip(graph.inputs, batch, strict=True)) for batch in (one, other, one)
    ]
    count = int(one[0].shape[0])
    shapes = {slot: _sample_shape(values[0][slot], count) for slot in graph.inputs}
    last_use = {slot: number for number, call in enumerate(calls) for slot in call.reads}
    with _undisturbed():
        for number, call in enumerate(calls):
            try:
                effects = _effects(call, values[0], True)
                _effects(call, values[1], True)
                _at_inference(call, values[2], values[0])
            except Exception as problem:
                if sample is not None:
                    raise
                reason = " ".join(str(problem).split())[:120]
                return Observed(shapes=None, reason=f"'{_name(call, names)}' takes no random "
                                f"inputs ({reason})")  # fmt: skip
            _require_pure(call, effects, values, count, names)
            shapes |= {slot: _sample_shape(values[0][slot], count) for slot in call.writes}
            for slot in [s for s in (*call.reads, *call.writes) if last_use.get(s, -1) <= number]:
                for table in values:
                    table.pop(slot, None)
    return Observed(shapes={slot: shape for slot, shape in shapes.items() if shape is not None})


def _name(call: Call, names: Mapping[int, str]) -> str:
    return names.get(id(call.operation), getattr(call.operation, "name", "cast"))


def _effects(call: Call, values: dict[Slot, Any], training: bool) -> str | None:
    """Run one call; returns what it did beside computing its outputs."""
    variables = call.operation.variables if isinstance(call.operation, keras.Layer) else []
    with keras.StatelessScope(collect_losses=True) as scope:
        # Inside a scope, TensorFlow and torch read the variables themselves.
        run(call, values, training if takes_training(call.operation) else None)
    moved = [v for v in variables if id(v) in scope.state_mapping]
    if moved:
        return f"it changes its variable '{moved[0].name}' in every training step"
    return "it adds to the loss in every step" if scope.losses else None


def _at_inference(call: Call, values: dict[Slot, Any], trained: Mapping[Slot, Any]) -> None:
    """Run one call in inference, unless it is the call that was made in training."""
    if not takes_training(call.operation) and all(values[s] is trained[s] for s in call.reads):
        values.update({slot: trained[slot] for slot in call.writes})
    else:
        _effects(call, values, False)


def _require_pure(
    call: Call,
    text: str | None,
    values: Sequence[dict[Slot, Any]],
    count: int,
    names: Mapping[int, str],
) -> None:
    for slot in call.writes:
        first, second = (_numbers(table[slot]) for table in values[:2])
        unchanged = values[2][slot] is values[0][slot]
        inference = first if unchanged else _numbers(values[2][slot])
        if text is not None or first is None or second is None or inference is None:
            break
        if not first.shape or first.shape[0] != count or first.shape != second.shape:
            continue  # the rows are not the samples
        dtype = keras.backend.standardize_dtype(values[0][slot].dtype)
        if not _same(first[0], second[-1], dtype):
            text = "its output for one sample depends on the other samples of the batch"
        elif not _same(first, inference, dtype):
            text = "it computes something else in training than at inference"
        elif np.array_equal(first, inference):
            values[2][slot] = values[0][slot]  # so the calls behind it are spared as well
    if text is None:
        return
    raise ModelError(
        f"'{_name(call, names)}' is frozen but not a pure function of its input: {text}, so what "
        "it computes cannot be stored. Put the boundary before it (at=...). "
        f"Received: {type(call.operation).__name__}"
    )


def _same(one: Array, other: Array, dtype: str) -> bool:
    if np.array_equal(one, other):  # the rule, and much faster than what follows
        return True
    one, other = one.astype(np.float64), other.astype(np.float64)
    largest = float(np.max(np.abs(other), initial=0.0, where=np.isfinite(other)))
    return bool(
        np.allclose(one, other, rtol=0.0, atol=_ROUNDING.get(dtype, 0.0) * largest, equal_nan=True)
    )


def _numbers(tensor: Any) -> Array | None:
    if not hasattr(tensor, "shape") or getattr(tensor, "dtype", None) is None:
        return None
    if keras.backend.standardize_dtype(tensor.dtype) == "string":
        return None
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")))


def _sample_shape(tensor: Any, count: int) -> tuple[int, ...] | None:
    shape = tuple(int(size) for size in tensor.shape)
    return shape[1:] if shape and shape[0] == count else None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Torch: no gradients, and unseeded layers draw from a generator that is put back."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    with torch.no_grad(), torch.random.fork_rng():
        yield


def _batches(graph: Graph, sample: Any) -> tuple[list[Any], list[Any]]:
    """Two batches of tensors; the first sample of one is the last of the other.

    Raises:
        ModelError: No such batches can be made for these inputs.
    """
    tensors = [graph.tensors[slot] for slot in graph.inputs]
    fixed = {int(t.shape[0]) for t in tensors if len(t.shape) and t.shape[0] is not None}
    count = min(fixed, default=2)
    if sample is None:
        rng = np.random.default_rng(0)
        rows = [_random_rows(tensor, 2 * count, rng) for tensor in tensors]
    else:
        rows = [np.asarray(keras.ops.convert_to_numpy(x)) for x in keras.tree.flatten(sample)]
        if len(rows) != len(tensors):
            raise ModelError(f"the sample has {len(rows)} arrays for {len(tensors)} inputs")
        if any(len(each) < count + 1 for each in rows):
            raise ModelError(f"the sample has fewer than {count + 1} rows")
    first = [each[:count] for each in rows]
    second = [_others(each, count) for each in rows]
    dtypes = [tensor.dtype for tensor in tensors]
    return tuple(  # type: ignore[return-value]
        [keras.ops.convert_to_tensor(x, dtype=d) for x, d in zip(batch, dtypes, strict=True)]
        for batch in (first, second)
    )


def _others(rows: Array, count: int) -> Array:
    """A batch of other samples that ends with the first one."""
    others = list(itertools.islice(itertools.cycle(range(count, len(rows))), count - 1))
    return rows[[*others, 0]]


def _random_rows(tensor: Any, count: int, rng: np.random.Generator) -> Array:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype == "string" or tensor.sparse:
        raise ModelError(f"no random inputs of dtype {dtype} can be made")
    shape = (count, *(_UNKNOWN_SIZE if size is None else size for size in tensor.shape[1:]))
    if dtype == "bool" or "int" in dtype:
        return rng.integers(0, 2, shape)
    return rng.normal(size=shape).astype(np.float32)
