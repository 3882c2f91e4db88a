"""What experiments measure: frozen dataclasses that know how they are written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from frostline.experiments import overfit_settings, transfer_settings
from frostline.experiments.settings import Row, Settings
from frostline.types import PhaseTable
from frostline.types.report import Report

Stage = Literal["head", "fine-tuning"]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch.

    Attributes:
        number: Counted from 1, over all stages.
        train_loss: Mean over the epoch's steps, while the weights moved (what `fit` reports).
        train_accuracy: Likewise.
        seconds: Time of the epoch with its evaluations; the first of a stage compiles.
    """

    number: int
    train_loss: float
    train_accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class OverfitEpoch(Epoch):
    """One epoch; the same images in both learning phases.

    Attributes:
        phase0_loss: At inference, after the epoch (what `fit` reports as validation).
        phase0_accuracy: Likewise.
        phase1_loss: In training mode, after the epoch; nothing is updated.
        phase1_accuracy: Likewise.
    """

    phase0_loss: float
    phase0_accuracy: float
    phase1_loss: float
    phase1_accuracy: float


@dataclass(frozen=True, kw_only=True)
class TransferEpoch(Epoch):
    """One epoch of one of the two stages.

    Attributes:
        stage: ``"head"`` or ``"fine-tuning"``.
        test_loss: On the test images, at inference, after the epoch.
        test_accuracy: Likewise.
    """

    stage: Stage
    test_loss: float
    test_accuracy: float


AnyRow = TypeVar("AnyRow", bound=Row)
AnyEpoch = TypeVar("AnyEpoch", bound=Epoch)


@dataclass(frozen=True, kw_only=True)
class RowResult(Generic[AnyRow, AnyEpoch]):
    """What one row showed.

    Attributes:
        row: The treatment.
        epochs: One record per epoch.
        phases: The images of the evaluation at the end, in every phase; without outputs.
        sites: Number of BN layers.
        sites_frozen: How many of them had frozen statistics at the end.
        boundary: The first layer that trained; ``None`` where nothing was frozen.
    """

    row: AnyRow
    epochs: tuple[AnyEpoch, ...]
    phases: PhaseTable
    sites: int
    sites_frozen: int
    boundary: str | None

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            **asdict(self.row),
            "boundary": self.boundary,
            "sites": self.sites,
            "sites_frozen": self.sites_frozen,
            "phases": {
                phase.phase: {
                    "loss": phase.loss,
                    **{name: float(value) for name, value in phase.metrics.items()},
                }
                for phase in self.phases.rows
            },
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }


@dataclass(frozen=True, kw_only=True)
class OverfitRow(RowResult[overfit_settings.Row, OverfitEpoch]):
    """What one row showed on the training images.

    Attributes:
        seconds: Time of the whole row, with building the model.
        report: Diagnosis of the trained network on the same images; ``None`` when not asked for.
    """

    seconds: float
    report: Report | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data, without the report."""
        return {
            **super().as_dict(),
            "seconds": round(self.seconds, 3),
            "patterns": list(self.phases.patterns),
        }


@dataclass(frozen=True, kw_only=True)
class TransferRow(RowResult[transfer_settings.Row, TransferEpoch]):
    """What one row showed on the test images.

    Attributes:
        seconds: Stage -> time of its whole `fit`, with computing the cache; ``"thawing"`` is the
            time between the stages, with recalibration. Rows share one cache: the first cached row
            of a run computes it.
    """

    seconds: Mapping[str, float]

    def accuracy(self, stage: Stage) -> float:
        """Test accuracy at the end of a stage."""
        return [epoch.test_accuracy for epoch in self.epochs if epoch.stage == stage][-1]

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data, from which it can be read again."""
        return {
            **super().as_dict(),
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "test_accuracy": {
                "head": self.accuracy("head"),
                "fine-tuning": self.accuracy("fine-tuning"),
            },
            "samples": self.phases.samples,
            "task": self.phases.task,
        }


AnySettings = TypeVar("AnySettings", bound=Settings)
AnyRowResult = TypeVar("AnyRowResult", bound=RowResult[Any, Any])


@dataclass(frozen=True, kw_only=True)
class Result(Generic[AnySettings, AnyRowResult]):
    """Everything that one run measured, with what is needed to repeat it.

    Attributes:
        settings: With every default filled in.
        selection: Which images were used.
        environment: Versions, backend and machine.
        rows: Finished rows, in order.
        interrupted: The run was stopped before its last row was finished.
        files: What was written.
    """

    experiment: ClassVar[str]
    #: Heading in ``history.csv`` -> field of an epoch; ``row`` is the row's name.
    history: ClassVar[Mapping[str, str]]

    settings: AnySettings
    selection: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[AnyRowResult, ...] = ()
    interrupted: bool = False
    files: tuple[Path, ...] = field(default=(), compare=False)

    @property
    def tables(self) -> dict[str, PhaseTable]:
        """Row's name -> its table of phases."""
        return {row.row.name: row.phases for row in self.rows}

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data; numbers may be NaN."""
        return {
            "experiment": self.experiment,
            "interrupted": self.interrupted,
            "settings": asdict(self.settings),
            "selection": self.selection,
            "environment": self.environment,
            "rows": [row.as_dict() for row in self.rows],
        }


@dataclass(frozen=True, kw_only=True)
class OverfitResult(Result[overfit_settings.OverfitSettings, OverfitRow]):
    """What one run of the overfit experiment measured."""

    experiment = "overfit"
    history = {  # noqa: RUF012 - a constant
        "policy": "row",
        "epoch": "number",
        "loss": "train_loss",
        "accuracy": "train_accuracy",
        "val_loss": "phase0_loss",
        "val_accuracy": "phase0_accuracy",
        "phase1_loss": "phase1_loss",
        "phase1_accuracy": "phase1_accuracy",
        "seconds": "seconds",
    }


@dataclass(frozen=True, kw_only=True)
class TransferResult(Result[transfer_settings.TransferSettings, TransferRow]):
    """What one run of the transfer experiment measured."""

    experiment = "transfer"
    history = {  # noqa: RUF012 - a constant
        "row": "row",
        "stage": "stage",
        "epoch": "number",
        "loss": "train_loss",
        "accuracy": "train_accuracy",
        "test_loss": "test_loss",
        "test_accuracy": "test_accuracy",
        "seconds": "seconds",
    }
