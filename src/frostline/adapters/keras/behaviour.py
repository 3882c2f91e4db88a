"""What each BN layer does in passes of the model itself, read off its inputs and outputs.

Every call is compared with what the layer would give with its stored statistics (λ = 0), with those
of the batch (λ = 1), and between; λ is where its output lies among them
(:mod:`frostline.numerics.behaviour`). It does not matter which flag, policy, argument or code of
its own made the layer do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from frostline.adapters.keras import graph as keras_graph
from frostline.adapters.keras.arrays import float64, to_numpy
from frostline.adapters.keras.compile import compiled
from frostline.adapters.keras.forward_pass import called, forced_phase, tensors
from frostline.adapters.keras.pipeline import prepared
from frostline.adapters.keras.random import fixed_randomness, seed_states, seeds
from frostline.adapters.keras.recurrent import looping, step_by_step
from frostline.adapters.keras.site_handle import (
    SiteHandle,
    replaced,
    site_handles,
)
from frostline.adapters.keras.statistics import reduced
from frostline.data.batch import Batch
from frostline.numerics.behaviour import CallSums, observed_blend, sums_of_formula
from frostline.numerics.blend import mixed
from frostline.types import Array
from frostline.types.measured import Behaviour

#: Largest difference, of the largest output, at which a layer does what the formula says.
_ALIKE = 1e-2

#: Samples of a compiled pass: enough for batch statistics that are not the stored ones.
_COMPILED_SAMPLES = 4

#: Passes in which a λ between 0 and 1 is made more exact.
_REFINEMENTS = 3


class _Call(NamedTuple):
    """One call of a layer that does nothing but normalise, as it comes out of a compiled pass."""

    inputs: Any
    outputs: Any
    stored: tuple[Any, Any]
    scale_and_offset: tuple[Any, ...]
    moved: Any


#: Sums of one call, and whether the stored statistics would have moved; none of what computes with
#: them in a way of its own.
_Entry = tuple[CallSums | None, bool]


def behaviour(model: Any, batches: Iterable[Any], step: Any = None) -> dict[str, Behaviour]:
    """Watch every site in a training-mode and an inference pass over each batch.

    Args:
        model: A built Keras model; nothing of it is changed.
        batches: A few; or tuples that begin with ``x``.
        step: The user's ``step(model, batch)``, which runs the model instead.

    Returns:
        Path -> behaviour, for all sites. What cannot be determined is ``None``: sites that were not
        called. Of what keeps running statistics in a way of its own only ``moves`` is told.
    """
    known = site_handles(model)
    watched = {path: handle for path, handle in known.items() if handle.stored() is not None}
    given = [Batch(*batch) if isinstance(batch, tuple) else batch for batch in batches]
    collected = [
        tensors(prepared(model, _few(batch.x))[0] if step is None else batch.given)
        for batch in given
    ]
    middles = dict.fromkeys(watched, 0.5)
    keepers = keras_graph.unknown_keepers(model)
    moved: dict[str, bool] = {}
    found: dict[str, Behaviour] = {}
    for _ in range(1 + _REFINEMENTS):
        seen = _seen(model, watched, keepers, collected, middles, step)
        for path in keepers:
            moved[path] = any(entry[1] for entry in seen.pop((True, path), ()))
        found = {path: _observed(path, handle, seen) for path, handle in known.items()}
        between = {path: _between(found[path]) for path in watched}
        if all(value is None or value == middles[path] for path, value in between.items()):
            break
        middles |= {path: value for path, value in between.items() if value is not None}
    return found | {
        path: Behaviour(path=path, training=None, inference=None, moves=moves)
        for path, moves in moved.items()
    }


def _few(x: Any) -> Any:
    """Use fewer samples on JAX: one compiled pass returns the values of all sites."""
    if keras.backend.backend() != "jax":
        return x
    return keras.tree.map_structure(lambda leaf: leaf[:_COMPILED_SAMPLES], x)


def _seen(
    model: Any,
    watched: Mapping[str, SiteHandle],
    keepers: Mapping[str, Any],
    batches: Sequence[Any],
    middles: Mapping[str, float],
    own_step: Any,
) -> dict[tuple[bool, str], list[_Entry]]:
    """Run both passes over all batches: (training, path) -> sums of each call of the layer."""
    variables = list(model.variables)
    states = [state for state, _ in seed_states(model)]
    seen: dict[tuple[bool, str], list[_Entry]] = {}
    passes = {
        training: compiled(
            functools.partial(_pass, model, watched, keepers, middles, training, own_step),
            variables,
            states,
            slope=False,
            # Tracing takes longer than running a few batches, except on JAX, which would compile
            # each operation by itself.
            eager=keras.backend.backend() != "jax"
            or own_step is not None
            or bool(getattr(model, "run_eagerly", False)),
        )
        for training in (True, False)
    }
    for step, x in enumerate(batches):
        for training, run in passes.items():
            with fixed_randomness(model, step):
                found = run(seeds(model, step), ops.zeros(()), x)
            for path, calls in found.items():
                entries: list[_Entry]
                if path in keepers:
                    entries = [(None, bool(moved)) for moved in calls]
                else:
                    entries = [_on_host(call, watched[path], middles[path]) for call in calls]
                seen.setdefault((training, path), []).extend(entries)
    return seen


def _between(found: Behaviour) -> float | None:
    """A λ that is neither 0 nor 1."""
    values = (found.training, found.inference)
    return next((blend for blend in values if blend is not None and 0 < blend < 1), None)


def _pass(
    model: Any,
    watched: Mapping[str, SiteHandle],
    keepers: Mapping[str, Any],
    middles: Mapping[str, float],
    training: bool,
    own_step: Any,
    mapping: list[tuple[Any, Any]],
    traced: bool,  # noqa: ARG001 - traces are not counted here
    blend: Any,  # noqa: ARG001 - the model does what it does
    x: Any,
) -> dict[str, list[Any]]:
    seen: dict[str, list[Any]] = {path: [] for path in watched}
    calls = [
        (handle, functools.partial(_watched, seen[path], middles[path]))
        for path, handle in watched.items()
    ]
    steps = step_by_step(looping(model))
    with keras.StatelessScope(state_mapping=mapping), steps, replaced(calls):
        kept = {path: _values(layer) for path, layer in keepers.items()}
        if own_step is None:
            called(model, x, training)
        else:
            with forced_phase(model, training):
                own_step(model, x)
        for path, layer in keepers.items():
            pairs = zip(kept[path], _values(layer), strict=True)
            seen[path] = [_differ(old, new) for old, new in pairs]
    return seen


def _differ(old: Any, new: Any) -> Any:
    """Whether any value moved; one that was NaN and still is has not."""
    nan = ops.logical_and(ops.not_equal(new, new), ops.not_equal(old, old))  # of integers, too
    return ops.any(ops.logical_not(ops.logical_or(ops.equal(new, old), nan)))


def _values(layer: Any) -> list[Any]:
    """Copies of what a layer keeps, as the scope around has it."""
    return [ops.copy(ops.convert_to_tensor(v)) for v in keras_graph.kept_by(layer)]


def _watched(
    seen: list[Any],
    middle: float,
    handle: SiteHandle,
    original_call: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the layer as it is and note what it did."""
    before = _stored(handle)
    outputs = original_call(*args, **kwargs)
    after = _stored(handle)
    call = handle.call(original_call, args, kwargs)
    moved = ops.logical_or(*map(_differ, before, after))
    if call.follows_formula and call.mask is None and outputs.shape == call.x.shape:
        parameters = tuple(
            None if parameter is None else ops.convert_to_tensor(parameter)
            for parameter in call.parameters()
        )
        entry: Any = _Call(call.x, outputs, before, parameters, moved)
        seen.append(entry if keras.backend.backend() == "jax" else _on_host(entry, handle, middle))
        return outputs
    batch = call.batch()
    stored = ops.cast(ops.stack(before), batch.dtype)
    statistics = [
        mixed(ops.full((), blend, batch.dtype), stored, batch, ops) for blend in (0.0, middle, 1.0)
    ]
    candidates = [call.normalised(pair) for pair in statistics]
    if not call.follows_formula:
        # A call that reads no stored statistics gives the same with any: the formula tells then.
        deaf = ops.all(ops.equal(candidates[0], candidates[2]))
        formula = [call.formula(pair) for pair in statistics]
        chosen = ops.logical_and(deaf, _alike(outputs, formula[2]))
        candidates = [
            ops.where(chosen, other, own) for own, other in zip(candidates, formula, strict=True)
        ]
    mean, variance = ops.unstack(batch, num=2)
    noise = 1 + ops.square(mean) / (variance + handle.epsilon)
    sums = _sums(handle, outputs, candidates)
    if sums[0].shape != noise.shape:
        noise = ops.max(noise, keepdims=True)
    seen.append((*sums, noise, moved))
    return outputs


