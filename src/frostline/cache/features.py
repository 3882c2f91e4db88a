"""Read features: rows in any order, memory-mapped, with flat memory however many there are."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from frostline.cache import shards
from frostline.cache.build import Manifest
from frostline.cache.files import DamagedError, map_array
from frostline.cache.shards import Collection, Tensor
from frostline.types import Array, DataError

#: Maps that are open at a time; each holds a file descriptor.
_OPEN_MAPS = 128
#: Mapped pages count as memory of this process until they are given back.
_HELD_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Features of one view of a data set: row i is sample i.

    Attributes:
        collection: Where.
        manifest: Which rows.
    """

    collection: Collection
    manifest: Manifest
    _maps: OrderedDict[tuple[int, int], Any] = field(default_factory=OrderedDict, repr=False)
    _touched: list[int] = field(default_factory=lambda: [0], repr=False)

    def __len__(self) -> int:
        return len(self.manifest.pointers)

    def rows(self, indices: Array) -> list[Array]:
        """Features of these samples, one array of shape ``(len(indices), ...)`` per tensor."""
        pointers = self.manifest.pointers[indices]
        owners = (pointers >> np.uint64(32)).astype(np.int64)
        rows = (pointers & np.uint64(0xFFFFFFFF)).astype(np.int64)
        found = []
        for position, tensor in enumerate(self.collection.tensors):
            out = np.empty((len(pointers), *tensor.shape), tensor.storage)
            for owner in np.unique(owners):
                chosen = np.flatnonzero(owners == owner)
                self._copy(out, chosen, int(owner), rows[chosen], position)
            self._touched[0] += out.nbytes
            found.append(shards.decode(out, tensor))
        if self._touched[0] > _HELD_BYTES:
            self._give_back()
        return found

    def _copy(self, out: Array, chosen: Array, owner: int, rows: Array, position: int) -> None:
        mapped = self._map(owner, position)
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            out[chosen] = mapped[rows[0] : rows[-1] + 1]
        else:
            for target, row in zip(chosen, rows, strict=True):
                out[target] = mapped[row]

    def _map(self, owner: int, position: int) -> Array:
        key = (owner, position)
        if key in self._maps:
            self._maps.move_to_end(key)
        else:
            path = self.collection.file(self.manifest.shards[owner], position)
            try:
                self._maps[key] = map_array(path)
            except DamagedError as error:
                raise DataError(
                    f"a file of the feature cache is gone or cut short ({error}); run it again, "
                    "what is missing is computed again"
                ) from error
            while len(self._maps) > _OPEN_MAPS:
                self._maps.popitem(last=False)
        mapped: Array = self._maps[key]
        return mapped

    def _give_back(self) -> None:
        """Drop the mapped pages from this process; they stay in the system's page cache."""
        advice = getattr(mmap, "MADV_DONTNEED", None)
        for mapped in self._maps.values():
            if advice is not None:
                mapped._mmap.madvise(advice)
        if advice is None:
            self._maps.clear()
        self._touched[0] = 0

    def digests(self) -> Array:
        """Digest of every sample, in order, shape ``(n, 16)``, uint8."""
        parts = [shards.read_shard(self.collection, name).samples for name in self.manifest.shards]
        starts = np.cumsum([0, *(len(part) for part in parts)])
        owners = (self.manifest.pointers >> np.uint64(32)).astype(np.int64)
        rows = (self.manifest.pointers & np.uint64(0xFFFFFFFF)).astype(np.int64)
        whole: Array = np.concatenate(parts)[starts[owners] + rows]
        return whole


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureCache:
    """Features of a frozen prefix on disk: row i is sample i, in every view.

    Made by :func:`frostline.cache_features`. Every byte behind it was compared with its checksum
    when it was made.

    Attributes:
        path: Folder of the cache.
        views: One per view; view 0 alone where nothing is augmented.

    Example:
        >>> features = cache.rows([0, 5, 2])        # one array per tensor of the frontier
    """

    path: Path
    views: tuple[View, ...]

    def __len__(self) -> int:
        return len(self.views[0])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Shape and stored dtype per tensor of the frontier."""
        return self.views[0].collection.tensors

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of each view: hash of prefix, weights, statistics, dtype, augmentation, view."""
        return tuple(view.collection.key for view in self.views)

    @property
    def fingerprint(self) -> str:
        """Hash of all samples, in order."""
        return self.views[0].manifest.fingerprint

    @property
    def engine(self) -> str:
        """What computed the features."""
        return self.views[0].collection.engine

    @property
    def nbytes(self) -> int:
        """Bytes of features, all views."""
        return sum(len(view) * view.collection.row_bytes for view in self.views)

    def rows(self, indices: Any, *, view: int = 0) -> list[Array]:
        """Features of some samples.

        Args:
            indices: Sample numbers, in any order, repeated or not.
            view: Which view; epoch e uses ``e % len(views)``.

        Returns:
            One array per tensor of the frontier, shape ``(len(indices), ...)``; floats stored in
            16 bits come back as float32.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1 or (wanted < 0).any() or (wanted >= len(self)).any():
            raise DataError(
                f"rows are numbered from 0 to {len(self) - 1}. Received: "
                f"{np.asarray(indices).ravel()[:5]}"
            )
        return self.views[view].rows(wanted)
