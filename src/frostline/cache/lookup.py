"""Where many samples are stored, in 24 bytes for each; shared by the workers of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from frostline.cache.shards import DIGEST_BYTES, Shard
from frostline.types import Array

#: A digest as two numbers, which sort and compare as one.
_PAIR = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True, eq=False)
class Lookup:
    """Samples by their digest.

    Attributes:
        digests: Sorted, of dtype ``_PAIR``, shape ``(n,)``.
        pointers: Number of the shard times 2^32, plus the row there, uint64, shape ``(n,)``.
    """

    digests: Array
    pointers: Array

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Lookup:
        """The samples of some shards, which are numbered as they come; the first shard wins."""
        empty = np.empty((0, DIGEST_BYTES), np.uint8)
        digests = _pairs(np.concatenate([empty, *(shard.samples for shard in shards)]))
        pointers = [
            (np.uint64(number) << np.uint64(32)) | np.arange(len(shard.samples), dtype=np.uint64)
            for number, shard in enumerate(shards)
        ]
        order = np.argsort(digests, kind="stable")
        whole = np.concatenate([np.empty(0, np.uint64), *pointers])
        return cls(digests[order], whole[order])

    def find(self, digests: Array) -> tuple[Array, Array]:
        """Pointers of samples, and which of them are known.

        Args:
            digests: Shape ``(m, DIGEST_BYTES)``, uint8.
        """
        pairs = _pairs(digests)
        places = np.searchsorted(self.digests, pairs)
        known = places < len(self.digests)
        known[known] = self.digests[places[known]] == pairs[known]
        pointers = np.zeros(len(pairs), np.uint64)
        pointers[known] = self.pointers[places[known]]
        return pointers, known


def _pairs(digests: Array) -> Array:
    return np.ascontiguousarray(digests).view(_PAIR).reshape(-1)
