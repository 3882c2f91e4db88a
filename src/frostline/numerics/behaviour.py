"""Which statistics a layer used, estimated from what it gave: λ by least squares, in numpy.

An output that was normalised with stored statistics lies at λ = 0, one with those of the batch at
λ = 1. Channels in which the two are alike up to rounding say nothing and do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from frostline.numerics.blend import mixed
from frostline.types import Array, as_float64

#: Roundings that an output may be away from its statistics: a channel in which stored and batch
#: statistics are closer than that says nothing.
_ROUNDINGS = 32

#: Values of λ that are compared, and how near to 0 or 1 it is taken to be 0 or 1.
_GRID = np.linspace(0.0, 1.0, 1001)
_NEAR = 0.005


@dataclass(frozen=True, eq=False)
class CallSums:
    """Sums over the outputs of one call, per channel; shape ``(channels,)`` each.

    With ``r``, ``h`` and ``b``: the output, that at λ = ``middle`` and that at λ = 1, each less
    that at λ = 0.

    Attributes:
        middle: A λ between 0 and 1.
        rr: Σ r². Likewise ``rh``, ``rb``, ``hh``, ``hb``, ``bb``.
        output: Sum of the squared outputs. Likewise ``stored`` at λ = 0, ``batch`` at λ = 1.
        noise: By how much subtracting the mean raises the rounding error, squared.
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


def sums_of_formula(
    x: Array,
    y: Array,
    stored: tuple[Array, Array],
    scale_and_offset: tuple[Array | None, Array | None],
    *,
    epsilon: float,
    middle: float,
) -> CallSums:
    """Sums of a layer that does nothing but normalise.

    Its output at any λ is ``a·u + b`` per channel, with ``u`` the input less its mean, so that four
    sums over the values give all others.

    Args:
        x: Inputs, float32, shape ``(values, channels)``.
        y: Outputs, likewise.
        stored: Stored mean and variance, shape ``(channels,)`` each.
        scale_and_offset: Gamma and beta; ``None`` where there is none.
        epsilon: Added to the variance.
        middle: As in :class:`CallSums`.
    """
    gamma, beta = (
        neutral if given is None else as_float64(given)
        for given, neutral in zip(scale_and_offset, (1.0, 0.0), strict=True)
    )
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean = x[0] + (x - x[0]).mean(axis=0, dtype=np.float64)
        u = x - mean.astype(np.float32)
        uu, count = _products(u, u), len(x)
        batch = (mean, uu / count)

        def line(blend: float) -> tuple[Array, Array]:
            at, variance = (
                mixed(blend, as_float64(old), new, np)
                for old, new in zip(stored, batch, strict=True)
            )
            slope = gamma / np.sqrt(variance + epsilon)
            return slope, (mean - at) * slope + beta

        a, b = line(0.0)
        (a_half, b_half), (a_one, b_one) = line(middle), line(1.0)
        r = y - (a.astype(np.float32) * u + b.astype(np.float32))
        ru, rest = _products(r, u), r.sum(axis=0, dtype=np.float64)

        def product(one: tuple[Array, Array], other: tuple[Array, Array]) -> Array:
            return as_float64(one[0] * other[0] * uu + one[1] * other[1] * count)

        half, whole = (a_half - a, b_half - b), (a_one - a, b_one - b)
        return CallSums(
            middle,
            rr=_products(r, r),
            rh=half[0] * ru + half[1] * rest,
            rb=whole[0] * ru + whole[1] * rest,
            hh=product(half, half),
            hb=product(half, whole),
            bb=product(whole, whole),
            output=_products(y, y),
            stored=product((a, b), (a, b)),
            batch=product((a_one, b_one), (a_one, b_one)),
            noise=1 + mean**2 / (batch[1] + epsilon),
        )


def observed_blend(calls: Sequence[CallSums], *, rounding: float) -> float | None:
    """λ by least squares over the channels of all calls in which it makes a difference.

    Outputs between those at λ = 0, ``middle`` and 1 are taken from the parabola through the three,
    so that these are met exactly. Channels are weighted by the size of their rounding errors. Where
    stored statistics are not finite everywhere, an output tells by being finite or not.

    Args:
        calls: Sums of each call of the layer.
        rounding: Relative spacing of numbers in its outputs, for float32 2⁻²⁴.

    Returns:
        Between 0 and 1; ``None`` when nothing tells.
    """
    error, votes = np.zeros_like(_GRID), []
    known = False
    for call in calls:
        with np.errstate(invalid="ignore", over="ignore"):
            scale = np.maximum(call.output, np.maximum(call.stored, call.batch)) * call.noise
            tells = call.bb > scale * np.square(_ROUNDINGS * rounding)
            tells &= np.isfinite(scale) & np.isfinite(call.rr)
        known |= bool(tells.any())
        parts = (call.rr, call.rh, call.rb, call.hh, call.hb, call.bb)
        rr, rh, rb, hh, hb, bb = (float(np.sum(part[tells] / scale[tells])) for part in parts)
        half = _GRID * (1 - _GRID) / (call.middle * (1 - call.middle))
        whole = _GRID * (_GRID - call.middle) / (1 - call.middle)
        square = half**2 * hh + 2 * half * whole * hb + whole**2 * bb
        error += rr - 2 * (half * rh + whole * rb) + square
        broken = np.isfinite(call.batch) & ~np.isfinite(call.stored)
        votes += list(np.isfinite(call.output)[broken].astype(float))
    if known:
        best = float(_GRID[int(np.argmin(error))])
    elif votes:
        best = float(np.mean(votes))
    else:
        return None
    return 0.0 if best < _NEAR else 1.0 if best > 1 - _NEAR else best


def _products(one: Array, other: Array) -> Array:
    return as_float64(np.einsum("nc,nc->c", one, other))
