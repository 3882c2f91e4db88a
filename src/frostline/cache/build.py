"""Compute what is missing: stream samples, skip those that are stored, write shard after shard."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from frostline.cache import shards
from frostline.cache.files import (
    DamagedError,
    FullError,
    read_array,
    read_sealed,
    require_name,
    sha256,
    write_array,
    write_sealed,
)
from frostline.cache.judge import Judge
from frostline.cache.progress import Progress, in_bytes
from frostline.cache.shards import Collection, Shard
from frostline.data.arrays import leaves, map_leaves
from frostline.types import Array, DataError, OutputError

#: ``run(x, digests)``: features of one full batch; the digests seed an augmentation.
Run = Callable[[Any, Array], Sequence[Array]]

_ROW_BITS = 32
#: Bytes that are left free on the disk, but never more than a twentieth of it.
_RESERVE = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set in a collection: sample i is ``pointers[i]``.

    Attributes:
        fingerprint: sha256 of all samples, in order.
        shards: Names.
        pointers: Shape ``(n,)``, uint64: position in ``shards`` times 2^32, plus the row there.
        ids: What the samples are called, shape ``(n,)``; ``None``: by their number.
    """

    fingerprint: str
    shards: tuple[str, ...]
    pointers: Array
    ids: Array | None = None


