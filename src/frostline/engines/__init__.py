"""Run a frozen prefix as fast as this machine can: native, ONNX Runtime or OpenVINO.

A frozen prefix is a pure function, so anything may compute it that computes the same. Which engine
is fastest depends on model, machine and backend, so it is measured, on the first batch; whether it
computes the same is measured there too.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib
import importlib.util
import io
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from frostline.adapters import prefix as prefixes
from frostline.data.batches import map_leaves
from frostline.numerics.compare import relative_difference
from frostline.types import Array, BackendError, FrostlineError, ModelError
from frostline.types.reasons import first_line

Run = Callable[[Any], list[Array]]

NAMES = ("native", "onnxruntime", "openvino")
#: Largest difference from the native output, as a share of its largest value.
TOLERANCE = 1e-4
#: Samples of the first batch on which engines are tried, where the model takes any number of them:
#: on whole batches of a large network the choice would cost more than it saves on a processor.
TRIAL_SAMPLES = 8
#: Samples on which an engine has to agree with native, which is not compiled for them.
COMPARED_SAMPLES = 2
#: Seconds of work from which on native is timed as well where another engine agrees: compiling it
#: takes seconds on TensorFlow and JAX, and on a processor it has not been the faster one yet.
NATIVE_PAYS_S = 60.0
#: A run that takes so many seconds is not timed a second time.
LONG_S = 0.5
#: ONNX Runtime's, fastest first, with their options; those that its package lacks are left out.
_PROVIDERS: dict[str, dict[str, str]] = {
    "TensorrtExecutionProvider": {},
    # TF32 keeps 10 bits of each factor: 1e-3, more than an engine may differ from native.
    "CUDAExecutionProvider": {"use_tf32": "0"},
    "CPUExecutionProvider": {},
}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Something that runs a prefix.

    Attributes:
        name: ``"native"``, ``"onnxruntime"`` or ``"openvino"``.
        device: What it runs on, in its own words.
        rates: Engine -> samples per second on the first batch, of those that were timed.
        errors: Engine -> largest difference from native in full precision, as a share of the
            largest value.
        notes: Why engines were not taken.
    """

    name: str
    device: str
    rates: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _run: Run = field(repr=False, default=lambda _: [])

    def run(self, batch: Any) -> list[Array]:
        """Compute one batch.

        Args:
            batch: Model inputs, an array or a structure of arrays, shape ``(n, ...)`` each.

        Returns:
            The flattened outputs, shape ``(n, ...)`` each, in the prefix's dtypes.
        """
        return self._run(batch)


#: Prefix -> (what it was then, the engine asked for, the engine): views and data sets share one.
_CHOSEN: weakref.WeakKeyDictionary[Any, tuple[Any, str, Engine]] = weakref.WeakKeyDictionary()


def remembered(prefix: Any, known_by: Any, wanted: str) -> Engine | None:
    """The engine that this process chose for a prefix as it is, if it is what is wanted now.

    Args:
        prefix: As for :func:`choose`.
        known_by: What tells whether it is still the same: its identity, for example.
        wanted: Name of an engine, or ``"auto"``.
    """
    try:
        found, asked, chosen = _CHOSEN[prefix]
    except (KeyError, TypeError):  # TypeError: no weak reference can be made to it
        return None
    return chosen if found == known_by and wanted in (asked, chosen.name) else None


def remember(prefix: Any, known_by: Any, asked: str, engine: Engine) -> None:
    """Answer :func:`remembered` with this engine, which was asked for as ``asked``."""
    _CHOSEN[prefix] = (known_by, asked, engine)


