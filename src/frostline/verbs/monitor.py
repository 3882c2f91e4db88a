"""How far BN is from what training sees, as a few numbers for a tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from frostline.adapters import Forward, adapter_of
from frostline.adapters.protocol import Condition
from frostline.data.batch import Batch
from frostline.measure.phases import require_one
from frostline.measure.samples import hold
from frostline.numerics import stats
from frostline.numerics.stats import Moments
from frostline.types import Array, ModelError, Site


class Monitor:
    """Measure a model that something trains; the numbers are those of :func:`bn_numbers`.

    Args:
        model: A Keras model or a torch module.
        data: A few held-out samples, as for :func:`frostline.phases`; read once and kept.
        loss: As in :func:`frostline.phases`.
        step: As in :func:`frostline.phases`.
        batch_size: Samples per batch for data given as arrays; use the one that you train with.
        max_samples: Samples that are used of them.

    Raises:
        ModelError: The model has no BN layer with stored statistics; ``loss`` and ``step`` at once.
        DataError: The samples do not fit the model.
    """

    def __init__(
        self, model: Any, data: Any, *, loss: Any, step: Any, batch_size: int, max_samples: int
    ) -> None:
        require_one(loss, step)
        self._adapter = adapter_of(model)
        if not self._stored():
            raise ModelError("no BN layer with stored statistics: there is nothing to monitor")
        self._forward = self._adapter.blend_forward(loss=loss, step=step)
        self._with_gap = loss is not None or step is not None
        self._batches = hold(
            self._adapter, data, step, batch_size=batch_size, max_samples=max_samples
        )
        self.measure()  # what does not fit shows now, not after an epoch

    def measure(self) -> dict[str, float]:
        """Return the numbers of the model as it is now; nothing of it changes."""
        sites = {site.path: site for site in self._adapter.sites()}
        with self._adapter.preserved():
            return bn_numbers(
                self._forward, self._batches, sites, self._stored(), with_gap=self._with_gap
            )

    def _stored(self) -> dict[str, tuple[Array, Array]]:
        return {
            fact.site.path: (fact.mean, fact.variance)
            for fact in self._adapter.facts()
            if fact.mean is not None and fact.variance is not None
        }


def bn_numbers(
    forward: Forward,
    held: Sequence[Batch],
    sites: Mapping[str, Site],
    stored: Mapping[str, tuple[Array, Array]],
    *,
    with_gap: bool,
) -> dict[str, float]:
    """Return the numbers of a model by the names that they have in logs.

    - ``bn/gap``: mean loss with batch statistics where training uses them, minus mean loss with
      stored statistics (λ = 1 against λ = 0), dropout off, same samples; only ``with_gap``.
    - ``bn/shift_p50``, ``bn/shift_p90``, ``bn/shift_max``: distance of the mean that a training
      pass sees from the stored one, in stored standard deviations; quantiles over all channels of
      all sites.
    - ``bn/ratio_max``: largest factor, at least 1, between a channel's seen and stored variance.
    - ``bn/frozen``: number of sites whose statistics are frozen.

    Args:
        forward: Passes of the model.
        held: Samples.
        sites: Path -> site.
        stored: Path -> stored mean and variance, shape ``(channels,)`` each.
        with_gap: Whether the model has a loss to compare.
    """
    blend = [float(not _locked(sites[path])) for path in forward.paths]
    gap, seen = _passes(forward, held, blend, with_gap=with_gap)
    shifts, ratios = [], []
    for path, found in seen.items():
        if path not in stored:
            continue
        mean, variance = stored[path]
        epsilon = sites[path].epsilon
        variance = np.maximum(variance, 0)
        shifts.append(stats.mean_shift(found.mean, mean, variance, epsilon=epsilon))
        ratios.append(stats.variance_ratio(found.variance, variance, epsilon=epsilon))
    p50, p90, largest = np.quantile(np.concatenate(shifts), [0.5, 0.9, 1.0])
    return {
        **({} if gap is None else {"bn/gap": gap}),
        "bn/shift_p50": float(p50),
        "bn/shift_p90": float(p90),
        "bn/shift_max": float(largest),
        "bn/ratio_max": float(np.exp(np.abs(np.log(np.concatenate(ratios))).max())),
        "bn/frozen": float(sum(site.stats_frozen for site in sites.values())),
    }


def _passes(
    forward: Forward, held: Sequence[Batch], blend: Sequence[float], *, with_gap: bool
) -> tuple[float | None, Mapping[str, Moments]]:
    """The gap, and the moments that the sites see in a training pass."""
    seen: dict[str, Moments] = {}
    losses: list[list[float]] = []
    for batch in held:
        if with_gap:
            one = forward.outcome(batch, Condition(blend, record=True))
            zero = forward.outcome(batch, Condition(0.0))
            moments = one.moments
            losses.append([float(one.losses.mean()), float(zero.losses.mean())])
        else:
            _, moments = forward.outputs(batch, Condition(blend, record=True))
        for path, found in moments.items():
            seen[path] = seen[path].merge(found) if path in seen else found
    if not losses:
        return None, seen
    counts = [batch.count or 1 for batch in held]
    one_mean, zero_mean = np.average(losses, axis=0, weights=counts)
    return float(one_mean - zero_mean), seen


def _locked(site: Site) -> bool:
    """Whether a training step normalises with what the site has stored."""
    return site.stats_frozen and site.policy == "inference"
