"""The essay's second experiment (§2.5): train a new head, fine-tune, and look at test images.

A pretrained network gets a new head, which is trained alone, and is then fine-tuned from a boundary
on with small steps. The rows differ in how BN layers are treated; weights, images, order and seeds
are the same. The patched rows compute their frozen part once (``fl.fit``).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frostline import environment
from frostline.adapters import adapter_of
from frostline.experiments import networks, records
from frostline.experiments.results import (
    Stage,
    TransferEpoch,
    TransferResult as TransferResult,
    TransferRow,
)
from frostline.experiments.run import Progress, Silent, run_rows
from frostline.experiments.transfer_settings import (
    ROWS as ROWS,
    Row as Row,
    TransferSettings as TransferSettings,
    check_settings,
    resolved,
)
from frostline.types import Array, DataError
from frostline.verbs.edit import freeze, recalibrate, unfreeze
from frostline.verbs.fit import fit

Epoch = TransferEpoch
RowResult = TransferRow
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
        resume: Keep the rows that the folder holds, after a check that settings (except ``rows``),
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
    if resume and (force or output is None):
        raise DataError("resume needs an output folder and does not go with force")
    settings, progress = resolved(settings), progress or Silent()
    with (
        records.folder(output, force=force or resume),
        tempfile.TemporaryDirectory(prefix="frostline-transfer-") as cache,
    ):
        train = networks.load(settings, settings.train_per_class)
        test = networks.load(settings, settings.test_per_class, "test")
        start = TransferResult(
            settings=settings,
            selection={"train": dict(train.selection), "test": dict(test.selection)},
            environment=environment.facts(),
        )
        if resume and output is not None:
            start = records.continued(start, output)
        data = _Data(
            train=networks.arrays(settings, train),
            test=networks.arrays(settings, test),
            classes=len(train.class_names),
            cache=cache,
        )

        def measure(row: Row) -> RowResult:
            return networks.on_its_own(settings, lambda: _run_row(row, settings, data, progress))

        return run_rows(start, ROWS, measure, progress=progress, output=output)


def describe(result: RowResult) -> str:
    """Return one sentence that says what the row shows, in numbers."""
    head, end = result.accuracy("head"), result.accuracy("fine-tuning")
    best = max(epoch.test_accuracy for epoch in result.epochs)
    change = end - head
    verb = "rises" if change > 0 else "falls" if change < 0 else "stays"
    return (
        f"test accuracy {verb} from {head:.1%} (head) to {end:.1%} (fine-tuned), {change:+.1%}; "
        f"best epoch {best:.1%}; in training mode {result.phases['1'].metrics['accuracy']:.1%}."
    )


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Images and labels of both splits, and the folder of the feature cache."""

    train: tuple[Array, Array]
    test: tuple[Array, Array]
    classes: int
    cache: str


def _run_row(row: Row, settings: TransferSettings, data: _Data, progress: Follower) -> RowResult:
    """Build, train in two stages and measure one network."""
    import keras

    model = networks.build(settings, row, data.classes, live=row.ramp)
    run = _Run(model=model, row=row, settings=settings, data=data, progress=progress)
    freeze(model, until="head")
    run.train("head", keras.optimizers.RMSprop(settings.head_learning_rate))
    if not row.ramp:
        started = time.perf_counter()
        _thaw(model, row, settings, data.train)
        run.seconds["thawing"] = time.perf_counter() - started
    sgd = keras.optimizers.SGD(settings.learning_rate, momentum=settings.momentum)
    run.train("fine-tuning", sgd)
    return RowResult(
        row=row,
        epochs=tuple(run.epochs),
        **networks.measured(model, data.test, settings),
        boundary=adapter_of(model).boundary(settings.boundary).path,
        seconds=run.seconds,
    )


def _thaw(model: Any, row: Row, settings: TransferSettings, train: tuple[Array, Array]) -> None:
    """Thaw what the row fine-tunes."""
    unfreeze(model, since=settings.boundary)
    if row.every_site:
        for layer in networks.bn_layers(model):
            layer.trainable = False
    if row.recalibrate:
        recalibrate(model, train, sites="unfrozen", batch_size=settings.batch_size)


@dataclass(kw_only=True)
class _Run:
    """The two stages of one row."""

    model: Any
    row: Row
    settings: TransferSettings
    data: _Data
    progress: Follower
    epochs: list[Epoch] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def train(self, stage: Stage, optimizer: Any) -> None:
        """Train one stage with an optimizer of its own."""
        import keras

        settings, (x, y) = self.settings, self.data.train
        networks.compile_classifier(self.model, optimizer)
        keras.utils.set_random_seed(settings.seed)
        callbacks = [_epoch_callback(lambda *numbers: self._record(stage, *numbers))]
        if self.row.ramp and stage == "fine-tuning":
            callbacks.insert(0, self._ramp(len(y)))
        arguments: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "epochs": settings.head_epochs if stage == "head" else settings.epochs,
            "validation_data": self.data.test,
            "validation_batch_size": settings.batch_size,
            "callbacks": callbacks,
            "verbose": 0,
        }
        started = time.perf_counter()
        # The callback that thaws is needed in fine-tuning only: train the head from the cache.
        if self.row.cached or (self.row.ramp and stage == "head"):
            fit(self.model, x, y, cache=self.data.cache, **arguments)
        else:
            self.model.fit(x, y, **arguments)
        self.seconds[stage] = time.perf_counter() - started

    def _ramp(self, samples: int) -> Any:
        from frostline.callbacks import GradualUnfreeze

        steps = math.ceil(samples / self.settings.batch_size)
        return GradualUnfreeze({0: self.settings.boundary}, ramp=steps)

    def _record(self, stage: Stage, logs: dict[str, float], seconds: float) -> None:
        epoch = Epoch(
            number=len(self.epochs) + 1,
            stage=stage,
            train_loss=float(logs["loss"]),
            train_accuracy=float(logs["accuracy"]),
            test_loss=float(logs["val_loss"]),
            test_accuracy=float(logs["val_accuracy"]),
            seconds=seconds,
        )
        networks.check_converges(epoch, learning_rate=self.settings.learning_rate)
        self.epochs.append(epoch)
        self.progress.epoch(epoch, self.settings.head_epochs + self.settings.epochs)


def _epoch_callback(report: Callable[[dict[str, float], float], None]) -> Any:
    """Return a Keras callback that reports the logs and the seconds of every epoch."""
    import keras

    started = [0.0]

    def begin(*_: Any) -> None:
        started[0] = time.perf_counter()

    def end(_: int, logs: dict[str, float]) -> None:
        report(dict(logs), time.perf_counter() - started[0])

    return keras.callbacks.LambdaCallback(on_epoch_begin=begin, on_epoch_end=end)
