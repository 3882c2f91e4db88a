"""Run a frozen prefix as fast as this machine can: native, ONNX Runtime or OpenVINO.

A frozen prefix is a pure function, so anything may compute it that computes the same. Which engine
is fastest depends on model, machine and backend, so it is measured, on the first batch; whether it
computes the same is measured there too. An engine is one file here, see :mod:`.registry`.
"""

from __future__ import annotations

from frostline.engines.choice import (
    COMPARED_SAMPLES,
    NAMES,
    TOLERANCE,
    TOLERANCES,
    TRIAL_SAMPLES,
    choose,
    remember,
    remembered,
    require_precision,
    rounding,
)
from frostline.engines.registry import Engine, engine

__all__ = [
    "COMPARED_SAMPLES",
    "NAMES",
    "TOLERANCE",
    "TOLERANCES",
    "TRIAL_SAMPLES",
    "Engine",
    "choose",
    "engine",
    "remember",
    "remembered",
    "require_precision",
    "rounding",
]
