"""Read features: rows in any order, in flat memory, each file compared with its checksum."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from frostline.cache import shards
from frostline.cache.build import Manifest
from frostline.cache.files import DamagedError, StoredArray
from frostline.cache.shards import Collection, Tensor
from frostline.types import Array, BackendError, DataError, OutputError

#: Files that are open at a time.
_OPEN_FILES = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Features of one view of a data set: row i is sample i.

    Attributes:
        collection: Where.
        manifest: Which rows.
    """

    collection: Collection
    manifest: Manifest
    _files: OrderedDict[tuple[int, int], StoredArray] = field(
        default_factory=OrderedDict, repr=False
    )

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
                out[chosen] = self._read(int(owner), position, rows[chosen])
            found.append(shards.decode(out, tensor))
        return found

    def _read(self, owner: int, position: int, rows: Array) -> Array:
        """Rows of one tensor of one shard."""
        name, key = self.manifest.shards[owner], (owner, position)
        try:
            if key not in self._files:
                shard = shards.read_shard(self.collection, name)
                self._files[key] = shards.open_tensor(self.collection, shard, position)
            self._files.move_to_end(key)
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return self._files[key].read(rows)
        except DamagedError as error:
            self._files.pop(key, None)
            raise DataError(
                f"shard {name[:12]} of the feature cache in {self.collection.folder} is damaged "
                f"({error}); make the cache again: this shard is computed anew, the others stay"
            ) from error

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

    Made by :func:`frostline.cache_features`. Every byte behind it is compared with its checksum
    before it is used, and again when its file has changed.

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
    def ids(self) -> Array | None:
        """What the samples are called, where they came with ids; ``None``: by their number."""
        return self.views[0].manifest.ids

    @property
    def engine(self) -> str:
        """What computed the features."""
        return self.views[0].collection.engine

    @property
    def precision(self) -> str:
        """What it computed in: ``"float32"``, as the prefix does, or ``"bfloat16"``."""
        return str(self.views[0].collection.about.get("precision", "float32"))

    @property
    def error(self) -> float:
        """How far a few features are from float32, as a share of the largest; 0 in float32."""
        return float(self.views[0].collection.about.get("error", 0.0))

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

    def to_parquet(
        self, path: str | os.PathLike[str], labels: Any = None, *, view: int = 0,
        overwrite: bool = False,
    ) -> Path:  # fmt: skip
        """Write the features as a table, one row per sample, a thousand in memory at a time.

        Columns are ``features`` (``features_0``, ... where several tensors cross the frontier),
        nested lists of fixed length, and ``id`` and ``label`` where there are some.

        Args:
            path: A ``.parquet`` file, or an ``.arrow`` file in Arrow's streaming format.
            labels: One per sample, shape ``(n, ...)``.
            view: Which augmented view.
            overwrite: Whether a file that is there may be replaced.

        Returns:
            The file.

        Raises:
            OutputError: The file cannot be written; nothing is left behind.
            DataError: Labels for another number of samples.
            BackendError: pyarrow is not installed.
        """
        from frostline.cache import export

        return export.write(self, Path(path), labels, view=view, overwrite=overwrite)

    def to_dataset(
        self, path: str | os.PathLike[str], labels: Any = None, *, view: int = 0,
        overwrite: bool = False,
    ) -> Any:  # fmt: skip
        """A ``datasets.Dataset`` of Hugging Face, which maps the file and loads nothing.

        Args:
            path: The ``.arrow`` file to write; the data set reads it as long as it lives.
            labels: As in :meth:`to_parquet`.
            view: As there.
            overwrite: As there.

        Raises:
            OutputError: As there.
            DataError: As there.
            BackendError: ``datasets`` is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise BackendError("to_dataset needs datasets: pip install datasets") from error
        from frostline.cache import export

        if Path(path).suffix != ".arrow":
            raise OutputError(f"to_dataset writes an .arrow file. Received: {path}")
        written = export.write(self, Path(path), labels, view=view, overwrite=overwrite)
        return datasets.Dataset.from_file(str(written))

    def to_torch(self, labels: Any = None, *, view: int = 0) -> Any:
        """A ``torch.utils.data.Dataset``: sample i is ``(features, label)``, read when asked for.

        Args:
            labels: One per sample, an array of shape ``(n, ...)`` or a structure of such;
                ``None``: sample i is its features alone.
            view: Which augmented view.
        """
        from frostline.adapters import data_set

        return data_set(self, labels, view=view)
