"""The essay's experiment (§2.4): overfit a fine-tuned network, then look at it at inference.

A pretrained network is frozen up to a boundary and trained on a few images; the same images are
then used for evaluation, so nothing is left to generalise. Whatever the network loses between
training mode (phase 1) and inference (phase 0) is therefore not overfitting. The experiment is
repeated for every behaviour that a frozen BN layer has had (the rows), from the same weights,
the same head and the same order of batches.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from frostline import environment, layers
from frostline.adapters import ModelView, view
from frostline.data import image_sets
from frostline.experiments import backbones, records
from frostline.experiments.overfit_settings import (
    ROWS,
    OverfitSettings,
    Row,
    check_settings,
    default_boundary,
    resolved,
)
from frostline.experiments.run import Progress, Result, Silent, run_rows
from frostline.types import Array, DataError, PhaseTable
from frostline.types.report import Report
from frostline.verbs.diagnose import diagnose, phases, require_sites, sites
from frostline.verbs.edit import convert, freeze, recalibrate

__all__ = [
    "ROWS",
    "Epoch",
    "Follower",
    "OverfitResult",
    "OverfitSettings",
    "Row",
    "RowResult",
    "check_settings",
    "default_boundary",
    "describe",
    "resolved",
    "run_overfit",
]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Losses and accuracies of one epoch.

    Attributes:
        number: Counted from 1.
        train_loss: Mean over the epoch's steps, while the weights moved (what `fit` reports).
        train_accuracy: Likewise.
        phase0_loss: At inference, on the same images, after the epoch (what `fit` reports as
            validation).
        phase0_accuracy: Likewise.
        phase1_loss: In training mode, on the same images, after the epoch; nothing is updated.
        phase1_accuracy: Likewise.
        seconds: Time of the epoch with its evaluations.
    """

    number: int
    train_loss: float
    train_accuracy: float
    phase0_loss: float
    phase0_accuracy: float
    phase1_loss: float
    phase1_accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What one row showed.

    Attributes:
        row: The treatment.
        epochs: One record per epoch.
        phases: The final table on the same images.
        sites: Number of BN layers.
        sites_frozen: How many of them had frozen statistics.
        boundary: The first layer that trains; ``None`` where nothing is frozen.
        seconds: Time of the whole row, with building the model.
        report: Diagnosis of the trained network on the same images; ``None`` when not asked for.
    """

    row: Row
    epochs: tuple[Epoch, ...]
    phases: PhaseTable
    sites: int
    sites_frozen: int
    boundary: str | None
    seconds: float
    report: Report | None = None


@dataclass(frozen=True, kw_only=True)
class OverfitResult(Result[OverfitSettings, RowResult]):
    """What one run of the experiment measured."""


Follower = Progress[Row, Epoch, RowResult]


def run_overfit(
    settings: OverfitSettings,
    *,
    output: Path | None = None,
    force: bool = False,
    diagnosed: bool = False,
    progress: Follower | None = None,
) -> OverfitResult:
    """Run the experiment; every row starts from the same weights, seeds and order of batches.

    Global random states are seeded at the start of each row: an experiment owns its process.

    Args:
        settings: What to run.
        output: Folder for ``results.json``, ``history.csv`` and the figures; it is checked before
            anything is trained, and rewritten after each row. ``None`` writes nothing.
        force: Write into a folder that already holds results.
        diagnosed: Also diagnose each trained network on the training images; the report goes into
            ``diagnosis-ROW.html`` and ``.json``, what it blames into ``diagnosis.json``.
        progress: Told about rows and epochs.

    Returns:
        The measurements. On ``KeyboardInterrupt`` the rows that were finished, with
        ``interrupted=True``.

    Raises:
        DataError: If the settings or the data cannot be used.
        ModelError: If the backbone or the boundary is unknown.
        OutputError: If the folder holds results already, or cannot be written.
    """
    check_settings(settings)
    settings = resolved(settings)
    made = () if output is None else records.check_folder(output, force=force)
    try:
        return _run_rows(settings, output, diagnosed, progress or Silent())
    finally:
        records.remove_empty(made)


def describe(result: RowResult) -> str:
    """Return one sentence: what is seen in this row, in numbers and nothing beyond them."""
    inference, training = result.phases["0"], result.phases["1"]
    samples = result.phases.samples
    low, high = inference.metrics["accuracy"], training.metrics["accuracy"]
    wrong = round((1 - low) * samples)
    sentence = (
        f"{high:.1%} of the {samples} training images are right in training mode, "
        f"{low:.1%} at inference"
    )
    if high > low:
        return f"{sentence}: {round((high - low) * samples)} images are lost in between."
    if wrong == 0:
        return f"{sentence}: nothing is lost."
    return f"{sentence}: no loss at inference."


def _run_rows(
    settings: OverfitSettings, output: Path | None, diagnosed: bool, progress: Follower
) -> OverfitResult:
    """Run row by row; what is finished is on disk before the next one starts."""
    images = image_sets.load(
        settings.data,
        classes=settings.classes or None,
        per_class=settings.per_class,
        image_size=settings.image_size,
        seed=settings.seed,
    )
    x = np.asarray(backbones.preprocess(settings.backbone, images.images), dtype=np.float32)
    y = images.labels.astype(np.int32)
    result = OverfitResult(
        settings=settings,
        selection=dict(images.selection),
        environment=environment.facts(),
        rows=(),
    )

    def measure(row: Row) -> RowResult:
        return _run_row(row, settings, x, y, len(images.class_names), diagnosed, progress)

    def keep(found: OverfitResult) -> None:
        if output is not None:
            records.write_numbers(found, output)

    result = run_rows(result, settings.rows, ROWS, measure, progress, keep)
    if output is not None and result.rows:
        result = replace(result, files=records.write(result, output))
    return result


def _run_row(
    row: Row,
    settings: OverfitSettings,
    x: Array,
    y: Array,
    classes: int,
    diagnosed: bool,
    progress: Follower,
) -> RowResult:
    """Build, treat, train and measure one network, and free its memory."""
    import keras

    started = time.perf_counter()
    keras.utils.clear_session()
    # Building draws the head's weights and training draws the order of batches, so both are
    # seeded: otherwise a row would depend on how many numbers its conversion happened to draw.
    keras.utils.set_random_seed(settings.seed)
    model = backbones.build(
        settings.backbone,
        image_size=settings.image_size,
        classes=classes,
        weights=settings.weights,
    )
    model, boundary = _treated(model, row, settings)
    model.compile(
        optimizer=_optimizer(settings),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    keras.utils.set_random_seed(settings.seed)
    try:
        epochs = _train(model, settings, x, y, progress)
        if row.recalibrate and not all(site.stats_frozen for site in sites(model)):
            recalibrate(model, (x, y), batch_size=settings.batch_size)
        table = phases(model, (x, y), batch_size=settings.batch_size)
        found = sites(model)
        report = _diagnosis(model, settings, x, y) if diagnosed else None
    finally:
        del model
        keras.utils.clear_session()
        gc.collect()
    return RowResult(
        row=row,
        epochs=epochs,
        phases=replace(table, rows=tuple(replace(r, outputs=None) for r in table.rows)),
        sites=len(found),
        sites_frozen=sum(site.stats_frozen for site in found),
        boundary=boundary,
        seconds=time.perf_counter() - started,
        report=report,
    )


def _diagnosis(model: Any, settings: OverfitSettings, x: Array, y: Array) -> Report:
    """Diagnose the network on all images that it was trained on."""
    return diagnose(
        model,
        (x, y),
        batch_size=settings.batch_size,
        max_samples=len(x),
        seed=settings.seed,
        verbose=0,
    )


def _treated(model: Any, row: Row, settings: OverfitSettings) -> tuple[Any, str | None]:
    """Return the model with our BN layers, frozen as the row says, and its boundary's name."""
    require_sites(sites(model))
    model = convert(model, policy=row.policy, debias=row.debias)
    norms = _bn_layers(model)
    for layer in norms:
        # Nothing is thawed in mid-training here, so no row pays for being able to.
        layer.live = False
    if row.frozen == "nothing":
        model.trainable = True
        return model, None
    boundary = view(model).boundary(settings.boundary)
    freeze(model, until=settings.boundary)
    if row.frozen == "prefix and every BN":
        for layer in norms:
            layer.trainable = False
    return model, boundary.path


