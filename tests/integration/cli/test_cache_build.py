"""``frostline cache build`` in one process; tests/slow/test_scale.py is about Ray."""

import sys

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.cli import main
from frostline.cli.application import spread_values


@pytest.fixture
def model_file(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(name="cut"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )
    fl.freeze(model, "cut")
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def test_features_of_a_file_are_kept_and_exported(model_file, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    x = np.random.default_rng(0).normal(size=(90, 8, 8, 3)).astype(np.float32)
    y = np.arange(90) % 3
    np.savez(tmp_path / "data.npz", x=x, y=y)
    words = [
        "cache", "build", str(model_file), str(tmp_path / "data.npz"), "--cache",
        str(tmp_path / "cache"), "--engine", "native", "--at", "cut", "--export",
        str(tmp_path / "f.parquet"),
    ]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "90 samples" in out
    assert "f.parquet: 90 rows" in out
    table = parquet.read_table(tmp_path / "f.parquet")
    model = keras.saving.load_model(model_file)
    prefix = fl.split(model, "cut").prefix
    np.testing.assert_allclose(
        np.array(table["features"].to_pylist()), keras.ops.convert_to_numpy(prefix(x)), atol=1e-5
    )
    np.testing.assert_array_equal(table["label"].to_numpy(), y)
    assert main(words) == 2  # the table is there
    assert "f.parquet exists" in capsys.readouterr().err


def test_a_precision_that_the_engine_has_not(model_file, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 8, 8, 3), np.float32), y=np.zeros(4))
    words = ["cache", "build", str(model_file), str(tmp_path / "data.npz"), "--cache",
             str(tmp_path / "cache"), "--engine", "onnxruntime", "--precision", "bfloat16",
             "--at", "cut"]  # fmt: skip
    assert main(words) == 2
    assert "it has no bfloat16. Leave precision= out" in capsys.readouterr().err
    assert main([*words, "--ray"]) == 2
    assert "features in bfloat16 are computed here only" in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("*/shards"))


def test_an_address_where_no_cluster_answers(model_file, tmp_path, capsys, monkeypatch):
    library = pytest.importorskip("ray")
    monkeypatch.setattr(library, "is_initialized", lambda: False)
    assert main(["cache", "build", str(model_file), "digits", "--ray", "127.0.0.1:1"]) == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err


def test_the_address_may_be_left_out():
    assert spread_values(["m", "d", "--ray"]) == ["m", "d", "--ray", "local"]
    assert spread_values(["--ray", "h:1", "m", "d"]) == ["--ray", "h:1", "m", "d"]


def test_without_pyarrow_an_export_is_refused_before_anything_is_computed(
    model_file, tmp_path, capsys, monkeypatch
):
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 8, 8, 3), np.float32))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    words = [
        "cache", "build", str(model_file), str(tmp_path / "data.npz"), "--cache",
        str(tmp_path / "cache"), "--at", "cut", "--export", str(tmp_path / "f.arrow"),
    ]  # fmt: skip
    assert main(words) == 2
    assert "needs pyarrow" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