class _Index:
    """Which samples are stored, and where; a shard is verified when it is first needed."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.shards: list[Shard | None] = []
        self.verified: set[int] = set()
        self.places: dict[bytes, int] = {}
        for shard in shards.known_shards(collection):
            self.add(shard.samples, len(self.shards))
            self.shards.append(shard)

    def add(self, samples: Array, ordinal: int, start: int = 0) -> None:
        for row, sample in enumerate(samples, start):
            self.places[sample.tobytes()] = (ordinal << _ROW_BITS) | row

    def find(self, sample: bytes) -> int | None:
        place = self.places.get(sample)
        if place is None:
            return None
        ordinal = place >> _ROW_BITS
        if ordinal < len(self.shards) and ordinal not in self.verified:
            shard = self.shards[ordinal]
            if shard is None:
                return None
            try:
                shards.verify_shard(self.collection, shard)
            except DamagedError:
                self._drop(ordinal, shard)
                return self.find(sample)  # another shard may have it as well
            self.verified.add(ordinal)
        return place

    def _drop(self, ordinal: int, shard: Shard) -> None:
        """Forget a damaged shard and remove it."""
        self.shards[ordinal] = None
        shards.remove_shard(self.collection, shard.name)
        lost = {sample.tobytes() for sample in shard.samples}
        for sample in lost:
            if self.places.get(sample, -1) >> _ROW_BITS == ordinal:
                del self.places[sample]
        for other, kept in enumerate(self.shards):
            for row, digest in enumerate(() if kept is None else kept.samples):
                if (sample := digest.tobytes()) in lost:
                    self.places.setdefault(sample, (other << _ROW_BITS) | row)


class Builder:
    """One pass over the data; at most one batch of inputs and two shards of features in memory.

    A shard is written, hashed and flushed to the disk in a thread beside the computation of the
    next one.

    Args:
        collection: Where; its lock is held.
        run: Features of a batch of exactly ``collection.batch_size`` samples.
        dtype: How floats are stored.
        progress: Told of every batch.
        max_bytes: Limit of ``used`` together with what is written.
        used: Bytes in the cache before.
        judge: Compares stored samples with what the prefix computes.
    """

    def __init__(
        self,
        collection: Collection,
        run: Run,
        dtype: str,
        progress: Progress,
        max_bytes: int | None = None,
        used: int = 0,
        judge: Judge | None = None,
    ) -> None:
        self.judge = judge
        self.collection = collection
        self.run = run
        self.dtype = dtype
        self.progress = progress
        self.max_bytes = max_bytes
        self.used = used
        self.index = _Index(collection)
        self.names: dict[int, str] = {}  # of the shards of this pass, by ordinal
        self._ordinal = len(self.index.shards)  # of the shard that is being filled
        self._filled = 0
        self._inputs: list[tuple[Any, Array, Array]] = []  # x, digests, numbers of the samples
        self._features: list[list[Array]] = []
        self._samples: list[Array] = []
        self._writing: Future[Shard] | None = None

    def build(self, inputs: Iterable[Any]) -> Manifest:
        """Take every batch of inputs, compute what is missing, write the manifest.

        Raises:
            FullError: Disk or limit reached; complete shards stay and count.
            ChangedError: Stored features are not what the prefix computes.
            DataError: Features that are not finite, with the sample.
        """
        with ThreadPoolExecutor(1) as self._writer:
            fingerprint, pointers = self._pass(inputs)
            self._settle()
        return self._finish(fingerprint, pointers)

    def _pass(self, inputs: Iterable[Any]) -> tuple[str, Array]:
        """Compute what is missing; fingerprint of the samples, and the place of each."""
        order = hashlib.sha256()
        pointers: list[Array] = []
        seen = 0
        for x in inputs:
            digests = shards.sample_digests(leaves(x))
            order.update(digests.tobytes())
            places, missing = self._locate(digests)
            if self.judge is not None:
                self.judge.see(x, digests, self._stored(places))
            pointers.append(places)
            if missing.any():
                rows = np.flatnonzero(missing)
                part = map_leaves(_taker(rows), x)
                self._inputs.append((part, digests[rows], rows + seen))
                self._compute(whole_batches=True)
            seen += len(digests)
            self.progress.advance(len(digests), int(missing.sum()))
        if self.judge is not None:
            self.judge.finish()
        self._compute(whole_batches=False)
        self._flush()
        return order.hexdigest(), np.concatenate(pointers)

    def _locate(self, digests: Array) -> tuple[Array, Array]:
        """Place of every sample, and which of them are to be computed."""
        places = np.empty(len(digests), np.uint64)
        missing = np.zeros(len(digests), bool)
        for row, digest in enumerate(digests):
            sample = digest.tobytes()
            place = self.index.find(sample)
            if place is None:
                place = (self._ordinal << _ROW_BITS) | self._filled
                self.index.places[sample] = place
                missing[row] = True
                self._filled += 1
                if self._filled == self.collection.shard_rows:
                    self._ordinal, self._filled = self._ordinal + 1, 0
            places[row] = place
        return places, missing

    def _stored(self, places: Array) -> list[tuple[int, Shard, int]]:
        """Which samples of a batch were stored before, and where."""
        found = []
        for number, place in enumerate(map(int, places)):
            ordinal = place >> _ROW_BITS
            shard = self.index.shards[ordinal] if ordinal < len(self.index.shards) else None
            if shard is not None:
                found.append((number, shard, place & ((1 << _ROW_BITS) - 1)))
        return found

    def _compute(self, *, whole_batches: bool) -> None:
        """Run the prefix on what waits."""
        size = self.collection.batch_size
        while self._inputs:
            waiting = sum(len(digests) for _, digests, _ in self._inputs)
            if waiting < size and whole_batches:
                return
            x, digests, numbers = _joined(self._inputs)
            self._inputs = []
            if waiting > size:
                rest = map_leaves(lambda leaf: leaf[size:], x)
                self._inputs = [(rest, digests[size:], numbers[size:])]
                x = map_leaves(lambda leaf: leaf[:size], x)
                digests, numbers = digests[:size], numbers[:size]
            self._store(x, digests, numbers)

    def _store(self, x: Any, digests: Array, numbers: Array) -> None:
        self._features.append(computed(self.collection, self.run, self.dtype, x, digests, numbers))
        self._samples.append(digests)
        if sum(map(len, self._samples)) == self.collection.shard_rows:
            self._flush()

    def _flush(self) -> None:
        """Begin to write what was computed as one shard."""
        self._settle()
        if not self._samples:
            return
        samples = np.concatenate(self._samples)
        arrays = [np.concatenate(column) for column in zip(*self._features, strict=True)]
        self._require_room(sum(array.nbytes for array in arrays))
        write = shards.write_shard
        self._writing = self._writer.submit(write, self.collection, samples, arrays)
        self._features, self._samples = [], []

    def _settle(self) -> None:
        """Wait until the last shard is written, and note it."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            shard = writing.result()
        except FullError as error:
            raise FullError(f"{error}. {self._so_far()}") from error
        self.names[len(self.index.shards) + len(self.names)] = shard.name
        self.used += sum(size for _, size in shard.files)

    def _require_room(self, size: int) -> None:
        free = shutil.disk_usage(self.collection.folder).free
        if free < size:
            raise FullError(
                f"the disk of {self.collection.folder.parent} is full: {size} bytes are needed, "
                f"{free} are free. {self._so_far()}"
            )
        if self.max_bytes is not None and self.used + size > self.max_bytes:
            raise FullError(
                f"the cache would grow beyond its limit of {in_bytes(self.max_bytes)}. "
                f"{self._so_far()}"
            )

    def _so_far(self) -> str:
        return (
            f"{len(self.names)} shard(s) of this run are complete and stay: make room (frostline "
            "cache rm) and run it again, it goes on from there"
        )

    def _finish(self, fingerprint: str, pointers: Array) -> Manifest:
        """Write the manifest, last of all."""
        manifest = numbered(fingerprint, pointers, self._name)
        try:
            write_manifest(self.collection, manifest)
        except FullError as error:
            raise FullError(f"{error}. {self._so_far()}") from error
        return manifest

    def _name(self, ordinal: int) -> str:
        if ordinal >= len(self.index.shards):
            return self.names[ordinal]
        shard = self.index.shards[ordinal]
        if shard is None:  # _drop took every pointer to it away before one was handed out
            raise OutputError(f"shard {ordinal} vanished from {self.collection.folder}")
        return shard.name


