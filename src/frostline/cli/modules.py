"""Torch modules on the command line: what MODEL and ``--state`` mean, and what a file can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frostline.types import ModelError

#: Files that only torch reads.
SUFFIXES = (".pt2", ".pt", ".pth", ".ts", ".torchscript")


def is_module(source: str, state: str | None = None) -> bool:
    """Whether MODEL is for torch alone, as far as its name tells; Keras need not be loaded."""
    return state is not None or Path(source).suffix in SUFFIXES


def is_state(model: Any) -> bool:
    """Whether a file of the model holds its parameters and statistics only, not the model."""
    from frostline.adapters import view

    return view(model).saved_as == "state"


def load(source: str, state: str | None) -> Any:
    """Load what :func:`is_module` says is torch's."""
    from frostline.adapters.torch import files as torch_files

    return torch_files.load_model(source, state)


def reference(source: str) -> Any:
    """A file with a state as its tensors; ``None`` when it is something else."""
    if Path(source).suffix not in (".pt", ".pth"):
        return None
    from frostline.adapters.torch import files as torch_files

    return torch_files.read_state_file(Path(source))


def loss(text: str | None, model: Any) -> Any:
    """What ``--loss`` means for a torch module: a name, or ``module:function``."""
    if text is None or ":" not in text or not is_state(model):
        return text
    from frostline.data.import_string import named

    return named(text)


def refuse(verb: str, line: str) -> None:
    """Refuse to write what a ``state_dict`` cannot hold, with the line that does it in code.

    Raises:
        ModelError: Always.
    """
    raise ModelError(
        f"a state_dict holds parameters and statistics only, so nothing of {verb} would be in the "
        f"file; in your code, behind load_state_dict: {line}"
    )
