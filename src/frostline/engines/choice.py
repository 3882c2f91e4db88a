"""Choose what runs a prefix: the fastest engine that agrees with native, measured on a batch."""

from __future__ import annotations

import importlib
import pkgutil
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from frostline import engines
from frostline.adapters import prefix as prefixes
from frostline.data.arrays import map_leaves
from frostline.engines.registry import ENGINES, Engine, Run
from frostline.numerics.compare import relative_difference
from frostline.types import Array, BackendError, FrostlineError, ModelError
from frostline.types.reasons import first_line

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

for _module in pkgutil.iter_modules(engines.__path__):
    if _module.name not in ("choice", "registry"):
        importlib.import_module(f"{engines.__name__}.{_module.name}")

NAMES = ("native", *ENGINES)

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
    if engine == "auto" and accelerator and not any(there() for _, there in ENGINES.values()):
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
    from frostline.adapters import adapter_of

    return adapter_of(prefix).backend


def _candidates(
    prefix: Any, wanted: Sequence[str], batch: Any
) -> list[tuple[str, Callable[[], tuple[Run, str]]]]:
    """Engines to try; the graph is written once for all of them."""
    written: list[bytes] = []

    def graph() -> bytes:
        if not written:
            written.append(prefixes.to_onnx(prefix, batch))
        return written[0]

    return [(name, lambda name=name: ENGINES[name][0](graph)) for name in wanted]  # type: ignore[misc]
