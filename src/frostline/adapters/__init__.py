"""The only rooms that know a framework: one protocol, one view per framework.

A view answers questions about a model in numpy and dataclasses and is the only way to change it.
Nothing above this package imports or names a framework.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from frostline.adapters.protocol import FlagCounts, Forward, Meter, ModelView, Outcome, SplitModel
from frostline.types import Array, ModelError
from frostline.types.facts import ModelFacts


def view(model: Any) -> ModelView:
    """Return the view of ``model``.

    Keras is asked before torch: on the torch backend every Keras model *is* an ``nn.Module``.

    Args:
        model: A Keras 3 model: functional, sequential or subclassed, on any backend; or a torch
            module, DataParallel, DDP and ``torch.compile`` around it included.

    Returns:
        A view; it holds the model and nothing of it is changed.

    Raises:
        ModelError: Not a model that Frostline can read; the text says what it is instead.
    """
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(model, getattr(keras, "Model", ())):
        from frostline.adapters.keras.adapter import KerasView

        return KerasView(model)
    if "torch" in sys.modules and type(model).__module__.startswith(("torch.export", "torch.jit")):
        from frostline.adapters.torch.program import ProgramView

        return cast(ModelView, ProgramView(model))
    if is_native(model):
        from frostline.adapters.torch.adapter import TorchView

        return TorchView(model)
    raise ModelError(_why_not(model, keras))


def read_facts(model: Any) -> ModelFacts:
    """Collect the facts of a model; nothing of it changes.

    Args:
        model: A Keras 3 model, which need not be built or compiled, or a torch module.

    Returns:
        The facts.

    Raises:
        ModelError: Not a model that Frostline can read.
    """
    return view(model).facts()


def is_native(model: Any) -> bool:
    """Whether it is a torch module and no Keras layer on the torch backend; loads nothing."""
    torch, keras = sys.modules.get("torch"), sys.modules.get("keras")
    if torch is None or not isinstance(model, torch.nn.Module):
        return False
    layer = keras is not None and isinstance(model, getattr(keras, "Layer", ()))
    ancestry = (parent.__module__ for parent in type(model).__mro__)
    foreign = any(name.startswith(("keras.src.", "tensorflow.python.keras.")) for name in ancestry)
    return not layer and not foreign


def layers_of(target: Any) -> tuple[Any, ...]:
    """Return what a person means: a model, a layer, a torch module, or several of one framework.

    Raises:
        ModelError: Something else, or nothing.
    """
    keras = sys.modules.get("keras")
    kind = getattr(keras, "Layer", ())
    # torch containers can be iterated and are modules nevertheless.
    several = isinstance(target, (list, tuple, Iterator))
    found = tuple(target) if several else (target,)
    if found and all(is_native(each) for each in found):
        return found
    for each in found:
        if keras is None or not isinstance(each, kind):
            raise ModelError(_why_not(each, keras))
    if not found:
        raise ModelError("expected a model, a layer or a list of layers. Received: an empty list")
    return found


def freezing(
    layers: tuple[Any, ...],
) -> AbstractContextManager[tuple[FlagCounts, Callable[[], None]]]:
    """Freeze layers for a block; see :func:`frostline.frozen`."""
    if is_native(layers[0]):
        from frostline.adapters.torch import edit as torch_edit

        return torch_edit.frozen(layers)
    from frostline.adapters.keras import edit as keras_edit

    return keras_edit.frozen(layers)


def full_precision(model: Any) -> AbstractContextManager[None]:
    """For a block, let no accelerator round products of float32 numbers (TF32).

    Nothing changes for a model on the processor, and what was set is set again afterwards.
    """
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(model, getattr(keras, "Model", ())):
        from frostline.adapters.keras.native import full_precision as of_keras

        return of_keras(model)
    if not is_native(model):
        return nullcontext()
    from frostline.adapters.torch import forward_pass as torch_pass, prefix as torch_prefix

    on_processor = torch_prefix.device(model) == "cpu"
    return nullcontext() if on_processor else torch_pass.full_precision()


def _why_not(model: Any, keras: Any) -> str:
    """Say what ``model`` is when it is not a Keras 3 model of this process."""
    received = f"Received: {type(model).__module__}.{type(model).__qualname__}"
    ancestry = [f"{parent.__module__}.{parent.__qualname__}" for parent in type(model).__mro__]
    if any(name.startswith(("tf_keras.", "tensorflow.python.keras.")) for name in ancestry):
        return (
            "this is a model of legacy Keras 2 (tf_keras); Frostline needs Keras 3. Load it with "
            f"keras.saving.load_model, TF_USE_LEGACY_KERAS unset. {received}"
        )
    if keras is not None and isinstance(model, getattr(keras, "Layer", ())):
        return f"this is a single layer; wrap it in a keras.Model or keras.Sequential. {received}"
    if any(name.startswith("keras.src.") for name in ancestry):
        now = keras.config.backend() if keras is not None else "unknown"
        return (
            "this Keras model was made under another backend than the one Keras runs on now "
            f"({now}); load it again in this process. {received}"
        )
    return f"not a model: expected a keras.Model or a torch.nn.Module. {received}"


__all__ = [
    "Array",
    "FlagCounts",
    "Forward",
    "Meter",
    "ModelView",
    "Outcome",
    "SplitModel",
    "full_precision",
    "view",
]
