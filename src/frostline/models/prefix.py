"""The frozen part of a model as the feature cache sees it: who it is, and how to run it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.types import Array, ModelError


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Something that computes features.

    Attributes:
        run: A full batch of inputs -> one array of shape ``(n, ...)`` per tensor of the frontier.
        engine: Its name.
    """

    run: Callable[[Any], Sequence[Array]]
    engine: str


def identity(prefix: Any) -> str:
    """Return the hash of a prefix: what it computes, weights and stored statistics included.

    Args:
        prefix: A built Keras model, or anything with an ``identity`` of its own.

    Raises:
        ModelError: Neither.
    """
    own = getattr(prefix, "identity", None)
    if isinstance(own, str):
        return own
    _require_keras(prefix)
    from frostline.models.keras_prefix import identity as of_keras

    return of_keras(prefix)


def runner(prefix: Any, first: Any, *, engine: str = "auto") -> Runner:
    """Return what runs a prefix.

    Args:
        prefix: As for :func:`identity`; with an ``identity`` of its own it is called as it is.
        first: A full batch of inputs.
        engine: ``"auto"`` or ``"native"``.

    Raises:
        ModelError: Not a prefix, or an unknown engine.
    """
    if isinstance(getattr(prefix, "identity", None), str):
        return Runner(run=prefix, engine="callable")
    _require_keras(prefix)
    del first
    if engine not in ("auto", "native"):
        raise ModelError(f"engine must be 'auto' or 'native'. Received: engine={engine!r}")
    from frostline.models.keras_prefix import native

    return Runner(run=native(prefix), engine="native")


def augmenter(augment: Any) -> Callable[[Any, int], Any]:
    """Return ``(x, seed) -> x`` on numpy batches, for a function or for a Keras layer."""
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(augment, getattr(keras, "Layer", ())):
        from frostline.models.keras_prefix import seeded

        return seeded(augment)
    chosen: Callable[[Any, int], Any] = augment
    return chosen


def _require_keras(prefix: Any) -> None:
    keras = sys.modules.get("keras")
    if keras is None or not isinstance(prefix, getattr(keras, "Model", ())):
        raise ModelError(
            "a prefix is a Keras model, for example fl.split(model).prefix, or a callable with an "
            "`identity` that changes whenever what it computes does. Received: "
            f"{type(prefix).__name__}"
        )
