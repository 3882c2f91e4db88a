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
#: The same by precision. Eight bits are 4e-3 for one product; what an engine computes wrongly is
#: off by more than what they add up to in deep networks.
TOLERANCES = {"float32": TOLERANCE, "bfloat16": 1e-1}
#: Samples of the first batch on which engines are tried, where the model takes any number of them:
#: on whole batches of a large network the choice would cost more than it saves on a processor.
TRIAL_SAMPLES = 8
#: Samples on which an engine has to agree with native, which is not compiled for them.
COMPARED_SAMPLES = 2
#: Seconds of work from which on native is timed as well where another engine agrees: compiling it
#: takes seconds on TensorFlow and JAX, and on a processor it has not been the faster one yet.
NATIVE_PAYS_S = 60.0
#: Seconds of work, at the rate of a few samples, up to which native is taken untried where nothing
#: has to be compiled for it. Whole batches take up to twice as long in torch; writing the graph and
#: trying engines takes one to three seconds.
SOON_S = 1.5
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
    """Answer :func:`remembered` with this engine, which was asked for as ``asked``.

    Not with one that was taken untried, as more data than these may be worth a trial.
    """
    if asked == "auto" and not (engine.rates or engine.notes):
        return
    _CHOSEN[prefix] = (known_by, asked, engine)


def choose(
    prefix: Any,
    batch: Any,
    engine: str = "auto",
    *,
    samples: int | None = None,
    precision: str = "float32",
) -> Engine:
    """Choose how to run a prefix.

    ``"auto"`` runs every installed engine on some samples of the batch and takes the fastest
    whose outputs agree with native to a relative error of 1e-4; where none is faster or agrees,
    native. Native is compared in full float32 precision: on an NVIDIA card it may round products
    to TF32, by 1e-3, as training does there. Where an engine that agrees needs less than a minute
    for all samples, the run that is compared is the one that is timed, and native is not compiled
    to be timed against it. Torch needs no compiling: where it is done with all samples as soon as a
    trial would be, no engine is tried. With one engine asked for by name, that one is taken if it
    agrees, and an error says why not otherwise. Where native runs on an accelerator, engines that
    have none are not tried, and it is always timed.

    In ``"bfloat16"`` every engine that has it is timed, native as well where that is torch, and how
    far each is from native in float32 is in ``errors``; ONNX Runtime, TensorFlow and JAX themselves
    are asked for float32 only.

    Engines get as many threads as ``OMP_NUM_THREADS`` says, or one per core of this process. ONNX
    Runtime takes TensorRT, or CUDA without TF32, where its package and the machine have them.

    Args:
        prefix: A built functional Keras model or a torch module, for example
            :attr:`frostline.Split.prefix`.
        batch: The first batch, in the structure of the model's inputs, shape ``(n, ...)`` each.
        engine: ``"auto"``, ``"native"``, ``"onnxruntime"`` or ``"openvino"``.
        samples: How many there are to compute, at most; ``None``: not known, maybe many.
        precision: ``"float32"``: as the prefix computes; or ``"bfloat16"``, which rounds factors to
            eight bits, on processors with AMX or AVX512-BF16.

    Returns:
        The engine, with what was measured.

    Raises:
        ModelError: Unknown engine or precision; an engine asked for by name that cannot run the
            model, disagrees or lacks the precision; no engine that has it.
        BackendError: One asked for by name that is not installed, or a processor without bfloat16.
    """
    require_precision(precision)
    if engine not in ("auto", *NAMES):
        allowed = ", ".join(("auto", *NAMES))
        raise ModelError(f"engine must be one of {allowed}. Received: engine={engine!r}")
    native = prefixes.native(prefix)
    lower = precision != "float32"
    if engine == "native" and not lower:
        return Engine(name="native", device=_backend(prefix), _run=native)
    few, count = batch, None
    every = NAMES if lower else NAMES[1:]
    wanted: tuple[str, ...] = every if engine == "auto" else (engine,)
    accelerator = prefixes.accelerator(prefix)
    # How far a lower precision is off is told of a whole batch, unless the model says it is open.
    if prefixes.takes_any_number(prefix) or (not lower and prefixes.takes_fewer(prefix, batch)):
        count = COMPARED_SAMPLES
        few = map_leaves(lambda leaf: leaf[:count], batch)
        if not accelerator:  # a card is idle with a few samples, and soon done with a batch
            batch = map_leaves(lambda leaf: leaf[:TRIAL_SAMPLES], batch)
    eager = engine == "auto" and not lower and not accelerator and _backend(prefix) == "torch"
    if eager and samples is not None and _soon(native, few, batch, samples):
        return Engine(name="native", device="torch", _run=native)
    notes: list[str] = []
    if engine == "auto" and accelerator and not any(e.accelerated() for e in ENGINES.values()):
        notes.append(f"native runs on {accelerator}, and the other engines only on the processor")
        wanted = wanted[:1] if lower else ()
    expected = prefixes.reference(prefix)(few) if wanted else []
    found: dict[str, tuple[Run, str]] = {}
    errors: dict[str, float] = {}
    rates: dict[str, float] = {}
    most = TOLERANCES[precision]
    for name, outcome in _candidates(prefix, wanted, batch, precision):
        try:
            run, device = outcome()
            whole, rate = _attempt(run, batch)
            outputs = [array[:count] for array in whole]
            errors[name] = error = relative_difference(outputs, expected)
            if not error <= most:
                raise ModelError(f"it differs from native by {error:.1e}, allowed is {most:.0e}")
            found[name] = (run, device)
            if engine == "auto":
                rates[name] = rate
        except FrostlineError as problem:
            if engine != "auto":
                kind = BackendError if isinstance(problem, BackendError) else ModelError
                text = f"engine {name} cannot run this prefix: {problem}"
                raise kind(f"{text}. {_WAYS}" if lower else text) from problem
            notes.append(f"{name} is not used: {problem}")
    long = samples is None or samples > NATIVE_PAYS_S * max(rates.values(), default=0.0)
    if accelerator or long:
        rates = {name: _rate(found[name][0], batch) for name in rates}
    if lower and not found:
        raise ModelError(f"nothing here computes this prefix in {precision}: {'; '.join(notes)}. "
                         f"{_WAYS}")  # fmt: skip
    if not lower and engine == "auto" and (accelerator or long or not found):
        found["native"] = (native, _backend(prefix))
        if rates:
            native(batch)  # compiles
            rates["native"] = _rate(native, batch)
    chosen = max(found, key=lambda name: rates.get(name, 0.0))
    run, device = found[chosen]
    return Engine(
        name=chosen, device=device, rates=rates, errors=errors, notes=tuple(notes),
        precision=precision, _run=run,
    )  # fmt: skip


