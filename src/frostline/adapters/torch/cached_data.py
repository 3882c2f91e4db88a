"""Cached features as a torch data set, and torch's data sets read in the order of their samples."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import data as torch_data

from frostline.adapters.torch.columns import column
from frostline.adapters.torch.replay import fields_of, is_record, is_samples
from frostline.data.arrays import has_shape, leaves, map_leaves
from frostline.types import Array, DataError


class FeatureDataset(torch_data.Dataset):  # type: ignore[misc]
    """Features of a frozen prefix with the labels of their samples: sample i is ``(x, y)``.

    ``x`` is a tensor, or a tuple of them where several cross the frontier; without labels it comes
    alone. Features are read from disk when they are asked for; labels are in memory.
    A ``DataLoader`` with workers gets its copies without the features. Everything that a
    :class:`frostline.FeatureCache` has is there as well (``rows``, ``nbytes``, ``engine``, ...).

    Args:
        cache: The features on disk.
        labels: An array of shape ``(n, ...)``, or a structure of such; ``None``: there are none.
        view: Which augmented view.
    """

    def __init__(self, cache: Any, labels: Any = None, *, view: int = 0) -> None:
        self.cache = cache
        self.labels = labels
        self.view = view

    @property
    def by_view(self) -> tuple[FeatureDataset, ...]:
        """One data set per augmented view: take ``by_view[epoch % len(by_view)]``."""
        numbers = range(len(self.cache.views))
        return tuple(FeatureDataset(self.cache, self.labels, view=number) for number in numbers)

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples at once; a ``DataLoader`` asks for its batches so."""
        count = len(self)
        wanted = np.asarray([int(index) for index in indices])
        if ((wanted < -count) | (wanted >= count)).any():
            raise IndexError(f"samples are numbered from 0 to {count - 1}. Received: {indices}")
        wanted = wanted % count
        columns = [torch.from_numpy(array) for array in self.cache.rows(wanted, view=self.view)]
        one = len(columns) == 1
        samples = []
        for row, index in enumerate(wanted):
            x = columns[0][row] if one else tuple(column[row] for column in columns)
            samples.append(x if self.labels is None else (x, map_leaves(_item(index), self.labels)))
        return samples

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "cache" not in vars(self):
            raise AttributeError(name)
        return getattr(self.cache, name)

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: pickled, they would be all the features."""
        views = tuple(
            type(view)(collection=view.collection, manifest=view.manifest)
            for view in self.cache.views
        )
        return {**vars(self), "cache": dataclasses.replace(self.cache, views=views)}


def _item(index: int) -> Any:
    def item(column: Array) -> Any:
        if column.dtype.kind == "O":  # an entry of a list
            return map_leaves(lambda x: torch.as_tensor(x) if has_shape(x) else x, column[index])
        return torch.as_tensor(column[index])

    return item


def require_indices(loader: Any, views: int) -> None:
    """Refuse a loader whose samples cannot be drawn by index.

    Raises:
        DataError: It is no ``DataLoader``, or its data set has no indices.
    """
    indexed = isinstance(loader, torch_data.DataLoader) and not isinstance(
        loader.dataset, torch_data.IterableDataset
    )
    if not indexed:
        raise DataError(
            f"views={views} draws each sample by its index, which takes a DataLoader over a "
            "data set with __getitem__; leave views out for other loaders. "
            f"Received: {type(loader).__name__}"
        )


def seeded(loader: Any, view: int) -> Any:
    """The loader with samples drawn with the seed of a view; order and batches are its own."""
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn",
             "generator", "multiprocessing_context", "prefetch_factor")  # fmt: skip
    ways: dict[str, Any] = {name: getattr(loader, name) for name in names}
    if loader.batch_sampler is not None:
        ways["batch_sampler"] = loader.batch_sampler
    else:
        ways |= {"sampler": loader.sampler, "batch_size": None}
    return torch_data.DataLoader(_Seeded(loader.dataset, view), **ways)


class _Seeded(torch_data.Dataset):  # type: ignore[misc]
    """A data set whose random draws for a sample depend on the sample and the view alone."""

    def __init__(self, samples: Any, view: int) -> None:
        self.samples, self.view = samples, view

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        seed = int.from_bytes(hashlib.sha256(f"{self.view}|{index}".encode()).digest()[:4])
        before = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's draws
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                return self.samples[index]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def in_order(data: Any, batch_size: int) -> Any:
    """Data as batches in the order of their samples, whatever a ``DataLoader`` would shuffle.

    Args:
        data: A torch ``Dataset`` or ``DataLoader``; anything else is returned as it is.
        batch_size: Samples per batch.

    Raises:
        DataError: Samples that are others when they are read again: their features cannot be kept.
    """
    loader = data if isinstance(data, torch_data.DataLoader) else None
    if loader is None and not isinstance(data, torch_data.Dataset):
        return data
    samples = data if loader is None else loader.dataset
    ways: dict[str, Any] = {"batch_size": batch_size, "shuffle": False}
    # A generator of its own: the user's draws stay what they are.
    ways["generator"] = torch.Generator().manual_seed(0)
    if loader is not None:
        ways |= {
            name: getattr(loader, name) for name in ("num_workers", "timeout", "worker_init_fn")
        }
        if loader.batch_size is not None:
            ways["collate_fn"] = loader.collate_fn
    if not isinstance(samples, torch_data.IterableDataset):
        _require_repeatable(samples)
    return torch_data.DataLoader(samples, **ways)


def _require_repeatable(samples: Any) -> None:
    """Read one sample twice."""
    if not len(samples):
        raise DataError("The data hold no samples. Received: a data set of length 0")
    one, other = (list(map(np.asarray, _read(samples[0]))) for _ in range(2))
    if any(a.shape != b.shape or not _same(a, b) for a, b in zip(one, other, strict=True)):
        raise DataError(
            "sample 0 of the data set is another one when it is read again, so its features cannot "
            "be kept: take the augmentation out of the data set and pass it as "
            f"fl.cache_features(..., views=8, augment=...). Received: {type(samples).__name__}"
        )


def _read(sample: Any) -> Iterator[Any]:
    """What a sample holds, dataclasses opened."""
    for _, leaf in leaves(sample):
        yield from _read(fields_of(leaf)) if is_record(leaf) else [leaf]


def _same(one: Array, other: Array) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")


def joined(parts: Sequence[Any], count: int) -> Any:
    """The labels of all batches; ``None`` where there are none.

    Args:
        parts: Labels of each batch, arrays or structures of arrays, or lists with an entry per
            sample.
        count: Samples in all batches.
    """
    if not parts or parts[0] is None:
        return None
    if all(map(is_samples, parts)) and sum(map(len, parts)) == count:
        return np.concatenate([column(part) for part in parts])
    columns = [[leaf for _, leaf in leaves(part)] for part in parts]
    whole = iter([np.concatenate(column) for column in zip(*columns, strict=True)])
    return map_leaves(lambda _: next(whole), parts[0])
