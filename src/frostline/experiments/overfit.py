"""The essay's experiment (§2.4): overfit a fine-tuned network, then look at it at inference.

A pretrained network is frozen up to a boundary and trained on a few images; the same images are
then used for evaluation, so nothing is left to generalise. Whatever the network loses between
training mode (phase 1) and inference (phase 0) is therefore not overfitting. The experiment is
repeated for every behaviour that a frozen BN layer has had (the rows), from the same weights,
the same head and the same order of batches.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from frostline import environment, layers
from frostline.diagnosis import phases, require_sites, sites
from frostline.experiments import backbones, datasets, records
from frostline.models import ModelView, view
from frostline.repair import convert, freeze, recalibrate
from frostline.types import Array, DataError, PhaseTable, Policy

log = logging.getLogger("frostline")

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
        data: What `datasets.load` knows: ``digits``, ``cifar10``, a folder, a parquet, an npz.
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
    """

    row: Row
    epochs: tuple[Epoch, ...]
    phases: PhaseTable
    sites: int
    sites_frozen: int
    boundary: str | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class OverfitResult:
    """Everything that one run measured, with what is needed to repeat it."""

    settings: OverfitSettings
    selection: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[RowResult, ...]
    interrupted: bool = False
    files: tuple[Path, ...] = field(default=(), compare=False)


class Progress(Protocol):
    """What a caller may do while the experiment runs."""

    def started(self, row: Row, number: int, total: int) -> None:
        """Row ``number`` of ``total`` (counted from 1) begins."""

    def epoch(self, epoch: Epoch, total: int) -> None:
        """One of ``total`` epochs is done."""

    def finished(self, result: RowResult) -> None:
        """A row is done."""


class Silent:
    """Progress that shows nothing."""

    def started(self, row: Row, number: int, total: int) -> None:
        """Show nothing."""

    def epoch(self, epoch: Epoch, total: int) -> None:
        """Show nothing."""

    def finished(self, result: RowResult) -> None:
        """Show nothing."""


def run_overfit(
    settings: OverfitSettings,
    *,
    output: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> OverfitResult:
    """Run the experiment; every row starts from the same weights, seeds and order of batches.

    Global random states are seeded at the start of each row: an experiment owns its process.

    Args:
        settings: What to run.
        output: Folder for ``results.json``, ``history.csv`` and the figures; it is checked before
            anything is trained, and rewritten after each row. ``None`` writes nothing.
        force: Write into a folder that already holds results.
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
    settings = _resolved(settings)
    made = () if output is None else records.check_folder(output, force=force)
    try:
        return _run_rows(settings, output, progress or Silent())
    finally:
        records.remove_empty(made)


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
    unknown = [name for name in settings.rows if name not in ROWS]
    if unknown or not settings.rows:
        raise DataError(f"rows must be some of {', '.join(ROWS)}. Received: {unknown or 'none'}")
    if len(set(settings.rows)) != len(settings.rows):
        raise DataError(f"a row is named twice. Received: rows={settings.rows}")
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


def default_boundary(backbone: str) -> str | int | float:
    """Return the boundary that is used when none is given; three quarters of other backbones."""
    return _BOUNDARIES.get(backbone.lower().replace("_", "-"), 0.75)


def _resolved(settings: OverfitSettings) -> OverfitSettings:
    """Fill in what was left to the backbone and the optimizer, so that results record it."""
    boundary, rate = settings.boundary, settings.learning_rate
    return replace(
        settings,
        boundary=default_boundary(settings.backbone) if boundary is None else boundary,
        learning_rate=LEARNING_RATES[settings.optimizer] if rate is None else rate,
    )


def _run_rows(settings: OverfitSettings, output: Path | None, progress: Progress) -> OverfitResult:
    """Run row by row; what is finished is on disk before the next one starts."""
    images = datasets.load(
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
    for number, name in enumerate(settings.rows, start=1):
        progress.started(ROWS[name], number, len(settings.rows))
        try:
            measured = _run_row(ROWS[name], settings, x, y, len(images.class_names), progress)
        except KeyboardInterrupt:
            result = replace(result, interrupted=True)
            break
        result = replace(result, rows=(*result.rows, measured))
        progress.finished(measured)
        if output is not None:
            records.write_numbers(result, output)
    if output is not None and result.rows:
        result = replace(result, files=records.write(result, output))
    return result


def _run_row(
    row: Row,
    settings: OverfitSettings,
    x: Array,
    y: Array,
    classes: int,
    progress: Progress,
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
    model: Any, settings: OverfitSettings, x: Array, y: Array, progress: Progress
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
