"""The engines there are: each is one file in this folder that registers what starts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from frostline.types import Array

#: Why a processor refuses bfloat16.
NO_BFLOAT16 = "this processor has no instructions for bfloat16 (AMX or AVX512-BF16)"

Run = Callable[[Any], list[Array]]
#: ``start(graph, precision)``: from what writes an ONNX graph, a function that runs it and its
#: device's name.
Start = Callable[[Callable[[], bytes], str], tuple[Run, str]]


@dataclass(frozen=True, kw_only=True)
class Registered:
    """An engine as it is registered.

    Attributes:
        start: Starts it.
        accelerated: Whether it may run on an accelerator on this machine.
        precisions: What it can compute in, on some machine.
    """

    start: Start
    accelerated: Callable[[], bool]
    precisions: tuple[str, ...]


#: By the name that users write.
ENGINES: dict[str, Registered] = {}


def engine(
    name: str,
    *,
    accelerated: Callable[[], bool] = lambda: False,
    precisions: tuple[str, ...] = ("float32",),
) -> Callable[[Start], Start]:
    """Register what starts an engine.

    Args:
        name: As users write it.
        accelerated: Whether it may run on an accelerator here; asked only where native does.
        precisions: What it can be asked to compute in; ``start`` says where a machine cannot.
    """

    def registered(start: Start) -> Start:
        ENGINES[name] = Registered(start=start, accelerated=accelerated, precisions=precisions)
        return start

    return registered


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
        precision: What it computes in: ``"float32"``, as its framework does, or ``"bfloat16"``.
    """

    name: str
    device: str
    rates: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    precision: str = "float32"
    _run: Run = field(repr=False, default=lambda _: [])

    @property
    def error(self) -> float:
        """Largest difference from native in full precision, as a share of the largest value."""
        return self.errors.get(self.name, 0.0)

    def run(self, batch: Any) -> list[Array]:
        """Compute one batch.

        Args:
            batch: Model inputs, an array or a structure of arrays, shape ``(n, ...)`` each.

        Returns:
            The flattened outputs, shape ``(n, ...)`` each, in the prefix's dtypes.
        """
        return self._run(batch)


def threads() -> int:
    """Threads that the user, or the cores given to this process, allow; 0: all cores."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    if text.isdigit():
        return int(text)
    # ONNX Runtime counts the machine's cores, also where ``taskset`` or a container gives it two.
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return given if given != os.cpu_count() else 0


def flat(batch: Any) -> list[Array]:
    """Arrays of a batch in any structure, mappings in the order of their keys."""
    if isinstance(batch, Mapping):
        return [leaf for key in sorted(batch) for leaf in flat(batch[key])]
    if isinstance(batch, (list, tuple)):
        return [leaf for part in batch for leaf in flat(part)]
    return [np.ascontiguousarray(batch)]
