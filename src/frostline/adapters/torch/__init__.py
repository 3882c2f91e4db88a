"""Native torch modules: which values belong here; see :class:`frostline.adapters.Room`.

Importing this package loads no framework.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from frostline.adapters.protocol import Adapter

#: First parts of the module names of classes that are Keras layers, whatever else they are.
_FOREIGN = ("keras.src.", "tensorflow.python.keras.")


def is_layer(value: Any) -> bool:
    """Whether it is a torch module, and no Keras layer on the torch backend."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.nn.Module):
        return False
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(value, getattr(keras, "Layer", ())):
        return False
    return not any(parent.__module__.startswith(_FOREIGN) for parent in type(value).__mro__)


def _is_program(value: Any) -> bool:
    programs = ("torch.export", "torch.jit", f"{__name__}.program")
    return type(value).__module__.startswith(programs)


def is_model(value: Any) -> bool:
    """Whether it is a torch module or an exported program."""
    return _is_program(value) or is_layer(value)


def adapter_of(model: Any) -> Adapter:
    """The adapter of a torch module or of an exported program.

    A TorchScript program is asked through a module that reads it, where that is possible.
    """
    from frostline.adapters.torch import script

    readable = script.is_program(model) and script.why_unreadable(model) is None
    if _is_program(model) and not readable:
        from frostline.adapters.torch.program import ProgramView

        return cast(Adapter, ProgramView(model))
    from frostline.adapters.torch.adapter import TorchView

    return TorchView(model)


def why_not(value: Any) -> str | None:  # noqa: ARG001 - any value may be passed
    """Nothing to say: a torch module is always a model."""
    return None
