"""The essay's second experiment (§2.5): train a new head, then fine-tune, and look at test images.

A pretrained network gets a new head, which is trained alone, and is then fine-tuned from a boundary
on with small steps. What differs between the rows is how BN layers are treated; weights, images,
order and seeds are the same. Frozen parts of the patched rows are computed once (``fl.fit``).
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frostline import environment, layers
from frostline.adapters import view
from frostline.data import image_sets
from frostline.experiments import backbones, records
from frostline.experiments.overfit_settings import default_boundary
from frostline.experiments.run import Progress, Result, Silent, run_rows
from frostline.experiments.transfer_settings import ROWS, Row, TransferSettings, check_settings
from frostline.types import Array, DataError, PhaseTable
from frostline.verbs.diagnose import phases, require_sites, sites
from frostline.verbs.edit import convert, freeze, recalibrate, unfreeze
from frostline.verbs.fit import fit

__all__ = [
    "ROWS",
    "Epoch",
    "Follower",
    "Row",
    "RowResult",
    "Stage",
    "TransferResult",
    "TransferSettings",
    "check_settings",
    "describe",
    "run_transfer",
]

Stage = Literal["head", "fine-tuning"]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch.

    Attributes:
        number: Counted from 1 over both stages.
        stage: ``"head"`` or ``"fine-tuning"``.
        train_loss: Mean over the epoch's steps, while the weights moved (what `fit` reports).
        train_accuracy: Likewise.
        test_loss: On the test images, at inference, after the epoch.
        test_accuracy: Likewise.
        seconds: Time of the epoch with its evaluation; the first of a stage compiles.
    """

    number: int
    stage: Stage
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What one row showed.

    Attributes:
        row: The treatment.
        epochs: Of both stages.
        phases: The test images at the end, in both learning phases.
        sites: Number of BN layers.
        sites_frozen: How many of them had frozen statistics while fine-tuning.
        boundary: The first layer that was fine-tuned.
        seconds: Stage -> time of its whole `fit`, computing the cache included; ``"thawing"``
            is the time between the stages, recalibration included. Rows share one cache, so the
            first cached one of a run pays for it.
    """

    row: Row
    epochs: tuple[Epoch, ...]
    phases: PhaseTable
    sites: int
    sites_frozen: int
    boundary: str | None
    seconds: dict[str, float]

    def accuracy(self, stage: Stage) -> float:
        """Test accuracy at the end of a stage."""
        return [epoch.test_accuracy for epoch in self.epochs if epoch.stage == stage][-1]


@dataclass(frozen=True, kw_only=True)
class TransferResult(Result[TransferSettings, RowResult]):
    """What one run of the experiment measured."""


Follower = Progress[Row, Epoch, RowResult]


def run_transfer(
    settings: TransferSettings,
    *,
    output: Path | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Follower | None = None,
) -> TransferResult:
    """Run the experiment; every row starts from the same weights, seeds and order of batches.

    Global random states are seeded at the start of each stage: an experiment owns its process.

    Args:
        settings: What to run.
        output: Folder for ``results.json``, ``history.csv`` and the figures, checked before
            anything is trained and rewritten after each row. ``None`` writes nothing.
        force: Write into a folder that already holds results.
        resume: Keep the rows that the folder holds, after a check that settings (but ``rows``),
            images, backend and versions are the same, and run those that are missing.
        progress: Told about rows and epochs.

    Returns:
        The measurements. On ``KeyboardInterrupt`` the rows that were finished, with
        ``interrupted=True``.

    Raises:
        DataError: The settings or the data cannot be used, training diverged, or the folder's
            rows were measured on something else.
        ModelError: The backbone or the boundary is unknown.
        OutputError: The folder holds results already, or cannot be written.
    """
    check_settings(settings)
    if settings.boundary is None:
        settings = replace(settings, boundary=default_boundary(settings.backbone))
    if resume and (force or output is None):
        raise DataError("resume needs an output folder and does not go with force")
    made = () if output is None else records.check_folder(output, force=force or resume)
    try:
        with tempfile.TemporaryDirectory(prefix="frostline-transfer-") as cache:
            run = _start(settings, output if resume else None)
            return _run_rows(*run, output, progress or Silent(), cache)
    finally:
        records.remove_empty(made)


def describe(result: RowResult) -> str:
    """Return one sentence: what is seen in this row, in numbers and nothing beyond them."""
    head, end = result.accuracy("head"), result.accuracy("fine-tuning")
    best = max(epoch.test_accuracy for epoch in result.epochs)
    change = end - head
    word = "rises" if change > 0 else "falls" if change < 0 else "stays"
    return (
        f"test accuracy {word} from {head:.1%} (head) to {end:.1%} (fine-tuned), {change:+.1%}; "
        f"best epoch {best:.1%}; in training mode {result.phases['1'].metrics['accuracy']:.1%}."
    )


def _start(
    settings: TransferSettings, earlier: Path | None
) -> tuple[TransferResult, tuple[image_sets.ImageSet, ...]]:
    """Load the images; return the result so far, with the rows that a folder holds, and them."""
    from frostline.experiments import transfer_records

    images = tuple(_images(settings, split) for split in ("train", "test"))
    result = TransferResult(
        settings=settings,
        selection={"train": dict(images[0].selection), "test": dict(images[1].selection)},
        environment=environment.facts(),
        rows=(),
    )
    return (transfer_records.continued(result, earlier) if earlier else result), images


def _run_rows(
    result: TransferResult,
    images: tuple[image_sets.ImageSet, ...],
    output: Path | None,
    progress: Follower,
    cache: str,
) -> TransferResult:
    """Run row by row; what is finished is on disk before the next one starts."""
    from frostline.experiments import transfer_records

    settings, classes = result.settings, len(images[0].class_names)
    data = tuple(_arrays(settings, each) for each in images)

    def measure(row: Row) -> RowResult:
        return _run_row(row, settings, data, classes, progress, cache)

    def keep(found: TransferResult) -> None:
        if output is not None:
            transfer_records.write_numbers(found, output)

    result = run_rows(result, settings.rows, ROWS, measure, progress, keep)
    if output is not None and result.rows:
        result = replace(result, files=transfer_records.write(result, output))
    return result


def _images(settings: TransferSettings, split: Literal["train", "test"]) -> image_sets.ImageSet:
    return image_sets.load(
        settings.data,
        split=split,
        classes=settings.classes or None,
        per_class=settings.train_per_class if split == "train" else settings.test_per_class,
        image_size=settings.image_size,
        seed=settings.seed,
    )


def _arrays(settings: TransferSettings, images: image_sets.ImageSet) -> tuple[Array, Array]:
    x = np.asarray(backbones.preprocess(settings.backbone, images.images), dtype=np.float32)
    return x, images.labels.astype(np.int32)


def _run_row(
    row: Row,
    settings: TransferSettings,
    data: tuple[tuple[Array, Array], ...],
    classes: int,
    progress: Follower,
    cache: str,
) -> RowResult:
    """Build, train in two stages and measure one network, and free its memory."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(settings.seed)
    model = backbones.build(
        settings.backbone, image_size=settings.image_size, classes=classes, weights=settings.weights
    )
    require_sites(sites(model))
    convert(model, policy=row.policy)
    for layer in _bn_layers(model):
        layer.live = row.ramp  # where nothing is thawed in mid-training, nothing pays for it
    try:
        run = _Run(model=model, row=row, settings=settings, data=data, progress=progress)
        freeze(model, until="head")
        run.train("head", keras.optimizers.RMSprop(settings.head_learning_rate), cache)
        if not row.ramp:
            started = time.perf_counter()
            _thaw(model, row, settings, data[0])
            run.seconds["thawing"] = time.perf_counter() - started
        run.train(
            "fine-tuning",
            keras.optimizers.SGD(settings.learning_rate, momentum=settings.momentum),
            cache,
        )
        table = phases(model, data[1], batch_size=settings.batch_size)
        found = sites(model)
        boundary = view(model).boundary(settings.boundary).path
    finally:
        del model
        keras.utils.clear_session()
        gc.collect()
    return RowResult(
        row=row,
        epochs=tuple(run.epochs),
        phases=replace(table, rows=tuple(replace(r, outputs=None) for r in table.rows)),
        sites=len(found),
        sites_frozen=sum(site.stats_frozen for site in found),
        boundary=boundary,
        seconds=run.seconds,
    )