def _alike(outputs: Any, formula: Any) -> Any:
    """Whether a layer gave what the formula does with the batch's statistics, up to rounding."""
    if outputs.shape != formula.shape:
        return ops.full((), False, "bool")
    one, other = (ops.cast(tensor, "float32") for tensor in (outputs, formula))
    return ops.max(ops.abs(one - other)) <= _ALIKE * ops.max(ops.abs(other))


def _stored(handle: SiteHandle) -> tuple[Any, Any]:
    """Copies: torch modules update their buffers in place."""
    pair = handle.stored()
    assert pair is not None  # others are not watched
    mean, variance = (ops.cast(ops.copy(moment), "float32") for moment in pair)
    return mean, variance


def _sums(handle: SiteHandle, outputs: Any, candidates: Sequence[Any]) -> list[Any]:
    """The sums of :class:`CallSums` from ``rr`` to ``batch``."""
    y, stored, half, batch = (
        ops.cast(candidate, "float32") for candidate in (outputs, *candidates)
    )
    pair = handle.stored()
    assert pair is not None
    rank, channels = len(y.shape), pair[0].shape[0]
    known = -rank <= handle.axis < rank and y.shape[handle.axis] == channels
    axes = reduced(y, handle.axis) if known else list(range(rank))
    r, h, b = y - stored, half - stored, batch - stored
    products = [(r, r), (r, h), (r, b), (h, h), (h, b), (b, b), (y, y)]
    products += [(stored, stored), (batch, batch)]
    return [ops.reshape(ops.sum(one * other, axis=axes), (-1,)) for one, other in products]


