"""Trainings of one model that differ in how BN is treated, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.types.arrays import Array
from frostline.types.measured import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class TreatmentRow:
    """What became of the model under one treatment.

    Attributes:
        name: Name of the treatment, such as ``"all-bn-frozen"``.
        meaning: What it does, in one sentence.
        line: What to write before the training, ready to paste.
        value: The metric on the validation data after the last epoch, mean over samples and seeds,
            with its own interval: Wilson's for an accuracy, else Student's.
        loss: Mean loss on the validation data after the last epoch.
        behind: How far the best treatment is ahead of this one in the metric, positive, with an
            interval that holds for all rows together; ``None`` for the best one itself.
        curve: The metric before the training and after each epoch, mean over the seeds.
        seconds: Of one training, validation not counted.
        seeds: How many trainings this row is made of.
        stopped: Epoch after which it was given up; ``None``: it ran to the end.
        values: The metric of each seed and sample, shape ``(seeds, samples)``; of each batch where
            the loss is one number per batch.
    """

    name: str
    meaning: str
    line: str
    value: Interval
    loss: float
    behind: Interval | None
    curve: tuple[float, ...]
    seconds: float
    seeds: int
    stopped: int | None = None
    values: Array = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Which treatment of BN is best for a model and its data; see :func:`frostline.compare`.

    Attributes:
        verdict: One sentence: the winner with its lead, or why there is none.
        winner: Name of the treatment that is ahead of every other one for certain; ``None``: the
            intervals show none.
        tied: Names of the treatments that are not told from the best one.
        metric: ``"accuracy"`` or ``"loss"``.
        rows: One per treatment, the best one first.
        skipped: Name of a treatment that was not run -> why.
        samples: Validation samples (or batches) per seed.
        epochs: Passes over the training data.
        cache_seconds: What computing the frozen part once took; 0 where nothing is cached.
        settings: What the trainings had in common, name -> value.
        notes: What else a person should know.
    """

    verdict: str
    winner: str | None
    tied: tuple[str, ...]
    metric: str
    rows: tuple[TreatmentRow, ...]
    skipped: Mapping[str, str]
    samples: int
    epochs: int
    cache_seconds: float
    settings: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> TreatmentRow:
        for row in self.rows:
            if row.name == name:
                return row
        known = ", ".join(row.name for row in self.rows)
        raise KeyError(f"there are {known}. Received: {name!r}")

    @property
    def line(self) -> str | None:
        """What to paste for the winner; ``None`` without one."""
        return None if self.winner is None else self[self.winner].line

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain types for JSON, without the numbers of single samples."""
        from frostline.report import comparison

        return comparison.as_dict(self)

    def to_json(self) -> str:
        """The comparison as JSON text."""
        from frostline.report import comparison

        return comparison.as_json(self)

    def plot(self) -> Figure:
        """Draw the treatments with their intervals, and the metric over the epochs."""
        from frostline.report import figures

        return figures.compared(self)

    def save(self, path: str | Path) -> Path:
        """Write it; the ending decides the form. The file is complete or not there.

        Args:
            path: ``.html``, ``.json``, ``.txt``, ``.png`` or ``.svg``; overwritten.

        Raises:
            OutputError: Another ending, or the file cannot be written.
        """
        from frostline.report import comparison

        return comparison.save(self, Path(path))

    def __str__(self) -> str:
        from frostline.report import comparison

        return comparison.as_text(self)

    def _repr_html_(self) -> str:
        from frostline.report import comparison

        return comparison.fragment(self)
