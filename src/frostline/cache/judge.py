"""Behaviour as the judge: a few stored samples are computed again whenever features are reused.

Identity says which features belong to a prefix. Where it is wrong after all, the features are: so
samples are drawn anew at each reuse and compared with what the prefix at hand computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from frostline import engines
from frostline.adapters import prefix as prefixes
from frostline.cache import shards
from frostline.cache.shards import Collection, Shard
from frostline.data.arrays import map_leaves
from frostline.types import Array

#: Samples compared when the first stored ones are met, and drawn from all that follow.
AT_FIRST, FROM_ALL = 2, 4
#: Largest difference as a share of the largest value: engines agree with native to a third of it.
TOLERANCE = 3e-4
#: What features in bfloat16 may differ by, in multiples of the error that was measured when they
#: were computed, and whatever that was: it is known of two samples only.
_LOWER, _LOWER_LEAST = 4.0, 2.0**-7
#: What rounding to 16 bits adds.
_STORED = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
#: Values below this count as zero.
_SMALLEST = 1e-6


class ChangedError(Exception):
    """Stored features are not what the prefix computes.

    Attributes:
        batches: Batches that were read before it showed.
    """

    def __init__(self, text: str, batches: int) -> None:
        super().__init__(text)
        self.batches = batches


class Judge:
    """Compares stored features with the prefix at hand.

    Args:
        prefix: What is to be reused.
        collection: Where its features are said to be.
        augment: ``(x, digests) -> x`` on a batch as it was computed; ``None``: nothing is
            augmented.
    """

    def __init__(
        self, prefix: Any, collection: Collection, augment: Callable[[Any, Array], Any] | None
    ) -> None:
        self.prefix = prefix
        self.collection = collection
        self.augment = augment
        self.batches = 0
        self._random = np.random.default_rng()
        self._met = 0
        self._held: list[tuple[Any, list[Array]]] = []
        self._run: Callable[[Any], Sequence[Array]] | None = None

    def see(self, x: Any, digests: Array, places: Sequence[tuple[int, Shard, int]]) -> None:
        """Look at the samples of a batch that are stored.

        Args:
            x: The batch.
            digests: Digest of each sample.
            places: ``(number in the batch, shard, row there)`` of those that are stored.

        Raises:
            ChangedError: Some of them differ.
        """
        self.batches += 1
        if not places:
            return
        if self.augment is not None:
            self._judge_augmented(x, digests, places)
            return
        first = not self._met
        order = self._random.permutation(len(places))
        chosen = [places[index] for index in order[: AT_FIRST if first else FROM_ALL]]
        found = [(_row(x, number), self._stored(shard, [row])) for number, shard, row in chosen]
        if first:
            self._compare(found)
        for offset, sample in enumerate(found):  # a fair draw from all that have passed
            if len(self._held) < FROM_ALL:
                self._held.append(sample)
            else:
                position = int(self._random.integers(self._met + offset + 1))
                if position < FROM_ALL:
                    self._held[position] = sample
        self._met += len(places)

    def finish(self) -> None:
        """Compare what was drawn from all of the stored samples.

        Raises:
            ChangedError: Some of them differ.
        """
        if self.batches > 1 and self._held:
            self._compare(self._held)

    def _judge_augmented(
        self, x: Any, digests: Array, places: Sequence[tuple[int, Shard, int]]
    ) -> None:
        """Compare samples whose whole batch is here: an augmentation is seeded by its batch."""
        if self._met:
            return
        size = self.collection.batch_size
        here = {digest.tobytes(): number for number, digest in enumerate(digests)}
        _, shard, row = places[int(self._random.integers(len(places)))]
        start = row - row % size
        together = shard.samples[start : start + size]
        numbers = [here.get(digest.tobytes()) for digest in together]
        if None in numbers or self.augment is None:
            return
        self._met += 1
        rows = np.minimum(np.arange(size), len(together) - 1)
        batch = map_leaves(lambda leaf: np.asarray(leaf)[np.array(numbers)[rows]], x)
        augmented = self.augment(batch, together[rows])
        stored = self._stored(shard, list(range(start, start + len(together))))
        self._judge(self._reference(augmented), stored, len(together))

    def _stored(self, shard: Shard, rows: list[int]) -> list[Array]:
        found = []
        for position, tensor in enumerate(self.collection.tensors):
            stored = shards.open_tensor(self.collection, shard, position)
            found.append(shards.decode(stored.read(np.array(rows)), tensor))
        return found

    def _compare(self, samples: Sequence[tuple[Any, list[Array]]]) -> None:
        count = len(samples)
        parts = [x for x, _ in samples]
        x = _joined(parts)
        if not self._takes_fewer(x):
            rows = np.minimum(np.arange(max(count, self.collection.batch_size)), count - 1)
            x = _joined([parts[row] for row in rows])
        stored = [np.concatenate(column) for column in zip(*(f for _, f in samples), strict=True)]
        self._judge(self._reference(x), stored, count)

    def _reference(self, x: Any) -> tuple[Any, list[Array]]:
        if self._run is None:
            self._run = prefixes.reference(self.prefix)
        return x, [np.asarray(array) for array in self._run(x)]

    def _takes_fewer(self, x: Any) -> bool:
        return not prefixes.is_callable_prefix(self.prefix) and prefixes.takes_fewer(self.prefix, x)

    def _judge(self, computed: tuple[Any, list[Array]], stored: list[Array], count: int) -> None:
        x, outputs = computed
        expected = [array[:count] for array in outputs]
        error = _difference(expected, stored)
        kinds = [_STORED.get(tensor.dtype, 0.0) for tensor in self.collection.tensors]
        allowed = TOLERANCE + max(kinds, default=0.0)
        about = self.collection.about
        if about.get("precision", "float32") != "float32":
            allowed += _LOWER * float(about.get("error", 0.0)) + _LOWER_LEAST
        if error > allowed and not prefixes.is_callable_prefix(self.prefix):
            allowed += 2 * engines.rounding(self.prefix, x, outputs)
        if not error <= allowed:
            raise ChangedError(
                f"stored features differ by {error:.1e} from what the prefix computes now, allowed "
                f"is {allowed:.0e}",
                self.batches,
            )


def _difference(expected: Sequence[Array], stored: Sequence[Array]) -> float:
    """Largest difference as a share of the largest value; what is nearly zero counts as zero."""
    if len(expected) != len(stored):
        return float("inf")
    worst = 0.0
    for want, have in zip(expected, stored, strict=True):
        if want.shape != have.shape or not np.isfinite(np.asarray(want, np.float64)).all():
            return float("inf")
        one, other = np.asarray(want, np.float64), np.asarray(have, np.float64)
        largest = max(np.abs(one).max(initial=0.0), np.abs(other).max(initial=0.0), _SMALLEST)
        worst = max(worst, float(np.abs(one - other).max(initial=0.0) / largest))
    return worst


def _row(x: Any, number: int) -> Any:
    return map_leaves(lambda leaf: np.array(np.asarray(leaf)[number : number + 1]), x)


def _joined(rows: Sequence[Any]) -> Any:
    from frostline.data.arrays import leaves

    columns = zip(*([leaf for _, leaf in leaves(row)] for row in rows), strict=True)
    whole = iter([np.concatenate(column) for column in columns])
    return map_leaves(lambda _: next(whole), rows[0])
