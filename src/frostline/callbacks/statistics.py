"""Stored statistics during ``fit``: recalibrated where they lag, kept where they are frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np

from frostline.adapters.keras import watch as keras_watch
from frostline.adapters.keras.moments import MomentRecorder
from frostline.callbacks.sites import keras_sites
from frostline.data.batches import require_reiterable
from frostline.graph.selection import GROUPS, select
from frostline.measure.recalibration import Method, recalibrated
from frostline.types import Array, ModelError

log = logging.getLogger("frostline")


class Recalibrate(keras.callbacks.Callback):  # type: ignore[misc]
    """Recalibrate BN during ``fit``: see :func:`frostline.recalibrate`.

    With ``when="epoch"`` the stored statistics are, in every validation and at the end of every
    epoch, those of the weights that the model then holds; training goes on from them. With
    ``when="end"`` it happens once, after the last epoch.

    ``SwapEMAWeights`` puts averaged weights into the model and leaves BN with the statistics of the
    others. Put this callback after it: the averaged weights get statistics of their own, and when
    they are swapped out again the statistics of the training run come back with theirs.

    Args:
        data: As for :func:`frostline.recalibrate`; read once per recalibration, so no iterator.
        when: ``"epoch"`` or ``"end"``.
        sites: As for :func:`frostline.recalibrate`. A group such as ``"unfrozen"`` may be empty in
            some epochs.
        method: ``"sequential"`` or ``"batch"``.
        batch_size: Samples per batch for data given as arrays.

    Raises:
        ModelError: At the start of ``fit``: no such site; unknown ``when``.
        DataError: The data are an iterator, or do not fit.
    """

    def __init__(
        self,
        data: Any,
        *,
        when: Literal["epoch", "end"] = "epoch",
        sites: Any = "unfrozen",
        method: Method = "sequential",
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        if when not in ("epoch", "end"):
            raise ModelError(f"when must be 'epoch' or 'end'. Received: when={when!r}")
        require_reiterable(data, "callbacks.Recalibrate")
        self.data = data
        self.when = when
        self.sites = sites
        self.method = method
        self.batch_size = batch_size
        self._meter: MomentRecorder | None = None
        self._mark: int | None = None
        self._undo: Callable[[], None] | None = None
        self._fitting = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check that the sites are there."""
        self._chosen()
        self._meter = self._mark = self._undo = None
        self._fitting = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Bring the statistics of the training run back if its weights came back."""
        self._follow_weights()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Before validation."""
        if self.when == "epoch":
            self._settle()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Bring the statistics of the training run back if its weights came back."""
        self._follow_weights()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Before what is listed behind this callback saves the model."""
        if self.when == "epoch":
            self._settle()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """After the last epoch, and after Keras has put averaged weights in place."""
        self._settle()
        self._fitting = False

    def _chosen(self) -> list[str]:
        """Paths of the sites; none where a group has no member now."""
        every = keras_sites(self.model)
        group = isinstance(self.sites, str) and self.sites in GROUPS
        frozen = {site.stats_frozen for site in every}
        if group and self.sites != "all" and (self.sites == "frozen") not in frozen:
            return []
        keras_only = {site.path for site in every}
        return [site.path for site in select(every, self.sites) if site.path in keras_only]

    def _settle(self) -> None:
        """Recalibrate for the weights that the model holds, unless that is done."""
        if not self._fitting:
            return
        paths = self._chosen()
        if not paths:
            return
        model = self.model
        mark = keras_watch.weights_mark(model, paths)
        if mark == self._mark:
            return
        if self._meter is None or list(self._meter.layers) != paths:
            self._meter = MomentRecorder(model, paths)
        undo = self._meter.snapshot()
        done = recalibrated(
            self._meter, paths, self.data, method=self.method, batch_size=self.batch_size
        )
        self._mark, self._undo = mark, undo
        log.info("%s", done.text())

    def _follow_weights(self) -> None:
        if not self._fitting or self._undo is None or self._meter is None:
            return
        if keras_watch.weights_mark(self.model, list(self._meter.layers)) != self._mark:
            self._undo()
            self._mark = self._undo = None


class KeepFrozen(keras.callbacks.Callback):  # type: ignore[misc]
    """See to it that nothing of a frozen BN site moves: stop the training, or put it back.

    Frozen is what has ``trainable = False`` at that moment, whatever its policy says; a site that
    is thawed meanwhile is let go, one that is frozen meanwhile is taken in.

    Args:
        action: ``"raise"`` a :class:`~frostline.ModelError` that names the site and the number, or
            ``"repair"``: put the old value back and log a warning.
        every: ``"epoch"``, or a number of batches between two looks. A look reads the frozen
            statistics; on JAX it also brings all weights back from the running step.
        parameters: Whether gamma and beta are watched.
        statistics: Whether stored statistics are watched.

    Attributes:
        repaired: How many values were put back so far.
    """

    def __init__(
        self,
        action: Literal["raise", "repair"] = "raise",
        *,
        every: int | Literal["epoch"] = "epoch",
        parameters: bool = True,
        statistics: bool = True,
    ) -> None:
        super().__init__()
        if action not in ("raise", "repair"):
            raise ModelError(f"action must be 'raise' or 'repair'. Received: {action!r}")
        if every != "epoch" and (isinstance(every, bool) or int(every) < 1):
            raise ModelError(f"every must be 'epoch' or at least 1. Received: every={every!r}")
        self.action = action
        self.every = every
        self.parameters = parameters
        self.statistics = statistics
        self.repaired = 0
        self._kept: dict[tuple[str, str], Array] = {}
        self._where = "before the first epoch"
        self._next = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Remember what is frozen."""
        self._kept = {}
        self._look(check=False)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Check what changed between two epochs, and add layers that were frozen meanwhile."""
        self._look()
        self._where = f"in epoch {epoch}"
        self._next = 0 if self.every == "epoch" else int(self.every) - 1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Look, if it is time; ``batch`` is the last of several with ``steps_per_execution``."""
        if self.every != "epoch" and batch >= self._next:
            self._next = batch + int(self.every)
            self._look(f"at batch {batch}")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Look."""
        self._look()

    def _look(self, when: str = "", *, check: bool = True) -> None:
        now = keras_watch.frozen_values(
            self.model, parameters=self.parameters, statistics=self.statistics
        )
        kept: dict[tuple[str, str], Array] = {}
        for place in now:
            key, value = (place.path, place.name), place.read()
            before = self._kept.get(key)
            if check and before is not None and before.tobytes() != value.tobytes():
                text = (
                    f"'{place.path}' is frozen, but its {place.name} moved by up to "
                    f"{np.abs(value - before).max():.3g} {' '.join([self._where, when]).strip()} "
                    f"(largest value before: {np.abs(before).max():.3g})"
                )
                if self.action == "raise":
                    raise ModelError(f"{text}. `frostline lint` tells why.")
                place.write(before)
                self.repaired += 1
                log.warning("%s; put back", text)
                value = before
            kept[key] = value
        self._kept = kept
