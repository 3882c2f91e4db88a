"""The nouns of Frostline: frozen dataclasses and errors. No behaviour, no framework.

Exceptions::

    FrostlineError                 root of everything raised on purpose
    ├── BackendError (ImportError)     no usable framework, or the wrong one
    ├── ModelError (ValueError)        the model cannot be used as asked (no BN, unknown layer, ...)
    ├── DataError (ValueError)         the data cannot be used as asked
    ├── OutputError (OSError)          a file or folder could not be written
    └── NotFrozenError (AssertionError)    a part that should be frozen is not (watching.py)
"""

from __future__ import annotations

import html
import math
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
        trained_by: Name of an inner model that is compiled for itself and whose optimizer trains
            this site too: it may live under two regimes, as in a GAN. ``None`` otherwise.
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
    trained_by: str | None = None


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
class Crossing:
    """One tensor of the frontier: what the frozen prefix hands to the rest of the model.

    Attributes:
        path: Path of the layer that computes it; the input's name where it is a model input.
        shape: Shape of one sample; ``None`` for sizes that the model leaves open.
        dtype: Name of its dtype, for example ``"float32"``.
        bytes_per_sample: Its size; open sizes count as in the trial run of the prefix, or as 1.
        computed: ``False`` for a model input that the rest of the model reads as it is.
    """

    path: str
    shape: tuple[int | None, ...]
    dtype: str
    bytes_per_sample: int
    computed: bool = True


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
        task: ``"binary"``, ``"multiclass"``, ``"regression"``, or ``"unknown"`` where labels and
            outputs fit none of these (several outputs, pixels): then only the loss is compared.
        samples: Number of samples, n.
        sites: Number of BN layers in the model.
        patterns: The essay's tell-tale patterns that are present, in words; empty when none.
    """

    rows: tuple[PhaseRow, ...]
    task: Literal["binary", "multiclass", "regression", "unknown"]
    samples: int
    sites: int
    patterns: tuple[str, ...] = ()

    def __getitem__(self, phase: str) -> PhaseRow:
        for row in self.rows:
            if row.phase == phase:
                return row
        raise KeyError(f"phase must be 'dynamic', '0' or '1'. Received: {phase!r}")

    def as_dict(self) -> dict[str, Any]:
        """The table as plain types for JSON: no outputs; numbers that are not finite are null."""
        return {
            "task": self.task,
            "samples": self.samples,
            "sites": self.sites,
            "rows": [
                {
                    "phase": row.phase,
                    "loss": _finite(row.loss),
                    "metrics": {name: _finite(value) for name, value in row.metrics.items()},
                }
                for row in self.rows
            ],
            "patterns": list(self.patterns),
        }

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, self._caption(), *self.patterns])

    def _repr_html_(self) -> str:
        """Jupyter's rendering; metric names come from the user's model, so all text is escaped."""
        head, *body = self._cells()

        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        rows = "".join(line(cells, "td") for cells in body)
        notes = "".join(f"<p>{html.escape(pattern)}</p>" for pattern in self.patterns)
        return (
            f"<table><caption>{html.escape(self._caption())}</caption>"
            f"<thead>{line(head, 'th')}</thead><tbody>{rows}</tbody></table>{notes}"
        )

    def _cells(self) -> list[list[str]]:
        names = list(dict.fromkeys(name for row in self.rows for name in row.metrics))

        def shown(value: float | None) -> str:
            return "–" if value is None else f"{value:.4g}"

        return [
            ["phase", "loss", *names],
            *(
                [row.phase, shown(row.loss), *(shown(row.metrics.get(name)) for name in names)]
                for row in self.rows
            ),
        ]

    def _caption(self) -> str:
        return f"{self.samples} samples, {self.task} task, {self.sites} BN layers"


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def as_float64(values: Any) -> npt.NDArray[np.float64]:
    """Return ``values`` as a float64 array; the dtype that all statistics are computed in."""
    return np.asarray(values, dtype=np.float64)


Severity = Literal["error", "warning", "info"]
Certainty = Literal["is", "may"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rule found at one site, or at the sites that it concerns together.

    Attributes:
        code: Stable code of the rule: ``FL203``.
        name: The rule's kebab-case name; it reads as the problem.
        severity: ``"error"``: the model computes something else than intended. ``"warning"``: it
            is likely to. ``"info"``: worth knowing, often intended.
        certainty: ``"is"`` follows from what was read; ``"may"`` is inferred.
        sites: Paths of the sites, in execution order.
        message: What is wrong, the number that shows it, what to do. At most 120 characters, and
            without paths, so that equal findings of many sites can be told once.
        evidence: The numbers behind the message, by name.
        fix: The repair as a word, for example ``"freeze"``; ``None`` when there is no single one.
    """

    code: str
    name: str
    severity: Severity
    certainty: Certainty
    sites: tuple[str, ...]
    message: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A rule that was not applied, and why.

    Attributes:
        code: The rule's code.
        name: Its kebab-case name.
        reason: Why, in words.
    """

    code: str
    name: str
    reason: str
