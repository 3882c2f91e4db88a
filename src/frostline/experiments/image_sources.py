"""Where images come from: one reader per kind of source, all giving a :class:`Catalogue`.

A catalogue knows every row's label but decodes only the rows that are asked for, so that taking
200 of 50,000 JPEGs costs 200 decodings.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from frostline.types import Array, BackendError, DataError
from frostline.types.reasons import first_line

Split = Literal["train", "test", "all"]
Labels = npt.NDArray[np.int64]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})

#: Words in file and folder names that tell the split, in order of preference.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val", "dev", "eval"),
}
# fmt: off
_CIFAR10_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
# fmt: on
_IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "coarse_label", "cls")


@dataclass(frozen=True, eq=False, kw_only=True)
class Catalogue:
    """Labels of all rows of a source, and a way to decode some of them.

    Attributes:
        labels: Class index of each row, int64, shape ``(rows,)``.
        class_names: One name per class index.
        decode: Row numbers -> RGB images, uint8 ``(h, w, 3)`` each.
        has_splits: Whether the rows are already those of one split.
    """

    labels: Labels
    class_names: tuple[str, ...]
    decode: Callable[[Sequence[int]], list[Array]]
    has_splits: bool


def open_source(source: str, split: Split) -> Catalogue:
    """Find the reader for ``source``: ``digits``, ``cifar10``, or a path.

    Raises:
        DataError: There is no such source, or it cannot be read.
        BackendError: A package that this kind of source needs is not installed.
    """
    if source == "digits":
        return _digits()
    if source == "cifar10":
        return _cifar10(split)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"No such file or folder, and not 'digits' or 'cifar10'. Received: {source}"
        )
    if path.suffix == ".npz":
        return _npz(path, source, split)
    if path.suffix == ".parquet":
        return _parquet(_files_of_split([path], split, source), source, split)
    if path.is_dir():
        parquets = sorted(path.rglob("*.parquet"))
        if parquets:
            return _parquet(_files_of_split(parquets, split, source), source, split)
        return _folder(path, source, split)
    raise DataError(
        "A data file must be .parquet or .npz; images come in a folder with one sub-folder per "
        f"class. Received: {source}"
    )


def optional(module: str, need: str) -> Any:
    """Import a package of the ``experiments`` extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f'{need} needs {module.split(".")[0]}: pip install "frostline[experiments]"'
        ) from error


def decode_image(data: bytes, where: str) -> Array:
    """Decode one encoded image to RGB, uint8 ``(h, w, 3)``.

    Raises:
        DataError: The bytes are no image, are cut short, or hold more than 8 bits per channel.
    """
    image_module = optional("PIL.Image", "Reading images")
    try:
        with image_module.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                # convert("RGB") would clip these to white without a word.
                raise DataError(f"{where}: only 8-bit images are read. Received: {image.mode}")
            return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
        reason = re.sub(r" <_io\.BytesIO.*>", "", str(error)) or type(error).__name__
        raise DataError(f"{where}: not a readable image ({reason})") from error


def _digits() -> Catalogue:
    bundle = optional("sklearn.datasets", "The data set 'digits'").load_digits()
    grey = np.rint(bundle.images * (255 / bundle.images.max())).astype(np.uint8)
    return Catalogue(
        labels=bundle.target.astype(np.int64),
        class_names=tuple(str(name) for name in bundle.target_names),
        decode=lambda rows: [np.repeat(grey[row, :, :, None], 3, axis=2) for row in rows],
        has_splits=False,
    )


