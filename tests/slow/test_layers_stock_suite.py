"""Keras' own test file of the stock layer, run against ours: an oracle we did not write."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest

from frostline.layers import BatchNormalization


def _load_stock_suite() -> types.ModuleType | None:
    """Import a private copy of Keras' test module whose ``layers.BatchNormalization`` is ours."""
    package = importlib.util.find_spec("keras.src.layers.normalization")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(next(iter(package.submodule_search_locations)), "batch_normalization_test.py")
    if not path.exists():
        return None
    from keras.src import layers

    substitute = types.ModuleType("layers_with_frostline")
    substitute.__dict__.update(vars(layers))
    substitute.BatchNormalization = BatchNormalization  # type: ignore[attr-defined]
    module = types.ModuleType("stock_batch_normalization_test")
    module.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    assert module.layers is layers
    module.layers = substitute  # type: ignore[attr-defined]
    module.BatchNormalization = BatchNormalization  # type: ignore[attr-defined]
    return module


@pytest.fixture(autouse=True, scope="module")
def _errors_as_keras_words_them() -> Iterator[None]:
    """Keras' test case turns off, for good, what names the layer in an error."""
    filtered = keras.config.is_traceback_filtering_enabled()
    yield
    if filtered:
        keras.config.enable_traceback_filtering()


_suite = _load_stock_suite()

if _suite is None:

    def test_stock_suite_is_available() -> None:
        pytest.skip(f"keras {keras.__version__} ships no test file for BatchNormalization")

else:
    StockSuite = next(
        value
        for name, value in vars(_suite).items()
        if name.startswith("BatchNormalization") and name.endswith("Test")
    )
