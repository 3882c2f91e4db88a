"""The Hugging Face ``Trainer``: BN in its logs, kept frozen, exact in its evaluations.

::

    from frostline.integrations.transformers import BatchNormMonitor, KeepFrozen, Recalibrate

    fl.freeze(trainer.model, until="resnet.encoder.stages.3")
    trainer.add_callback(BatchNormMonitor(trainer, held_batches))
    trainer.add_callback(KeepFrozen(until="resnet.encoder.stages.3"))
    trainer.add_callback(Recalibrate(trainer))
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from frostline.integrations.evaluation import Evaluation, kept_generators
from frostline.verbs.monitor import Monitor
from frostline.verbs.watch import Watch, assert_frozen, watching_of


class BatchNormMonitor(TrainerCallback):  # type: ignore[misc]
    """Log, at the end of every epoch, how far BN is from what training sees.

    The numbers have the names of :class:`frostline.callbacks.BatchNormMonitor`, ``bn/gap`` and so
    on; they go through ``trainer.log``, so wherever ``report_to`` sends logs.

    Args:
        trainer: The trainer, since a callback gets no logger.
        data: A few held-out batches or samples, as for :func:`frostline.phases`.
        step: As in :func:`frostline.phases`; default is the loss that the model returns for a
            batch with labels, ``model(**batch).loss``.
        loss: Instead of a step, as in :func:`frostline.phases`.
        batch_size: Samples per batch for data given as arrays.
        max_samples: Samples that are used of them.

    Raises:
        ModelError: At the start of training: no BN layer.
        DataError: At the start of training: the samples do not fit the model.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: Any,
        *,
        step: Any = None,
        loss: Any = None,
        batch_size: int = 32,
        max_samples: int = 256,
    ) -> None:
        self.trainer = trainer
        self.data = data
        self.step = own_loss if step is None and loss is None else step
        self.loss = loss
        self.batch_size = batch_size
        self.max_samples = max_samples
        self._monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the samples; a mistake shows before the first epoch."""
        with kept_generators():
            self._monitor = Monitor(
                kwargs["model"],
                self.data,
                loss=self.loss,
                step=self.step,
                batch_size=self.batch_size,
                max_samples=self.max_samples,
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the numbers."""
        if self._monitor is not None:
            with kept_generators():
                numbers = self._monitor.measure()
            self.trainer.log(numbers)


class KeepFrozen(TrainerCallback):  # type: ignore[misc]
    """Stop the training when a frozen BN layer is not frozen, or moved.

    Args:
        until: Boundary, as in :func:`frostline.assert_frozen`: every BN layer before it must be
            frozen; ``None``: what is frozen at the start must stay as it is.

    Raises:
        NotFrozenError: At the start, or at the end of an epoch; it names the layers.
    """

    def __init__(self, until: Any = None) -> None:
        self.until = until
        self._watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the flags, and remember the numbers."""
        if self.until is not None:
            assert_frozen(kwargs["model"], until=self.until)
        self._watch = watching_of(kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare with the start."""
        if self._watch is not None:
            self._watch.require_unmoved(self.until)


class Recalibrate(TrainerCallback):  # type: ignore[misc]
    """Evaluate with exact statistics of the training data; the stored ones come back after.

    Training goes on as if there had been no evaluation: checkpoints hold the statistics of the
    training run. To keep the exact ones at the end, call :func:`frostline.recalibrate`.

    The trainer has no event before an evaluation, so this wraps ``trainer.evaluate``, which
    ``train()`` calls as well.

    Args:
        trainer: The trainer.
        data: As for :func:`frostline.recalibrate`; default is ``trainer.train_dataset`` in batches
            of its ``data_collator``.
        sites: As for :func:`frostline.recalibrate`.
        method: As for :func:`frostline.recalibrate`.

    Raises:
        ModelError: At an evaluation: the model has no BN layer, or no such site.
        DataError: At an evaluation: the data do not fit the model.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: Any = None,
        *,
        sites: Any = "unfrozen",
        method: Any = "sequential",
    ) -> None:
        evaluation = Evaluation(sites=sites, method=method)
        inner = trainer.evaluate
        running: list[bool] = []

        @functools.wraps(inner)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            if running:  # one evaluation of several data sets calls itself for each
                return inner(*args, **kwargs)
            running.append(True)
            try:
                evaluation.begin(
                    trainer.model, lambda: training_batches(trainer) if data is None else data
                )
                return inner(*args, **kwargs)
            finally:
                running.clear()
                evaluation.end()

        trainer.evaluate = evaluate


def own_loss(model: Any, batch: Any) -> Any:
    """Return the loss that a model of Transformers computes from a batch with labels."""
    return model(**batch)["loss"]


def training_batches(trainer: Trainer) -> Any:
    """Return a loader of the training data that shares nothing with the one that trains."""
    return torch.utils.data.DataLoader(
        trainer.train_dataset,
        batch_size=trainer.args.per_device_train_batch_size,
        collate_fn=trainer.data_collator,
    )