def computed(
    collection: Collection, run: Run, dtype: str, x: Any, digests: Array, numbers: Any
) -> list[Array]:
    """Features of at most one batch, as they are stored.

    Args:
        collection: Where they will go.
        run: Takes exactly ``collection.batch_size`` samples: fewer are padded with the last one.
        dtype: How floats are stored.
        x: The samples.
        digests: One per sample.
        numbers: What the samples are called in an error.

    Raises:
        DataError: Features of another shape, or not finite.
    """
    count, size = len(digests), collection.batch_size
    if count < size:
        rows = np.minimum(np.arange(size), count - 1)
        x, digests = map_leaves(lambda leaf: leaf[rows], x), digests[rows]
    features = []
    arrays = [np.asarray(array) for array in run(x, digests)]
    for position, (array, tensor) in enumerate(zip(arrays, collection.tensors, strict=True)):
        if array.shape != (size, *tensor.shape):
            raise DataError(
                f"tensor {position} of the frontier changed its shape from "
                f"{(size, *tensor.shape)}; all samples must have one shape. "
                f"Received: {array.shape}"
            )
        encoded = shards.encode(array[:count], dtype)
        _require_finite(encoded, tensor, position, numbers)
        features.append(encoded)
    return features


def numbered(
    fingerprint: str, pointers: Array, name: Callable[[int], str], ids: Array | None = None
) -> Manifest:
    """A manifest that numbers shards in the order of their first sample.

    Args:
        fingerprint: Hash of all samples, in order.
        pointers: Shard of each sample times 2^32, plus the row there, by any numbers of shards.
        name: Number -> name of a shard.
        ids: What the samples are called.
    """
    ordinals, first, position = np.unique(
        pointers >> np.uint64(_ROW_BITS), return_index=True, return_inverse=True
    )
    order = np.argsort(first)
    rank = np.empty(len(order), np.uint64)
    rank[order] = np.arange(len(order), dtype=np.uint64)
    rows = pointers & np.uint64((1 << _ROW_BITS) - 1)
    return Manifest(
        fingerprint=fingerprint,
        shards=tuple(name(int(ordinal)) for ordinal in ordinals[order]),
        pointers=(rank[position] << np.uint64(_ROW_BITS)) | rows,
        ids=ids,
    )


def _taker(rows: Array) -> Callable[[Any], Array]:
    """Take these rows of an array."""
    return lambda leaf: np.asarray(leaf)[rows]


def _joined(parts: list[tuple[Any, Array, Array]]) -> tuple[Any, Array, Array]:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*([leaf for _, leaf in leaves(x)] for x, _, _ in parts), strict=True)
    try:
        joined = iter([np.concatenate(column) for column in columns])
    except ValueError as error:
        raise DataError(f"the batches' inputs do not fit together ({error})") from error
    return (
        map_leaves(lambda _: next(joined), parts[0][0]),
        np.concatenate([digests for _, digests, _ in parts]),
        np.concatenate([numbers for _, _, numbers in parts]),
    )


def _require_finite(encoded: Array, tensor: shards.Tensor, position: int, numbers: Array) -> None:
    """Name the samples whose features are NaN or infinite; such features are never stored."""
    if tensor.dtype == "bfloat16":
        bad = (encoded & np.uint16(0x7F80)) == 0x7F80
    elif encoded.dtype.kind == "f":
        bad = ~np.isfinite(encoded)
    else:
        return
    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
    if not rows.size:
        return
    shown = ", ".join(str(numbers[row]) for row in rows[:5])
    hint = " (or too large for float16: dtype='bfloat16')" if tensor.dtype == "float16" else ""
    raise DataError(
        f"features are NaN or infinite{hint} in tensor {position} of the frontier, sample(s) "
        f"{shown}{', ...' if rows.size > 5 else ''}; nothing of them is stored. Look at these "
        "inputs, and at the weights of the frozen layers."
    )


