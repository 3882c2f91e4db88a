"""Which site is to blame: the path integral of the gradient from λ = 0 to λ = 1.

``shareᵢ = ∫₀¹ ∂L/∂λᵢ(t·1) dt``. By the fundamental theorem of calculus the shares add up to the gap
``L(1) − L(0)``; how far a sum falls short tells how good the quadrature is. The cost is one
gradient per node, whatever the number of sites.

References:
    - Aumann, Shapley: Values of Non-Atomic Games. Princeton 1974.
    - Sundararajan, Taly, Yan: Axiomatic attribution for deep networks. ICML 2017. (completeness)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from frostline.numerics.stats import gauss_legendre
from frostline.types import Array, DataError, as_float64

#: Fewest and most nodes of the quadrature; doubled in between.
MIN_NODES = 5
MAX_NODES = 40

#: Part of the gap that the shares may miss before the number of nodes is doubled.
TOLERANCE = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Shares:
    """What each site contributes to the gap.

    Attributes:
        shares: One signed part of the gap per site, in units of the loss, shape ``(sites,)``.
        gap: What they should add up to: the loss at λ = 1 minus that at λ = 0.
        nodes: Nodes of the quadrature they come from.
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
) -> Shares:
    """Split the gap among the sites by Gauss–Legendre quadrature of the gradient.

    The number of nodes is doubled until the shares add up to the gap, at most to ``max_nodes``; a
    sum that still does not is returned and says so.

    Args:
        gradient: t in (0, 1) -> ∂L/∂λ at λ = t·1, shape ``(sites,)``.
        gap: L(1) − L(0) on the same samples, measured, not integrated.
        nodes: To begin with; at least 5.
        max_nodes: At most; at least ``nodes``.
        tolerance: Largest residual that is good enough, relative to the gap.
        floor: A difference between sum and gap, in units of the loss, that is good enough whatever
            the gap: what the loss itself is uncertain by.

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
    while True:
        shares = _quadrature(gradient, nodes)
        spent += nodes
        missing = abs(float(shares.sum()) - gap)
        complete = missing <= max(tolerance * abs(gap), floor)
        if complete or 2 * nodes > max_nodes:
            break
        nodes *= 2
    residual = missing / abs(gap) if gap else (np.inf if missing else 0.0)
    return Shares(
        shares=shares,
        gap=gap,
        nodes=nodes,
        gradients=spent,
        residual=float(residual),
        complete=complete,
    )


def _quadrature(gradient: Callable[[float], Array], nodes: int) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] | None = None
    for t, weight in zip(*gauss_legendre(nodes), strict=True):
        slope = as_float64(gradient(float(t)))
        if slope.ndim != 1 or (total is not None and slope.shape != total.shape):
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
        total = slope * weight if total is None else total + slope * weight
    assert total is not None  # there are at least five nodes
    return total
