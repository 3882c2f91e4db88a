"""ONNX Runtime: on the processor, or on an NVIDIA card where its package has CUDA or TensorRT."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frostline.engines.registry import Run, engine, flat, threads
from frostline.types import Array, BackendError, ModelError
from frostline.types.reasons import first_line

#: ONNX Runtime's, fastest first, with their options; those that its package lacks are left out.
_PROVIDERS: dict[str, dict[str, str]] = {
    "TensorrtExecutionProvider": {},
    # TF32 keeps 10 bits of each factor: 1e-3, more than an engine may differ from native.
    "CUDAExecutionProvider": {"use_tf32": "0"},
    "CPUExecutionProvider": {},
}


def _on_nvidia() -> bool:
    """Whether ONNX Runtime's package has an accelerator."""
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return any(
        name != "CPUExecutionProvider"
        for name, _ in _providers(onnxruntime.get_available_providers())
    )


@engine("onnxruntime", accelerated=_on_nvidia)
def start(graph: Callable[[], bytes], precision: str) -> tuple[Run, str]:  # noqa: ARG001
    """Start a session on the fastest device of package and machine, in float32."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendError('onnxruntime is not installed: pip install "frostline[onnx]"')
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    providers = _providers(onnxruntime.get_available_providers())
    if any(name.startswith("CUDA") for name, _ in providers):
        _load_cuda_libraries(onnxruntime)
    content = graph()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as problem:  # as above
        raise ModelError(f"ONNX Runtime refuses the graph: {first_line(problem)}") from problem
    inputs = [(entry.name, _dtype(entry.type)) for entry in session.get_inputs()]

    def run(batch: Any) -> list[Array]:
        leaves = flat(batch)
        feed = {
            name: leaf.astype(dtype, copy=False)
            for (name, dtype), leaf in zip(inputs, leaves, strict=True)
        }
        return list(session.run(None, feed))

    return run, session.get_providers()[0].removesuffix("ExecutionProvider")


def _providers(available: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """What ONNX Runtime is to try, fastest first; one without a device here it leaves out."""
    return [
        (name, dict(given))
        for name, given in _PROVIDERS.items()
        if name in available and (not name.startswith("Tensorrt") or _has_tensorrt())
    ]


def _has_tensorrt() -> bool:
    """Whether TensorRT's library is where the loader looks.

    ONNX Runtime's package names the provider with or without it, and prints a page where it fails.
    """
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    return ctypes.util.find_library("nvinfer") is not None or any(
        any(Path(folder).glob("libnvinfer.so*")) for folder in folders if folder
    )


def _load_cuda_libraries(onnxruntime: Any) -> None:
    """Load those of CUDA and cuDNN that came as Python packages, which the loader does not know."""
    load = getattr(onnxruntime, "preload_dlls", None)  # since 1.21
    if load is not None:
        # It prints what it misses; the session says whether CUDA works.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(RuntimeError):
            load()


def _dtype(text: str) -> Any:
    """``tensor(float)`` -> float32."""
    inner = text.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32"}.get(inner, inner))
