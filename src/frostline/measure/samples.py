"""The fixed samples of a diagnosis: a seeded random draw, mixed once, in batches of one size.

Order is a property of training, not of a model, so it is drawn at random here: a batch has the
class mixture of the data. All batches have one size: batch statistics of a short last batch would
be of another quality, and each further size is compiled again. Batches that are not arrays are
never cut: a loader's dataset and collate function make others, or they are taken as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from frostline.adapters import Adapter
from frostline.data.arrays import leaves
from frostline.data.batch import Batch, joined, left_out, take
from frostline.data.batches import Collation, batches, collation_of, paired
from frostline.types import Array, DataError

#: A stream is read up to so many times the samples that are wanted: a generator may never end.
READ_FACTOR = 64

#: From so many batches on the samples beyond the last full batch are left out; with fewer, the
#: samples are cut into batches of equal size near the wanted one.
MANY_BATCHES = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """The samples of a diagnosis, in batches.

    Attributes:
        batches: Arrays: all of :attr:`batch_size` samples. What is no arrays of one length: as the
            loader made them.
        batch_size: Samples per batch; of the first where they differ or are not known.
        natural: Batch size that was asked for or that the data have.
        read: Samples that were read to draw these.
        notes: What a person should know about the draw.
        divisible: The batches are arrays and may be cut and mixed anew.
        items: Single samples in the order of :attr:`batches`, where the data are a loader or
            dataset that can make other batches of them.
        source: What makes a batch of :attr:`items`.
        cut: Batches were cut where they could be.
        given: The first batch that was cut, as it was read.
        as_read: Where the data came in batches that were mixed anew: some of those, at random, in
            their own order and of one size, up to as many samples.
    """

    batches: tuple[Batch, ...]
    batch_size: int
    natural: int
    read: int
    notes: tuple[str, ...] = field(default=())
    divisible: bool = True
    items: tuple[Any, ...] = ()
    source: Collation | None = None
    cut: bool = True
    given: Batch | None = None
    as_read: tuple[Batch, ...] = ()

    def __len__(self) -> int:
        if self.divisible:
            return len(self.batches) * self.batch_size
        return sum(self.batch_size if (n := part.count) is None else n for part in self.batches)

    @property
    def fixed(self) -> str | None:
        """Why no other batches can be made of the samples; ``None``: they can."""
        if self.divisible or self.items:
            return None
        if not self.cut:
            return "the model takes the batches as a whole: other ones cannot be made of them"
        return (
            "the batches are no arrays of one length, and the data are no loader with a dataset of "
            "single samples and a collate function: other batches cannot be made of them"
        )

    @property
    def whole(self) -> Batch:
        """All samples in one batch.

        Raises:
            DataError: They are not arrays of one length.
        """
        return joined(list(self.batches))

    def first(self, count: int) -> Samples:
        """The first batches that hold at least ``count`` samples; at least one batch, at most all.

        The draw is random, so they are a random part of the samples.
        """
        number = min(len(self.batches), max(1, -(-count // self.batch_size)))
        part = replace(self, batches=self.batches[:number], notes=())
        return replace(part, items=self.items[: len(part)])


def hold(
    adapter: Adapter, data: Any, step: Any, *, max_samples: int, batch_size: int = 32
) -> list[Batch]:
    """A few batches that are read once and kept, as the model, or the user's step, takes them."""
    read = batches(
        data,
        batch_size=batch_size,
        max_samples=max_samples,
        inputs=adapter.inputs(),
        whole=step is not None,
    )
    return list(paired(read))


