"""How the BN gap splits among the sites, along λ = t · (training blend)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from frostline.adapters.protocol import Condition
from frostline.data.batch import Batch
from frostline.measure.bench import Bench
from frostline.measure.samples import Samples
from frostline.numerics.attribution import MAX_NODES, path_integral
from frostline.types import Array, DataError
from frostline.types.measured import Attribution, Probe

#: Samples that are differentiated: a derivative costs three passes, and there is one per node.
SAMPLES = 128

#: Nodes at most, where the shares do not add up at the first try.
MOST_NODES = 75

#: What the derivatives may cost, in passes over all samples, and what they may cost altogether
#: where the shares do not add up at the first try.
BUDGET, MOST = 4.0, 20.0

#: Sites that are switched off one at a time, as a check.
ALONE = 3

#: Nodes to begin with, by the quotient of variances below which they do in trials on digits.
NODES = ((10.0, 5), (300.0, 10), (1e4, 20))

#: From so many sites on shares are added up by block.
MANY_SITES = 12

_BLOCK = re.compile(
    r"(?:[a-z]+\d+_)?(?:block|stage|layer|mixed|cell|unit)[_-]?\d+[a-z]?(?![a-z0-9])|conv\d+",
    re.IGNORECASE,
)


def attribute(
    bench: Bench, blend: Array, *, training: Probe, stored: Probe, quotient: float = 1.0
) -> Attribution:
    """Split the gap between the training blend and λ = 0 among the sites.

    Args:
        bench: Model and samples; :data:`SAMPLES` are used, or fewer for the :data:`BUDGET`, but a
            whole batch; see :func:`part_for`.
        blend: λ as training uses it, shape ``(sites,)``.
        training: The probe at that blend, on all samples.
        stored: The probe at λ = 0, on all samples.
        quotient: Largest quotient of a stored variance and that of a batch, at least 1: how sharply
            the loss may bend at the ends of the path; see :func:`walk`.

    Raises:
        DataError: A loss or derivative that is not finite.
    """
    begin = time.perf_counter()
    nodes = next((n for limit, n in NODES if quotient < limit), MAX_NODES)
    each_gap = bench.by_batch(training) - bench.by_batch(stored)
    part = part_for(bench.samples, nodes, each_gap)
    chosen = np.flatnonzero(blend)
    forward = _only(bench, chosen)
    high, low = (float(bench.by_batch(probe)[[*part]].mean()) for probe in (training, stored))
    if not np.isfinite(high - low):
        raise DataError("some losses are not finite, so nothing can be attributed. Received: NaN")
    reached = {0.0: low, 1.0: high}

    def gradient(u: float) -> Array:
        t, speed = walk(u, quotient)
        here = t * blend[chosen]
        reached[u], slope = _slope(forward, bench, part, here)
        shares = np.zeros(len(blend))
        shares[chosen] = slope * blend[chosen] * speed
        return shares

    each = 3 * len(part) / len(bench.batches)
    found = path_integral(
        gradient,
        high - low,
        nodes=nodes,
        max_nodes=max(nodes, min(MOST_NODES, int(MOST / each))),
        value=reached.__getitem__,
    )
    seconds = time.perf_counter() - begin
    bench.spend("attribution", seconds, found.gradients * each)
    top = np.argsort(-np.abs(found.shares))[:ALONE]
    return Attribution(
        paths=bench.paths,
        shares=found.shares,
        gap=found.gap,
        residual=found.residual,
        complete=found.complete,
        nodes=found.nodes,
        samples=sum(bench.batches[number].count or 1 for number in part),
        groups=grouped(bench.paths, found.shares),
        alone={bench.paths[i]: high - _without(bench, part, blend, i) for i in top if blend[i]},
        curve=tuple((walk(u, quotient)[0], loss) for u, loss in sorted(reached.items())),
    )


def part_for(samples: Samples, nodes: int, gaps: Array) -> tuple[int, ...]:
    """The batches that are differentiated at so many nodes, by their number; at least one.

    They speak for all samples, so one after the other that batch is taken with which the mean gap
    of those taken comes nearest to the mean of all: a gap in loss often lies in a few samples, and
    the first batches may have half of it, or twice.

    Args:
        samples: All of them.
        nodes: Nodes of the quadrature.
        gaps: Mean gap of each batch, shape ``(batches,)``; batches where it is not finite are
            taken only if there are no others.

    Example:
        Of 200 samples in batches of 25 five nodes are taken on 50, twenty on 25.
    """
    affordable = int(BUDGET * len(samples) / (3 * nodes)) // samples.batch_size
    number = max(1, min(affordable, -(-SAMPLES // samples.batch_size)))
    sound = np.flatnonzero(np.isfinite(gaps))
    if not len(sound):
        return (0,)
    taken: list[Any] = []
    target = float(gaps[sound].mean())
    while len(taken) < min(number, len(sound)):
        left = [index for index in sound if index not in taken]
        sums = gaps[taken].sum() + gaps[left]
        taken.append(left[int(np.argmin(np.abs(sums / (len(taken) + 1) - target)))])
    return tuple(sorted(int(index) for index in taken))


def _only(bench: Bench, chosen: Array) -> Any:
    """Passes that differentiate by these sites alone: the others stay at λ = 0."""
    narrow = getattr(bench.forward, "only", None)
    paths = [bench.paths[index] for index in chosen]
    if narrow is not None and len(paths) < len(bench.paths):
        return narrow(paths)
    return _Embedded(bench.forward, len(bench.paths), chosen)


@dataclass(frozen=True)
class _Embedded:
    """Derivatives by some of the sites, taken from those by all."""

    forward: Any
    sites: int
    chosen: Array

    def gradient(self, batch: Batch, condition: Condition) -> tuple[Array, Array]:
        """Losses and slope, shapes ``(units,)`` and ``(chosen,)``."""
        whole = np.zeros(self.sites)
        whole[self.chosen] = condition.blend
        losses, slope = self.forward.gradient(batch, replace(condition, blend=whole))
        return losses, slope[self.chosen]


def walk(u: float, quotient: float) -> tuple[float, float]:
    """Place ``t`` on the path at ``u``, and dt/du.

    A variance ``(1 − t)·stored + t·batch`` changes by a factor within a stretch of ``1/quotient``
    at one end of [0, 1]. ``t`` is a logistic curve of ``u`` whose ends are as flat as that, so that
    quadrature in ``u`` has nodes there; for a quotient near 1 it is a straight line.

    Example:
        >>> [round(walk(u, 1000.0)[0], 3) for u in (0.0, 0.1, 0.5, 1.0)]
        [0.0, 0.003, 0.5, 1.0]
    """
    steepness = 2 * math.log(max(quotient, math.e))
    end = 1 / (1 + math.exp(steepness / 2))
    here = 1 / (1 + math.exp(-steepness * (u - 0.5)))
    place = min(max((here - end) / (1 - 2 * end), 0.0), 1.0)  # rounding may leave [0, 1]
    return place, steepness * here * (1 - here) / (1 - 2 * end)


def _slope(forward: Any, bench: Bench, part: Sequence[int], blend: Array) -> tuple[float, Array]:
    """Mean loss and its derivative; a batch counts as one, whatever its size."""
    batches = bench.batches
    losses, slopes = zip(
        *(forward.gradient(batches[number], Condition(blend, number=number)) for number in part),
        strict=True,
    )
    return float(np.mean([batch.mean() for batch in losses])), np.mean(slopes, axis=0)


def _without(bench: Bench, part: Sequence[int], blend: Array, site: int) -> float:
    """Mean loss at the training blend with one site at λ = 0."""
    changed = blend.copy()
    changed[site] = 0.0
    return bench.probe("alone", blend=changed, batches=[bench.batches[i] for i in part]).loss


def grouped(paths: Sequence[str], shares: Array) -> Mapping[str, float]:
    """Add up the shares of each block, in execution order; empty for a network of few sites."""
    if len(paths) < MANY_SITES:
        return {}
    names = [block(path) for path in paths]
    if not 1 < len(set(names)) <= len(paths) / 2:
        # Names that tell nothing: runs of neighbours.
        size = -(-len(paths) // MANY_SITES)
        runs = [paths[start : start + size] for start in range(0, len(paths), size)]
        names = [f"{run[0]} … {run[-1]}" if len(run) > 1 else run[0] for run in runs for _ in run]
    groups: dict[str, float] = {}
    for name, share in zip(names, shares, strict=True):
        groups[name] = groups.get(name, 0.0) + float(share)
    return groups


def block(path: str) -> str:
    """Block of a site: what its name begins with, else the model or layer that it is nested in.

    Example:
        >>> block("conv2_block1_1_bn"), block("net/block2a_expand_bn"), block("net/block3/bn1")
        ('conv2_block1', 'net/block2a', 'net/block3')
    """
    parent, _, name = path.rpartition("/")
    inside = _BLOCK.match(name)
    if inside:
        return f"{parent}/{inside.group()}" if parent else inside.group()
    return parent or name