# --- on the host ------------------------------------------------------------------------------


def _on_host(entry: Any, handle: SiteHandle, middle: float) -> _Entry:
    """What one call did, in numpy.

    Of a layer that follows the formula the inputs and outputs are enough: a backend would run some
    sixty operations per layer for the sums.
    """
    if isinstance(entry, _Call):
        x, y = (_rows(tensor, handle.axis) for tensor in (entry.inputs, entry.outputs))
        mean, variance = (float64(moment) for moment in entry.stored)
        gamma, beta = (None if p is None else float64(p) for p in entry.scale_and_offset)
        sums = sums_of_formula(
            x, y, (mean, variance), (gamma, beta), epsilon=handle.epsilon, middle=middle
        )
        return sums, bool(entry.moved)
    if isinstance(entry[0], CallSums):
        return entry[0], entry[1]
    *parts, moved = entry
    return CallSums(middle, *(float64(part) for part in parts)), bool(moved)


def _rows(tensor: Any, axis: int) -> Array:
    """float32, shape ``(values, channels)``."""
    array = to_numpy(ops.cast(tensor, "float32"))
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def _observed(
    path: str, handle: SiteHandle, seen: Mapping[tuple[bool, str], Sequence[_Entry]]
) -> Behaviour:
    dtype = getattr(handle.owner, "compute_dtype", "float32")
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype, 2.0**-24)
    training, inference = (seen.get((phase, path), ()) for phase in (True, False))
    return Behaviour(
        path=path,
        training=observed_blend([sums for sums, _ in training if sums], rounding=rounding),
        inference=observed_blend([sums for sums, _ in inference if sums], rounding=rounding),
        moves=any(moved for _, moved in training) if training else None,
    )
