"""The nouns of Frostline: frozen dataclasses and errors. No behaviour, no framework.

Exceptions::

    FrostlineError                 root of everything raised on purpose
    ├── BackendError (ImportError)     no usable framework, or the wrong one
    ├── ModelError (ValueError)        the model cannot be used as asked (no BN, unknown layer, ...)
    ├── DataError (ValueError)         the data cannot be used as asked
    └── OutputError (OSError)          a file or folder could not be written
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Policy = Literal["inference", "batch", "update"]


class FrostlineError(Exception):
    """Root of every error that Frostline raises on purpose; its text is meant for people."""


class BackendError(FrostlineError, ImportError):
    """No usable framework is installed, or another one is needed."""


class ModelError(FrostlineError, ValueError):
    """The model cannot be used as asked: no BN layer, an unknown boundary, a bad file."""


class DataError(FrostlineError, ValueError):
    """The data cannot be used as asked: a missing file, a corrupt image, wrong shapes."""


class OutputError(FrostlineError, OSError):
    """A file or folder could not be written."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One BN layer of a model.

    Attributes:
        path: Hierarchical address, unique in the model: ``backbone/block3/bn1``.
        name: The layer's own name.
        kind: Class name of the layer, for example ``BatchNormalization``.
        index: Position in execution order where the graph is known, else in creation order.
        channels: Number of channels; ``None`` while the layer is not built.
        axis: The channel axis, as the layer was given it.
        decay: Share of the old value that one update keeps (Keras ``momentum``).
        epsilon: Added to the variance before the square root.
        params_frozen: gamma and beta do not train.
        stats_frozen: The stored statistics do not move in training.
        policy: What the layer does in training while frozen.
        calls: How often the layer is used in the model's graph; more than 1 means shared.
        dtype: Compute dtype of the layer.
        version: Old-release preset of our own layer, else ``None``.
        debias: Whether the moving average is corrected for its start.
    """

    path: str
    name: str
    kind: str
    index: int
    channels: int | None
    axis: int
    decay: float
    epsilon: float
    params_frozen: bool
    stats_frozen: bool
    policy: Policy
    calls: int = 1
    dtype: str = "float32"
    version: str | None = None
    debias: bool = False


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Where freezing ends: the layers before it are the prefix.

    Attributes:
        path: Path of the first layer *behind* the frozen prefix; ``None`` when all is frozen.
        index: Its position among the model's top-level layers.
    """

    path: str | None
    index: int


@dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """Loss and metrics of one learning phase on the given data.

    Attributes:
        phase: ``"dynamic"`` (the model's own ``evaluate``), ``"0"`` (inference) or ``"1"``
            (training-mode forward pass, nothing updated).
        loss: Mean loss over the samples; ``None`` when the model has no loss.
        metrics: Metric name -> value. ``accuracy`` and ``auc`` for classification, ``mse`` and
            ``spearman`` for regression.
        outputs: Predictions of the phase, shape ``(n, ...)``, float32; ``None`` for dynamic.
    """

    phase: Literal["dynamic", "0", "1"]
    loss: float | None
    metrics: Mapping[str, float]
    outputs: Array | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class PhaseTable:
    """The essay's detection: the same data in the dynamic phase, phase 0 and phase 1.

    Attributes:
        rows: dynamic, 0 and 1, in this order.
        task: ``"binary"``, ``"multiclass"`` or ``"regression"``.
        samples: Number of samples, n.
        sites: Number of BN layers in the model.
        patterns: The essay's tell-tale patterns that are present, in words; empty when none.
    """

    rows: tuple[PhaseRow, ...]
    task: Literal["binary", "multiclass", "regression"]
    samples: int
    sites: int
    patterns: tuple[str, ...] = ()

    def __getitem__(self, phase: str) -> PhaseRow:
        for row in self.rows:
            if row.phase == phase:
                return row
        raise KeyError(f"phase must be 'dynamic', '0' or '1'. Received: {phase!r}")


def as_float64(values: Any) -> npt.NDArray[np.float64]:
    """Return ``values`` as a float64 array; the dtype that all statistics are computed in."""
    return np.asarray(values, dtype=np.float64)
