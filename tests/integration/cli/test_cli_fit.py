"""``frostline fit``: a compiled model file in, a trained one out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from frostline.cli import main


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu", trainable=False),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.save("not-compiled.keras")
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.save("model.keras")
    rng = np.random.default_rng(0)
    np.savez("data.npz", x=rng.normal(size=(40, 6)), y=rng.integers(0, 2, 40))
    return tmp_path


def weights(path: str) -> list[Any]:
    return [np.asarray(w) for w in keras.saving.load_model(path).get_weights()]


def test_fit_writes_what_keras_would_train(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "model.keras", "data.npz", "-o", "out.keras", "--epochs", "2",
               "--batch-size", "8", "--seed", "5", "--learning-rate", "0.1"]  # fmt: skip
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "out.keras: 40 samples, 2 epoch(s): accuracy" in captured.out
    assert "40 samples, 40 computed" in captured.err
    model = keras.saving.load_model("model.keras")
    model.optimizer.learning_rate = 0.1
    keras.utils.set_random_seed(5)
    with np.load("data.npz", allow_pickle=False) as data:
        model.fit(data["x"], data["y"], epochs=2, batch_size=8, verbose=0)
    for mine, theirs in zip(weights("out.keras"), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, np.asarray(theirs), atol=1e-5)
    assert main(command) == 2  # it exists now
    assert "--force" in capsys.readouterr().err


def frozen(path: Path, *flags: bool) -> str:
    """The model with its two layers thawed or not, in a file."""
    model = keras.saving.load_model("model.keras")
    for layer, flag in zip(model.layers, flags, strict=True):
        layer.trainable = flag
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.save(path)
    return str(path)


def test_the_next_run_finds_its_features(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((6,)), *(keras.layers.Dense(n) for n in (8, 5, 2))])
    for name, trainable in (("head", 2), ("more", 1)):
        for number, layer in enumerate(model.layers):
            layer.trainable = number >= trainable
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.save(f"{name}.keras")
    assert main(["fit", "head.keras", "data.npz", "-o", "a.keras", "--thaw-later", "1"]) == 0
    assert capsys.readouterr().err.count("40 samples, 40 computed") == 2
    assert main(["fit", "more.keras", "data.npz", "-o", "b.keras"]) == 0
    assert "40 samples, 0 computed" in capsys.readouterr().err
    assert main(["fit", "head.keras", "data.npz", "-o", "c.keras", "--thaw-later", "9"]) == 2
    assert "Received: 9" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::UserWarning")
def test_nothing_frozen_trains_plainly_and_says_so(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thawed = frozen(files / "thawed.keras", True, True)
    shown = warnings.showwarning
    assert main(["fit", thawed, "data.npz", "-o", "out.keras"]) == 0
    assert warnings.showwarning is shown
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line.lower()]
    expected = "warning: fl.fit runs plain model.fit: nothing in the model is frozen"
    assert any(line.startswith(expected) for line in told)
    assert not (files / "cache").exists()
    assert np.abs(weights("out.keras")[0] - weights(thawed)[0]).max() > 0


def test_everything_frozen_is_an_error_that_says_what_to_do(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = frozen(files / "still.keras", False, False)
    assert main(["fit", still, "data.npz", "-o", "out.keras"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: everything in the model is frozen")
    assert "fl.unfreeze(model, since=...)" in error
    assert not (files / "out.keras").exists()


def test_errors_take_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "not-compiled.keras", "data.npz", "-o", "out.keras"]) == 2
    assert "is not compiled" in capsys.readouterr().err
    tiny = ["fit", "model.keras", "data.npz", "-o", "out.keras", "--max-gb", "1e-8"]
    assert main(tiny) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "beyond the limit" in error
    assert not (files / "out.keras").exists()
