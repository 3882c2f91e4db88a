"""Which site is to blame: the path integral of the gradient from λ = 0 to λ = 1.

``shareᵢ = ∫₀¹ ∂L/∂λᵢ(t·1) dt``. By the fundamental theorem of calculus the shares add up to the gap
``L(1) − L(0)``; how far a sum falls short tells how good the quadrature is. The cost is one
gradient per node, whatever the number of sites.

Where the loss bends so sharply that a quadrature of few nodes misses it, and the loss at each node
is known too, intervals between nodes are halved where the gradient and the measured difference of
the loss disagree most, and each is then scaled to that difference.

References:
    - Aumann, Shapley: Values of Non-Atomic Games. Princeton 1974.
    - Sundararajan, Taly, Yan: Axiomatic attribution for deep networks. ICML 2017. (completeness)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from frostline.numerics.stats import gauss_legendre
from frostline.types import Array, DataError, as_float64

#: Fewest and most nodes of the quadrature; doubled in between.
MIN_NODES = 5
MAX_NODES = 40

#: Part of the gap that the shares may miss before the number of nodes is doubled.
TOLERANCE = 0.05

#: An interval is scaled to the measured difference of the loss by at most this factor, up or down.
#: A gradient that is farther off points anywhere, and what it misses is left to the residual.
MOST_SCALED = 4.0

#: Intervals are not halved below this part of the path.
SHORTEST = 1e-6


@dataclass(frozen=True, eq=False, kw_only=True)
class Shares:
    """What each site contributes to the gap.

    Attributes:
        shares: One signed part of the gap per site, in units of the loss, shape ``(sites,)``.
        gap: What they should add up to: the loss at λ = 1 minus that at λ = 0.
        nodes: Nodes of the quadrature they come from, those of halved intervals included.
        gradients: Gradients that were computed in all, those of coarser attempts included.
        residual: ``|Σ shares − gap| / |gap|``; infinite where there is no gap but shares.
        complete: Whether the residual is within the tolerance.
    """

    shares: npt.NDArray[np.float64]
    gap: float
    nodes: int
    gradients: int
    residual: float
    complete: bool


def path_integral(
    gradient: Callable[[float], Array],
    gap: float,
    *,
    nodes: int = MIN_NODES,
    max_nodes: int = MAX_NODES,
    tolerance: float = TOLERANCE,
    floor: float = 0.0,
    value: Callable[[float], float] | None = None,
) -> Shares:
    """Split the gap among the sites by Gauss–Legendre quadrature of the gradient.

    Where the shares do not add up to the gap, more nodes are taken, at most ``max_nodes``: without
    ``value`` twice as many each time, with it one at a time, in the middle of the interval whose
    trapezoid differs most from the measured difference of the loss at its ends, until these misses
    together are within the tolerance. Each interval is then scaled to that difference. A sum that
    still does not add up is returned and says so.

    Args:
        gradient: t in (0, 1) -> ∂L/∂λ at λ = t·1, shape ``(sites,)``.
        gap: L(1) − L(0) on the same samples, measured, not integrated.
        nodes: To begin with; at least 5.
        max_nodes: At most; at least ``nodes``.
        tolerance: Largest residual that is good enough, relative to the gap.
        floor: A difference between sum and gap, in units of the loss, that is good enough whatever
            the gap: what the loss itself is uncertain by.
        value: t -> L(t·1), at 0, at 1, and at the places where the gradient was taken before.

    Returns:
        The shares, with the residual of their sum.

    Raises:
        DataError: A gap or gradient that is not finite, gradients of changing shape, or node
            numbers out of range.

    Example:
        >>> found = path_integral(lambda t: np.array([2 * t * t, t * t]), gap=1.0)  # L = λ₁² λ₂
        >>> found.shares.round(12), found.nodes
        (array([0.66666667, 0.33333333]), 5)
    """
    if not MIN_NODES <= nodes <= max_nodes:
        raise DataError(
            f"nodes must be at least {MIN_NODES} and at most max_nodes. "
            f"Received: nodes={nodes}, max_nodes={max_nodes}"
        )
    if not np.isfinite(gap):
        raise DataError(f"the gap must be finite. Received: {gap}")
    gap, spent = float(gap), 0
    enough = max(tolerance * abs(gap), floor)
    while True:
        known = _slopes(gradient, nodes)
        shares: Array = np.asarray(sum(
            slope * weight
            for slope, weight in zip(known.values(), gauss_legendre(nodes)[1], strict=True)
        ))  # fmt: skip
        spent += nodes
        missing = abs(float(shares.sum()) - gap)
        if missing <= enough or value is not None or 2 * nodes > max_nodes:
            break
        nodes *= 2
    if missing > enough and value is not None:
        _halve(gradient, value, known, most=max_nodes, enough=enough)
        shares = np.sum([piece.scaled for piece in _pieces(known, value)], axis=0)
        spent = nodes = len(known)
        missing = abs(float(shares.sum()) - gap)
    residual = missing / abs(gap) if gap else (np.inf if missing else 0.0)
    return Shares(
        shares=shares,
        gap=gap,
        nodes=nodes,
        gradients=spent,
        residual=float(residual),
        complete=missing <= enough,
    )


@dataclass(frozen=True, eq=False)
class _Piece:
    """An interval of the path, its trapezoid, and the measured difference of the loss."""

    start: float
    end: float
    trapezoid: Array
    rise: float

    @property
    def miss(self) -> float:
        return abs(float(self.trapezoid.sum()) - self.rise)

    @property
    def scaled(self) -> Array:
        total = float(self.trapezoid.sum())
        factor = self.rise / total if total else 0.0
        sound = 1 / MOST_SCALED <= factor <= MOST_SCALED
        return self.trapezoid * factor if sound else self.trapezoid


def _pieces(known: Mapping[float, Array], value: Callable[[float], float]) -> list[_Piece]:
    """The intervals between nodes; at an end of the path the slope is that of the next node."""
    places = [0.0, *sorted(known), 1.0]
    slopes = [known.get(place) for place in places]
    slopes[0], slopes[-1] = slopes[1], slopes[-2]
    losses = [value(place) for place in places]
    return [
        _Piece(a, b, (b - a) * (left + right) / 2, after - before)  # type: ignore[operator]
        for (a, b), (left, right), (before, after) in zip(
            pairwise(places), pairwise(slopes), pairwise(losses), strict=True
        )
    ]


def _halve(
    gradient: Callable[[float], Array],
    value: Callable[[float], float],
    known: dict[float, Array],
    *,
    most: int,
    enough: float,
) -> None:
    """Add nodes where the gradient and the loss disagree most, until they agree or are ``most``."""
    while len(known) < most:
        pieces = _pieces(known, value)
        worst = max(pieces, key=lambda piece: piece.miss)
        if sum(piece.miss for piece in pieces) <= enough or worst.end - worst.start < SHORTEST:
            return
        middle = (worst.start + worst.end) / 2
        known[middle] = _slope(gradient, middle, next(iter(known.values())).shape)


def _slopes(gradient: Callable[[float], Array], nodes: int) -> dict[float, Array]:
    """Place -> gradient, at the nodes of the quadrature, in their order."""
    found: dict[float, Array] = {}
    for place in gauss_legendre(nodes)[0]:
        shape = next(iter(found.values())).shape if found else None
        found[float(place)] = _slope(gradient, float(place), shape)
    return found


def _slope(
    gradient: Callable[[float], Array], t: float, shape: tuple[int, ...] | None
) -> npt.NDArray[np.float64]:
    slope = as_float64(gradient(t))
    if slope.ndim != 1 or (shape is not None and slope.shape != shape):
        raise DataError(
            "the gradient must have shape (sites,) at every node. "
            f"Received: shape {slope.shape} at λ = {t:.4g}"
        )
    if not np.isfinite(slope).all():
        raise DataError(
            f"the gradient is not finite at λ = {t:.4g}: nothing can be attributed. "
            f"Received: site {int(np.argmin(np.isfinite(slope)))} has "
            f"{slope[~np.isfinite(slope)][0]}"
        )
    return slope
