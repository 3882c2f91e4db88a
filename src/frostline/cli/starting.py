"""What every command that needs a model does first."""

from __future__ import annotations

import importlib

from frostline import environment
from frostline.cli.options import Backend


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
