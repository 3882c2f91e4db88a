"""The decay of the moving statistics: choose it, set it, say it in both conventions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from frostline.models import ModelView
from frostline.selection import select
from frostline.types import ModelError, Site

#: A Keras momentum below this is more likely PyTorch's number (its default is 0.1).
LIKELY_TORCH = 0.5


@dataclass(frozen=True, kw_only=True)
class MomentumChange:
    """What :func:`set_view_momentum` did, in words, and how to take it back."""

    text: str
    notes: tuple[str, ...]
    undo: Callable[[], None]


def set_view_momentum(view: ModelView, momentum: Any, *, sites: Any) -> MomentumChange:
    """Set the decay of chosen sites; see :func:`frostline.set_momentum`."""
    number = isinstance(momentum, (int, float, np.integer, np.floating))
    if isinstance(momentum, bool) or not number or not 0 <= momentum <= 1:
        raise ModelError(
            "momentum must be a number between 0 and 1, the share of the old value that an update "
            f"keeps (Keras' convention). Received: momentum={momentum!r}"
        )
    decay = float(momentum)
    chosen = select(view.sites(), sites)
    baked, undo = view.set_decay(tuple(site.path for site in chosen), decay)
    return MomentumChange(text=_text(chosen, decay), notes=_notes(baked, chosen, decay), undo=undo)


def _text(chosen: tuple[Site, ...], decay: float) -> str:
    old = sorted({site.decay for site in chosen})
    before = " and ".join(f"{value:.6g}" for value in old[:3]) + (", ..." if len(old) > 3 else "")
    sites = "1 site" if len(chosen) == 1 else f"{len(chosen)} sites"
    return (
        f"set the momentum of {sites} from {before} to {decay:.6g} in Keras' convention "
        f"({1 - decay:.6g} in PyTorch's): an update keeps {decay:.4%} of the old statistics"
    )


def _notes(stock: int, chosen: tuple[Site, ...], decay: float) -> tuple[str, ...]:
    notes = []
    if stock:
        notes.append(
            f"{stock} of the sites are stock Keras layers, whose momentum is a constant of the "
            "training step: it takes effect after the next compile(); frostline.convert makes it "
            "live"
        )
    if decay < LIKELY_TORCH:
        notes.append(
            f"{decay:.6g} is low for Keras: if it is a PyTorch momentum, pass {1 - decay:.6g}"
        )
    if decay == 1:
        notes.append("with 1.0 the statistics never move")
    frozen = sum(site.stats_frozen for site in chosen)
    if frozen:
        notes.append(f"{frozen} of the sites are frozen: their statistics do not move anyway")
    return tuple(notes)


def suggest_momentum(steps: int, learning_rate_ratio: float = 1.0) -> float:
    """Suggest a Keras momentum for a planned number of training steps.

    An exponential average keeps ``decay**n`` of its old value after n updates. The suggestion is
    the slowest average that has forgotten all but 1% of it by the end::

        decay = 0.01 ** (learning_rate_ratio / steps),   at least 0.5 and at most 0.999

    (Keras' default 0.99 needs 459 steps for that; 70 steps leave 49%.) The variance of the average
    is (1 − decay) / (1 + decay) of that of one batch (Hunter, J. Quality Technology 18, 1986), so a
    slower one is less noisy. The lower bound keeps at least three batches' worth of averaging; it
    is reached at 6 steps, for which :func:`frostline.recalibrate` is the better tool.

    Args:
        steps: Updates that are planned, for example epochs times batches per epoch.
        learning_rate_ratio: Learning rate of the layers below divided by the usual one. With a
            smaller one their outputs move more slowly and the average may be longer in proportion:
            at 0.1 its horizon is ten times as long (63% of the old value is left at the end).

    Returns:
        The share of the old value that one update keeps; 1 minus it is PyTorch's momentum.

    Raises:
        ModelError: Not a positive number of steps or ratio.

    Example:
        >>> round(suggest_momentum(70), 3), suggest_momentum(10**6), suggest_momentum(1)
        (0.936, 0.999, 0.5)
    """
    try:
        count = 0 if isinstance(steps, bool) else operator.index(steps)
    except TypeError:
        count = 0
    if count < 1:
        raise ModelError(f"steps must be a whole number of at least 1. Received: steps={steps!r}")
    if not (math.isfinite(learning_rate_ratio) and learning_rate_ratio > 0):
        raise ModelError(
            "learning_rate_ratio must be a positive number. "
            f"Received: learning_rate_ratio={learning_rate_ratio!r}"
        )
    decay = math.pow(0.01, learning_rate_ratio / count)
    return min(max(decay, 0.5), 0.999)