def draw(
    data: Any,
    *,
    max_samples: int,
    batch_size: int | None = None,
    seed: int = 0,
    fixed: bool = False,
    labels: bool = True,
    whole: bool = False,
    inputs: int = 1,
    finite: Callable[[Batch], Array] | None = None,
    cut: bool = True,
) -> Samples:
    """Draw samples at random, mix them and cut them into batches of one size.

    Every sample gets a random key, and those with the smallest keys are kept: of data of any length
    only ``2 * max_samples`` samples and a batch are held in memory. Arrays are read whole; streams
    up to :data:`READ_FACTOR` times ``max_samples`` samples.

    Batches that are not arrays of one length, do not fit together (padded to different lengths), or
    are mappings for the user's step (an entry may number the samples of its batch) are not cut: a
    loader's own dataset and collate function make new ones of random samples, and where there are
    none the first batches are taken as they come.

    Args:
        data: See :mod:`frostline.data.batches`; one-shot iterators too.
        max_samples: At most so many samples.
        batch_size: Wanted samples per batch; ``None`` for that of the data's own first batch, and
            32 for arrays.
        seed: Of the draw.
        fixed: The model takes no other batch size.
        labels: Raise where there are none.
        whole: Keep what a batch holds beside inputs, labels and weights.
        inputs: So many first items of a longer batch are inputs.
        finite: Which samples the model makes finite numbers of, shape ``(n,)``: it may mask inputs
            that are not. ``None``: of finite inputs.
        cut: The model takes parts of a batch; else all batches are taken as they come.

    Returns:
        The samples.

    Raises:
        DataError: No labels, no samples, or batches that do not fit together.
    """
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size must be at least 1. Received: batch_size={batch_size}")
    limit = READ_FACTOR * max_samples
    rng = np.random.default_rng(seed)
    kept = _Kept(max_samples, rng)
    whole_batches = _WholeBatches(max_samples, np.random.default_rng([seed, 1]))
    natural, read, held, form = batch_size, 0, [], None
    notes: list[str] = []
    stream = batches(
        data,
        batch_size=batch_size or 32,
        max_samples=_bound(data, limit),
        inputs=inputs,
        whole=whole,
    )
    for batch in stream:
        if labels and not leaves(batch.y):
            raise DataError(
                "a diagnosis compares losses, which need labels: pass (x, y). "
                "Received: batches without labels"
            )
        if not whole and (note := left_out(batch)) is not None and note not in notes:
            notes.append(note)
        count = batch.count or 1
        natural = natural or count
        if read < max_samples:
            held.append(batch)
        read += count
        may_be_cut = batch.divisible and not batch.named if whole else batch.regular
        may_be_cut = may_be_cut and cut
        here = _form(batch) if may_be_cut else None
        form = here if form is None else form
        if here is None or here != form:
            source = collation_of(data, inputs) if cut else None
            if source is not None:
                try:
                    made = _collated(source, max_samples, natural, rng, notes, fixed=fixed)
                except TypeError:  # a dataset that only its own loader can read
                    pass
                else:
                    whole_batches.add(batch)
                    while read < max_samples and (other := next(stream, None)) is not None:
                        read += other.count or 1
                        whole_batches.add(other)
                    return replace(made, as_read=whole_batches.found())
            return _as_they_come(held, stream, max_samples, notes, cut=cut)
        kept.add(batch)
        whole_batches.add(batch)
    assert natural is not None  # `batches` raises when there are none
    mixed, broken = _sound(kept.mixed(), finite)
    notes += broken
    if read >= limit and not _is_arrays(data):
        notes.append(f"only the first {read:,} samples of the data were read")
    size = natural if fixed else size_near(len(mixed), natural)
    if len(mixed) < size:
        raise DataError(
            f"the model takes batches of {size} samples only. Received: {len(mixed)} samples"
        )
    left = len(mixed) % size
    if left:
        notes.append(f"{left} of {len(mixed)} samples beyond the last full batch were left out")
    parts = list(batches(take(mixed, slice(len(mixed) - left)), batch_size=size))
    return Samples(
        batches=tuple(parts),
        batch_size=size,
        natural=natural,
        read=read,
        notes=tuple(notes),
        given=held[0],
        as_read=whole_batches.found() if not fixed or natural == held[0].count else (),
    )


def _form(batch: Batch) -> Any:
    """What two batches must have in common to be joined."""
    return [
        (name, leaf.shape[1:], leaf.dtype.kind)
        for name, leaf in leaves((batch.x, batch.y, batch.sample_weight))
    ]


def _as_they_come(
    held: list[Batch], stream: Iterator[Batch], max_samples: int, notes: list[str], *, cut: bool
) -> Samples:
    """Whole batches: those read so far, and more up to ``max_samples``."""
    read = sum(batch.count or 1 for batch in held)
    while read < max_samples and (batch := next(stream, None)) is not None:
        held.append(batch)
        read += batch.count or 1
    kept = list(paired(held))
    first = kept[0].count or 1
    if len(kept) > 2 and (kept[-1].count or 1) < first:
        notes.append(f"the last batch, of {kept.pop().count} samples, is shorter and was left out")
    why = "they are no arrays of one length" if cut else "the model takes no part of one"
    return Samples(
        batches=tuple(kept),
        batch_size=first,
        natural=first,
        read=read,
        notes=(*notes, f"the batches are taken as they come: {why}"),
        divisible=False,
        cut=cut,
    )


