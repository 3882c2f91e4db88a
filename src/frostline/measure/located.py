"""One site's stored statistics beside those of the data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from frostline.data.batch import Batch, take
from frostline.measure.bench import Bench, Statistics
from frostline.numerics import stats
from frostline.numerics.stats import Moments
from frostline.types import Array
from frostline.types.measured import SiteMeasurement

#: Samples whose moments are taken class by class, and most classes.
CLASS_SAMPLES = 256
MOST_CLASSES = 8

#: Batches used to tell the uses of a shared layer apart.
USE_BATCHES = 4

#: Distances from single classes are not taken of more: the one that came last has to be among them.
MOST_SINGLE_CLASSES = 16

#: Stored statistics this far from the data, in standard deviations, may be those of one class.
OFF = 0.05

Recorded = Sequence[Mapping[str, Moments]]


def site_measurements(
    bench: Bench,
    recorded: Recorded,
    population: Statistics,
    *,
    noisy: Recorded = (),
    apart: Mapping[str, float] | None = None,
) -> dict[str, SiteMeasurement]:
    """Set stored, population and batch statistics of each site side by side.

    Args:
        bench: Model and samples.
        recorded: Moments per batch of a pass with λ = 1 everywhere.
        population: Exact population statistics of all sites.
        noisy: Moments per batch of a training-mode pass with dropout; empty without.
        apart: Path -> :func:`beyond_mixed` of the batches as the data bring them.
    """
    sites = {site.path: site for site in bench.adapter.sites()}
    runs = bench.meter()  # calls the model as the user's step does
    meter = runs or bench.adapter.meter(bench.paths)
    within = within_classes(bench, recorded)
    calls = bench.calls
    uses = {} if runs is None else shared_uses(bench, runs)
    off_class = class_distances(bench, recorded, {path: meter.stored(path) for path in bench.paths})
    found = {}
    for path in bench.paths:
        seen = [moments[path] for moments in recorded if path in moments]
        if path not in population or not seen:
            continue
        stored_mean, stored_variance = meter.stored(path)
        mean, variance = population[path]
        epsilon = sites[path].epsilon
        whole = functools.reduce(Moments.merge, seen)
        under_noise = [moments[path] for moments in noisy if path in moments]
        noisy_mean, noisy_variance = _settled(under_noise) if under_noise else (None, None)
        per_sample = seen[0].count / bench.batch_size / calls[path]
        found[path] = SiteMeasurement(
            path=path,
            stored_mean=stored_mean,
            stored_variance=stored_variance,
            mean=mean,
            variance=variance,
            batch_mean=whole.mean,
            batch_variance=_mean_variance(seen),
            values=int(per_sample) if per_sample == int(per_sample) else None,
            shift=stats.mean_shift(mean, stored_mean, stored_variance, epsilon=epsilon),
            ratio=stats.variance_ratio(variance, stored_variance, epsilon=epsilon),
            noise=noise(seen, epsilon),
            within_variance=within.get(path),
            class_distances=off_class.get(path),
            own_batches=(apart or {}).get(path),
            noisy_mean=noisy_mean,
            noisy_variance=noisy_variance,
            uses=uses.get(path, ()),
        )
    return found


def quotient(site: SiteMeasurement) -> float:
    """How far stored and batch variance are apart, as a factor of at least 1, median channel."""
    ratio = site.ratio[np.isfinite(site.ratio) & (site.ratio > 0)]
    return math.exp(float(np.median(np.abs(np.log(ratio))))) if ratio.size else 1.0


def beyond_mixed(own: Sequence[Moments], mixed: Sequence[Moments]) -> float:
    """How far a batch is from all of them, in standard deviations, beyond what mixed ones are.

    Squares of independent distances add up, so theirs are subtracted; at least 0.
    """
    return math.sqrt(max(0.0, _scatter(own) - _scatter(mixed)))


def _scatter(seen: Sequence[Moments]) -> float:
    """Mean square over batches of the distance of one from all; NaN where it is not finite."""
    whole = functools.reduce(Moments.merge, seen)
    pairs = [(moments.mean, moments.variance) for moments in seen]
    apart = [stats.normals_apart(pair, (whole.mean, whole.variance)) for pair in pairs]
    return float(np.mean(np.square(apart)))


def _mean_variance(seen: Sequence[Moments]) -> Array:
    """Mean over batches of the variance within one."""
    return np.asarray(np.mean([moments.variance for moments in seen], axis=0), np.float64)


def _settled(seen: Sequence[Moments]) -> tuple[Array, Array]:
    """What a settled average over these batches would hold: mean, and variance within one."""
    return functools.reduce(Moments.merge, seen).mean, _mean_variance(seen)


def first_misfit(
    bench: Bench, batches: Sequence[Batch], transform: Callable[[Any], Any] | None
) -> float | None:
    """Distance of the first site's stored statistics from what it sees of transformed inputs.

    Args:
        bench: The model.
        batches: Some of its batches.
        transform: Applied to the inputs; ``None``: as they are.

    Returns:
        The distance in standard deviations; ``None`` without a site.
    """
    run = bench.blended(0.0, record=True, transform=transform)
    _, _, seen = bench.passes("input trials", run, batches)
    for path in bench.paths:
        if taken := [moments[path] for moments in seen if path in moments]:
            return stats.normals_apart(bench.meter().stored(path), _settled(taken))
    return None


def noise(seen: Sequence[Moments], epsilon: float = 0.0) -> float:
    """Deviation of batch means over population deviations; NaN with one batch."""
    if len(seen) < 2:
        return float("nan")
    whole = functools.reduce(Moments.merge, seen)
    deviations = np.std([moments.mean for moments in seen], axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.median(deviations / np.sqrt(whole.variance + epsilon)))


def within_classes(bench: Bench, recorded: Recorded) -> dict[str, Array]:
    """Population variance within a class, mean over the largest classes; empty without classes.

    The passes run at λ = 0 with the statistics of mixed batches in the place of the stored ones:
    so each sample is treated as in a mixed batch at λ = 1, and a batch may be of one class.
    """
    if not bench.has_classes:
        return {}
    merged = {
        path: functools.reduce(Moments.merge, [moments[path] for moments in recorded])
        for path in bench.paths
        if all(path in moments for moments in recorded)
    }
    if not merged or not all(moments.finite for moments in merged.values()):
        return {}
    mixed = {path: (moments.mean, moments.variance) for path, moments in merged.items()}
    classes = _class_batches(bench, MOST_CLASSES)
    if len(classes) < 2:
        return {}
    variances: dict[str, list[Array]] = {path: [] for path in mixed}

    run = bench.blended(0.0, statistics=mixed, record=True)
    for batches in classes.values():
        _, _, seen = bench.passes("statistics of classes", run, batches)
        for path in mixed:
            found = [moments[path] for moments in seen if path in moments]
            if not found:  # a branch that these samples do not take
                continue
            whole = functools.reduce(Moments.merge, found)
            variances[path].append(whole.variance)
    return {path: np.mean(found, axis=0) for path, found in variances.items() if found}


def class_distances(
    bench: Bench, recorded: Recorded, stored: Mapping[str, tuple[Array, Array]]
) -> dict[str, Array]:
    """Path -> distance of the stored statistics from those of batches of each class alone.

    A moving average over data that are sorted by class holds the class that came last. Empty where
    fewer than two sites are off, or without classes.
    """
    if not bench.has_classes:
        return {}
    off = [
        path
        for path in bench.paths
        if all(path in moments for moments in recorded)
        and stats.normals_apart(stored[path], _settled([moments[path] for moments in recorded]))
        > OFF
    ]
    assert bench.labels is not None
    if len(off) < 2 or not 2 <= len(np.unique(bench.labels)) <= MOST_SINGLE_CLASSES:
        return {}
    classes = _class_batches(bench, MOST_SINGLE_CLASSES)
    if len(classes) < 2:
        return {}
    found = {path: np.full(int(max(classes)) + 1, np.nan) for path in off}

    run = bench.blended(1.0, record=True)
    for label, batches in classes.items():
        _, _, seen = bench.passes("statistics of classes", run, batches)
        for path in off:
            taken = [moments[path] for moments in seen if path in moments]
            if taken:  # else a branch that this class does not take
                found[path][label] = stats.normals_apart(stored[path], _settled(taken))
    return found


def _class_batches(bench: Bench, most_classes: int) -> dict[int, list[Batch]]:
    """Batches of one class each, for the largest classes; a small class fills one by repeating."""
    assert bench.labels is not None
    labels = bench.labels
    names, counts = np.unique(labels, return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")[:most_classes]]
    size, most = bench.batch_size, max(1, CLASS_SAMPLES // bench.batch_size // len(largest))
    whole = bench.samples.whole
    classes: dict[int, list[Batch]] = {}
    for name in largest:
        index = np.flatnonzero(labels == name)
        if len(index) < 2:
            continue
        if len(index) < size:
            index = np.resize(index, size)
        starts = range(0, len(index) - size + 1, size)
        classes[int(name)] = [take(whole, index[s : s + size]) for s in list(starts)[:most]]
    return classes


def shared_uses(bench: Bench, meter: Any) -> dict[str, tuple[tuple[Array, Array], ...]]:
    """Path of a shared layer -> mean and variance of what each of its uses saw, at λ = 1."""
    shared = {path for path, calls in bench.calls.items() if calls > 1} & set(bench.paths)
    if not shared:
        return {}
    measure = meter.batch()
    per_batch = [measure(batch) for batch in bench.batches[:USE_BATCHES]]
    found = {}
    for path in shared:
        uses = [seen[path] for seen in per_batch if seen.get(path)]
        if len({len(moments) for moments in uses}) != 1:
            continue  # not used, or not equally often in each batch
        columns = zip(*uses, strict=True)
        merged = [functools.reduce(Moments.merge, column) for column in columns]
        found[path] = tuple((moments.mean, moments.variance) for moments in merged)
    return found
