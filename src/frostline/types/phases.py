"""Loss and metrics of the learning phases: the table of the essay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from frostline.types.arrays import Array


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
        patterns: Telling patterns of the essay that are present, in words.
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
        from frostline.report import phases

        return phases.as_text(self)

    def _repr_html_(self) -> str:
        from frostline.report import phases

        return phases.as_html(self)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