def _cifar10(split: Split) -> Catalogue:
    try:
        from keras.datasets import cifar10
    except ImportError as error:
        raise BackendError(
            "The data set 'cifar10' is downloaded with Keras, which is not installed; or read "
            "it from a file: --data FOLDER_WITH_PARQUET"
        ) from error
    try:
        (x_train, y_train), (x_test, y_test) = cifar10.load_data()
    except Exception as error:  # no network, a proxy's page instead of the archive, full disk
        reason = first_line(error)
        raise DataError(
            f"CIFAR-10 cannot be downloaded here ({reason}); "
            "read it from a file instead: --data FOLDER_WITH_PARQUET"
        ) from error
    parts = {"train": [(x_train, y_train)], "test": [(x_test, y_test)]}
    chosen = parts.get(split, [*parts["train"], *parts["test"]])
    images = np.concatenate([np.asarray(x) for x, _ in chosen])
    labels = np.concatenate([np.asarray(y).reshape(-1) for _, y in chosen]).astype(np.int64)
    return Catalogue(
        labels=labels,
        class_names=_CIFAR10_NAMES,
        decode=lambda rows: [images[row] for row in rows],
        has_splits=True,
    )


def split_of_name(name: str) -> Split:
    """The split that a file or folder name tells; ``"all"`` when it tells none.

    Example:
        >>> split_of_name("cifar10-test"), split_of_name("data")
        ('test', 'all')
    """
    words = re.split(r"[^a-z]+", name.lower())
    for split in ("train", "test"):
        if any(word in _SPLIT_WORDS[split] for word in words):
            return "train" if split == "train" else "test"
    return "all"


def _files_of_split(files: list[Path], split: Split, source: str) -> list[Path]:
    """The files of one split, by name; all of them when no name tells a split."""
    told = {file: split_of_name(file.stem) for file in files}
    if split == "all" or set(told.values()) == {"all"}:
        return files
    chosen = [file for file in files if told[file] == split]
    if not chosen:
        names = ", ".join(file.name for file in files[:5])
        raise DataError(f"{source}: no file of the split {split!r}, by name. Received: {names}")
    # "test" and "validation" side by side: the better word wins, they are different samples.
    for word in _SPLIT_WORDS[split]:
        exact = [file for file in chosen if word in re.split(r"[^a-z]+", file.stem.lower())]
        if exact:
            return exact
    return chosen


def _parquet(files: list[Path], source: str, split: Split) -> Catalogue:
    """Hugging Face image data sets: ``image: struct<bytes, path>`` and an integer label."""
    parquet = optional("pyarrow.parquet", "Reading parquet files")
    labels: list[Labels] = []
    places: list[tuple[Any, str, int]] = []  # file, its name, first row of it in the catalogue
    names: tuple[str, ...] | None = None
    image_column = ""
    for file in files:
        shown = source if Path(source).suffix else f"{source.rstrip('/')}/{file.name}"
        try:
            handle = parquet.ParquetFile(file)
        except Exception as error:  # pyarrow's ArrowInvalid, OSError: truncated, not a parquet
            raise DataError(
                f"{shown}: not a readable parquet file ({first_line(error)})"
            ) from error
        image_column, label_column = _columns(handle.schema_arrow, shown)
        values, found = _parquet_labels(handle, label_column, shown)
        if names is not None and found != names:
            raise DataError(f"{shown}: its classes differ from those of {files[0].name}")
        names = found
        places.append((handle, shown, sum(map(len, labels))))
        labels.append(values)
    starts = np.array([start for _, _, start in places])

    def decode(rows: Sequence[int]) -> list[Array]:
        images: dict[int, Array] = {}
        owners = np.searchsorted(starts, np.asarray(rows, dtype=np.int64), side="right") - 1
        for owner in np.unique(owners):
            handle, shown, start = places[owner]
            inside = sorted({int(row) - start for row in np.asarray(rows)[owners == owner]})
            for row, data in _parquet_bytes(handle, image_column, inside, shown):
                images[row + start] = decode_image(data, f"{shown}, row {row}")
        return [images[int(row)] for row in rows]

    told = split != "all" and any(split_of_name(file.stem) != "all" for file in files)
    return Catalogue(
        labels=np.concatenate(labels), class_names=names or (), decode=decode, has_splits=told
    )