def require_room(
    collection: Collection, expected: int | None, *, max_bytes: int | None, used: int
) -> None:
    """Refuse before the work what cannot fit.

    Args:
        collection: Where.
        expected: Samples to come; ``None`` when not known.
        max_bytes: Limit of the whole cache.
        used: Bytes of the whole cache now.

    Raises:
        FullError: Neither disk nor limit can hold it, even if all that is there is used again.
    """
    if expected is None:
        return
    there = sum(path.stat().st_size for path in collection.shards.glob("*.npy"))
    needed = max(0, expected * collection.row_bytes - there)
    disk = shutil.disk_usage(collection.folder)
    free = disk.free
    about = (
        f"{expected} samples of {collection.row_bytes} bytes need {in_bytes(needed)} more in "
        f"{collection.folder.parent}"
    )
    ways = "remove old caches (frostline cache rm), choose another folder, or dtype='float16'"
    if needed and needed + min(_RESERVE, disk.total // 20) > free:
        raise FullError(f"{about}, and the disk has {in_bytes(free)} free: {ways}")
    if max_bytes is not None and used + needed > max_bytes:
        raise FullError(
            f"{about}, which has {in_bytes(used)} already, beyond the limit of "
            f"{in_bytes(max_bytes)} (max_gb): {ways}"
        )


def estimate(collection: Collection, title: str, expected: int | None) -> str:
    """Say, before the work, how much disk it takes at most and how much is free."""
    each = f"{collection.row_bytes:,} bytes each"
    free = shutil.disk_usage(collection.folder).free
    if expected is None:
        size = f"an unknown number of samples, {each}"
    else:
        size = f"up to {in_bytes(expected * collection.row_bytes)}: {expected:,} samples, {each}"
    return f"{title}: {size}; {in_bytes(free)} are free in {collection.folder.parent}"


def write_manifest(collection: Collection, manifest: Manifest) -> None:
    """Write pointers, then the manifest that makes them count; untouched if it is there."""
    path = collection.manifests / f"{manifest.fingerprint}.json"
    try:
        found = read_manifest(collection, manifest.fingerprint)
        same = found.shards == manifest.shards
        if (
            same
            and np.array_equal(found.pointers, manifest.pointers)
            and _same_ids(found, manifest)
        ):
            with contextlib.suppress(OSError):  # of a disk that is read-only
                path.touch()
            return
    except DamagedError:
        pass
    digest, _ = write_array(path.with_suffix(".npy"), manifest.pointers)
    content = {
        "key": collection.key,
        "fingerprint": manifest.fingerprint,
        "shards": list(manifest.shards),
        "samples": len(manifest.pointers),
        "pointers": digest,
    }
    if manifest.ids is not None:
        content["ids"], _ = write_array(path.with_suffix(".ids.npy"), manifest.ids)
    write_sealed(path, content)


def _same_ids(found: Manifest, manifest: Manifest) -> bool:
    """Whether ids that are there can stay; a data set without ids leaves them alone."""
    return manifest.ids is None or (
        found.ids is not None and np.array_equal(found.ids, manifest.ids)
    )


def read_manifest(collection: Collection, fingerprint: str) -> Manifest:
    """Read a manifest and its pointers; the shards it names are not read.

    Raises:
        DamagedError: Missing or changed.
        DataError: Another version's, or it names something that is no shard.
    """
    path = collection.manifests / f"{require_name(fingerprint, collection.folder)}.json"
    body = read_sealed(path)
    try:
        names = tuple(require_name(name, path) for name in body["shards"])
        samples, digest = int(body["samples"]), body["pointers"]
        belongs = (body["key"], body["fingerprint"]) == (collection.key, fingerprint)
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path.name}: fields are missing") from error
    pointers = read_array(path.with_suffix(".npy"), digest)
    if pointers.dtype != np.uint64:
        raise DamagedError(f"{path.stem}.npy: of another form")
    ids = read_array(path.with_suffix(".ids.npy"), body["ids"]) if "ids" in body else None
    shard = pointers >> np.uint64(_ROW_BITS)
    if ids is not None and ids.shape != (samples,):
        raise DamagedError(f"{path.stem}.ids.npy: of another form")
    if not belongs or pointers.shape != (samples,) or (shard >= len(names)).any():
        raise DamagedError(f"{path.name}: describes something else")
    return Manifest(fingerprint=fingerprint, shards=names, pointers=pointers, ids=ids)


def manifests(collection: Collection) -> Iterator[Manifest]:
    """Every manifest that is whole."""
    for path in sorted(collection.manifests.glob("[!.]*.json")):
        try:
            yield read_manifest(collection, path.stem)
        except DamagedError:
            continue


def collection_key(identity: str, *parts: Any) -> str:
    """Hash of what decides the features beside the samples."""
    return sha256("collection", identity, *(repr(part) for part in parts))
