"""What each BN layer does in passes of the model itself, told from its inputs and outputs.

Every call of a layer is compared with what the layer would give with its stored statistics (λ = 0),
with those of the batch (λ = 1), and between; λ is where its output lies among them. So it does not
matter which flag, policy, argument or code of its own made the layer do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from frostline.adapters.keras import graph as keras_graph
from frostline.adapters.keras.blend import in_a_loop
from frostline.adapters.keras.compile import compiled
from frostline.adapters.keras.forward_pass import tensors
from frostline.adapters.keras.random import fixed_randomness, seed_states, seeds
from frostline.adapters.keras.site_handle import Port, mixed_statistics, ports, reduced, replaced
from frostline.numerics.blend import mixed
from frostline.types import Array, as_float64
from frostline.types.measured import Behaviour

#: Roundings that an output may be away from its statistics: a channel in which stored and batch
#: statistics are so alike tells nothing.
_ROUNDINGS = 32

#: Largest difference, of the largest output, at which a layer does what the formula says.
_ALIKE = 1e-2

#: Steps in which λ is searched, and how near to 0 or 1 it is taken to be 0 or 1.
_GRID = np.linspace(0.0, 1.0, 1001)
_NEAR = 0.005

#: Samples of a compiled pass: enough for batch statistics that are not the stored ones.
_COMPILED_SAMPLES = 4

#: Passes in which a λ between 0 and 1 is made more exact.
_REFINEMENTS = 3


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over a call's outputs per channel, shape ``(channels,)`` each.

    With ``r``, ``h`` and ``b``: the output, that at λ = ``middle`` and that at λ = 1, less that at
    λ = 0.
    ``output``, ``stored`` and ``batch`` are squares of the output, that at λ = 0 and that at λ = 1;
    ``noise`` is by how much subtracting the mean raises the rounding error, squared; ``moved``, of
    no shape, is whether the stored statistics would have moved.
    """

    middle: float
    rr: Array
    rh: Array
    rb: Array
    hh: Array
    hb: Array
    bb: Array
    output: Array
    stored: Array
    batch: Array
    noise: Array
    moved: Array


class _Call(NamedTuple):
    """One call of a layer that does nothing but normalise."""

    inputs: Any
    outputs: Any
    stored: tuple[Any, Any]
    scale_and_offset: tuple[Any, ...]
    moved: Any


def behaviour(model: Any, batches: Iterable[tuple[Any, ...]]) -> dict[str, Behaviour]:
    """Watch every site in a training-mode and an inference pass over each batch.

    Args:
        model: A built Keras model; nothing of it is changed.
        batches: Tuples that begin with ``x``; a few are enough.

    Returns:
        Path -> behaviour, for all sites. What cannot be told is ``None``: sites that were not
        called, or that a recurrent layer runs in a loop which lets nothing out.
    """
    known = ports(model)
    places = keras_graph.walk(model)
    watched = {
        path: port
        for path, port in known.items()
        if port.stored() is not None and not in_a_loop(places, path)
    }
    collected = [tensors(_few(batch[0])) for batch in batches]
    middles = dict.fromkeys(watched, 0.5)
    told: dict[str, Behaviour] = {}
    for _ in range(1 + _REFINEMENTS):
        seen = _seen(model, watched, collected, middles)
        told = {path: _told(path, port, seen) for path, port in known.items()}
        between = {path: _between(told[path]) for path in watched}
        if all(value is None or value == middles[path] for path, value in between.items()):
            break
        middles |= {path: value for path, value in between.items() if value is not None}
    return told


def _few(x: Any) -> Any:
    """On JAX fewer samples, for a compiled pass gives the values of all sites at once."""
    if keras.backend.backend() != "jax":
        return x
    return keras.tree.map_structure(lambda leaf: leaf[:_COMPILED_SAMPLES], x)


def _seen(
    model: Any, watched: Mapping[str, Port], batches: Sequence[Any], middles: Mapping[str, float]
) -> dict[tuple[bool, str], list[_Sums]]:
    """Run both passes over all batches: (training, path) -> sums of each call of the layer."""
    variables = list(model.variables)
    states = [state for state, _ in seed_states(model)]
    seen: dict[tuple[bool, str], list[_Sums]] = {}
    passes = {
        training: compiled(
            functools.partial(_pass, model, watched, middles, training),
            variables,
            states,
            slope=False,
            # A few batches: to trace takes longer than to run, but on JAX, which would compile
            # each operation by itself.
            eager=keras.backend.backend() != "jax" or bool(getattr(model, "run_eagerly", False)),
        )
        for training in (True, False)
    }
    for step, x in enumerate(batches):
        for training, run in passes.items():
            with fixed_randomness(model, step):
                found = run(seeds(model, step), ops.zeros(()), x)
            for path, uses in found.items():
                entries = [_arrays(each, watched[path], middles[path]) for each in uses]
                seen.setdefault((training, path), []).extend(entries)
    return seen