def _bn_layers(model: Any) -> list[Any]:
    return [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]


def _thaw(model: Any, row: Row, settings: TransferSettings, train: tuple[Array, Array]) -> None:
    """Thaw what the row fine-tunes."""
    unfreeze(model, since=settings.boundary)
    if row.every_site:
        for layer in _bn_layers(model):
            layer.trainable = False
    if row.recalibrate:
        recalibrate(model, train, sites="unfrozen", batch_size=settings.batch_size)


@dataclass(kw_only=True)
class _Run:
    """The two stages of one row."""

    model: Any
    row: Row
    settings: TransferSettings
    data: tuple[tuple[Array, Array], ...]
    progress: Follower
    epochs: list[Epoch] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def train(self, stage: Stage, optimizer: Any, cache: str) -> None:
        """Train one stage with an optimizer of its own."""
        import keras

        settings, (x, y) = self.settings, self.data[0]
        self.model.compile(
            optimizer=optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"]
        )
        keras.utils.set_random_seed(settings.seed)
        callbacks = [_reporter(lambda *seen: self._seen(stage, *seen))]
        if self.row.ramp and stage == "fine-tuning":
            callbacks.insert(0, self._ramp(len(y)))
        arguments: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "epochs": settings.head_epochs if stage == "head" else settings.epochs,
            "validation_data": self.data[1],
            "validation_batch_size": settings.batch_size,
            "callbacks": callbacks,
            "verbose": 0,
        }
        started = time.perf_counter()
        # Only fine-tuning needs the callback that thaws; the head is trained alike in both rows.
        if self.row.cached or (self.row.ramp and stage == "head"):
            fit(self.model, x, y, cache=cache, **arguments)
        else:
            self.model.fit(x, y, **arguments)
        self.seconds[stage] = time.perf_counter() - started

    def _ramp(self, samples: int) -> Any:
        from frostline.callbacks import GradualUnfreeze

        steps = math.ceil(samples / self.settings.batch_size)
        return GradualUnfreeze({0: self.settings.boundary}, ramp=steps)

    def _seen(self, stage: Stage, logs: dict[str, float], seconds: float) -> None:
        epoch = Epoch(
            number=len(self.epochs) + 1,
            stage=stage,
            train_loss=float(logs["loss"]),
            train_accuracy=float(logs["accuracy"]),
            test_loss=float(logs["val_loss"]),
            test_accuracy=float(logs["val_accuracy"]),
            seconds=seconds,
        )
        if not math.isfinite(epoch.train_loss):
            raise DataError(
                f"training diverged: the loss of epoch {epoch.number} is {epoch.train_loss}. "
                f"Received: learning_rate={self.settings.learning_rate}"
            )
        self.epochs.append(epoch)
        self.progress.epoch(epoch, self.settings.head_epochs + self.settings.epochs)


def _reporter(told: Callable[[dict[str, float], float], None]) -> Any:
    """A Keras callback that hands on the numbers of every epoch and how long it took."""
    import keras

    clock = [0.0]

    def begin(*_: Any) -> None:
        clock[0] = time.perf_counter()

    def end(_: int, logs: dict[str, float]) -> None:
        told(dict(logs), time.perf_counter() - clock[0])

    return keras.callbacks.LambdaCallback(on_epoch_begin=begin, on_epoch_end=end)
