"""Batch sizes and neighbours: what a sample's answer depends on beside the sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from frostline.adapters import Outcome
from frostline.data.arrays import has_shape, leaves
from frostline.data.batch import Batch
from frostline.measure.bench import Bench
from frostline.measure.samples import rebatched
from frostline.numerics.compare import relative_difference
from frostline.types import Array
from frostline.types.measured import SweepPoint

Outputs = tuple[Array, ...] | None

#: Samples of the sweep, and its sizes beside the bench's own; JAX compiles each anew. In batches of
#: two a sample costs several times as much as in whole ones.
SAMPLES = 64
SIZES = (2, 8)

#: The largest size: enough for good statistics, and not much more memory than the model needs.
LARGE, TIMES = 64, 2

#: How far a loss per sample may differ between sizes, of its smallest, where the loss is a sum over
#: the batch. A mean differs by the ratio of the sizes, which is at least two.
ADDED = 0.2

#: Batches that are mixed anew to look at neighbours.
NEIGHBOUR_BATCHES = 4

#: Seeds of a batch that is run again are those of no other batch.
OTHER = 1_000_000_007


def sizes(count: int, batch_size: int) -> tuple[int, ...]:
    """Batch sizes to try on so many samples, ascending: small ones, the base, and a large one."""
    wanted = {*SIZES, batch_size, min(count, max(LARGE, TIMES * batch_size))}
    return tuple(sorted(size for size in wanted if size <= count))


def sweep(bench: Bench, outputs: Outputs, *, stored: bool = False) -> tuple[SweepPoint, ...]:
    """Try the first samples at other batch sizes, all of them on the same samples.

    Args:
        bench: Model and samples.
        outputs: Of the model's own inference at the base batch size; ``None`` with several outputs.
        stored: Inference uses stored statistics at every site: λ = 0 is then inference, and the
            pass that gives λ = 1 gives both. To compile another one for each size is what a sweep
            would mostly cost on JAX.
    """
    part = bench.samples.first(SAMPLES)
    inference = bench.own(training=False)
    if stored and bench.paths and len(sizes(len(part), bench.batch_size)) > 1:
        inference = bench.blended(0.0)
        _, outputs, _ = bench.passes("sweep", inference, part.batches, keep=len(part))
    points = tuple(
        _point(bench, size, len(part), inference, outputs)
        for size in sizes(len(part), bench.batch_size)
    )
    return points if bench.unit == "sample" else per_sample(points, bench.batch_size)


def per_sample(points: tuple[SweepPoint, ...], batch_size: int) -> tuple[SweepPoint, ...]:
    """Losses that are sums over their batch, as those of so many samples; others as they are.

    The model's own inference tells: it answers alike in batches of any size, so that its loss is
    proportional to the size where it is a sum.
    """
    rates = [point.inference_loss / point.batch_size for point in points]
    if len(rates) < 2 or not max(rates) - min(rates) <= ADDED * abs(min(rates, key=abs)):
        return points
    return tuple(
        replace(
            point,
            batch_loss=point.batch_loss * batch_size / point.batch_size,
            inference_loss=point.inference_loss * batch_size / point.batch_size,
        )
        for point in points
    )


def _point(
    bench: Bench,
    size: int,
    count: int,
    at_inference: Callable[[Batch, int], Outcome],
    outputs: Outputs,
) -> SweepPoint:
    n = count // size * size
    batches = list(rebatched(bench.samples, size, np.arange(count)))
    padded = False
    if size == bench.batch_size:
        inference, change = bench.nominal(training=False), 0.0
    else:
        padded = len({_shapes(batch) for batch in (*bench.samples.batches, *batches)}) > 1
        inference, found, _ = bench.passes("sweep", at_inference, batches, keep=n)
        change = relative_change(found, outputs)
    batch = inference
    if bench.paths:
        known = size == bench.batch_size
        batch = bench.probe("sweep", blend=1.0, batches=None if known else batches)
    units = n if bench.unit == "sample" else len(batches)
    return SweepPoint(
        batch_size=size,
        batch_loss=float(batch.losses[:units].mean()),
        batch_accuracy=None if batch.hits is None else float(batch.hits[:n].mean()),
        inference_loss=float(inference.losses[:units].mean()),
        inference_change=change,
        padded=padded,
    )


def _shapes(batch: Batch) -> frozenset[tuple[int, ...]]:
    """What shapes the samples of a batch have; a list of pictures holds the samples themselves."""
    shapes = [tuple(leaf.shape) for _, leaf in leaves(batch.x) if _known(leaf)]
    if isinstance(batch.x, list):
        return frozenset(shapes)
    return frozenset(shape[1:] for shape in shapes if shape and shape[0] == batch.count)


def _known(leaf: Any) -> bool:
    return has_shape(leaf) and not getattr(leaf, "is_nested", False)


def neighbours(bench: Bench, outputs: Outputs, *, seed: int) -> float:
    """Largest change of an inference output when the samples are mixed anew."""
    part = bench.samples.first(NEIGHBOUR_BATCHES * bench.batch_size)
    if len(part.batches) > 1:
        order = np.random.default_rng(seed).permutation(len(part))
    else:  # one batch: other company is the first sample many times
        order = np.zeros(len(part), dtype=np.int64)
    batches = rebatched(part, bench.batch_size, order)
    _, found, _ = bench.passes("neighbours", bench.own(training=False), batches, keep=len(part))
    return relative_change(found, None if outputs is None else tuple(a[order] for a in outputs))


def repeated(bench: Bench, outputs: Outputs) -> float:
    """Largest change of an inference output when the same batches are run again by other chance."""
    part = bench.samples.first(NEIGHBOUR_BATCHES * bench.batch_size)
    again = bench.own(training=False)
    _, found, _ = bench.passes(
        "repeated", lambda batch, number: again(batch, number + OTHER), part.batches, keep=len(part)
    )
    return relative_change(found, outputs)


def relative_change(found: Outputs, base: Outputs) -> float:
    """Largest difference of the values finite in both, relative to the largest base value.

    Of several outputs the one that changes most; at most 1 where all base values are 0; NaN where
    there is nothing to compare.
    """
    here, there = tuple(found or ()), tuple(base or ())
    bases = [other[: len(one)] for one, other in zip(here, there, strict=False)]
    change = relative_difference(here[: len(bases)], bases, finite_only=True)
    return 1.0 if np.isinf(change) else change