def choose(prefix: Any, batch: Any, engine: str = "auto", *, samples: int | None = None) -> Engine:
    """Choose how to run a prefix.

    ``"auto"`` runs every installed engine on some samples of the batch and takes the fastest
    whose outputs agree with native to a relative error of 1e-4; where none is faster or agrees,
    native. Native is compared in full float32 precision: on an NVIDIA card it may round products
    to TF32, by 1e-3, as training does there. Where an engine that agrees needs less than a minute
    for all samples, native is not compiled to be timed against it. With one engine asked for by
    name, that one is taken if it agrees, and an error says why not otherwise. Where native runs on
    an accelerator, engines that have none are not tried, and it is always timed.

    Engines get as many threads as ``OMP_NUM_THREADS`` says, or one per core of this process. ONNX
    Runtime takes TensorRT, or CUDA without TF32, where its package and the machine have them.

    Args:
        prefix: A built functional Keras model or a torch module, for example
            :attr:`frostline.Split.prefix`.
        batch: The first batch, in the structure of the model's inputs, shape ``(n, ...)`` each.
        engine: ``"auto"``, ``"native"``, ``"onnxruntime"`` or ``"openvino"``.
        samples: How many there are to compute, at most; ``None``: not known, maybe many.

    Returns:
        The engine, with what was measured.

    Raises:
        ModelError: Unknown engine, or one asked for by name that cannot run the model or disagrees.
        BackendError: One asked for by name that is not installed.
    """
    if engine not in ("auto", *NAMES):
        allowed = ", ".join(("auto", *NAMES))
        raise ModelError(f"engine must be one of {allowed}. Received: engine={engine!r}")
    native = prefixes.native(prefix)
    if engine == "native":
        return Engine(name="native", device=_backend(prefix), _run=native)
    few = batch
    wanted: tuple[str, ...] = NAMES[1:] if engine == "auto" else (engine,)
    accelerator = prefixes.accelerator(prefix)
    if prefixes.takes_any_number(prefix):
        few = map_leaves(lambda leaf: leaf[:COMPARED_SAMPLES], batch)
        # A card is idle with a few samples, and soon done with a batch.
        batch = batch if accelerator else map_leaves(lambda leaf: leaf[:TRIAL_SAMPLES], batch)
    notes: list[str] = []
    if engine == "auto" and accelerator and not _on_nvidia():
        notes.append(f"native runs on {accelerator}, and the other engines only on the processor")
        wanted = ()
    expected = prefixes.reference(prefix)(few) if wanted else []
    found: dict[str, tuple[Run, str]] = {}
    errors: dict[str, float] = {}
    for name, outcome in _candidates(prefix, wanted, few):
        try:
            run, device = outcome()
            errors[name] = error = relative_difference(_attempt(run, few), expected)
            if not error <= TOLERANCE:
                raise ModelError(
                    f"it differs from native by {error:.1e}, allowed is {TOLERANCE:.0e}"
                )
            found[name] = (run, device)
        except FrostlineError as problem:
            if engine != "auto":
                kind = BackendError if isinstance(problem, BackendError) else ModelError
                raise kind(f"engine {name} cannot run this prefix: {problem}") from problem
            notes.append(f"{name} is not used: {problem}")
    rates = (
        {} if engine != "auto" else {name: _rate(run, batch) for name, (run, _) in found.items()}
    )
    long = samples is None or samples > NATIVE_PAYS_S * max(rates.values(), default=0.0)
    if engine == "auto" and (accelerator or long or not found):
        found["native"] = (native, _backend(prefix))
        if rates:
            native(batch)  # compiles
            rates["native"] = _rate(native, batch)
    chosen = max(found, key=lambda name: rates.get(name, 0.0))
    run, device = found[chosen]
    return Engine(
        name=chosen, device=device, rates=rates, errors=errors, notes=tuple(notes), _run=run
    )


def rounding(prefix: Any, batch: Any, expected: Sequence[Array]) -> float:
    """How far native on an accelerator is from full precision; 0 on the processor.

    Args:
        prefix: As for :func:`choose`.
        batch: A few samples.
        expected: What full precision computes of them.
    """
    if not prefixes.accelerator(prefix):
        return 0.0
    return relative_difference(prefixes.native(prefix)(batch), expected)


