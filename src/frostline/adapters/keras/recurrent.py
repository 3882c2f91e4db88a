"""Recurrent layers that run BN in a loop which only the backend sees: taken step by step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras

from frostline.adapters.keras.graph import is_site, walk
from frostline.adapters.keras.overridden import overridden


def looping(model: Any) -> list[Any]:
    """The recurrent layers whose cells hold BN."""
    layers = [place.layer for place in walk(model)]
    return [layer for layer in layers if isinstance(layer, keras.layers.RNN) and _holds_bn(layer)]


def step_by_step(loops: Sequence[Any]) -> AbstractContextManager[None]:
    """Run them without a loop, for a block: what its sites see would never get out of one."""
    return overridden((layer, "unroll", True) for layer in loops)


def _holds_bn(layer: Any) -> bool:
    return any(is_site(place.layer) for place in walk(layer))
