"""Select, sort and summarise the numbers of a report for its tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from frostline.types import Array, as_float64
from frostline.types.measured import Attribution, Gap, Measurement, Probe, Remedy
from frostline.types.report import Report

#: Number of sites named beside the picture of shares.
NAMED_SITES = 3

#: Quantiles over a site's channels that are shown.
QUANTILES = (0.5, 0.9, 1.0)


def relative_shares(found: Attribution) -> Array:
    """Return each site's share of the BN gap as a fraction of it; zeros without a gap."""
    if not found.gap or not math.isfinite(found.gap):
        return np.zeros(len(found.paths))
    return as_float64(found.shares) / found.gap


def largest(values: Array, most: int = NAMED_SITES) -> list[int]:
    """Return the positions of the values with the largest magnitude, without zeros."""
    order = np.argsort(-np.abs(values), kind="stable")[:most]
    return [int(index) for index in order if values[index]]


def top_sites(found: Attribution) -> list[tuple[str, float, float | None]]:
    """Return (path, fraction of the gap, change in loss alone) of the largest shares."""
    shares = relative_shares(found)
    return [
        (path, float(shares[index]), found.alone.get(path))
        for index in largest(shares)
        for path in (found.paths[index],)
    ]


def group_shares(found: Attribution, most: int) -> list[tuple[str, float]]:
    """Return (block, fraction of the gap) of the largest blocks, in order of depth."""
    if not found.gap or not math.isfinite(found.gap):
        return []
    values = np.array(list(found.groups.values()), dtype=np.float64) / found.gap
    names = list(found.groups)
    return [(names[index], float(values[index])) for index in sorted(largest(values, most))]


def block_of(report: Report, paths: Sequence[str]) -> list[str]:
    """Return each site's block: the longest group name that its path starts with."""
    found = report.attribution
    names = sorted(found.groups if found is not None else (), key=len, reverse=True)
    return [next((name for name in names if _begins(path, name)), "") for path in paths]


def runs(values: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (value, start, stop) of each stretch of equal values.

    >>> runs(["a", "a", "b"])
    [('a', 0, 2), ('b', 2, 3)]
    """
    found: list[tuple[str, int, int]] = []
    for index, value in enumerate(values):
        if found and found[-1][0] == value:
            found[-1] = (value, found[-1][1], index + 1)
        else:
            found.append((value, index, index + 1))
    return found


def quantiles(values: Array, at: Sequence[float] = QUANTILES) -> tuple[float, ...]:
    """Return quantiles over the finite channels; NaN if there is none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return (math.nan,) * len(at)
    return tuple(float(value) for value in np.quantile(finite, at))


def median(values: Array) -> float:
    """Return the median over the finite channels."""
    return quantiles(values, (0.5,))[0]


def drift_quantiles(measured: Measurement) -> tuple[Array, Array]:
    """Return quantiles of shift and variance ratio, each of shape ``(3, sites)``.

    Returns:
        10th percentile, median and 90th percentile over the channels: of the shift, and of the
        variance ratio.
    """
    at = (0.1, 0.5, 0.9)
    shifts = [quantiles(site.shift, at) for site in measured.sites.values()]
    ratios = [quantiles(site.ratio, at) for site in measured.sites.values()]
    return np.array(shifts).reshape(-1, 3).T, np.array(ratios).reshape(-1, 3).T


def probes(measured: Measurement) -> list[tuple[Probe, Gap | None]]:
    """Return each probe with the gap whose first probe it is, if there is one."""
    gaps = {gap.of: gap for gap in reversed(list(measured.gaps.values()))}
    return [(probe, gaps.get(probe.name)) for probe in measured.probes.values()]


def remedy_metric(remedies: Sequence[Remedy]) -> str:
    """Return the metric that compares remedies: accuracy if all have it and it moves, else loss."""
    measured = [remedy for remedy in remedies if remedy.after]
    if measured and all("accuracy" in remedy.after and remedy.before for remedy in measured):
        values = {remedy.after["accuracy"] for remedy in measured}
        values |= {remedy.before.get("accuracy", math.nan) for remedy in measured}
        if max(values) - min(values) > 1e-9:
            return "accuracy"
    return "loss"


def effects(remedy: Remedy) -> list[tuple[str, float, float]]:
    """Return (metric, before, after) for each metric that was measured both times."""
    return [
        (name, remedy.before[name], after)
        for name, after in remedy.after.items()
        if name in remedy.before
    ]


def first_choice(remedies: Sequence[Remedy]) -> Remedy | None:
    """Return the first recommended remedy; remedies are sorted best first."""
    return next((remedy for remedy in remedies if remedy.recommended), None)


def measured_remedies(remedies: Sequence[Remedy], metric: str) -> list[Remedy]:
    """Return the remedies with a finite value of the metric before and after."""
    return [
        remedy
        for remedy in remedies
        if all(math.isfinite(side.get(metric, math.nan)) for side in (remedy.before, remedy.after))
    ]


def frozen_paths(report: Report) -> set[str]:
    """Return the paths of sites whose parameters or statistics are frozen."""
    return {site.path for site in report.sites if site.stats_frozen or site.params_frozen}


def unexplained(report: Report) -> float | None:
    """Return the fraction of the gap that no cause explains; ``None`` if unknown or below 0.5%."""
    shares = [cause.share for cause in report.causes if cause.share is not None]
    rest = 1 - sum(shares)
    return rest if shares and rest >= 0.005 else None


def _begins(path: str, name: str) -> bool:
    return path == name or (path.startswith(name) and path[len(name)] in "/_.")