def _attempt(run: Run, batch: Any) -> list[Array]:
    try:
        return run(batch)
    except Exception as problem:  # the engines' exceptions have no public root
        raise ModelError(f"it fails on the first batch: {first_line(problem)}") from problem


def _rate(run: Run, batch: Any) -> float:
    """Samples per second, the better of two runs; an earlier call has compiled already."""
    seconds: list[float] = []
    while len(seconds) < 2 and not (seconds and seconds[0] > LONG_S):
        start = time.perf_counter()
        outputs = run(batch)
        seconds.append(time.perf_counter() - start)
    return len(outputs[0]) / max(min(seconds), 1e-9)


def _backend(prefix: Any) -> str:
    from frostline.adapters import view

    return view(prefix).backend


def _candidates(
    prefix: Any, wanted: Sequence[str], batch: Any
) -> list[tuple[str, Callable[[], tuple[Run, str]]]]:
    """Engines to try; the graph is written once for all of them."""
    written: list[bytes] = []

    def graph() -> bytes:
        if not written:
            written.append(prefixes.to_onnx(prefix, batch))
        return written[0]

    start = {"onnxruntime": _onnxruntime, "openvino": _openvino}
    return [(name, lambda name=name: start[name](graph)) for name in wanted]  # type: ignore[misc]


def _threads() -> int:
    """Threads that the user, or the cores given to this process, allow; 0: all cores."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    if text.isdigit():
        return int(text)
    # ONNX Runtime counts the machine's cores, also where ``taskset`` or a container gives it two.
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return given if given != os.cpu_count() else 0


def _leaves(batch: Any) -> list[Array]:
    if isinstance(batch, Mapping):
        return [leaf for key in sorted(batch) for leaf in _leaves(batch[key])]
    if isinstance(batch, (list, tuple)):
        return [leaf for each in batch for leaf in _leaves(each)]
    return [np.ascontiguousarray(batch)]


def _onnxruntime(graph: Callable[[], bytes]) -> tuple[Run, str]:
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendError("onnxruntime is not installed: pip install frostline[onnx]")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads()
    options.log_severity_level = 3
    providers = _providers(onnxruntime.get_available_providers())
    if any(name.startswith("CUDA") for name, _ in providers):
        _load_cuda_libraries(onnxruntime)
    content = graph()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as problem:  # as above
        raise ModelError(f"ONNX Runtime refuses the graph: {first_line(problem)}") from problem
    inputs = [(each.name, _dtype(each.type)) for each in session.get_inputs()]

    def run(batch: Any) -> list[Array]:
        leaves = _leaves(batch)
        feed = {
            name: leaf.astype(dtype, copy=False)
            for (name, dtype), leaf in zip(inputs, leaves, strict=True)
        }
        return list(session.run(None, feed))

    return run, session.get_providers()[0].removesuffix("ExecutionProvider")


def _on_nvidia() -> bool:
    """Whether ONNX Runtime's package has an accelerator."""
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return any(
        name != "CPUExecutionProvider"
        for name, _ in _providers(onnxruntime.get_available_providers())
    )


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
        # What it misses it prints; whether CUDA works, the session tells.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(RuntimeError):
            load()


def _dtype(text: str) -> Any:
    """``tensor(float)`` -> float32."""
    inner = text.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32"}.get(inner, inner))


def _openvino(graph: Callable[[], bytes]) -> tuple[Run, str]:
    if importlib.util.find_spec("openvino") is None:
        raise BackendError("openvino is not installed: pip install frostline[openvino]")
    openvino = _quiet_openvino()
    content = graph()
    # Some processors would compute in bfloat16 by default.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if _threads():
        settings["INFERENCE_NUM_THREADS"] = _threads()
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(content), "CPU", settings)
    except Exception as problem:  # as above
        raise ModelError(f"OpenVINO refuses the graph: {first_line(problem)}") from problem
    dtypes = [each.get_element_type().to_dtype() for each in compiled.inputs]

    def run(batch: Any) -> list[Array]:
        leaves = _leaves(batch)
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