def _collated(
    source: Collation,
    max_samples: int,
    size: int,
    rng: np.random.Generator,
    notes: list[str],
    *,
    fixed: bool,
) -> Samples:
    chosen = rng.permutation(len(source.indices))[:max_samples]
    size = size if fixed else size_near(len(chosen), size)
    if size > len(chosen):
        raise DataError(
            f"the model takes batches of {size} samples only. Received: {len(chosen)} samples"
        )
    chosen = chosen[: len(chosen) // size * size]
    items = source.items(source.indices[int(index)] for index in chosen)
    starts = range(0, len(items), size)
    return Samples(
        batches=tuple(source.batch(items[start : start + size]) for start in starts),
        batch_size=size,
        natural=size,
        read=len(items),
        notes=tuple(notes),
        divisible=False,
        items=tuple(items),
        source=source,
    )


def _sound(whole: Batch, finite: Callable[[Batch], Array] | None = None) -> tuple[Batch, list[str]]:
    """The samples that are finite numbers, as inputs or for the model, and a note on the others.

    One that is not spoils the statistics of its whole batch. Where all are of that kind they stay.
    """
    sound = np.ones(len(whole), dtype=bool)
    for _, leaf in leaves(whole.x):
        if leaf.dtype.kind == "f":
            sound &= np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1)
    if finite is not None and not sound.all():
        rows = np.flatnonzero(~sound)
        sound[rows] = finite(take(whole, rows))
    broken = int((~sound).sum())
    if not broken:
        return whole, []
    note = f"{broken} of {len(whole)} samples hold NaN or infinite inputs"
    if not sound.any():
        return whole, [note]
    return take(whole, np.flatnonzero(sound)), [f"{note} and are left out"]


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
        keys, whole = np.concatenate(self.keys), joined(self.parts)
        best = np.sort(np.argpartition(keys, self.most - 1)[: self.most])
        self.keys, self.parts = [keys[best]], [take(whole, best)]
        self.threshold = float(keys[best].max())

    def mixed(self) -> Batch:
        """The kept samples in the order of their keys, which is random."""
        keys, whole = np.concatenate(self.keys), joined(self.parts)
        return take(whole, np.argsort(keys)[: self.most])


class _WholeBatches:
    """Random batches as the data bring them: the random draw mixes what training may keep apart."""

    def __init__(self, most: int, rng: np.random.Generator) -> None:
        self.most, self.rng = most, rng
        self.size: int | None = None
        self.number = 0
        self.batches: list[tuple[float, int, Batch]] = []

    def add(self, batch: Batch) -> None:
        self.number += 1
        self.size = self.size or batch.count
        # Cut from arrays, or a short last one, or of a size that is not known.
        if batch.whole is None or not batch.count or batch.count != self.size:
            return
        self.batches.append((self.rng.random(), self.number, batch))
        if len(self.batches) > max(2, self.most // self.size):
            self.batches.remove(max(self.batches, key=lambda entry: entry[0]))

    def found(self) -> tuple[Batch, ...]:
        """In their own order."""
        return tuple(batch for *_, batch in sorted(self.batches, key=lambda entry: entry[1]))


def rebatched(samples: Samples, size: int, order: Array | None = None) -> Iterator[Batch]:
    """The same samples in batches of another size or in another order; a short rest is left out.

    Args:
        samples: The samples; not :attr:`Samples.fixed`.
        size: Samples per batch.
        order: Indices of samples; ``None`` for their own order.

    Raises:
        DataError: The samples cannot be put into other batches.
    """
    if samples.fixed is not None:
        raise DataError(samples.fixed)
    index = np.arange(len(samples)) if order is None else order
    whole = samples.whole if samples.divisible else None
    for start in range(0, len(index) - size + 1, size):
        rows = index[start : start + size]
        if whole is not None:
            yield take(whole, rows)
        else:
            assert samples.source is not None
            yield samples.source.batch([samples.items[row] for row in rows])


def _bound(data: Any, limit: int) -> int | None:
    return None if _is_arrays(data) else limit


def _is_arrays(data: Any) -> bool:
    """Data whose end is known: arrays, and lists of batches."""
    return isinstance(data, (tuple, list, Batch)) or hasattr(data, "shape")
