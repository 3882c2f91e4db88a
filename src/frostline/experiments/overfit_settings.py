"""The overfit experiment: its rows and its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from frostline.experiments import settings as shared
from frostline.experiments.settings import default_boundary as default_boundary
from frostline.types import DataError

Optimizer = Literal["sgd", "rmsprop", "adam"]


@dataclass(frozen=True, kw_only=True)
class Row(shared.Row):
    """One way of treating BN; the attributes of `settings.Row`, and these.

    Attributes:
        debias: Whether the moving averages start from nothing and are corrected for it.
        frozen: ``"prefix"`` (all layers before the boundary), ``"nothing"``, or ``"prefix and
            every BN"`` (also the BN layers behind the boundary; the other weights there train).
        recalibrate: Whether the statistics behind the boundary are measured anew after training,
            on the same images. The curves show the training, the table shows what comes after.
    """

    debias: bool = False
    frozen: Literal["prefix", "nothing", "prefix and every BN"] = "prefix"
    recalibrate: bool = False


#: All rows, in the order in which they run and are shown.
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="update",
            policy="update",
            meaning="frozen BN uses batch statistics and updates the stored ones "
            "(Keras before 2.1.3, PyTorch today)",
        ),
        Row(
            name="batch",
            policy="batch",
            meaning="frozen BN uses batch statistics, no update (Keras 2.1.3 to 2.2.4)",
        ),
        Row(name="inference", meaning="frozen BN uses its stored statistics (the patch, Keras 3)"),
        Row(
            name="inference+debias",
            debias=True,
            meaning="the same, and the moving averages behind the boundary start from nothing, "
            "corrected for it",
        ),
        Row(
            name="inference+recalibrate",
            recalibrate=True,
            meaning="as inference, and after training the statistics behind the boundary are "
            "measured anew (fl.recalibrate)",
        ),
        Row(
            name="none-frozen",
            frozen="nothing",
            meaning="control: no layer frozen, the whole network trains",
        ),
        Row(
            name="all-bn-frozen",
            frozen="prefix and every BN",
            meaning="control: every BN layer frozen on its stored statistics, also behind the "
            "boundary; the other weights there train",
        ),
    )
}

#: Step sizes that are used when none is given.
LEARNING_RATES: dict[str, float] = {"sgd": 0.01, "rmsprop": 1e-4, "adam": 1e-4}


@dataclass(frozen=True, kw_only=True)
class OverfitSettings(shared.Settings):
    """What one run depends on; the attributes of `settings.Settings`, and these.

    Attributes:
        per_class: Images per class; all when ``None``.
        optimizer: ``"sgd"``, ``"rmsprop"`` or ``"adam"``.
        learning_rate: Step size; ``None`` takes the optimizer's from `LEARNING_RATES`.
    """

    per_class: int | None = 100
    rows: tuple[str, ...] = tuple(ROWS)
    optimizer: Optimizer = "sgd"


def check_settings(settings: OverfitSettings) -> None:
    """Refuse settings that cannot be run, before anything is loaded.

    Raises:
        DataError: With the setting's name, what is allowed and what was received.
    """
    shared.check(settings, ROWS, counts=("per_class",))
    if settings.optimizer not in LEARNING_RATES:
        raise DataError(
            f"optimizer must be one of {', '.join(LEARNING_RATES)}. "
            f"Received: optimizer={settings.optimizer!r}"
        )


def resolved(settings: OverfitSettings) -> OverfitSettings:
    """Fill in the defaults of backbone and optimizer, so that the results record them."""
    boundary, rate = settings.boundary, settings.learning_rate
    return replace(
        settings,
        boundary=default_boundary(settings.backbone) if boundary is None else boundary,
        learning_rate=LEARNING_RATES[settings.optimizer] if rate is None else rate,
    )
