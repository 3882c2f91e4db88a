"""The essay's experiment (§2.4): overfit a fine-tuned network, then look at it at inference.

A pretrained network is frozen up to a boundary and trained on a few images. The same images serve
for evaluation, so nothing is left to generalise, and whatever the network loses between training
mode (phase 1) and inference (phase 0) is not overfitting. Each row repeats this with one behaviour
that frozen BN layers have had, from the same weights, head and order of batches.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from frostline import environment
from frostline.adapters import Adapter, adapter_of
from frostline.experiments import networks, records
from frostline.experiments.overfit_settings import (
    ROWS as ROWS,
    OverfitSettings as OverfitSettings,
    Row as Row,
    check_settings as check_settings,
    default_boundary as default_boundary,
    resolved as resolved,
)
from frostline.experiments.results import OverfitEpoch, OverfitResult as OverfitResult, OverfitRow
from frostline.experiments.run import Progress, Silent, run_rows
from frostline.types import Array
from frostline.types.report import Report
from frostline.verbs.diagnose import diagnose, sites
from frostline.verbs.edit import freeze, recalibrate

Epoch = OverfitEpoch
RowResult = OverfitRow
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
            ``diagnosis-ROW.html`` and ``.json``, and its causes into ``diagnosis.json``.
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
    settings, progress = resolved(settings), progress or Silent()
    with records.folder(output, force=force):
        images = networks.load(settings, settings.per_class)
        data, classes = networks.arrays(settings, images), len(images.class_names)
        start = OverfitResult(
            settings=settings, selection=dict(images.selection), environment=environment.facts()
        )

        def measure(row: Row) -> RowResult:
            return networks.on_its_own(
                settings, lambda: _run_row(row, settings, data, classes, diagnosed, progress)
            )

        return run_rows(start, ROWS, measure, progress=progress, output=output)


def describe(result: RowResult) -> str:
    """Return one sentence that says what the row shows, in numbers."""
    inference, training = result.phases["0"], result.phases["1"]
    samples = result.phases.samples
    low, high = inference.metrics["accuracy"], training.metrics["accuracy"]
    sentence = (
        f"{high:.1%} of the {samples} training images are right in training mode, "
        f"{low:.1%} at inference"
    )
    if high > low:
        return f"{sentence}: {round((high - low) * samples)} images are lost in between."
    return f"{sentence}: {'nothing is lost' if low == 1 else 'no loss at inference'}."


def _run_row(
    row: Row,
    settings: OverfitSettings,
    data: tuple[Array, Array],
    classes: int,
    diagnosed: bool,
    progress: Follower,
) -> RowResult:
    """Build, treat, train and measure one network."""
    import keras

    started = time.perf_counter()
    model = networks.build(settings, row, classes, debias=row.debias)
    boundary = _freeze(model, row, settings)
    networks.compile_classifier(model, _optimizer(settings))
    # Seed again: conversion draws random numbers, a different count in each row.
    keras.utils.set_random_seed(settings.seed)
    epochs = _train(model, settings, *data, progress)
    if row.recalibrate and not all(site.stats_frozen for site in sites(model)):
        recalibrate(model, data, batch_size=settings.batch_size)
    return RowResult(
        row=row,
        epochs=epochs,
        boundary=boundary,
        **networks.measured(model, data, settings),
        report=_diagnosis(model, settings, data) if diagnosed else None,
        seconds=time.perf_counter() - started,
    )


def _diagnosis(model: Any, settings: OverfitSettings, data: tuple[Array, Array]) -> Report:
    return diagnose(
        model,
        data,
        batch_size=settings.batch_size,
        max_samples=len(data[0]),
        seed=settings.seed,
        verbose=0,
    )


def _freeze(model: Any, row: Row, settings: OverfitSettings) -> str | None:
    """Freeze what the row says, and return the boundary's path."""
    if row.frozen == "nothing":
        model.trainable = True
        return None
    boundary = adapter_of(model).boundary(settings.boundary)
    freeze(model, until=settings.boundary)
    if row.frozen == "prefix and every BN":
        for layer in networks.bn_layers(model):
            layer.trainable = False
    return boundary.path


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
    """Fit one epoch at a time, and evaluate phase 1 after each.

    The order of batches is drawn here, so that it is the same in every row and on every backend,
    and a new one in each epoch. `fit` on TensorFlow repeats its first order in every call.
    """
    adapter = adapter_of(model)
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
        loss, accuracy = _in_training_mode(adapter, x, y, settings.batch_size)
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
        networks.check_converges(
            epoch, optimizer=settings.optimizer, learning_rate=settings.learning_rate
        )
        epochs.append(epoch)
        progress.epoch(epoch, settings.epochs)
    return tuple(epochs)


def _in_training_mode(adapter: Adapter, x: Array, y: Array, batch_size: int) -> tuple[float, float]:
    """Return loss and accuracy of a training-mode forward pass; nothing is updated."""
    total, right = 0.0, 0
    for step, at in enumerate(range(0, len(x), batch_size)):
        batch, labels = x[at : at + batch_size], y[at : at + batch_size]
        outputs, loss = adapter.score(batch, labels, training=True, step=step)
        total += float(loss or 0.0) * len(labels)
        right += int((np.asarray(outputs).argmax(axis=-1) == labels).sum())
    return total / len(x), right / len(x)
