"""Ultralytics: BN in the metrics of a training, kept frozen, exact in its validations.

::

    from frostline.integrations.ultralytics import BatchNormMonitor, KeepFrozen, Recalibrate

    model = YOLO("yolo11n.pt")
    KeepFrozen(until="model.10").add_to(model)
    Recalibrate(images).add_to(model)
    model.train(data="coco8.yaml", freeze=10)

Boundaries are paths in the network that trains, ``trainer.model``.
"""

from __future__ import annotations

from typing import Any

from frostline.integrations.evaluation import Evaluation, kept_generators
from frostline.verbs.monitor import Monitor
from frostline.verbs.watch import Watch, watching_of


class BatchNormMonitor:
    """Add, to the metrics of every epoch, how far BN is from what training sees.

    The numbers have the names of :class:`frostline.callbacks.BatchNormMonitor` without the gap,
    and stand beside the validation's in ``results.csv`` and in what Ultralytics' loggers get.

    Args:
        data: A few images as the network takes them: float, ``(samples, 3, height, width)``, from
            0 to 1; or batches of these.
        batch_size: Samples per batch for data given as one array; use the one that you train with.
        max_samples: Samples that are used of them.

    Raises:
        ModelError: At the start of training: no BN layer.
        DataError: At the start of training: the images do not fit the network.
    """

    def __init__(self, data: Any, *, batch_size: int = 16, max_samples: int = 64) -> None:
        self.data = data
        self.batch_size = batch_size
        self.max_samples = max_samples
        self._monitor: Monitor | None = None
        self._numbers: dict[str, float] = {}

    def add_to(self, model: Any) -> None:
        """Register with a model of Ultralytics, before its ``train()``."""
        model.add_callback("on_train_start", self._begin)
        model.add_callback("on_train_epoch_end", self._measure)

    def _begin(self, trainer: Any) -> None:
        with kept_generators():
            self._monitor = Monitor(
                _network(trainer),
                self.data,
                loss=None,
                step=None,
                batch_size=self.batch_size,
                max_samples=self.max_samples,
            )

    def _measure(self, trainer: Any) -> None:
        if self._monitor is not None:
            with kept_generators():
                self._numbers = self._monitor.measure()
        # Ultralytics writes `lr` beside the losses and metrics to its file and its loggers.
        trainer.lr = {**trainer.lr, **self._numbers}


class KeepFrozen:
    """Stop the training when a frozen BN layer moved.

    Ultralytics freezes in its own way, ``train(freeze=10)``, each time an epoch begins; what counts
    here are the numbers.

    Args:
        until: Boundary, as in :func:`frostline.assert_frozen`: no BN layer before it may move;
            ``None``: none that is frozen at the start.

    Raises:
        NotFrozenError: At the end of an epoch; it names the layers.
    """

    def __init__(self, until: Any = None) -> None:
        self.until = until
        self._watch: Watch | None = None

    def add_to(self, model: Any) -> None:
        """Register with a model of Ultralytics, before its ``train()``."""
        model.add_callback("on_train_start", self._begin)
        model.add_callback("on_train_epoch_end", self._check)

    def _begin(self, trainer: Any) -> None:
        self._watch = watching_of(_network(trainer))

    def _check(self, trainer: Any) -> None:
        if self._watch is not None:
            self._watch.require_unmoved(self.until)


class Recalibrate:
    """Validate with exact statistics of your images; the stored ones come back after.

    Ultralytics validates the averaged network, ``trainer.ema.ema``, and saves that one: what it
    saves has the statistics of the training run.

    Args:
        data: Images as the network takes them, as for :class:`BatchNormMonitor`; a few hundred of
            the training data.
        sites: As for :func:`frostline.recalibrate`.
        method: As for :func:`frostline.recalibrate`.

    Raises:
        ModelError: At a validation: no BN layer, or no such site.
        DataError: At a validation: the images do not fit the network.
    """

    def __init__(self, data: Any, *, sites: Any = "all", method: Any = "sequential") -> None:
        self.data = data
        self._evaluation = Evaluation(sites=sites, method=method)

    def add_to(self, model: Any) -> None:
        """Register with a model of Ultralytics, before its ``train()``."""
        model.add_callback("on_train_epoch_end", self._begin)
        model.add_callback("on_val_end", self._end)
        model.add_callback("on_fit_epoch_end", self._end)  # an epoch without a validation
        model.add_callback("on_train_end", self._end)

    def _begin(self, trainer: Any) -> None:
        self._evaluation.begin(trainer.ema.ema, lambda: self.data)

    def _end(self, _: Any) -> None:
        self._evaluation.end()


def _network(trainer: Any) -> Any:
    return getattr(trainer.model, "module", trainer.model)
