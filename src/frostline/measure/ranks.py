"""Looking at a model together: the same samples and the same statistics on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from frostline.adapters import Adapter
from frostline.adapters.together import Together
from frostline.data.batch import Batch, NoSamplesError
from frostline.data.batches import batches
from frostline.measure.samples import draw
from frostline.numerics.stats import mean_shift
from frostline.types import DataError


@dataclass(frozen=True, eq=False)
class Pooled:
    """Batches of all ranks, in their order.

    Attributes:
        batches: What the loaders yielded, or arrays ``(x, y)`` that are cut from it.
    """

    batches: Sequence[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def pooled(
    ranks: Together,
    data: Any,
    *,
    max_samples: int,
    batch_size: int | None = None,
    seed: int = 0,
    whole: bool = False,
    inputs: int = 1,
) -> tuple[Any, int | None]:
    """Samples of all ranks, drawn so that each of their samples is as likely as any other.

    Args:
        ranks: Who calls this together; a process alone gets its data back.
        data: The share of this rank, which may be empty.
        max_samples: So many of all ranks together.
        batch_size: Samples per batch; ``None``: that of the loaders.
        seed: Of the draw.
        whole: Keep batches as the loader yields them, for the user's step.
        inputs: So many first items of a longer batch are inputs.

    Returns:
        The samples, the same on all ranks, and the samples per batch.

    Raises:
        DataError: No rank has samples, or batches cannot be sent to other ranks.
    """
    if ranks.size == 1 or data is None:
        return data, batch_size
    mine: list[Any] = [[], 0, 0]
    try:
        found = draw(data, max_samples=max_samples, batch_size=batch_size, seed=seed + ranks.rank,
                     labels=False, whole=whole, inputs=inputs,
                     finite=lambda batch: np.ones(len(batch), bool))  # fmt: skip
        counted = [[batch.given, batch.count or 1] for batch in found.batches]
        mine = [counted, found.read, found.natural]
    except NoSamplesError:
        pass
    everyone = ranks.nested(mine)
    total = sum(read for _, read, _ in everyone)
    if not total:
        raise DataError("The data hold no samples, here or on any other rank.")
    chosen: list[Any] = []
    for theirs, read, _ in everyone:
        left = max_samples * read / total
        for batch, count in theirs:
            if left <= 0:
                break
            chosen.append(batch)
            left -= count
    return Pooled(chosen), batch_size or max(natural for *_, natural in everyone)


def joined_shares(ranks: Together, stream: Iterator[Batch], inputs: int = 1) -> Iterator[Batch]:
    """The batches of this rank; a share of one sample goes to a rank that has more.

    A layer that normalises with the batch cannot do so with one value.
    """
    if ranks.size == 1:
        yield from stream
        return
    head = list(itertools.islice(stream, 2))
    lone = len(head) == 1 and head[0].count == 1
    everyone = ranks.nested([head[0].given] if lone else bool(head))
    taker = next((rank for rank, answer in enumerate(everyone) if answer is True), None)
    if lone and taker is not None:
        return
    yield from itertools.chain(head, stream)
    given = [answer[0] for answer in everyone if isinstance(answer, list)]
    if ranks.rank == taker and given:
        yield from batches(Pooled(given), inputs=inputs)


@contextmanager
def as_rank_0(adapter: Adapter, ranks: Together) -> Iterator[str]:
    """Lend a model the stored statistics of rank 0 for a block: those that are saved, mostly.

    Yields:
        What to tell where the statistics of the ranks differ; else nothing.

    Raises:
        ModelError: Anything but the statistics differs.
    """
    if ranks.size == 1:
        yield ""
        return
    paths = [entry.site.path for entry in adapter.facts() if entry.mean is not None]
    meter = adapter.meter(paths, ranks)
    everyone = ranks.nested([list(meter.stored(path)) for path in paths])
    apart: dict[str, float] = {}
    for number, path in enumerate(paths):
        mean, variance = everyone[0][number]
        means = [theirs[number][0] for theirs in everyone]
        if all(np.array_equal(everyone[0][number], theirs[number]) for theirs in everyone):
            continue
        epsilon = meter.epsilon(path)
        apart[path] = max(
            float(np.max(mean_shift(other, mean, variance, epsilon=epsilon))) for other in means
        )
    text = ""
    if apart:
        worst = max(apart, key=lambda path: apart[path])
        text = (
            f"the ranks store different statistics ({len(apart)} of {len(paths)} BN layers, means "
            f"up to {apart[worst]:.3g} standard deviations apart at '{worst}'): those of rank 0 "
            "are looked at; frostline.merge_statistics merges them"
        )
    restore = meter.snapshot()
    try:
        for path, (mean, variance) in zip(paths, everyone[0], strict=True):
            if path in apart:
                meter.store(path, mean, variance)
        yield text
    finally:
        restore()