def _between(found: Behaviour) -> float | None:
    """A λ that is neither 0 nor 1."""
    values = (found.training, found.inference)
    return next((each for each in values if each is not None and 0 < each < 1), None)


def _pass(
    model: Any,
    watched: Mapping[str, Port],
    middles: Mapping[str, float],
    training: bool,
    mapping: list[tuple[Any, Any]],
    traced: bool,  # noqa: ARG001 - nobody counts these
    blend: Any,  # noqa: ARG001 - the model does what it does
    x: Any,
) -> dict[str, list[tuple[Any, ...]]]:
    seen: dict[str, list[tuple[Any, ...]]] = {path: [] for path in watched}
    calls = [
        (port, functools.partial(_watched, seen[path], middles[path]))
        for path, port in watched.items()
    ]
    with keras.StatelessScope(state_mapping=mapping), replaced(calls):
        model(x, training=training)
    return seen


def _watched(
    seen: list[tuple[Any, ...]],
    middle: float,
    port: Port,
    own: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the layer as it is and note what it did."""
    before = _stored(port)
    outputs = own(*args, **kwargs)
    after = _stored(port)
    use = port.use(own, args, kwargs)
    moved = [
        ops.any(ops.logical_not(ops.logical_or(new == old, ops.isnan(new) & ops.isnan(old))))
        for old, new in zip(before, after, strict=True)
    ]
    if (known := use.scale_and_offset()) is not None and outputs.shape == use.x.shape:
        tensors_of = tuple(None if each is None else ops.convert_to_tensor(each) for each in known)
        call = _Call(use.x, outputs, before, tensors_of, ops.logical_or(*moved))
        seen.append(call if keras.backend.backend() == "jax" else _by_hand(port, call, middle))
        return outputs
    batch = use.batch()
    candidates = [
        use.normalised(*mixed_statistics(ops.full((), weight, use.x.dtype), before, batch))
        for weight in (0.0, middle, 1.0)
    ]
    if (formula := use.textbook(*batch)) is not None:
        # A call that reads no stored statistics gives the same with any: the formula tells then.
        deaf = ops.all(ops.equal(candidates[0], candidates[2]))
        plain = [use.textbook(*mixed_statistics(ops.full((), weight, use.x.dtype), before, batch))
                 for weight in (0.0, middle)]  # fmt: skip
        obeys = _alike(outputs, formula)
        candidates = [
            ops.where(ops.logical_and(deaf, obeys), other, own_candidate)
            for own_candidate, other in zip(candidates, (*plain, formula), strict=True)
        ]
    sums = _sums(port, outputs, candidates)
    mean, variance = batch
    noise = 1 + ops.square(mean) / (variance + port.epsilon)
    if sums[0].shape != noise.shape:
        noise = ops.max(noise, keepdims=True)
    seen.append((*sums, noise, ops.logical_or(*moved)))
    return outputs


def _alike(outputs: Any, formula: Any) -> Any:
    """Whether a layer gave what the formula does with the batch's statistics, up to rounding."""
    if outputs.shape != formula.shape:
        return ops.full((), False, "bool")
    one, other = (ops.cast(each, "float32") for each in (outputs, formula))
    return ops.max(ops.abs(one - other)) <= _ALIKE * ops.max(ops.abs(other))


def _stored(port: Port) -> tuple[Any, Any]:
    """Copies: torch modules update their buffers in place."""
    pair = port.stored()
    assert pair is not None  # others are not watched
    mean, variance = (ops.cast(ops.copy(each), "float32") for each in pair)
    return mean, variance


def _sums(port: Port, outputs: Any, candidates: Sequence[Any]) -> list[Any]:
    """The sums of :class:`_Sums` up to ``batch``."""
    y, stored, half, batch = (ops.cast(each, "float32") for each in (outputs, *candidates))
    pair = port.stored()
    assert pair is not None
    rank, channels = len(y.shape), pair[0].shape[0]
    known = -rank <= port.axis < rank and y.shape[port.axis] == channels
    axes = reduced(y, port.axis) if known else list(range(rank))
    r, h, b = y - stored, half - stored, batch - stored
    products = [(r, r), (r, h), (r, b), (h, h), (h, b), (b, b), (y, y)]
    products += [(stored, stored), (batch, batch)]
    return [ops.reshape(ops.sum(one * other, axis=axes), (-1,)) for one, other in products]


# --- on the host ------------------------------------------------------------------------------


def _by_hand(port: Port, call: _Call, middle: float) -> tuple[Any, ...]:
    """The sums of :class:`_Sums`, of a layer that follows the formula.

    Its output at any λ is ``a·u + b`` per channel, ``u`` the input less its mean. So four sums over
    the values tell all: a backend would run some sixty operations per layer.
    """
    x, y = (_rows(each, port.axis) for each in (call.inputs, call.outputs))
    pair = [_array(each) for each in call.stored]
    gamma, beta = (
        np.full(x.shape[1], neutral) if each is None else _array(each)
        for each, neutral in zip(call.scale_and_offset, (1.0, 0.0), strict=True)
    )
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean = x[0] + (x - x[0]).mean(axis=0, dtype=np.float64)
        u = x - mean.astype(np.float32)
        uu = _products(u, u)
        variance = uu / len(x)

        def line(weight: float) -> tuple[Array, Array]:
            """``a`` and ``b`` at this λ."""
            at, spread = (
                mixed(weight, old, new, np) for old, new in zip(pair, (mean, variance), strict=True)
            )
            slope = gamma / np.sqrt(spread + port.epsilon)
            return slope, (mean - at) * slope + beta

        lines = [line(weight) for weight in (0.0, middle, 1.0)]
        (a, b), *others = lines
        r = y - (a.astype(np.float32) * u + b.astype(np.float32))
        ru, rest, count = _products(u, r), r.sum(axis=0, dtype=np.float64), len(x)
        (a_half, b_half), (a_one, b_one) = [(slope - a, at - b) for slope, at in others]
        return (
            _products(r, r),
            a_half * ru + b_half * rest,
            a_one * ru + b_one * rest,
            a_half**2 * uu + b_half**2 * count,
            a_half * a_one * uu + b_half * b_one * count,
            a_one**2 * uu + b_one**2 * count,
            _products(y, y),
            *(lines[i][0] ** 2 * uu + lines[i][1] ** 2 * count for i in (0, 2)),
            1 + mean**2 / (variance + port.epsilon),
            call.moved,
        )


def _rows(tensor: Any, axis: int) -> Array:
    """float32, shape ``(values, channels)``."""
    array = np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def _array(tensor: Any) -> Array:
    if isinstance(tensor, np.ndarray):
        return as_float64(tensor)
    return as_float64(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def _products(one: Array, other: Array) -> Array:
    """Sum over the values of a product, per channel."""
    return as_float64(np.einsum("nc,nc->c", one, other))


def _arrays(entry: tuple[Any, ...], port: Port, middle: float) -> _Sums:
    if isinstance(entry, _Call):
        entry = _by_hand(port, entry, middle)
    return _Sums(middle, *(_array(each) for each in entry))


def _told(path: str, port: Port, seen: Mapping[tuple[bool, str], Sequence[_Sums]]) -> Behaviour:
    rounding = _rounding(port)
    training, inference = (seen.get((phase, path), ()) for phase in (True, False))
    return Behaviour(
        path=path,
        training=_blend(training, rounding),
        inference=_blend(inference, rounding),
        moves=any(bool(each.moved) for each in training) if training else None,
    )


def _rounding(port: Port) -> float:
    """Relative spacing of numbers in the layer's outputs."""
    dtype = getattr(port.owner, "compute_dtype", "float32")
    return {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype, 2.0**-24)


def _blend(uses: Sequence[_Sums], rounding: float) -> float | None:
    """λ by least squares over the channels of all uses in which it makes a difference.

    Outputs between those at λ = 0, ``middle`` and 1 are taken from the parabola through the three,
    so that these are met exactly. Channels are weighted by the size of their rounding errors.
    """
    error, votes = np.zeros_like(_GRID), []
    told = False
    for use in uses:
        with np.errstate(invalid="ignore", over="ignore"):
            scale = np.maximum(use.output, np.maximum(use.stored, use.batch)) * use.noise
            tells = use.bb > scale * np.square(_ROUNDINGS * rounding)
            tells &= np.isfinite(scale) & np.isfinite(use.rr)
        told |= bool(tells.any())
        parts = (use.rr, use.rh, use.rb, use.hh, use.hb, use.bb)
        rr, rh, rb, hh, hb, bb = (float(np.sum(each[tells] / scale[tells])) for each in parts)
        middle = use.middle
        half = _GRID * (1 - _GRID) / (middle * (1 - middle))
        whole = _GRID * (_GRID - middle) / (1 - middle)
        square = half**2 * hh + 2 * half * whole * hb + whole**2 * bb
        error += rr - 2 * (half * rh + whole * rb) + square
        # Where what is stored is not finite, the output tells by being finite or not.
        broken = np.isfinite(use.batch) & ~np.isfinite(use.stored)
        votes += list(np.isfinite(use.output)[broken].astype(float))
    if told:
        best = float(_GRID[int(np.argmin(error))])
    elif votes:
        best = float(np.mean(votes))
    else:
        return None
    return 0.0 if best < _NEAR else 1.0 if best > 1 - _NEAR else best
