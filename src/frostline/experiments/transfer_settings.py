"""What the transfer experiment can be run with: its rows, its settings, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

from frostline.experiments.run import check_rows
from frostline.types import DataError, Policy


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of treating BN.

    Attributes:
        name: The row's name, as in tables and files.
        meaning: What it is, for people.
        policy: What a frozen BN layer does in training.
        cached: Train through ``fl.fit``, which computes the frozen part once; otherwise every
            epoch runs the whole network.
        every_site: Fine-tune with every BN layer frozen, also behind the boundary.
        recalibrate: Measure the statistics behind the boundary on the training images before
            they are thawed.
        ramp: Let BN behind the boundary go from stored to batch statistics over the first epoch.
    """

    name: str
    meaning: str
    policy: Policy = "inference"
    cached: bool = True
    every_site: bool = False
    recalibrate: bool = False
    ramp: bool = False


#: All rows, in the order in which they run and are shown.
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="unpatched",
            policy="batch",
            cached=False,
            meaning="frozen BN uses batch statistics in training (Keras 2.1.3 to 2.2.4); the whole "
            "network runs in every epoch",
        ),
        Row(
            name="patched",
            meaning="frozen BN uses its stored statistics (the patch, Keras 3), frozen part cached",
        ),
        Row(
            name="all-bn-frozen",
            every_site=True,
            meaning="as patched, and BN behind the boundary stays frozen while its neighbours are "
            "fine-tuned",
        ),
        Row(
            name="recalibrate",
            recalibrate=True,
            meaning="as patched, and the statistics behind the boundary are measured on the "
            "training images before they are thawed (fl.recalibrate)",
        ),
        Row(
            name="ramp",
            cached=False,
            ramp=True,
            meaning="as patched, and BN behind the boundary goes from stored to batch statistics "
            "over the first epoch of fine-tuning (fl.callbacks.GradualUnfreeze)",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """What one run depends on, and nothing else.

    Attributes:
        backbone: A name that `backbones.build` knows.
        data: What `image_sets.load` knows, with a train and a test split.
        classes: Class names to use; all when empty.
        train_per_class: Training images per class; all when ``None``.
        test_per_class: Test images per class; all when ``None``.
        image_size: Side of the square images, in pixels.
        boundary: First layer that is fine-tuned; ``None`` takes the backbone's usual one.
        rows: Names from `ROWS`.
        head_epochs: Epochs of the head alone.
        epochs: Epochs of fine-tuning.
        batch_size: Images per step.
        head_learning_rate: Step size of RMSprop for the head.
        learning_rate: Step size of SGD for fine-tuning.
        momentum: Momentum of SGD.
        weights: ``"pretrained"`` or ``None`` for random weights.
        seed: Seeds selection, head and order of batches.
    """

    backbone: str = "efficientnet-lite0"
    data: str = "cifar10"
    classes: tuple[str, ...] = ()
    train_per_class: int | None = 100
    test_per_class: int | None = 100
    image_size: int = 96
    boundary: str | int | float | None = None
    rows: tuple[str, ...] = tuple(ROWS)
    head_epochs: int = 10
    epochs: int = 5
    batch_size: int = 32
    head_learning_rate: float = 1e-3
    learning_rate: float = 1e-4
    momentum: float = 0.9
    weights: str | None = "pretrained"
    seed: int = 0


def check_settings(settings: TransferSettings) -> None:
    """Refuse settings that cannot be run, before anything is loaded.

    Raises:
        DataError: With the setting's name, what is allowed and what was received.
    """
    least = {"image_size": 8, "head_epochs": 1, "epochs": 1, "batch_size": 2,
             "train_per_class": 1, "test_per_class": 1, "seed": 0}  # fmt: skip
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value is not None and value < lowest:
            raise DataError(f"{name} must be at least {lowest}. Received: {name}={value}")
    for name in ("head_learning_rate", "learning_rate"):
        rate = getattr(settings, name)
        if not (math.isfinite(rate) and rate > 0):
            raise DataError(f"{name} must be above 0. Received: {name}={rate}")
    if not 0 <= settings.momentum < 1:
        raise DataError(f"momentum must be in [0, 1). Received: momentum={settings.momentum}")
    check_rows(settings.rows, ROWS)
