"""Labelled images: load, select classes and n per class, resize; all reproducible.

Sources: ``digits`` (bundled with scikit-learn, needs no download), ``cifar10`` (through
``keras.datasets``), Hugging Face image parquet files or a folder of them, an image folder with one
sub-folder per class, and ``.npz`` files.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frostline.data import bundled
from frostline.data.archive import images_of_arrays
from frostline.data.catalogue import Catalogue, Labels, Split, optional
from frostline.data.image_folder import image_folder
from frostline.data.parquet import files_of_split, parquet_files
from frostline.data.reading import available_memory, require_memory
from frostline.types import Array, DataError

#: Share of each class, at its end, that is the test split of a source that has no splits of its
#: own: the usual one in five.
HELD_OUT = 0.2

#: Largest side that images are resized to: such an image has 192 MiB.
MOST_SIDE = 8192


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: RGB, uint8, shape ``(n, h, w, 3)``.
        labels: int64, shape ``(n,)``, from 0 to ``len(class_names) - 1``.
        class_names: One name per label.
        source: As the user typed it.
        selection: Which samples were taken, as plain types for JSON: ``source``, ``split``,
            ``classes`` (their order gives the labels), ``per_class``, ``seed``, ``indices`` (row
            of each sample in the source; ``None`` when ``per_class`` is: all rows) and ``digest``
            (BLAKE2b-128 of pixels and labels, to notice a source that has changed).
    """

    images: Array
    labels: Labels
    class_names: tuple[str, ...]
    source: str
    selection: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False, kw_only=True)
class Chosen:
    """Which images of a source are meant; none of them is decoded.

    Attributes:
        source: As given.
        split: As given.
        catalogue: Reads the source.
        rows: Row of each image there, shape ``(n,)``, in a seeded random order.
        labels: Their labels.
        class_names: One per label.
        size: Height and width to resize to; ``None``: as they are.
    """

    source: str
    split: Split
    catalogue: Catalogue
    rows: Labels
    labels: Labels
    class_names: tuple[str, ...]
    size: tuple[int, int] | None


def choose(
    source: str,
    *,
    split: Split = "train",
    classes: Sequence[str | int] | None = None,
    per_class: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
) -> Chosen:
    """Choose images as :func:`load` does, and decode none."""
    source = str(source)
    if split not in ("train", "test", "all"):
        raise DataError(f"split must be 'train', 'test' or 'all'. Received: {split!r}")
    if per_class is not None and per_class < 1:
        raise DataError(f"per_class must be at least 1. Received: {per_class}")
    if seed < 0:
        raise DataError(f"seed must be 0 or more. Received: {seed}")
    size = None if image_size is None else _height_width(image_size)
    catalogue = open_source(source, split)
    chosen = _class_indices(catalogue.class_names, classes, source)
    rows, labels = _select(catalogue, chosen, split, per_class, seed, source)
    return Chosen(
        source=source, split=split, catalogue=catalogue, rows=rows, labels=labels,
        class_names=tuple(catalogue.class_names[index] for index in chosen), size=size,
    )  # fmt: skip


def decoded(catalogue: Catalogue, rows: Sequence[int], size: Any, source: str) -> Array:
    """Some images of a source, uint8, shape ``(n, h, w, 3)``."""
    return _stack(catalogue.decode(list(rows), _Prepare(size)), source)


