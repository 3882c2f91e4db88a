"""``.npz`` files: plain number arrays, whose headers are checked before they are believed."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from frostline.data.catalogue import Catalogue, Split, encoded
from frostline.data.reading import array_bytes, require_file, require_sound_zip
from frostline.types import Array, DataError
from frostline.types.reasons import first_line

_PAIRS = {
    "train": [("x_train", "y_train")],
    "test": [("x_test", "y_test"), ("x_val", "y_val")],
    "all": [("x_train", "y_train"), ("x_test", "y_test")],
}


def read_arrays(path: Path) -> tuple[Array, Array] | None:
    """Return ``x`` and ``y`` of a plain ``.npz``; ``None`` when it has other names in it.

    Raises:
        DataError: No such file, not a readable ``.npz``, or not equally many.
    """
    arrays = _read(path, str(path), ("x", "y"))
    if "x" not in arrays or "y" not in arrays:
        return None
    x, y = arrays["x"], arrays["y"]
    if x.dtype.kind not in "uifb" or y.dtype.kind not in "uifb":
        return None
    if not x.ndim or not y.ndim:
        raise DataError(
            f"{path}: x and y have one entry per sample. Received: shapes {x.shape} and {y.shape}"
        )
    if len(x) != len(y) or not len(x):
        raise DataError(
            f"{path}: x and y must be equally many, at least 1. Received: {len(x)} and {len(y)}"
        )
    return x, y


def images_of_arrays(path: Path, source: str, split: Split) -> Catalogue:
    """Arrays ``x``, ``y``, or ``x_train``, ``y_train``, ``x_test``, ``y_test``, as images."""
    keys = _names(path, source)
    present = [(x, y) for x, y in _PAIRS[split] if x in keys and y in keys]
    has_splits = bool(present) and split != "all"
    if split != "all":
        present = present[:1]
    if not present and "x" in keys and "y" in keys:
        present = [("x", "y")]
    if not present:
        first = _PAIRS[split][0]
        raise DataError(
            f"{source}: no arrays x and y, nor {first[0]} and {first[1]}. "
            f"Received: {', '.join(keys) or 'an empty archive'}"
        )
    wanted = [name for pair in present for name in pair]
    arrays = _read(path, source, [*wanted, "class_names"])
    images = np.concatenate([_as_rgb(arrays[x], source, x) for x, _ in present])
    values = np.concatenate([_as_labels(arrays[y], source, y) for _, y in present])
    if len(images) != len(values):
        raise DataError(
            f"{source}: {len(images)} images but {len(values)} labels; they must be equally many."
        )
    if not len(images):
        raise DataError(f"{source}: one image at least is needed. Received: arrays of length 0")
    if "class_names" not in arrays:
        labels, names = encoded(values.tolist(), source)
    else:
        names = tuple(str(name) for name in arrays["class_names"].ravel().tolist())
        if values.dtype.kind in "US":
            raise DataError(f"{source}: labels must be numbers where there are class_names.")
        labels = values.astype(np.int64)
        if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(names):
            raise DataError(f"{source}: labels must be 0 to {len(names) - 1}, as class_names say.")
    return Catalogue(
        labels=labels,
        class_names=names,
        decode=lambda rows, prepare: [prepare(images[row]) for row in rows],
        has_splits=has_splits,
    )


def _names(path: Path, shown: str) -> list[str]:
    with _opened(path, shown) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _read(path: Path, shown: str, names: Iterable[str]) -> dict[str, Array]:
    """Return the arrays of these names that are there, in the byte order of this machine."""
    found = {}
    try:
        with _opened(path, shown) as archive:
            for name in names:
                member = next((n for n in (f"{name}.npy", name) if n in archive.namelist()), None)
                if member is None:
                    continue
                _check_header(archive, member, shown)
                with archive.open(member) as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                found[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise DataError(f"{shown}: not a readable .npz file ({first_line(error)})") from None
    return found


def _opened(path: Path, shown: str) -> zipfile.ZipFile:
    require_file(path)
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DataError(f"{shown}: not a readable .npz file ({first_line(error)})") from None
    try:
        require_sound_zip(archive, shown)
    except DataError:
        archive.close()
        raise
    return archive


def _check_header(archive: zipfile.ZipFile, member: str, shown: str) -> None:
    """Refuse an array of objects, and one whose size is not that of its bytes."""
    with archive.open(member) as stream:
        shape, dtype = _header(stream)
        there = archive.getinfo(member).file_size - stream.tell()
    if dtype.hasobject:
        raise DataError(
            f"{shown}: it holds pickled objects, which are never loaded; save plain number arrays"
        )
    if min(shape, default=0) < 0 or array_bytes(shape, dtype) != there:
        raise DataError(
            f"{shown}: {member} declares {dtype} of shape {shape}, which are not the {there} bytes "
            "that it holds"
        )


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version} of the .npy format")
    return shape, dtype


def _as_rgb(images: Array, source: str, key: str) -> Array:
    """Greyscale or RGB, 0..255 or 0..1, to uint8 ``(n, h, w, 3)``."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype.kind not in "uifb":
        raise DataError(
            f"{source}: {key} must be images of shape (n, h, w), (n, h, w, 1) or (n, h, w, 3). "
            f"Received: {images.shape}, {images.dtype}"
        )
    if images.dtype != np.uint8 and images.size:
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 255):  # also catches NaN
            raise DataError(
                f"{source}: values of {key} must be 0 to 255, or 0 to 1. "
                f"Received: {low:g} to {high:g}"
            )
        scale = 255.0 if images.dtype.kind in "fb" and high <= 1 else 1.0
        images = np.rint(images.astype(np.float64) * scale).astype(np.uint8)
    return np.repeat(images, 3, axis=3) if images.shape[-1] == 1 else images


def _as_labels(values: Array, source: str, key: str) -> Array:
    """Integers or strings of shape ``(n,)`` or ``(n, 1)``, or one-hot rows."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    elif values.ndim == 2 and np.array_equal(np.unique(values), [0, 1]):
        values = values.argmax(axis=1)
    if values.dtype.kind in "uf" and not np.all(np.abs(values) < 2.0**63):  # NaN is refused too
        raise DataError(f"{source}: {key} must be finite labels below 2^63.")
    whole = values.dtype.kind == "f" and bool(np.all(values == np.rint(values)))
    if values.ndim != 1 or not (values.dtype.kind in "uibUS" or whole):
        raise DataError(
            f"{source}: {key} must be integer labels of shape (n,), or one-hot rows. "
            f"Received: {values.shape}, {values.dtype}"
        )
    return values if values.dtype.kind in "US" else values.astype(np.int64)
