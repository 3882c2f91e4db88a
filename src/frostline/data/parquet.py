"""Hugging Face image data sets: parquet files with encoded images and integer labels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frostline.data.catalogue import (
    SPLIT_WORDS,
    Catalogue,
    Labels,
    Split,
    encoded,
    optional,
    split_of_name,
)
from frostline.data.decoding import decode_image
from frostline.data.reading import require_file, require_memory
from frostline.types import Array, DataError
from frostline.types.reasons import first_line

_IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "coarse_label", "cls")

#: A row's label as an object of Python, and its place in a list.
_BYTES_PER_LABEL = 64


def parquet_files(files: list[Path], source: str, split: Split) -> Catalogue:
    """Hugging Face image data sets: ``image: struct<bytes, path>`` and an integer label."""
    parquet = optional("pyarrow.parquet", "Reading parquet files")
    labels: list[Labels] = []
    places: list[tuple[Any, str, int]] = []  # file, its name, first row of it in the catalogue
    names: tuple[str, ...] | None = None
    image_column = ""
    for file in files:
        shown = source if Path(source).suffix else f"{source.rstrip('/')}/{file.name}"
        require_file(file)
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

    def decode(rows: Sequence[int], prepare: Callable[[Array], Array]) -> list[Array]:
        images: dict[int, Array] = {}
        owners = np.searchsorted(starts, np.asarray(rows, dtype=np.int64), side="right") - 1
        for owner in np.unique(owners):
            handle, shown, start = places[owner]
            inside = sorted({int(row) - start for row in np.asarray(rows)[owners == owner]})
            for row, data in _parquet_bytes(handle, image_column, inside, shown):
                images[row + start] = prepare(decode_image(data, f"{shown}, row {row}"))
        return [images[int(row)] for row in rows]

    named = split != "all" and any(split_of_name(file.stem) != "all" for file in files)
    return Catalogue(
        labels=np.concatenate(labels), class_names=names or (), decode=decode, has_splits=named
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
    require_memory(handle.metadata.num_rows * _BYTES_PER_LABEL, f"{shown}: its labels")
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
        return encoded(values, f"{shown}, column {column!r}")
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
            require_memory(handle.metadata.row_group(group).total_byte_size, f"{shown}: its rows")
            try:
                table = handle.read_row_group(group, columns=[column])
                cells = table.column(0).take([row - start for row in wanted]).to_pylist()
            except Exception as error:  # damaged pages behind an intact footer
                found_rows = f"rows {start} to {start + count - 1}"
                raise DataError(
                    f"{shown}: {found_rows} cannot be read ({first_line(error)})"
                ) from error
            for row, cell in zip(wanted, cells, strict=True):
                data = cell.get("bytes") if isinstance(cell, dict) else cell
                if not isinstance(data, bytes):
                    raise DataError(f"{shown}, row {row}: holds no image bytes")
                found.append((row, data))
        start += count
    return found


def files_of_split(files: list[Path], split: Split, source: str) -> list[Path]:
    """The files of one split, by name; all of them when no name tells a split."""
    splits = {file: split_of_name(file.stem) for file in files}
    if split == "all" or set(splits.values()) == {"all"}:
        return files
    chosen = [file for file in files if splits[file] == split]
    if not chosen:
        names = ", ".join(file.name for file in files[:5])
        raise DataError(f"{source}: no file of the split {split!r}, by name. Received: {names}")
    # "test" and "validation" side by side: the better word wins, they are different samples.
    for word in SPLIT_WORDS[split]:
        exact = [file for file in chosen if word in re.split(r"[^a-z]+", file.stem.lower())]
        if exact:
            return exact
    return chosen