def load(
    source: str,
    *,
    split: Split = "train",
    classes: Sequence[str | int] | None = None,
    per_class: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
) -> ImageSet:
    """Load images of some classes, in a seeded random order.

    The order is shuffled because sources are often sorted by class, and batches of one class have
    other batch statistics than batches of all. The rows taken from one class depend on ``seed``
    and that class only, and fewer ``per_class`` are a subset of more.

    A source without splits of its own is split per class: the first four fifths are ``"train"``,
    the rest is ``"test"``.

    Args:
        source: ``"digits"``, ``"cifar10"``, or the path of a ``.parquet`` or ``.npz`` file, of a
            folder of parquet files, or of a folder with one sub-folder per class.
        split: ``"train"``, ``"test"`` or ``"all"``. Parquet files and folders tell theirs by name.
        classes: Names or indices; their order gives the labels. ``None`` for all.
        per_class: Images per class; ``None`` for all.
        image_size: Side, or height and width, in pixels; ``None`` keeps the images' own size.
        seed: Of the choice and the order.

    Returns:
        The images with their labels and the record of the selection.

    Raises:
        DataError: No such source, an unreadable file or image (named), an unknown class, a class
            with too few images, or images of different sizes and no ``image_size``.
        BackendError: A package that this source needs is not installed.

    Example:
        >>> pair = load("digits", classes=["3", "8"], per_class=10)
        >>> pair.images.shape, pair.class_names
        ((20, 8, 8, 3), ('3', '8'))
    """
    found = choose(
        source, split=split, classes=classes, per_class=per_class, image_size=image_size, seed=seed
    )
    source, size, rows, labels = found.source, found.size, found.rows, found.labels
    names = found.class_names
    if size is not None:
        what = f"{len(rows)} images of {size[0]} x {size[1]} pixels"
        require_memory(3 * math.prod(size) * len(rows), what)
    images = decoded(found.catalogue, rows.tolist(), size, source)
    digest = hashlib.blake2b(images.tobytes(), digest_size=16)
    digest.update(labels.tobytes())
    selection = {
        "source": source,
        "split": split,
        "classes": list(names),
        "per_class": per_class,
        "seed": seed,
        "indices": None if per_class is None else rows.tolist(),
        "digest": digest.hexdigest(),
    }
    return ImageSet(
        images=images, labels=labels, class_names=names, source=source, selection=selection
    )


def open_source(source: str, split: Split) -> Catalogue:
    """Find the reader for ``source``: ``digits``, ``cifar10``, or a path.

    Raises:
        DataError: There is no such source, or it cannot be read.
        BackendError: A package that this kind of source needs is not installed.
    """
    if source == "digits":
        return bundled.digits()
    if source == "cifar10":
        return bundled.cifar10(split)
    path = Path(source).expanduser()
    try:
        there = path.exists()
    except (OSError, ValueError):  # links in a loop, a name that is too long, a null byte
        there = False
    if not there:
        raise DataError(
            f"No such file or folder, and not 'digits' or 'cifar10'. Received: {source}"
        )
    if path.suffix == ".npz":
        return images_of_arrays(path, source, split)
    if path.suffix == ".parquet":
        return parquet_files(files_of_split([path], split, source), source, split)
    if path.is_dir():
        parquets = sorted(path.rglob("*.parquet"))
        if parquets:
            return parquet_files(files_of_split(parquets, split, source), source, split)
        return image_folder(path, source, split)
    raise DataError(
        "A data file must be .parquet or .npz; images come in a folder with one sub-folder per "
        f"class. Received: {source}"
    )


