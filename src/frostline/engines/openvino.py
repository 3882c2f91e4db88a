"""OpenVINO, on the processor."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from frostline.engines.registry import Run, engine, flat, threads
from frostline.types import Array, BackendError, ModelError
from frostline.types.reasons import first_line


@engine("openvino")
def start(graph: Callable[[], bytes]) -> tuple[Run, str]:
    """Compile the graph for the processor, in float32."""
    if importlib.util.find_spec("openvino") is None:
        raise BackendError('openvino is not installed: pip install "frostline[openvino]"')
    openvino = _quiet_openvino()
    content = graph()
    # Some processors would compute in bfloat16 by default.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads():
        settings["INFERENCE_NUM_THREADS"] = threads()
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(content), "CPU", settings)
    except Exception as problem:  # as above
        raise ModelError(f"OpenVINO refuses the graph: {first_line(problem)}") from problem
    dtypes = [port.get_element_type().to_dtype() for port in compiled.inputs]

    def run(batch: Any) -> list[Array]:
        leaves = flat(batch)
        feed = [leaf.astype(dtype, copy=False) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        # A request's own arrays are written again by the next one.
        return [np.array(value) for value in compiled(feed).values()]

    return run, "CPU"


def _quiet_openvino() -> Any:
    """Import OpenVINO without its usage reports.

    They call home at import, from a forked process, which JAX warns may never end.
    """
    reports = "openvino_telemetry"
    known = sys.modules.get(reports)
    if "openvino" not in sys.modules:  # without the package that reports it takes a stub
        sys.modules[reports] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        if sys.modules.get(reports) is None:
            sys.modules.pop(reports, None)
        if known is not None:
            sys.modules[reports] = known