def require_precision(precision: str) -> None:
    """Refuse a precision that no engine has.

    Raises:
        ModelError: It is none of those in ``TOLERANCES``.
    """
    if precision not in TOLERANCES:
        names = " or ".join(map(repr, TOLERANCES))
        raise ModelError(f"precision must be {names}. Received: precision={precision!r}")


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


def _soon(run: Run, few: Any, batch: Any, samples: int) -> bool:
    """Whether native is soon done with all samples; where it is far from that, a few show it."""
    for part, most in ((few, 4 * SOON_S), (batch, SOON_S)):
        try:
            rate = _timed(run, part)[1]
        except Exception:  # to be told where it is no trial
            return False
        if samples > most * rate:
            return False
    return True


def _attempt(run: Run, batch: Any) -> tuple[list[Array], float]:
    """The outputs of a first run, and its samples per second."""
    try:
        return _timed(run, batch)
    except Exception as problem:  # the engines' exceptions have no public root
        raise ModelError(f"it fails on the first batch: {first_line(problem)}") from problem


def _rate(run: Run, batch: Any) -> float:
    """Samples per second, the better of two runs; an earlier call has compiled already."""
    outputs, rate = _timed(run, batch)
    if len(outputs[0]) > LONG_S * rate:
        return rate
    return max(rate, _timed(run, batch)[1])


def _timed(run: Run, batch: Any) -> tuple[list[Array], float]:
    start = time.perf_counter()
    outputs = run(batch)
    return outputs, len(outputs[0]) / max(time.perf_counter() - start, 1e-9)


def _backend(prefix: Any) -> str:
    from frostline.adapters import adapter_of

    return adapter_of(prefix).backend


#: What works where bfloat16 does not.
_WAYS = "Leave precision= out (float32), or write engine='auto' with openvino installed"


def _candidates(
    prefix: Any, wanted: Sequence[str], batch: Any, precision: str
) -> list[tuple[str, Callable[[], tuple[Run, str]]]]:
    """Engines to try; the graph is written once for all of them."""
    written: list[bytes] = []

    def graph() -> bytes:
        if not written:
            written.append(prefixes.to_onnx(prefix, batch))
        return written[0]

    def started(name: str) -> tuple[Run, str]:
        if name == "native":
            return prefixes.native(prefix, precision), _backend(prefix)
        if precision not in ENGINES[name].precisions:
            raise ModelError(f"it has no {precision}")
        return ENGINES[name].start(graph, precision)

    return [(name, lambda name=name: started(name)) for name in wanted]  # type: ignore[misc]
