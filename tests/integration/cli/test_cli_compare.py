"""``frostline compare`` end to end: a model file and data in, a table, JSON and a page out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from frostline.cli import main

L = keras.layers


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(4, name="d0"), L.BatchNormalization(name="bn0"), L.ReLU(),
         L.Dense(4, name="d1"), L.BatchNormalization(name="bn1"),
         L.Dense(2, activation="softmax", name="head")]
    )  # fmt: skip
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.save("model.keras")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype("float32")
    np.savez("data.npz", x=x, y=(x[:, 0] > 0).astype(int))
    return tmp_path


COMMAND = ["compare", "model.keras", "data.npz", "--until", "d1", "--epochs", "1", "--seeds", "1",
           "--treatments", "all-bn-frozen", "thawed", "--batch-size", "16"]  # fmt: skip


def test_a_table_and_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (files / "model.keras").read_bytes()
    assert main([*COMMAND, "-o", "found.html", "--validation-split", "0.5"]) == 0
    captured = capsys.readouterr()
    assert "all-bn-frozen" in captured.out
    assert "thawed: the same as 'now' here" in captured.out
    assert "validation 30 samples" in captured.out
    page = (files / "found.html").read_text()
    assert "<svg" in page
    assert "fl.freeze(model, sites=&#34;all&#34;)" in page
    assert (files / "model.keras").read_bytes() == before
    assert main([*COMMAND, "-o", "found.html"]) == 2  # it exists now
    assert "--force" in capsys.readouterr().err


def test_json_and_validation_data_of_their_own(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del files
    assert main([*COMMAND, "--format", "json", "--validation", "data.npz", "--metric", "loss"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["samples"], found["epochs"]) == ("loss", 60, 1)
    assert {row["name"] for row in found["rows"]} == {"now", "all-bn-frozen"}
    assert found["line"] is None or found["winner"]


def test_what_cannot_be_is_said(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del files
    for extra, text in (
        (["--optimizer", "SGD"], "leave --loss and --optimizer out"),
        (["-o", "found.pdf"], "found.pdf"),
        (["--treatments", "melt"], "momentum-by-steps"),
        (["--seeds", "99999999999"], "less than or equal to 1000"),  # it listed them all, in 12 GB
    ):
        assert main([*COMMAND, *extra]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.skipif(os.environ["KERAS_BACKEND"] != "torch", reason="torch has its own process")
def test_a_torch_module_with_an_optimizer_by_name(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "compared_nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4),\n"
        "        nn.BatchNorm1d(4), nn.Linear(4, 2))\n"
    )
    monkeypatch.setattr(sys, "path", [str(files), *sys.path])
    words = [COMMAND[0], "compared_nets:build", *COMMAND[2:]]
    words[words.index("d1")] = "3"
    assert main(words) == 2
    assert "--optimizer SGD" in capsys.readouterr().err
    assert main([*words, "--optimizer", "SGD", "--learning-rate", "0.1"]) == 0
    assert "backend torch; trains from 3" in capsys.readouterr().out
