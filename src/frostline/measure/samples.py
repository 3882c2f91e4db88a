"""The fixed samples of a diagnosis: a seeded random draw, mixed once, in batches of one size.

Order is a property of training, not of a model, so it is drawn at random here: a batch has the
class mixture of the data. All batches have one size: batch statistics of a short last batch would
be of another quality, and each further size is compiled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from frostline.data.batches import Batch, batches, collect, leaves, map_leaves
from frostline.types import Array, DataError

#: A stream is read up to so many times the samples that are wanted: a generator may never end.
READ_FACTOR = 64

#: From so many batches on the samples beyond the last full batch are left out; with fewer, the
#: samples are cut into batches of equal size near the wanted one.
MANY_BATCHES = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Labelled samples in batches of one size.

    Attributes:
        batches: All of :attr:`batch_size` samples.
        batch_size: Samples per batch.
        natural: Batch size that was asked for or that the data have.
        read: Samples that were read to draw these.
        notes: What a person should know about the draw.
    """

    batches: tuple[Batch, ...]
    batch_size: int
    natural: int
    read: int
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.batches) * self.batch_size

    @property
    def whole(self) -> Batch:
        """All samples in one batch."""
        return collect(list(self.batches))

    def first(self, count: int) -> Samples:
        """The first batches that hold at least ``count`` samples; at least one batch, at most all.

        The draw is random, so they are a random part of the samples.
        """
        number = min(len(self.batches), max(1, -(-count // self.batch_size)))
        return Samples(
            batches=self.batches[:number],
            batch_size=self.batch_size,
            natural=self.natural,
            read=self.read,
        )


def draw(
    data: Any,
    *,
    max_samples: int,
    batch_size: int | None = None,
    seed: int = 0,
    fixed: bool = False,
) -> Samples:
    """Draw samples at random, mix them and cut them into batches of one size.

    Every sample gets a random key, and those with the smallest keys are kept: of data of any length
    only ``2 * max_samples`` samples and a batch are held in memory. Arrays are read whole; streams
    up to :data:`READ_FACTOR` times ``max_samples`` samples.

    Args:
        data: See :mod:`frostline.data.batches`; one-shot iterators too.
        max_samples: At most so many samples.
        batch_size: Wanted samples per batch; ``None`` for that of the data's own first batch, and
            32 for arrays.
        seed: Of the draw.
        fixed: The model takes no other batch size.

    Returns:
        The samples.

    Raises:
        DataError: No labels, no samples, or batches that do not fit together.
    """
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size must be at least 1. Received: batch_size={batch_size}")
    limit = READ_FACTOR * max_samples
    kept = _Kept(max_samples, np.random.default_rng(seed))
    natural, read = batch_size, 0
    for batch in batches(data, batch_size=batch_size or 32, max_samples=_bound(data, limit)):
        if not leaves(batch.y):
            raise DataError(
                "a diagnosis compares losses, which need labels: pass (x, y). "
                "Received: batches without labels"
            )
        natural = natural or len(batch)
        read += len(batch)
        kept.add(batch)
    assert natural is not None  # `batches` raises when there are none
    whole, notes = _sound(kept.mixed())
    if read >= limit and not _is_arrays(data):
        notes.append(f"only the first {read:,} samples of the data were read")
    size = natural if fixed else size_near(len(whole), natural)
    if len(whole) < size:
        raise DataError(
            f"the model takes batches of {size} samples only. Received: {len(whole)} samples"
        )
    left = len(whole) % size
    if left:
        notes.append(f"{left} of {len(whole)} samples beyond the last full batch were left out")
    cut = list(batches(take(whole, slice(len(whole) - left)), batch_size=size))
    return Samples(
        batches=tuple(cut), batch_size=size, natural=natural, read=read, notes=tuple(notes)
    )


def _sound(whole: Batch) -> tuple[Batch, list[str]]:
    """The samples whose inputs are finite numbers, and a note on the others.

    One that is not spoils the statistics of its whole batch. Where all are of that kind they stay.
    """
    sound = np.ones(len(whole), dtype=bool)
    for _, leaf in leaves(whole.x):
        if leaf.dtype.kind == "f":
            sound &= np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1)
    broken = int((~sound).sum())
    if not broken:
        return whole, []
    told = f"{broken} of {len(whole)} samples hold NaN or infinite inputs"
    if not sound.any():
        return whole, [told]
    return take(whole, np.flatnonzero(sound)), [f"{told} and are left out"]


def size_near(count: int, wanted: int) -> int:
    """Size of equal batches of ``count`` samples: the wanted one where many fit, else near it.

    Example:
        >>> size_near(1000, 32), size_near(40, 32), size_near(70, 32), size_near(3, 32)
        (32, 40, 35, 3)
    """
    if count >= MANY_BATCHES * wanted:
        return wanted
    return count // max(1, round(count / wanted))


class _Kept:
    """The samples with the smallest random keys so far."""

    def __init__(self, most: int, rng: np.random.Generator) -> None:
        self.most, self.rng = most, rng
        self.keys: list[Array] = []
        self.parts: list[Batch] = []
        self.threshold = np.inf

    def add(self, batch: Batch) -> None:
        keys = self.rng.random(len(batch))
        chosen = np.flatnonzero(keys < self.threshold)
        if not len(chosen):
            return
        self.keys.append(keys[chosen])
        self.parts.append(take(batch, chosen))
        if sum(map(len, self.keys)) >= 2 * self.most:
            self._compact()

    def _compact(self) -> None:
        keys, whole = np.concatenate(self.keys), collect(self.parts)
        best = np.sort(np.argpartition(keys, self.most - 1)[: self.most])
        self.keys, self.parts = [keys[best]], [take(whole, best)]
        self.threshold = float(keys[best].max())

    def mixed(self) -> Batch:
        """The kept samples in the order of their keys, which is random."""
        keys, whole = np.concatenate(self.keys), collect(self.parts)
        return take(whole, np.argsort(keys)[: self.most])


def rebatched(samples: Samples, size: int, order: Array | None = None) -> Iterator[Batch]:
    """The same samples in batches of another size or in another order; a short rest is left out.

    Args:
        samples: The samples.
        size: Samples per batch.
        order: Indices of samples; ``None`` for their own order.
    """
    whole = samples.whole
    index = np.arange(len(samples)) if order is None else order
    for start in range(0, len(index) - size + 1, size):
        yield take(whole, index[start : start + size])


def take(batch: Batch, rows: Any) -> Batch:
    """The rows of a batch: a slice, or an array of indices."""
    return Batch(
        map_leaves(lambda leaf: leaf[rows], batch.x),
        map_leaves(lambda leaf: leaf[rows], batch.y),
        map_leaves(lambda leaf: leaf[rows], batch.sample_weight),
    )


def _bound(data: Any, limit: int) -> int | None:
    return None if _is_arrays(data) else limit


def _is_arrays(data: Any) -> bool:
    """Data whose end is known: arrays, and lists of batches."""
    return isinstance(data, (tuple, list, Batch)) or hasattr(data, "shape")
