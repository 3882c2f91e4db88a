"""OpenVINO, on the processor."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from frostline.engines.registry import NO_BFLOAT16, Run, engine, flat, threads
from frostline.types import Array, BackendError, ModelError
from frostline.types.reasons import first_line


@engine("openvino", precisions=("float32", "bfloat16"))
def start(graph: Callable[[], bytes], precision: str) -> tuple[Run, str]:
    """Compile the graph for the processor; inputs and outputs are float32 in any case."""
    if importlib.util.find_spec("openvino") is None:
        raise BackendError('openvino is not installed: pip install "frostline[openvino]"')
    openvino = _quiet_openvino()
    if precision == "bfloat16" and "BF16" not in _capabilities(openvino):
        raise BackendError(NO_BFLOAT16)
    content = graph()
    # Without the hint some processors would compute in bfloat16 by default.
    hint = "bf16" if precision == "bfloat16" else "f32"
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if threads():
        settings["INFERENCE_NUM_THREADS"] = threads()
    try:
        with _signal_stack_kept():
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


def _capabilities(openvino: Any) -> list[str]:
    """What the processor computes in, in OpenVINO's words."""
    with _signal_stack_kept():
        return list(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class _SignalStack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Keep the stack on which this thread handles signals.

    On processors with AMX OpenVINO puts one of its own in its place when it loads its plugin, and
    unmaps that with the plugin. Where another thread does so, as the collection of garbage may, the
    next signal that Python handles would end the process.
    """
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


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
