"""Data sets that need no file: scikit-learn's digits, and CIFAR-10 as Keras downloads it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from frostline.data.catalogue import Catalogue, Split, optional
from frostline.types import BackendError, DataError
from frostline.types.reasons import first_line

# fmt: off
_CIFAR10_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
# fmt: on


def digits() -> Catalogue:
    """Return 1797 handwritten digits, 8 x 8, from scikit-learn."""
    bundle = optional("sklearn.datasets", "The data set 'digits'").load_digits()
    grey = np.rint(bundle.images * (255 / bundle.images.max())).astype(np.uint8)
    return Catalogue(
        labels=bundle.target.astype(np.int64),
        class_names=tuple(str(name) for name in bundle.target_names),
        decode=lambda rows, prepare: [
            prepare(np.repeat(grey[row, :, :, None], 3, axis=2)) for row in rows
        ],
        has_splits=False,
    )


def cifar10(split: Split) -> Catalogue:
    """Return CIFAR-10, downloaded by Keras where it is not there yet.

    Raises:
        BackendError: Keras is not installed.
        DataError: It cannot be downloaded.
    """
    try:
        cifar10: Any = importlib.import_module("keras.datasets").cifar10
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
        decode=lambda rows, prepare: [prepare(images[row]) for row in rows],
        has_splits=True,
    )