def _features(schema: Any) -> dict[str, Any]:
    """The Hugging Face description of the columns; empty when there is none."""
    try:
        text = (schema.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(text)["info"]["features"]
        return dict(features)
    except (ValueError, KeyError, TypeError):
        return {}


def _columns(schema: Any, shown: str) -> tuple[str, str]:
    """Names of the image column and the label column."""
    features = _features(schema)

    def pick(kind: str, known: tuple[str, ...]) -> str | None:
        typed = [name for name in schema.names if (features.get(name) or {}).get("_type") == kind]
        return next((name for name in (*known, *typed) if name in schema.names), None)

    image, label = pick("Image", _IMAGE_COLUMNS), pick("ClassLabel", _LABEL_COLUMNS)
    if image is None or label is None:
        missing = " and ".join(
            what for what, name in (("an image", image), ("a label", label)) if name is None
        )
        raise DataError(
            f"{shown}: no column with {missing}; expected one of {', '.join(_IMAGE_COLUMNS)} and "
            f"one of {', '.join(_LABEL_COLUMNS)}. Received: columns {', '.join(schema.names)}"
        )
    return image, label


def _parquet_labels(handle: Any, column: str, shown: str) -> tuple[Labels, tuple[str, ...]]:
    try:
        values = handle.read(columns=[column]).column(0).to_pylist()
    except Exception as error:  # damaged pages behind an intact footer
        raise DataError(
            f"{shown}: column {column!r} cannot be read ({first_line(error)})"
        ) from error
    names = (_features(handle.schema_arrow).get(column) or {}).get("names")
    if isinstance(names, dict):  # {"0": "airplane", ...} in older metadata
        names = [names[key] for key in sorted(names, key=int)]
    if names is None:
        return _encoded(values, f"{shown}, column {column!r}")
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise DataError(
                f"{shown}, row {row}: no label; labels are 0 to {len(names) - 1}. Received: {value}"
            )
    return np.array(values, dtype=np.int64), tuple(str(name) for name in names)


def _parquet_bytes(
    handle: Any, column: str, rows: list[int], shown: str
) -> list[tuple[int, bytes]]:
    """Encoded images of some rows; only the row groups that hold them are read."""
    found: list[tuple[int, bytes]] = []
    start = 0
    for group in range(handle.num_row_groups):
        count = handle.metadata.row_group(group).num_rows
        wanted = [row for row in rows if start <= row < start + count]
        if wanted:
            try:
                table = handle.read_row_group(group, columns=[column])
                cells = table.column(0).take([row - start for row in wanted]).to_pylist()
            except Exception as error:  # damaged pages behind an intact footer
                raise DataError(
                    f"{shown}: rows {start} to {start + count - 1} cannot be read "
                    f"({first_line(error)})"
                ) from error
            for row, cell in zip(wanted, cells, strict=True):
                data = cell.get("bytes") if isinstance(cell, dict) else cell
                if not isinstance(data, bytes):
                    raise DataError(f"{shown}, row {row}: holds no image bytes")
                found.append((row, data))
        start += count
    return found


def _folder(root: Path, source: str, split: Split) -> Catalogue:
    """One sub-folder per class, below ``train``/``test`` folders where there are such."""
    told = {child.name: split_of_name(child.name) for child in _subfolders(root)}
    has_splits = bool(told) and "all" not in told.values()
    tops = [root / n for n, s in told.items() if split in ("all", s)] if has_splits else [root]
    if not tops:
        raise DataError(f"{source}: no folder of the split {split!r}. Received: {', '.join(told)}")
    tops = tops if split == "all" else tops[:1]
    found = [
        (child.name, file)
        for top in tops
        for child in _subfolders(top)
        for file in sorted(child.rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    if not found:
        loose = any(file.suffix.lower() in SUFFIXES for file in root.iterdir())
        reason = "its images are not in one sub-folder per class" if loose else "no images in it"
        raise DataError(f"{reason}; expected FOLDER/CLASS/*.jpg|png|... Received: {source}")
    names = tuple(sorted({name for name, _ in found}))
    numbers = {name: number for number, name in enumerate(names)}

    def decode(rows: Sequence[int]) -> list[Array]:
        images = []
        for row in rows:
            file = found[row][1]
            shown = str(Path(source) / file.relative_to(root))
            try:
                data = file.read_bytes()
            except OSError as error:
                raise DataError(f"{shown}: cannot be read ({error.strerror})") from error
            images.append(decode_image(data, shown))
        return images

    return Catalogue(
        labels=np.array([numbers[name] for name, _ in found], dtype=np.int64),
        class_names=names,
        decode=decode,
        has_splits=has_splits and split != "all",
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _npz(path: Path, source: str, split: Split) -> Catalogue:
    """Arrays ``x``, ``y``, or ``x_train``, ``y_train``, ``x_test``, ``y_test``."""
    try:
        # Opened here: np.load leaves its own handle open when the archive is damaged.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not hasattr(archive, "files"):
                raise ValueError("one bare array")
            keys = list(archive.files)
            pairs = {
                "train": [("x_train", "y_train")],
                "test": [("x_test", "y_test"), ("x_val", "y_val")],
                "all": [("x_train", "y_train"), ("x_test", "y_test")],
            }[split]
            present = [(x, y) for x, y in pairs if x in keys and y in keys]
            has_splits = bool(present) and split != "all"
            if split != "all":
                present = present[:1]
            if not present and "x" in keys and "y" in keys:
                present = [("x", "y")]
            if not present:
                raise DataError(
                    f"{source}: no arrays x and y, nor {pairs[0][0]} and {pairs[0][1]}. "
                    f"Received: {', '.join(keys) or 'an empty archive'}"
                )
            images = np.concatenate([_as_rgb(archive[x], source, x) for x, _ in present])
            values = np.concatenate([_as_labels(archive[y], source, y) for _, y in present])
            named = archive["class_names"].tolist() if "class_names" in keys else None
    except DataError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error) or "pickle" in str(error):
            reason = "it holds pickled objects, which are never loaded; save plain number arrays"
        else:
            reason = f"not a readable .npz file ({first_line(error)})"
        raise DataError(f"{source}: {reason}") from error
    if len(images) != len(values):
        raise DataError(
            f"{source}: {len(images)} images but {len(values)} labels; they must be equally many."
        )
    if named is None:
        labels, names = _encoded(values.tolist(), source)
    else:
        labels, names = values.astype(np.int64), tuple(str(name) for name in named)
        if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(names):
            raise DataError(f"{source}: labels must be 0 to {len(names) - 1}, as class_names say.")
    return Catalogue(
        labels=labels,
        class_names=names,
        decode=lambda rows: [images[row] for row in rows],
        has_splits=has_splits,
    )


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
    whole = values.dtype.kind == "f" and bool(np.all(values == np.rint(values)))
    if values.ndim != 1 or not (values.dtype.kind in "uibUS" or whole):
        raise DataError(
            f"{source}: {key} must be integer labels of shape (n,), or one-hot rows. "
            f"Received: {values.shape}, {values.dtype}"
        )
    return values if values.dtype.kind in "US" else values.astype(np.int64)


def _encoded(values: list[Any], where: str) -> tuple[Labels, tuple[str, ...]]:
    """Number the distinct values in sorted order; their text is the class name."""
    if any(value is None for value in values):
        raise DataError(f"{where}, row {values.index(None)}: no label")
    distinct = sorted(set(values))
    numbers = {value: number for number, value in enumerate(distinct)}
    labels = np.array([numbers[value] for value in values], dtype=np.int64)
    return labels, tuple(str(value) for value in distinct)
