"""Model files: read with one line of complaint, written whole or not at all."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.adapters.keras.files import load_model, save_model
from frostline.types import ModelError, OutputError

L = keras.layers
X = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


def converted(**compile_as: Any) -> Any:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.BatchNormalization(name="bn")])
    if compile_as:
        model.compile(**compile_as)
    return fl.convert(model, policy="batch")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_round_trip_keeps_our_layer_and_the_outputs(tmp_path: Path, suffix: str) -> None:
    model = converted(optimizer="adam", loss=keras.losses.MeanSquaredError())
    model.train_on_batch(X, X[:, :3])
    save_model(model, tmp_path / f"m{suffix}")
    loaded = load_model(str(tmp_path / f"m{suffix}"))
    assert fl.sites(loaded) == fl.sites(model)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(v) for v in (ours, theirs)))
    for each in (loaded, model):
        each.train_on_batch(X, X[:, :3])  # and it goes on from there
    for ours, theirs in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_h5_whose_optimizer_state_fits_other_variables(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = converted(optimizer="adam", loss=keras.losses.MeanSquaredError())
    model.train_on_batch(X, X[:, :3])
    model.layers[0].trainable = False  # after compile: the file has slots of Dense all the same
    save_model(model, tmp_path / "m.h5")
    with caplog.at_level(logging.WARNING, "frostline"):
        loaded = load_model(str(tmp_path / "m.h5"))
    assert "its optimizer starts anew" in caplog.text
    loaded.train_on_batch(X, X[:, :3])
    for ours, theirs in zip(
        loaded.layers[0].get_weights(), model.layers[0].get_weights(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_h5_whose_compile_state_keras_cannot_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = converted(optimizer="sgd", loss="mse")  # Keras writes the name, then cannot find it
    save_model(model, tmp_path / "m.h5")
    with pytest.raises(ValueError, match="mse"):
        keras.saving.load_model(tmp_path / "m.h5")
    with caplog.at_level(logging.WARNING, "frostline"):
        loaded = load_model(str(tmp_path / "m.h5"))
    assert "without its compile state" in caplog.text
    assert not loaded.compiled
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """Objects that conftest froze are let go for a test."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
@pytest.mark.parametrize("broken", [False, True])
def test_what_was_found_in_use_is_left_alone_while_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    model, frozen, around = converted(), [], list(gc.callbacks)
    save_model(model, tmp_path / "m.keras")
    real = keras.saving.load_model

    def load(*given: Any, **ways: Any) -> Any:
        gc.collect()
        frozen.append(gc.get_freeze_count())
        if broken:
            raise ValueError("broken")
        return real(*given, **ways)

    monkeypatch.setattr(keras.saving, "load_model", load)
    with pytest.raises(ModelError, match="broken") if broken else nullcontext():
        load_model(str(tmp_path / "m.keras"))
    assert min(frozen) > 1000
    assert gc.get_freeze_count() == 0
    assert gc.callbacks == around


def test_truncated_files(tmp_path: Path) -> None:
    save_model(converted(), tmp_path / "m.keras")
    whole = (tmp_path / "m.keras").read_bytes()
    for share in (0, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.keras").write_bytes(whole[:share])
        with pytest.raises(ModelError, match=r"cut\.keras: not a whole \.keras file") as caught:
            load_model(str(tmp_path / "cut.keras"))
        assert "\n" not in str(caught.value)
    (tmp_path / "cut.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ModelError, match=r"cut\.h5: not a readable Keras model") as caught:
        load_model(str(tmp_path / "cut.h5"))
    assert "module:function" not in str(caught.value)


class Mine(L.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("make", [lambda: L.Lambda(lambda x: x), Mine], ids=["lambda", "custom"])
def test_code_in_files_is_refused_and_a_way_out_named(
    tmp_path: Path, suffix: str, make: Any
) -> None:
    path = tmp_path / f"m{suffix}"
    save_model(keras.Sequential([keras.Input((4,)), make()]), path)
    with pytest.raises(ModelError, match="pass module:function") as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.keras", "no such model file"),
        ("weights.pt", "no such model file"),
        (".", "is a folder"),
        ("no_such_module_xyz:build", "cannot import 'no_such_module_xyz'"),
        ("json:no_such", "has no function 'no_such'"),
        ("time:time", r"not a keras\.Model\. Received: float"),
        ("json:loads", "the function failed"),
    ],
)
def test_sources_that_are_no_model(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


def test_function_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_net_for_a_test.py").write_text(
        "import keras\n"
        "def build():\n"
        "    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert load_model("my_net_for_a_test:build").output_shape == (None, 2)


# --- writing --------------------------------------------------------------------------------------


def test_a_file_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        save_model(converted(), path)
    assert path.read_bytes() == b"precious"
    save_model(converted(), path, overwrite=True)
    assert load_model(str(path)).built


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "m.keras"
    path.write_bytes(b"precious")

    def fails(_model: Any, target: Any) -> None:
        target.write(b"half")
        raise failure

    monkeypatch.setattr("frostline.adapters.keras.files.saving_lib.save_model", fails)
    expected = OutputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save_model(converted(), path, overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["m.keras"]
    assert path.read_bytes() == b"precious"


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save_model(converted(), tmp_path / "missing" / "m.keras")
    if os.geteuid() == 0:
        return  # root may write anywhere
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot write"):
        save_model(converted(), tmp_path / "locked" / "m.keras")


def test_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.keras or \.h5"):
        save_model(converted(), tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())
