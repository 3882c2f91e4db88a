"""Lightning: BN in the logs of a ``Trainer``, kept frozen, exact in its validations.

``lightning.pytorch`` and ``pytorch_lightning`` are both served: the one that is imported already,
or else the one that is installed. Each callback finds the network: the module itself if it defines
``forward``, or else its only child with BN layers; ``network="net"`` names another one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from frostline.integrations.evaluation import Evaluation, kept_generators
from frostline.types import ModelError
from frostline.verbs.diagnose import sites as sites_of
from frostline.verbs.monitor import Monitor
from frostline.verbs.watch import Watch, assert_frozen, watching_of

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _lightning() -> Any:
    for name in _NAMES:
        if name in sys.modules:
            return sys.modules[name]
    installed = [name for name in _NAMES if importlib.util.find_spec(name.partition(".")[0])]
    return importlib.import_module((installed or _NAMES)[0])


pl = _lightning()


class _OnNetwork(pl.Callback):  # type: ignore[misc, name-defined]
    """A callback that acts on the network inside a Lightning module."""

    def __init__(self, network: str | None) -> None:
        self.network = network

    def _network(self, module: Any) -> Any:
        if self.network is not None:
            return module.get_submodule(self.network)
        if type(module).forward is not pl.LightningModule.forward:
            return module
        children = [child for _, child in module.named_children() if _has_bn(child)]
        if len(children) != 1:
            names = [name for name, _ in module.named_children()]
            raise ModelError(
                "which child of the Lightning module is the network? Name it: network='...'. "
                f"Received: {type(module).__name__} without forward, with children {names}"
            )
        return children[0]


class BatchNormMonitor(_OnNetwork):
    """Log, at the end of every epoch, how far BN is from what training sees.

    The numbers have the names of :class:`frostline.callbacks.BatchNormMonitor`, ``bn/gap`` and so
    on. They are logged by the module, so they reach its loggers, ``EarlyStopping("bn/gap")`` and
    ``ModelCheckpoint``.

    Args:
        data: A few held-out samples, as for :func:`frostline.phases`.
        loss: As in :func:`frostline.phases`.
        step: As in :func:`frostline.phases`.
        network: Name of the child that is the network.
        batch_size: Samples per batch for data given as arrays; use the one that you train with.
        max_samples: Samples that are used of them.

    Raises:
        ModelError: At the start of ``fit``: no BN layer, or which child is the network is unclear.
        DataError: At the start of ``fit``: the samples do not fit the network.
    """

    def __init__(
        self,
        data: Any,
        *,
        loss: Any = None,
        step: Any = None,
        network: str | None = None,
        batch_size: int = 32,
        max_samples: int = 256,
    ) -> None:
        super().__init__(network)
        self.data = data
        self.settings = {
            "loss": loss,
            "step": step,
            "batch_size": batch_size,
            "max_samples": max_samples,
        }
        self._monitor: Monitor | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Read the samples; a mistake shows before the first epoch."""
        with kept_generators():
            self._monitor = Monitor(self._network(module), self.data, **self.settings)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Log the numbers."""
        if self._monitor is not None:
            with kept_generators():
                numbers = self._monitor.measure()
            module.log_dict(numbers)


class KeepFrozen(_OnNetwork):
    """Stop the run when a frozen BN layer is not frozen, or moved.

    Args:
        until: Boundary in the network, as in :func:`frostline.assert_frozen`: every BN layer
            before it must be frozen; ``None``: what is frozen at the start must stay as it is.
        network: Name of the child that is the network.

    Raises:
        NotFrozenError: At the start or the end of an epoch; it names the layers.
    """

    def __init__(self, until: Any = None, *, network: str | None = None) -> None:
        super().__init__(network)
        self.until = until
        self._watch: Watch | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Remember the numbers."""
        self._watch = watching_of(self._network(module))

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Check the flags."""
        if self.until is not None:
            assert_frozen(self._network(module), until=self.until)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Compare the numbers with those of the start."""
        if self._watch is not None:
            self._watch.require_unmoved(self.until)


class Recalibrate(_OnNetwork):
    """Validate with exact statistics of the training data; the stored ones come back after.

    Training goes on as if there had been no validation, and ``ModelCheckpoint`` saves the
    statistics of the training run. To keep the exact ones at the end, call
    :func:`frostline.recalibrate`.

    Args:
        data: As for :func:`frostline.recalibrate`; default is the trainer's training data.
        network: Name of the child that is the network.
        sites: As for :func:`frostline.recalibrate`.
        method: As for :func:`frostline.recalibrate`.

    Raises:
        ModelError: At a validation: no BN layer, no such site, or no clear network.
        DataError: At a validation: the data do not fit the network.
    """

    def __init__(
        self,
        data: Any = None,
        *,
        network: str | None = None,
        sites: Any = "unfrozen",
        method: Any = "sequential",
    ) -> None:
        super().__init__(network)
        self.data = data
        self._evaluation = Evaluation(sites=sites, method=method)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Recalibrate."""
        if not trainer.sanity_checking:
            self._evaluation.begin(
                self._network(module),
                lambda: trainer.train_dataloader if self.data is None else self.data,
            )

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Put the statistics of the training run back."""
        self._evaluation.end()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Put them back, too, where the validation raised."""
        self._evaluation.end()


def _has_bn(module: Any) -> bool:
    try:
        return bool(list(sites_of(module)))
    except ModelError:
        return False
