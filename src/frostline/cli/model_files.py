"""MODEL in, a file out: what every command that needs a model does first and last."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from frostline import environment
from frostline.cli.options import Backend, ModelOptions, OutputOptions
from frostline.data import files
from frostline.report.sites import Sites
from frostline.types import ModelError

#: Files that only torch reads.
_TORCH_FILES = (".pt2", ".pt", ".pth", ".ts", ".torchscript")
STATE_FILES = (".pt", ".pth")
KERAS_FILES = (".keras", ".h5")


def start(backend: Backend | None, *, keras: bool = True) -> None:
    """Settle backend and noise before anything imports Keras.

    Args:
        backend: As typed.
        keras: Whether Keras is needed; a torch module is looked at without.
    """
    environment.quiet_frameworks()
    if not keras:
        return
    environment.choose_backend(None if backend is None else backend.value)
    with environment.native_noise_held_back():
        importlib.import_module("keras")


def open_model(options: ModelOptions) -> Any:
    """Settle the backend and load MODEL."""
    start(options.backend, keras=not _is_module(options.model, options.state))
    return load(options.model, options.state)


def open_to_edit(options: ModelOptions, target: OutputOptions) -> Any:
    """Load a MODEL that has BN layers, and refuse a target that cannot be written."""
    model = open_model(options)
    sites_of(model)
    check_output(target, options.model, state=is_state(model))
    return model


def load(source: str, state: str | None = None) -> Any:
    """Load MODEL; Keras' file code may start TensorFlow on any backend, which is noisy."""
    from frostline.adapters import store

    with environment.native_noise_held_back():
        if _is_module(source, state):
            return store("torch").load_model(source, state)
        return store("keras").load_model(source)


def load_reference(source: str, model: Any) -> Any:
    """Load a model to compare with; for a torch module, a file with a state will do."""
    if is_state(model) and Path(source).suffix in STATE_FILES:
        from frostline.adapters import store

        return store("torch").read_state_file(Path(source))
    return load(source)


def save(model: Any, target: OutputOptions) -> None:
    """Write a model, whole or not at all."""
    from frostline.adapters import store

    with environment.native_noise_held_back():
        if is_state(model):
            store("torch").save_state(model, target.output, overwrite=target.force)
        else:
            store("keras").save_model(model, target.output, overwrite=target.force)


def sites_of(model: Any) -> Sites:
    """Return the BN sites; raises `ModelError` where there are none."""
    from frostline.verbs.diagnose import require_sites, sites

    found = sites(model)
    require_sites(found)
    return found


def is_state(model: Any) -> bool:
    """Whether a file of the model holds its parameters and statistics only, not the model."""
    from frostline.adapters import adapter_of

    return adapter_of(model).saved_as == "state"


def loss_of(text: str | None, model: Any) -> Any:
    """What ``--loss`` means for a torch module: a name, or ``module:function``."""
    if text is None or ":" not in text or not is_state(model):
        return text
    from frostline.data.import_string import named

    return named(text)


def check_output(target: OutputOptions, source: str, *, state: bool = False) -> None:
    """Refuse an output that cannot be, before the work instead of after it.

    Args:
        target: As typed.
        source: MODEL, which is not overwritten by mistake.
        state: Whether a torch module's state is written, not a Keras model.

    Raises:
        OutputError: Another ending, a file that is there already, or no such folder.
    """
    suffixes, noun = (
        (STATE_FILES, "the state of a torch module") if state else (KERAS_FILES, "a model")
    )
    files.check_output(target.output, suffixes, noun, force=target.force, source=source)


def require_model_file(model: Any, verb: str, line: str) -> None:
    """Refuse to write what a ``state_dict`` cannot hold, with the line that does it in code.

    Raises:
        ModelError: The model is a torch module, whose file is a state.
    """
    if is_state(model):
        raise ModelError(
            f"a state_dict holds parameters and statistics only, so nothing of {verb} would be in "
            f"the file; in your code, behind load_state_dict: {line}"
        )


def _is_module(source: str, state: str | None = None) -> bool:
    """Whether MODEL is for torch alone, as far as its name tells; Keras need not be loaded."""
    return state is not None or Path(source).suffix in _TORCH_FILES
