"""Measurements of a model on data: ``(adapter, data) -> dataclass``. Nothing here changes a model.

``phases`` is the essay's detection, three passes. ``samples`` and ``bench`` hold the fixed samples
on which every probe of a diagnosis runs; ``measure`` runs all of them.
"""

from frostline.measure.bench import Bench
from frostline.measure.judged import NEAR_ONE, Judged, infer_task, judge
from frostline.measure.measuring import GAPS, Progress, measure
from frostline.measure.phases import (
    CHANCE_MARGIN,
    LARGE_MSE,
    SMALL_GAP,
    Metrics,
    patterns,
    phase_table,
)
from frostline.measure.samples import Samples, draw

__all__ = [
    "CHANCE_MARGIN",
    "GAPS",
    "LARGE_MSE",
    "NEAR_ONE",
    "SMALL_GAP",
    "Bench",
    "Judged",
    "Metrics",
    "Progress",
    "Samples",
    "draw",
    "infer_task",
    "judge",
    "measure",
    "patterns",
    "phase_table",
]
