"""A collection: one folder of shards that one frozen prefix computed, found by sample content.

::

    ROOT/<key>/collection.json         what computed it: prefix, dtype, view, engine
    ROOT/<key>/shards/<name>.json      which samples, checksum per file; written last
    ROOT/<key>/shards/<name>.<t>.npy   tensor t of the frontier, shape (rows, ...)
    ROOT/<key>/manifests/<fingerprint>.json, .npy    a data set: sample i -> shard and row

A shard is named by the hash of the samples in it, so it serves every data set that has them, in any
order. No file name is ever read from a file: all are computed from hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frostline.cache.files import (
    DamagedError,
    StoredArray,
    read_sealed,
    require_name,
    require_no_link,
    sha256,
    sweep,
    write_array,
    write_sealed,
)
from frostline.data.arrays import is_numbers, leaves, map_leaves
from frostline.types import Array, DataError

#: Bytes that stand for a sample: sha256, cut; two of a million samples meet by chance once in 1e26.
DIGEST_BYTES = 16

#: Bytes of one tensor's file, about.
_SHARD_BYTES = 64 << 20
#: A kill loses at most twice as many samples: a shard that is written and one that is computed.
_SHARD_ROWS = 1024

_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of the frontier, as it is stored.

    Attributes:
        shape: Of one sample.
        dtype: As computed; ``bfloat16`` is stored as the ``uint16`` of its bits.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def storage(self) -> np.dtype[Any]:
        """Dtype of the file."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes per sample."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.storage.itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A few samples' features on disk.

    Attributes:
        name: sha256 of the collection's key and the samples.
        samples: Digests, shape ``(rows, DIGEST_BYTES)``, uint8.
        files: sha256 and size in bytes per tensor.
    """

    name: str
    samples: Array
    files: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Collection:
    """One folder: what one prefix computes, in one view, in one dtype.

    Attributes:
        folder: Where.
        key: Hash of all that decides the features, but the samples.
        tensors: The frontier.
        engine: What computed it.
        batch_size: Samples per pass of the prefix.
        about: What people want to know: model name, view and so on.
    """

    folder: Path
    key: str
    tensors: tuple[Tensor, ...]
    engine: str
    batch_size: int
    about: dict[str, Any]

    @property
    def shards(self) -> Path:
        """Folder of the shards."""
        return self.folder / "shards"

    @property
    def manifests(self) -> Path:
        """Folder of the manifests."""
        return self.folder / "manifests"

    @property
    def row_bytes(self) -> int:
        """Bytes per sample over all tensors."""
        return sum(tensor.row_bytes for tensor in self.tensors)

    @property
    def shard_rows(self) -> int:
        """Samples per shard: a multiple of the batch size, at least one batch."""
        largest = max((tensor.row_bytes for tensor in self.tensors), default=1)
        rows = min(_SHARD_ROWS, _SHARD_BYTES // max(1, largest))
        return max(1, rows // self.batch_size) * self.batch_size

    def file(self, name: str, tensor: int) -> Path:
        """File of one tensor of one shard."""
        return self.shards / f"{name}.{tensor}.npy"


def create(collection: Collection) -> None:
    """Make the folder; only while holding its lock. What is there and right is not written."""
    for folder in (collection.shards, collection.manifests):
        require_no_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    sweep(collection.folder)
    path = collection.folder / "collection.json"
    content = {
        "key": collection.key,
        "tensors": [[list(t.shape), t.dtype] for t in collection.tensors],
        "engine": collection.engine,
        "batch_size": collection.batch_size,
        "about": collection.about,
    }
    with contextlib.suppress(DamagedError):
        there = read_sealed(path)
        if {name: there.get(name) for name in content} == json.loads(json.dumps(content)):
            return
    write_sealed(path, content)


def discard(folder: Path) -> None:
    """Remove all that a collection holds, its description first; only while holding its lock."""
    (folder / "collection.json").unlink(missing_ok=True)
    for inner in ("manifests", "shards"):
        for path in (folder / inner).glob("*"):
            path.unlink(missing_ok=True)


def load(folder: Path) -> Collection:
    """Read what a folder says about itself.

    Raises:
        DamagedError: There is no whole description.
        DataError: Another version's, or one that does not belong into this folder.
    """
    path = folder / "collection.json"
    require_no_link(folder, folder / "shards", folder / "manifests")
    body = read_sealed(path)
    if require_name(body.get("key"), path) != folder.name:
        raise DataError(f"{path}: refused, it describes another folder. Received: {body['key']!r}")
    try:
        return Collection(
            folder=folder,
            key=body["key"],
            tensors=tuple(_tensor(shape, dtype, path) for shape, dtype in body["tensors"]),
            engine=str(body["engine"]),
            batch_size=int(body["batch_size"]),
            about=dict(body["about"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path.name}: fields are missing") from error


def _tensor(shape: Any, dtype: Any, path: Path) -> Tensor:
    kind = "f" if dtype == "bfloat16" else np.dtype(str(dtype)).kind
    if kind not in "fiub":
        raise DataError(f"{path}: refused, features are numbers. Received: dtype {dtype!r}")
    return Tensor(shape=tuple(int(side) for side in shape), dtype=str(dtype))


def known_shards(collection: Collection) -> Iterator[Shard]:
    """Every shard whose description is whole; what it describes is not checked yet."""
    for path in sorted(collection.shards.glob("[!.]*.json")):
        try:
            yield read_shard(collection, path.stem)
        except DamagedError:
            with contextlib.suppress(OSError):
                path.unlink()


def read_shard(collection: Collection, name: str) -> Shard:
    """Read a shard's description.

    Raises:
        DamagedError: Missing or changed.
        DataError: It names something outside the cache.
    """
    path = collection.shards / f"{require_name(name, collection.folder)}.json"
    body = read_sealed(path)
    try:
        raw = bytes.fromhex(body["samples"])
        samples = np.frombuffer(raw, np.uint8).reshape(-1, DIGEST_BYTES)
        files = tuple((str(digest), int(size)) for digest, size in body["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path.name}: fields are missing") from error
    if shard_name(collection.key, samples) != name or len(files) != len(collection.tensors):
        raise DamagedError(f"{path.name}: describes other samples")
    return Shard(name=name, samples=samples, files=files)


def open_tensor(collection: Collection, shard: Shard, index: int) -> StoredArray:
    """Open one tensor of a shard, compared with its checksum and with the form of the frontier.

    Raises:
        DamagedError: It differs.
    """
    tensor, (digest, _) = collection.tensors[index], shard.files[index]
    stored = StoredArray(collection.file(shard.name, index), digest)
    if stored.shape != (len(shard.samples), *tensor.shape) or stored.dtype != tensor.storage:
        raise DamagedError(f"{stored.path.name}: of another form")
    return stored


def verify_shard(collection: Collection, shard: Shard) -> None:
    """Compare every file with its checksum, and its form with the frontier.

    Raises:
        DamagedError: One differs.
    """
    for index in range(len(collection.tensors)):
        open_tensor(collection, shard, index)


def write_shard(collection: Collection, samples: Array, features: Sequence[Array]) -> Shard:
    """Write the features, then the description that makes them count."""
    name = shard_name(collection.key, samples)
    files = tuple(
        write_array(collection.file(name, index), array) for index, array in enumerate(features)
    )
    write_sealed(
        collection.shards / f"{name}.json",
        {"samples": samples.tobytes().hex(), "files": [list(file) for file in files]},
    )
    return Shard(name=name, samples=samples, files=files)


def remove_shard(collection: Collection, name: str) -> None:
    """Remove a shard: its description first, so that no half of it ever counts."""
    paths = [collection.shards / f"{require_name(name, collection.folder)}.json"]
    paths += [collection.file(name, index) for index in range(len(collection.tensors))]
    for path in paths:
        path.unlink(missing_ok=True)


def shard_name(key: str, samples: Array) -> str:
    """Name of the shard that holds these samples, in this order."""
    return sha256("shard", key, samples.tobytes())


def sample_digests(columns: Sequence[tuple[str, Array]]) -> Array:
    """Digest of each sample of a batch: name, dtype, shape and bytes of every array.

    Args:
        columns: ``(name, array)`` of the inputs, arrays of shape ``(n, ...)``.

    Returns:
        Shape ``(n, DIGEST_BYTES)``, uint8.
    """
    named = sorted(columns, key=lambda column: column[0])  # frameworks reorder dicts
    heads = [f"{name}|{array.dtype.str}|{array.shape[1:]}".encode() for name, array in named]
    rows = [np.ascontiguousarray(array) for _, array in named]
    digests = np.empty((len(rows[0]), DIGEST_BYTES), np.uint8)
    for index in range(len(digests)):
        digest = hashlib.sha256()
        for head, array in zip(heads, rows, strict=True):
            digest.update(head)
            digest.update(_bytes(array, index))
        digests[index] = np.frombuffer(digest.digest()[:DIGEST_BYTES], np.uint8)
    return digests


def _bytes(array: Array, index: int) -> Any:
    """The bytes of one row."""
    if array.dtype.kind != "O":
        return array[index : index + 1].view(np.uint8).data
    sample = array[index]
    parts = [repr(map_leaves(lambda _: 0, sample)).encode()]
    for _, leaf in leaves(sample):
        if isinstance(leaf, np.ndarray):
            parts += [f"{leaf.dtype.str}|{leaf.shape}".encode(), leaf.tobytes()]
        elif is_numbers(leaf) or isinstance(leaf, (bytes, bool)):
            parts.append(repr(leaf).encode())
        else:
            raise DataError(
                "cached features are found by what a sample holds: arrays, numbers and texts, and "
                f"mappings and lists of them. Received: {type(leaf).__name__}"
            )
    return b"|".join(parts)


def encode(array: Array, dtype: str) -> Array:
    """Return features as they are stored.

    ``float32`` keeps floats exactly as they were computed. ``float16`` and ``bfloat16`` round to
    nearest, ties to even; bfloat16 becomes the ``uint16`` of its bits.
    """
    if array.dtype.name == "bfloat16":  # of ml_dtypes: JAX and TensorFlow
        return array.view(np.uint16)
    if array.dtype.kind != "f" or dtype == "float32" or array.dtype.itemsize <= 2:
        return array
    if dtype == "float16":
        with np.errstate(over="ignore"):  # an overflow is found as infinite, with its sample
            return array.astype(np.float16)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def decode(array: Array, tensor: Tensor) -> Array:
    """Return stored features as numbers: 16-bit floats become float32, which is exact."""
    if tensor.dtype == "bfloat16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def stored_dtype(array: Array, dtype: str) -> str:
    """Name of the dtype that :func:`encode` makes of features."""
    if array.dtype.name == "bfloat16":
        return "bfloat16"
    if array.dtype.kind == "f" and array.dtype.itemsize > 2 and dtype != "float32":
        return dtype
    return array.dtype.name


def require_dtype(dtype: str) -> str:
    """Return ``dtype`` if features can be stored in it.

    Raises:
        DataError: They cannot.
    """
    if dtype not in _FLOATS:
        raise DataError(f"dtype must be one of {', '.join(_FLOATS)}. Received: {dtype!r}")
    return dtype