def _bn_layers(model: Any) -> list[Any]:
    return [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]


def _optimizer(settings: OverfitSettings) -> Any:
    import keras

    rate = settings.learning_rate
    if settings.optimizer == "sgd":
        return keras.optimizers.SGD(rate, momentum=settings.momentum)
    if settings.optimizer == "rmsprop":
        return keras.optimizers.RMSprop(rate)
    return keras.optimizers.Adam(rate)


def _train(
    model: Any, settings: OverfitSettings, x: Array, y: Array, progress: Follower
) -> tuple[Epoch, ...]:
    """Fit one epoch at a time, so that each can be followed by a look at phase 1.

    The order is drawn here, not by `fit`: it is then the same in every row and on every backend,
    and another one in every epoch (on TensorFlow each call of `fit` would repeat the first).
    """
    seen = view(model)
    rng = np.random.default_rng(settings.seed)
    epochs: list[Epoch] = []
    for number in range(1, settings.epochs + 1):
        started = time.perf_counter()
        order = rng.permutation(len(y))
        logs = model.fit(
            x[order],
            y[order],
            shuffle=False,
            batch_size=settings.batch_size,
            validation_data=(x, y),
            validation_batch_size=settings.batch_size,
            initial_epoch=number - 1,
            epochs=number,
            verbose=0,
        ).history
        loss, accuracy = _in_training_mode(seen, x, y, settings.batch_size)
        epoch = Epoch(
            number=number,
            train_loss=logs["loss"][0],
            train_accuracy=logs["accuracy"][0],
            phase0_loss=logs["val_loss"][0],
            phase0_accuracy=logs["val_accuracy"][0],
            phase1_loss=loss,
            phase1_accuracy=accuracy,
            seconds=time.perf_counter() - started,
        )
        if not math.isfinite(epoch.train_loss):
            raise DataError(
                f"training diverged: the loss of epoch {number} is {epoch.train_loss}. "
                f"Received: optimizer={settings.optimizer!r}, "
                f"learning_rate={settings.learning_rate}"
            )
        epochs.append(epoch)
        progress.epoch(epoch, settings.epochs)
    return tuple(epochs)


def _in_training_mode(seen: ModelView, x: Array, y: Array, batch_size: int) -> tuple[float, float]:
    """Return loss and accuracy of a training-mode forward pass; nothing is updated."""
    total, right = 0.0, 0
    for step, at in enumerate(range(0, len(x), batch_size)):
        batch, labels = x[at : at + batch_size], y[at : at + batch_size]
        outputs, loss = seen.score(batch, labels, training=True, step=step)
        total += float(loss or 0.0) * len(labels)
        right += int((np.asarray(outputs).argmax(axis=-1) == labels).sum())
    return total / len(x), right / len(x)
