"""The decay of the moving statistics: choose it, set it, say it in both conventions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from frostline.adapters import Adapter
from frostline.graph.selection import select
from frostline.types import ModelError, Site

#: A Keras momentum below this is more likely PyTorch's number (its default is 0.1).
LIKELY_TORCH = 0.5


@dataclass(frozen=True, kw_only=True)
class MomentumChange:
    """What :func:`set_site_momentum` did, in words, and how to take it back."""

    text: str
    notes: tuple[str, ...]
    undo: Callable[[], None]


def set_site_momentum(adapter: Adapter, momentum: Any, *, sites: Any) -> MomentumChange:
    """Set the decay of chosen sites; see :func:`frostline.set_momentum`."""
    number = isinstance(momentum, (int, float, np.integer, np.floating))
    if isinstance(momentum, bool) or not number or not 0 <= momentum <= 1:
        raise ModelError(
            "momentum must be a number between 0 and 1, the share of the old value that an update "
            f"keeps (Keras' convention). Received: momentum={momentum!r}"
        )
    decay = float(momentum)
    chosen = select(adapter.sites(), sites)
    baked, undo = adapter.set_decay(tuple(site.path for site in chosen), decay)
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
