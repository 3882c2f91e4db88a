"""BN in numbers at the end of every epoch."""

from __future__ import annotations

import logging
from typing import Any

import keras

from frostline.adapters import Forward, adapter_of
from frostline.adapters.keras import graph as keras_graph
from frostline.adapters.keras.loss import computes_loss
from frostline.callbacks.sites import keras_sites
from frostline.data.batch import Batch
from frostline.data.batches import batches, paired
from frostline.measure.phases import require_one
from frostline.types import ModelError
from frostline.verbs.monitor import bn_numbers

log = logging.getLogger("frostline")


class BatchNormMonitor(keras.callbacks.Callback):  # type: ignore[misc]
    """Write into ``logs``, at the end of every epoch, how far BN is from what training sees.

    The numbers go wherever logs go: ``History``, TensorBoard, CSV, Weights & Biases, MLflow,
    ``EarlyStopping(monitor="bn/gap")``. Put this callback before those.

    - ``bn/gap``: mean loss with batch statistics where training uses them, minus mean loss with
      stored statistics (λ = 1 against λ = 0), dropout off, same samples. Left out where the model
      has no loss or the data have no labels.
    - ``bn/shift_p50``, ``bn/shift_p90``, ``bn/shift_max``: distance of the mean that a training
      pass sees from the stored one, in stored standard deviations; quantiles over all channels of
      all sites.
    - ``bn/ratio_max``: largest factor, at least 1, between a channel's seen and stored variance.
    - ``bn/frozen``: number of sites whose statistics are frozen.

    Nothing of the model changes. The cost is that of two forward passes over the samples, which are
    compiled before the first epoch and again only when ``trainable`` is flipped.

    Args:
        data: A few held-out samples, ``(x, y)`` or anything that :func:`frostline.phases` takes;
            read once and kept in memory.
        loss: Instead of the compiled loss, as in :func:`frostline.phases`.
        step: Instead of a loss, the user's own ``step(model, batch)``, as in
            :func:`frostline.phases`.
        batch_size: Samples per batch for data given as arrays. Batch statistics depend on it: use
            the one that you train with.
        max_samples: Samples that are used of them.

    Raises:
        ModelError: At the start of ``fit``: the model has no BN layer.
        DataError: At the start of ``fit``: the samples do not fit the model.
    """

    def __init__(
        self,
        data: Any,
        *,
        loss: Any = None,
        step: Any = None,
        batch_size: int = 32,
        max_samples: int = 256,
    ) -> None:
        super().__init__()
        require_one(loss, step)
        self.data = data
        self.loss = loss
        self.step = step
        self.batch_size = batch_size
        self.max_samples = max_samples
        self._batches: list[Batch] = []
        self._forward: Forward | None = None
        self._with_gap = True

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Read the samples and compile; a mistake shows before the first epoch, not after it."""
        if not self._batches:
            self._batches = list(
                paired(batches(self.data, batch_size=self.batch_size, max_samples=self.max_samples))
            )
        model = self.model
        paths = [site.path for site in keras_sites(model)]
        self._forward = adapter_of(model).blend_forward(loss=self.loss, step=self.step, paths=paths)
        asked = self.loss is not None or self.step is not None
        compiled = bool(model.loss) and all(part.y is not None for part in self._batches)
        self._with_gap = asked or compiled or computes_loss(model)
        try:
            self.measure()
        except ModelError as problem:
            if not self._with_gap or asked:
                raise
            self._with_gap = False
            log.warning("BatchNormMonitor leaves out bn/gap: %s", problem)
            self.measure()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the numbers into ``logs``."""
        found = self.measure()
        if logs is not None:
            logs.update(found)

    def measure(self) -> dict[str, float]:
        """Return the numbers of the model as it is now, by the names that they have in logs."""
        model = self.model  # on JAX this brings the weights back from the running fit
        if self._forward is None:
            raise ModelError("measure() needs a model: it works from the start of fit on.")
        sites = {site.path: site for site in adapter_of(model).sites()}
        layers = {place.path: place.layer for place in keras_graph.walk(model)}
        stored = {
            path: (
                keras.ops.convert_to_numpy(layers[path].moving_mean),
                keras.ops.convert_to_numpy(layers[path].moving_variance),
            )
            for path in self._forward.paths
        }
        return bn_numbers(self._forward, self._batches, sites, stored, with_gap=self._with_gap)
