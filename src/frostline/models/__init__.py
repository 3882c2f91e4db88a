"""The only rooms that know a framework: one protocol, one view per framework.

A view answers questions about a model in numpy and dataclasses and is the only way to change it.
Nothing above this package imports or names a framework.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from frostline.types import Array, Boundary, ModelError, Site


class ModelView(Protocol):
    """What the rest of Frostline may ask of a model, whatever its framework."""

    model: Any
    framework: str  # "keras" | "torch"
    backend: str  # "tensorflow" | "jax" | "torch"

    def sites(self) -> tuple[Site, ...]:
        """Every BN layer, in execution order where the graph is known."""
        ...

    def preserved(self) -> AbstractContextManager[None]:
        """Restore every variable, flag, momentum and compile state on any exit, bit for bit."""
        ...

    def forward(self, x: Any, *, training: bool) -> Array:
        """Forward pass of one batch, float32; no variable of the model changes."""
        ...
