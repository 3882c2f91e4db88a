"""What the rows of every experiment do with a network: load images, build, measure, free."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np

from frostline import layers
from frostline.data import image_sets
from frostline.experiments import backbones
from frostline.experiments.results import Epoch
from frostline.experiments.settings import Row, Settings
from frostline.types import Array, DataError
from frostline.verbs.diagnose import phases, require_sites, sites
from frostline.verbs.edit import convert

Made = TypeVar("Made")


def load(
    settings: Settings, per_class: int | None, split: Literal["train", "test"] = "train"
) -> image_sets.ImageSet:
    """Return the images of a split that the settings select."""
    return image_sets.load(
        settings.data,
        split=split,
        classes=settings.classes or None,
        per_class=per_class,
        image_size=settings.image_size,
        seed=settings.seed,
    )


def arrays(settings: Settings, images: image_sets.ImageSet) -> tuple[Array, Array]:
    """Return images as the backbone wants them, float32, and labels, int32."""
    x = np.asarray(backbones.preprocess(settings.backbone, images.images), dtype=np.float32)
    return x, images.labels.astype(np.int32)


def on_its_own(settings: Settings, make: Callable[[], Made]) -> Made:
    """Return what ``make`` does from a fresh, seeded state; free the memory of its networks."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(settings.seed)
    try:
        return make()
    finally:
        keras.utils.clear_session()
        gc.collect()


def build(
    settings: Settings, row: Row, classes: int, *, debias: bool = False, live: bool = False
) -> Any:
    """Return the backbone with a new head and BN layers that follow the row's policy.

    Args:
        settings: Of the run.
        row: Its treatment.
        classes: Number of outputs.
        debias: As in ``fl.convert``.
        live: Let ``trainable`` take effect in mid-training, which costs time.
    """
    model = backbones.build(
        settings.backbone, image_size=settings.image_size, classes=classes, weights=settings.weights
    )
    require_sites(sites(model))
    model = convert(model, policy=row.policy, debias=debias)
    for layer in bn_layers(model):
        layer.live = live
    return model


def compile_classifier(model: Any, optimizer: Any) -> None:
    """Compile for integer labels, with accuracy."""
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])


def bn_layers(model: Any) -> list[Any]:
    """Return Frostline's BN layers of a flat model."""
    return [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]


def measured(model: Any, data: tuple[Array, Array], settings: Settings) -> dict[str, Any]:
    """Return the fields of `RowResult` that are read off a trained model."""
    table = phases(model, data, batch_size=settings.batch_size)
    found = sites(model)
    return {
        "phases": replace(table, rows=tuple(replace(row, outputs=None) for row in table.rows)),
        "sites": len(found),
        "sites_frozen": sum(site.stats_frozen for site in found),
    }


def check_converges(epoch: Epoch, **settings: object) -> None:
    """Stop a training whose loss is no number.

    Raises:
        DataError: It names the epoch and the settings to change.
    """
    if not math.isfinite(epoch.train_loss):
        received = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise DataError(
            f"training diverged: the loss of epoch {epoch.number} is {epoch.train_loss}; "
            f"try a smaller learning rate. Received: {received}"
        )
