"""The frozen part of a model as the feature cache sees it: who it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from frostline.types import ModelError


def identity(prefix: Any) -> str:
    """Return the hash of a prefix: what it computes, weights and stored statistics included.

    Args:
        prefix: A built Keras model, or anything with an ``identity`` of its own.

    Raises:
        ModelError: Neither.
    """
    if is_callable_prefix(prefix):
        return str(prefix.identity)
    _require_keras(prefix)
    from frostline.models.keras_prefix import identity as of_keras

    return of_keras(prefix)


def is_callable_prefix(prefix: Any) -> bool:
    """Whether a prefix is a function with an ``identity`` of its own, which runs as it is."""
    return isinstance(getattr(prefix, "identity", None), str)


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