def resize(
    images: Array,
    size: int | tuple[int, int],
    *,
    method: Literal["bilinear", "bicubic"] = "bicubic",
) -> Array:
    """Resize images with Pillow, which smooths when it makes them smaller.

    Args:
        images: uint8, shape ``(n, h, w, 3)``.
        size: New side, or height and width, in pixels.
        method: ``"bilinear"`` or ``"bicubic"``.

    Returns:
        uint8, shape ``(n, height, width, 3)``; the same values on every machine.

    Raises:
        DataError: The size is not positive, or the images are not uint8 RGB.
    """
    height_width = _height_width(size)
    if method not in ("bilinear", "bicubic"):
        raise DataError(f"method must be 'bilinear' or 'bicubic'. Received: {method!r}")
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise DataError(
            "images must be uint8 of shape (n, h, w, 3). "
            f"Received: {images.dtype} of shape {images.shape}"
        )
    resized = np.empty((len(images), *height_width, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        resized[index] = _resized(image, height_width, method)
    return resized


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if not (1 <= height <= MOST_SIDE and 1 <= width <= MOST_SIDE):
        raise DataError(f"An image size must be 1 to {MOST_SIDE} pixels. Received: {size}")
    return height, width


def _resized(image: Array, size: tuple[int, int], method: Literal["bilinear", "bicubic"]) -> Array:
    if image.shape[:2] == size:
        return image
    pillow = optional("PIL.Image", "Resizing images")
    filters = {"bilinear": pillow.Resampling.BILINEAR, "bicubic": pillow.Resampling.BICUBIC}
    return np.asarray(pillow.fromarray(image).resize(size[::-1], filters[method]))


class _Prepare:
    """Resizes each image as soon as it is decoded, and stops when memory runs short.

    Args:
        size: Height and width in pixels; ``None`` keeps each image's own.
    """

    def __init__(self, size: tuple[int, int] | None) -> None:
        self._size = size
        self._left = available_memory()

    def __call__(self, image: Array) -> Array:
        kept = image if self._size is None else _resized(image, self._size, "bicubic")
        self._left -= kept.nbytes
        if self._left < 0:
            raise DataError(
                "the images do not fit into memory; choose a smaller image_size=, or fewer with "
                "per_class="
            )
        return kept


def _stack(images: list[Array], source: str) -> Array:
    shapes = sorted({image.shape[:2] for image in images})
    if len(shapes) > 1:
        raise DataError(
            f"{source}: the images have {len(shapes)} different sizes, from {shapes[0]} to "
            f"{shapes[-1]}; choose one with image_size=."
        )
    return np.stack(images)


def _class_indices(
    names: tuple[str, ...], classes: Sequence[str | int] | None, source: str
) -> list[int]:
    """Class indices in the order asked for; a name wins over an index of the same text."""
    if classes is None:
        return list(range(len(names)))
    if isinstance(classes, str) or not len(classes):
        raise DataError(f"classes must be a list of names or indices. Received: {classes!r}")
    chosen = []
    for wanted in classes:
        text = str(wanted)
        if isinstance(wanted, str) and text in names:
            chosen.append(names.index(text))
        elif text.isdecimal() and int(text) < len(names):
            chosen.append(int(text))
        else:
            close = difflib.get_close_matches(text, names, n=3)
            hint = f" Closest: {', '.join(close)}." if close else ""
            listed = ", ".join(names[:20]) + (f", ... ({len(names)})" if len(names) > 20 else "")
            raise DataError(
                f"{source}: no such class.{hint} Its classes: {listed}. Received: {wanted!r}"
            )
    if len(set(chosen)) < len(chosen):
        raise DataError(f"A class is named twice. Received: {', '.join(map(str, classes))}")
    return chosen


def _select(
    catalogue: Catalogue,
    chosen: list[int],
    split: Split,
    per_class: int | None,
    seed: int,
    source: str,
) -> tuple[Labels, Labels]:
    """Rows and their new labels, shuffled."""
    rows: list[Labels] = []
    for index in chosen:
        available = np.flatnonzero(catalogue.labels == index)
        if not catalogue.has_splits and split != "all":
            kept = len(available) - int(len(available) * HELD_OUT)
            available = available[:kept] if split == "train" else available[kept:]
        if len(available) < (per_class or 1):
            raise DataError(
                f"{source}: class {catalogue.class_names[index]!r} has {len(available)} image(s) "
                f"in the split {split!r}. Received: per_class={per_class}"
            )
        # Seeded per class: the choice does not depend on which other classes are taken.
        shuffled = np.random.default_rng([seed, index]).permutation(available)
        rows.append(shuffled[:per_class])
    labels = np.repeat(np.arange(len(rows)), [len(part) for part in rows]).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.concatenate(rows)[order].astype(np.int64), labels[order]
