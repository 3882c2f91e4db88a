"""Keras 3 on any of its backends: which values belong here; see :class:`frostline.adapters.Room`.

Importing this package loads no framework.
"""

from __future__ import annotations

import sys
from typing import Any

from frostline import environment
from frostline.adapters.protocol import Adapter


def is_layer(value: Any) -> bool:
    """Whether it is a Keras layer; every model is one."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, getattr(keras, "Layer", ()))


def is_model(value: Any) -> bool:
    """Whether it is a Keras model."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, getattr(keras, "Model", ()))


def adapter_of(model: Any) -> Adapter:
    """The adapter of a Keras model.

    Raises:
        BackendError: The Keras of this process is too old.
    """
    environment.refuse_old_keras(sys.modules["keras"].__version__)
    from frostline.adapters.keras.adapter import KerasView

    return KerasView(model)


def why_not(value: Any) -> str | None:
    """Say what a value with a Keras ancestry is, if it is no Keras 3 model of this process."""
    keras = sys.modules.get("keras")
    ancestry = [f"{parent.__module__}.{parent.__qualname__}" for parent in type(value).__mro__]
    if any(name.startswith(("tf_keras.", "tensorflow.python.keras.")) for name in ancestry):
        return (
            "this is a model of legacy Keras 2 (tf_keras); Frostline needs Keras 3. Load it with "
            "keras.saving.load_model, TF_USE_LEGACY_KERAS unset."
        )
    if is_layer(value):
        return "this is a single layer; wrap it in a keras.Model or keras.Sequential."
    if any(name.startswith("keras.src.") for name in ancestry):
        now = keras.config.backend() if keras is not None else "unknown"
        return (
            "this Keras model was made under another backend than the one Keras runs on now "
            f"({now}); load it again in this process."
        )
    return None
