"""What every command that needs a model does first."""

from __future__ import annotations

import importlib

from frostline import environment
from frostline.commands.options import Backend


def start(backend: Backend | None) -> None:
    """Settle backend and noise before anything imports Keras."""
    environment.quiet_frameworks()
    environment.choose_backend(None if backend is None else backend.value)
    with environment.native_noise_held_back():
        importlib.import_module("keras")
