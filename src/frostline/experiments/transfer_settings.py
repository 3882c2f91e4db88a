"""The transfer experiment: its rows and its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from frostline.experiments import settings as shared


@dataclass(frozen=True, kw_only=True)
class Row(shared.Row):
    """One way of treating BN; the attributes of `settings.Row`, and these.

    Attributes:
        cached: Train through ``fl.fit``, which computes the frozen part once; otherwise every
            epoch runs the whole network.
        every_site: Fine-tune with every BN layer frozen, also behind the boundary.
        recalibrate: Measure the statistics behind the boundary on the training images before
            they are thawed.
        ramp: Move BN behind the boundary from stored to batch statistics over the first epoch.
    """

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
class TransferSettings(shared.Settings):
    """What one run depends on; the attributes of `settings.Settings`, and these.

    Attributes:
        train_per_class: Training images per class; all when ``None``.
        test_per_class: Test images per class; all when ``None``.
        head_epochs: Epochs of the head alone.
        epochs: Epochs of fine-tuning.
        head_learning_rate: Step size of RMSprop for the head.
        learning_rate: Step size of SGD for fine-tuning.
    """

    data: str = "cifar10"
    train_per_class: int | None = 100
    test_per_class: int | None = 100
    image_size: int = 96
    rows: tuple[str, ...] = tuple(ROWS)
    head_epochs: int = 10
    epochs: int = 5
    head_learning_rate: float = 1e-3
    learning_rate: float = 1e-4


def check_settings(settings: TransferSettings) -> None:
    """Refuse settings that cannot be run, before anything is loaded.

    Raises:
        DataError: With the setting's name, what is allowed and what was received.
    """
    shared.check(
        settings,
        ROWS,
        counts=("head_epochs", "train_per_class", "test_per_class"),
        rates=("learning_rate", "head_learning_rate"),
    )


def resolved(settings: TransferSettings) -> TransferSettings:
    """Fill in the backbone's usual boundary, so that the results record it."""
    if settings.boundary is not None:
        return settings
    return replace(settings, boundary=shared.default_boundary(settings.backbone))
