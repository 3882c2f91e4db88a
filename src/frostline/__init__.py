"""Frostline: frozen Batch Normalization that is really frozen.

``import frostline`` loads numpy at most; a framework is loaded only by the model you pass. Every
public name is imported on first use.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version as _version
from typing import Any

__version__ = _version("frostline")

#: Public name -> module that defines it. A name equal to the module's own name is the module.
_EXPORTS = {
    "BackendError": "types",
    "Boundary": "types",
    "Change": "repair",
    "Crossing": "types",
    "DataError": "types",
    "FeatureCache": "cache.features",
    "Finding": "types",
    "FrostlineError": "types",
    "ModelError": "types",
    "NotFrozenError": "watching",
    "OutputError": "types",
    "PhaseTable": "types",
    "Report": "report.report",
    "Site": "types",
    "assert_frozen": "watching",
    "Split": "splitting",
    "cache_features": "cache",
    "callbacks": "callbacks",
    "convert": "repair",
    "diagnose": "diagnosis",
    "fit": "training",
    "fold": "repair",
    "freeze": "repair",
    "frozen": "repair",
    "layers": "layers",
    "lint": "diagnosis",
    "phases": "diagnosis",
    "recalibrate": "repair",
    "restore": "repair",
    "set_momentum": "repair",
    "sites": "diagnosis",
    "split": "splitting",
    "suggest_momentum": "momentum",
    "unfreeze": "repair",
    "watch": "watching",
}

__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'frostline' has no attribute {name!r}")
    module = importlib.import_module(f"frostline.{_EXPORTS[name]}")
    value = module if name == _EXPORTS[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
