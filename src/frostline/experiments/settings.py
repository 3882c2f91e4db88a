"""What every experiment depends on, and what is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.types import DataError, Policy

#: First layer that trains. EfficientNet-Lite: the last but one stage, eleven blocks of Lite0, as in
#: the first measurement of the design; ResNet50: 140 layers are frozen, as in the essay.
_BOUNDARIES: dict[str, str | int | float] = {
    "efficientnet-lite0": "block12_expand_conv",
    "efficientnet-lite1": "block16_expand_conv",
    "efficientnet-lite2": "block16_expand_conv",
    "resnet50": 140,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of treating BN.

    Attributes:
        name: The row's name in tables and files.
        meaning: What it does, for people.
        policy: What a frozen BN layer does in training.
    """

    name: str
    meaning: str
    policy: Policy = "inference"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one run of an experiment depends on, and nothing else.

    Attributes:
        backbone: A name that `backbones.build` knows.
        data: ``digits``, ``cifar10``, or the path of a folder, a parquet or an npz file.
        classes: Class names to use; all classes when empty.
        image_size: Side of the square images, in pixels.
        boundary: First layer that trains: a name or path, an index into the model's layers, or a
            share of them (a float in (0, 1)); ``None`` takes the backbone's usual boundary.
        rows: Names of the rows to run.
        epochs: Passes over the images.
        batch_size: Images per step.
        learning_rate: Step size.
        momentum: Momentum of SGD.
        weights: ``"pretrained"`` or ``None`` for random weights.
        seed: Seeds the selection of images, the head, and the order of batches.
    """

    backbone: str = "efficientnet-lite0"
    data: str = "digits"
    classes: tuple[str, ...] = ()
    image_size: int = 128
    boundary: str | int | float | None = None
    rows: tuple[str, ...] = ()
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float | None = None
    momentum: float = 0.9
    weights: str | None = "pretrained"
    seed: int = 0


def check(
    settings: Settings,
    rows: Mapping[str, Any],
    *,
    counts: Sequence[str] = (),
    rates: Sequence[str] = ("learning_rate",),
) -> None:
    """Refuse settings that cannot be run.

    Args:
        settings: The settings.
        rows: All rows by name.
        counts: Further fields that must be at least 1, or ``None``.
        rates: Fields that must be above 0, or ``None``.

    Raises:
        DataError: With the setting's name, what is allowed and what was received.
    """
    least = {"image_size": 8, "epochs": 1, "batch_size": 2, **dict.fromkeys(counts, 1)}
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is not None and value < smallest:
            raise DataError(f"{name} must be at least {smallest}. Received: {name}={value}")
    if settings.seed < 0:
        raise DataError(f"seed must be at least 0. Received: seed={settings.seed}")
    unknown = [name for name in settings.rows if name not in rows]
    if unknown or not settings.rows:
        raise DataError(f"rows must be some of {', '.join(rows)}. Received: {unknown or 'none'}")
    if len(set(settings.rows)) != len(settings.rows):
        raise DataError(f"a row is named twice. Received: rows={settings.rows}")
    for name in rates:
        rate = getattr(settings, name)
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise DataError(f"{name} must be above 0. Received: {name}={rate}")
    if not 0 <= settings.momentum < 1:
        raise DataError(f"momentum must be in [0, 1). Received: momentum={settings.momentum}")
    if isinstance(settings.boundary, float) and not 0 < settings.boundary < 1:
        raise DataError(
            f"a boundary given as a share must be in (0, 1). Received: boundary={settings.boundary}"
        )


def default_boundary(backbone: str) -> str | int | float:
    """Return the usual boundary of a backbone; three quarters of its layers if it has none."""
    return _BOUNDARIES.get(backbone.lower().replace("_", "-"), 0.75)


def data_name(data: str) -> str:
    """Return a short name for a data source: the last part of a path, without suffix."""
    path = Path(data)
    if path.suffix or len(path.parts) > 1 or path.is_dir():
        return path.resolve().stem
    return data
