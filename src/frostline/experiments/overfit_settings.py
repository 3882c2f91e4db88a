"""What the overfit experiment can be run with: its rows, its settings, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from frostline.experiments.run import check_rows
from frostline.types import DataError, Policy

Optimizer = Literal["sgd", "rmsprop", "adam"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of treating BN in the experiment.

    Attributes:
        name: The row's name, as in tables and files.
        meaning: What it is, for people.
        policy: What a frozen BN layer does in training.
        debias: Whether the moving averages start from nothing and are corrected for it.
        frozen: ``"prefix"`` (all layers before the boundary), ``"nothing"``, or ``"prefix and
            every BN"`` (also the BN layers behind the boundary; the other weights there train).
        recalibrate: Whether the statistics behind the boundary are measured anew after training,
            on the same images; the curves show the training, the table what comes after.
    """

    name: str
    meaning: str
    policy: Policy = "inference"
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
        Row(
            name="inference",
            meaning="frozen BN uses its stored statistics (the patch, Keras 3)",
        ),
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


#: First layer that trains. EfficientNet-Lite: the last but one stage, eleven blocks of Lite0 as in
#: the design's first measurement; ResNet50: 140 layers are frozen, as in the essay.
_BOUNDARIES: dict[str, str | int | float] = {
    "efficientnet-lite0": "block12_expand_conv",
    "efficientnet-lite1": "block16_expand_conv",
    "efficientnet-lite2": "block16_expand_conv",
    "resnet50": 140,
}


@dataclass(frozen=True, kw_only=True)
class OverfitSettings:
    """What one run of the experiment depends on, and nothing else.

    Attributes:
        backbone: A name that `backbones.build` knows.
        data: What `image_sets.load` knows: ``digits``, ``cifar10``, a folder, a parquet, an npz.
        classes: Class names to use; all classes when empty.
        per_class: Images per class; all when ``None``.
        image_size: Side of the square images, in pixels.
        boundary: First layer that trains: a name or path, an index into the model's layers, or a
            share of them (a float in (0, 1)); ``None`` takes the backbone's usual boundary.
        rows: Names from `ROWS`.
        epochs: Passes over the images.
        batch_size: Images per step.
        optimizer: ``"sgd"``, ``"rmsprop"`` or ``"adam"``.
        learning_rate: Step size; ``None`` takes the optimizer's from `LEARNING_RATES`.
        momentum: Momentum of SGD.
        weights: ``"pretrained"`` or ``None`` for random weights.
        seed: Seeds selection, head, order of batches.
    """

    backbone: str = "efficientnet-lite0"
    data: str = "digits"
    classes: tuple[str, ...] = ()
    per_class: int | None = 100
    image_size: int = 128
    boundary: str | int | float | None = None
    rows: tuple[str, ...] = tuple(ROWS)
    epochs: int = 10
    batch_size: int = 32
    optimizer: Optimizer = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    weights: str | None = "pretrained"
    seed: int = 0


def check_settings(settings: OverfitSettings) -> None:
    """Refuse settings that cannot be run, before anything is loaded.

    Raises:
        DataError: With the setting's name, what is allowed and what was received.
    """
    for name, least in (("image_size", 8), ("epochs", 1), ("batch_size", 2), ("per_class", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise DataError(f"{name} must be at least {least}. Received: {name}={value}")
    if settings.seed < 0:
        raise DataError(f"seed must not be negative. Received: seed={settings.seed}")
    check_rows(settings.rows, ROWS)
    if settings.optimizer not in LEARNING_RATES:
        raise DataError(
            f"optimizer must be one of {', '.join(LEARNING_RATES)}. "
            f"Received: optimizer={settings.optimizer!r}"
        )
    rate = settings.learning_rate
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise DataError(f"learning_rate must be above 0. Received: learning_rate={rate}")
    if not 0 <= settings.momentum < 1:
        raise DataError(f"momentum must be in [0, 1). Received: momentum={settings.momentum}")
    if isinstance(settings.boundary, float) and not 0 < settings.boundary < 1:
        raise DataError(
            f"a boundary given as a share must be in (0, 1). Received: boundary={settings.boundary}"
        )


def default_boundary(backbone: str) -> str | int | float:
    """Return the boundary that is used when none is given; three quarters of other backbones."""
    return _BOUNDARIES.get(backbone.lower().replace("_", "-"), 0.75)


def resolved(settings: OverfitSettings) -> OverfitSettings:
    """Fill in what was left to the backbone and the optimizer, so that results record it."""
    boundary, rate = settings.boundary, settings.learning_rate
    return replace(
        settings,
        boundary=default_boundary(settings.backbone) if boundary is None else boundary,
        learning_rate=LEARNING_RATES[settings.optimizer] if rate is None else rate,
    )
