"""What every source of images becomes: labels of all rows, and a way to decode some of them.

A catalogue knows every row's label but decodes only the rows that are asked for, so that taking
200 of 50,000 JPEGs costs 200 decodings.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from frostline.types import Array, BackendError, DataError

Split = Literal["train", "test", "all"]
Labels = npt.NDArray[np.int64]

#: Words in file and folder names that tell the split, in order of preference.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val", "dev", "eval"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Catalogue:
    """Labels of all rows of a source, and a way to decode some of them.

    Attributes:
        labels: Class index of each row, int64, shape ``(rows,)``.
        class_names: One name per class index.
        decode: Row numbers and a function -> what the function makes of each row's RGB image,
            uint8 ``(h, w, 3)``. It is called as soon as an image is decoded.
        has_splits: Whether the rows are already those of one split.
    """

    labels: Labels
    class_names: tuple[str, ...]
    decode: Callable[[Sequence[int], Callable[[Array], Array]], list[Array]]
    has_splits: bool


def split_of_name(name: str) -> Split:
    """The split that a file or folder name tells; ``"all"`` when it tells none.

    Example:
        >>> split_of_name("cifar10-test"), split_of_name("data")
        ('test', 'all')
    """
    words = re.split(r"[^a-z]+", name.lower())
    for split in ("train", "test"):
        if any(word in SPLIT_WORDS[split] for word in words):
            return "train" if split == "train" else "test"
    return "all"


def encoded(values: list[Any], where: str) -> tuple[Labels, tuple[str, ...]]:
    """Number the distinct values in sorted order; their text is the class name."""
    if any(value is None for value in values):
        raise DataError(f"{where}, row {values.index(None)}: no label")
    kinds = {type(value) for value in values}
    if not (kinds <= {int, bool} or kinds in ({str}, {float})):
        raise DataError(
            f"{where}: labels must be whole numbers, or texts. "
            f"Received: {', '.join(sorted(kind.__name__ for kind in kinds))}"
        )
    if any(value != value for value in values):
        raise DataError(f"{where}: NaN is no label")
    distinct = sorted(set(values))
    numbers = {value: number for number, value in enumerate(distinct)}
    labels = np.array([numbers[value] for value in values], dtype=np.int64)
    return labels, tuple(str(value) for value in distinct)


def optional(module: str, need: str) -> Any:
    """Import a package of the ``experiments`` extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f'{need} needs {module.split(".")[0]}: pip install "frostline[experiments]"'
        ) from error
