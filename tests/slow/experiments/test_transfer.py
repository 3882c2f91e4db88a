"""The transfer experiment against stock Keras by hand; its files; what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tables

from frostline import cli
from frostline.experiments import figures, transfer
from frostline.types import DataError, OutputError

pytestmark = pytest.mark.once  # that fl.fit is model.fit on every backend is tested with fl.fit

SETTINGS = transfer.TransferSettings(
    backbone="tiny",
    data="digits",
    classes=("3", "8"),
    train_per_class=16,
    test_per_class=12,
    image_size=16,
    boundary="block2a_conv",
    head_epochs=2,
    epochs=2,
    batch_size=8,
    head_learning_rate=0.01,
    learning_rate=0.01,
    weights=None,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "all"


@pytest.fixture(scope="module")
def result(folder: Path) -> transfer.TransferResult:
    """Run every row once, written to a folder."""
    return transfer.run_transfer(SETTINGS, output=folder)


def by_hand() -> list[float]:
    """Losses and accuracies of the patched row, with stock layers and ``model.fit`` alone."""
    import keras

    from frostline.data import image_sets
    from frostline.experiments import backbones

    data = []
    for split, count in (("train", 16), ("test", 12)):
        images = image_sets.load(
            "digits", split=split, classes=("3", "8"), per_class=count, image_size=16, seed=0
        )  # type: ignore[arg-type]
        data.append((backbones.preprocess("tiny", images.images), images.labels.astype("int32")))
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = backbones.build("tiny", image_size=16, classes=2, weights=None)
    names = [layer.name for layer in model.layers]
    found: list[float] = []
    for first, optimizer in (
        ("head", keras.optimizers.RMSprop(0.01)),
        ("block2a_conv", keras.optimizers.SGD(0.01, momentum=0.9)),
    ):
        for number, layer in enumerate(model.layers):
            layer.trainable = number >= names.index(first)
        model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        keras.utils.set_random_seed(0)
        logs = model.fit(
            *data[0], batch_size=8, epochs=2, validation_data=data[1], validation_batch_size=8,
            verbose=0,
        ).history  # fmt: skip
        for epoch in range(2):
            found += [logs[name][epoch] for name in ("loss", "accuracy", "val_loss")]
            found += [logs["val_accuracy"][epoch]]
    return found


def test_the_patched_row_is_stock_keras(result: transfer.TransferResult) -> None:
    row = next(row for row in result.rows if row.row.name == "patched")
    have = [
        number
        for epoch in row.epochs
        for number in (
            epoch.train_loss, epoch.train_accuracy, epoch.test_loss, epoch.test_accuracy
        )
    ]  # fmt: skip
    np.testing.assert_allclose(have, by_hand(), rtol=2e-4, atol=1e-5)


def test_rows_differ_where_they_should(result: transfer.TransferResult) -> None:
    rows = {row.row.name: row for row in result.rows}
    assert list(rows) == list(transfer.ROWS)
    losses = {name: [e.test_loss for e in row.epochs] for name, row in rows.items()}
    for name in ("all-bn-frozen", "recalibrate", "ramp"):  # the head is trained alike
        np.testing.assert_allclose(losses[name][:2], losses["patched"][:2], rtol=1e-4)
        assert abs(losses[name][-1] - losses["patched"][-1]) > 1e-5
    assert abs(losses["unpatched"][0] - losses["patched"][0]) > 1e-5
    assert rows["all-bn-frozen"].sites_frozen == rows["patched"].sites == 5
    assert {rows[n].sites_frozen for n in ("unpatched", "patched", "recalibrate", "ramp")} == {3}
    assert [e.stage for e in rows["ramp"].epochs] == ["head"] * 2 + ["fine-tuning"] * 2
    frozen = rows["all-bn-frozen"].phases
    assert frozen["0"].loss == pytest.approx(frozen["1"].loss, rel=1e-5)  # no gap without batches


def test_the_files_say_what_was_measured(result: transfer.TransferResult, folder: Path) -> None:
    content = json.loads((folder / "results.json").read_text())
    assert content["experiment"] == "transfer"
    assert content["settings"]["boundary"] == "block2a_conv"
    for row, kept in zip(result.rows, content["rows"], strict=True):
        assert kept["test_accuracy"]["fine-tuning"] == row.epochs[-1].test_accuracy
        assert kept["phases"]["1"]["accuracy"] == row.phases["1"].metrics["accuracy"]
    table = tables.KINDS["transfer"]([content])
    for row in result.rows:
        seconds = sum(row.seconds.values())
        head, end = row.accuracy("head"), row.accuracy("fine-tuning")
        assert f"| `{row.row.name}` | {head:.3f} | {end:.3f} | " in table
        assert f"| {seconds:.0f} |" in table
    assert "3, 8; 16 training images each; 24 test images; fine-tuned from `block2a_conv`" in table
    lines = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    assert len(lines) == 5 * 4
    assert float(lines[-1]["test_loss"]) == pytest.approx(result.rows[-1].epochs[-1].test_loss)
    assert (folder / "figure.png").read_bytes() == figures.draw(result, suffix=".png")
    assert b"fine-tuned from" in (folder / "figure.svg").read_bytes()
    assert {path.name for path in result.files} == {path.name for path in folder.iterdir()}


def test_a_sentence_says_what_a_row_shows(result: transfer.TransferResult) -> None:
    row = result.rows[0]
    shown = transfer.describe(row)
    assert f"{row.epochs[1].test_accuracy:.1%} (head)" in shown
    assert f"{row.epochs[-1].test_accuracy:.1%} (fine-tuned)" in shown
    rising = replace(row, epochs=(*row.epochs[:3], replace(row.epochs[3], test_accuracy=2.0)))
    assert "rises" in transfer.describe(rising)


def test_an_interruption_keeps_the_finished_rows(
    result: transfer.TransferResult, tmp_path: Path, monkeypatch: Any
) -> None:
    def row(row: transfer.Row, *_: Any) -> transfer.RowResult:
        if row.name == "ramp":
            raise KeyboardInterrupt
        return next(each for each in result.rows if each.row is row)

    monkeypatch.setattr(transfer, "_run_row", row)
    settings = replace(SETTINGS, rows=("patched", "ramp", "recalibrate"))
    found = transfer.run_transfer(settings, output=tmp_path / "run")
    assert found.interrupted
    assert [each.row.name for each in found.rows] == ["patched"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["interrupted"]


def test_a_resumed_run_is_an_uninterrupted_one(
    result: transfer.TransferResult, tmp_path: Path, monkeypatch: Any
) -> None:
    shorter = replace(SETTINGS, rows=("patched",))
    transfer.run_transfer(shorter, output=tmp_path, resume=True)  # nothing there: starts anew
    real, ran = transfer._run_row, []

    def row(row: transfer.Row, *rest: Any) -> transfer.RowResult:
        ran.append(row.name)
        return real(row, *rest)

    monkeypatch.setattr(transfer, "_run_row", row)
    longer = replace(SETTINGS, rows=("recalibrate", "patched"))
    found = transfer.run_transfer(longer, output=tmp_path, resume=True)
    assert ran == ["recalibrate"]
    assert [each.row.name for each in found.rows] == ["patched", "recalibrate"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["settings"]["rows"] == ["patched", "recalibrate"]
    whole = {each.row.name: each for each in result.rows}
    for have, kept in zip(found.rows, content["rows"], strict=True):
        want = [epoch.test_loss for epoch in whole[have.row.name].epochs]
        np.testing.assert_allclose([e.test_loss for e in have.epochs], want, rtol=1e-5)
        np.testing.assert_allclose([e["test_loss"] for e in kept["epochs"]], want, rtol=1e-5)
        assert have.phases.samples == 24
    with pytest.raises(DataError, match=r"learning_rate 0\.5 \(the file: 0\.01\)"):
        transfer.run_transfer(replace(longer, learning_rate=0.5), output=tmp_path, resume=True)
    with pytest.raises(DataError, match="test images"):
        transfer.run_transfer(replace(longer, seed=1), output=tmp_path, resume=True)
    assert json.loads((tmp_path / "results.json").read_text()) == content


def test_what_is_no_result_is_not_continued(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"experiment": "overfit", "schema_version": 1}', '{"experiment": 1}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(DataError, match="cannot be continued"):
            transfer.run_transfer(SETTINGS, output=tmp_path, resume=True)
        assert (tmp_path / "results.json").read_text() == text
    with pytest.raises(DataError, match="does not go with force"):
        transfer.run_transfer(SETTINGS, output=tmp_path, resume=True, force=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"test_per_class": 0}, "test_per_class must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"head_learning_rate": float("nan")}, "head_learning_rate must be above 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"rows": ("magic",)}, "rows must be some of unpatched"),
        ({"rows": ("ramp", "ramp")}, "named twice"),
    ],
    ids=["epochs", "test", "rate", "head-rate", "momentum", "unknown", "twice"],
)
def test_settings_that_cannot_be_run_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        transfer.run_transfer(replace(SETTINGS, **change))


def test_a_folder_with_results_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(OutputError, match="--force"):
        transfer.run_transfer(SETTINGS, output=tmp_path)


def test_the_command_runs_without_a_download_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "experiment transfer --data digits --backbone tiny --weights none --classes 3 8 "
    words += "--image-size 16 --train-per-class 16 --test-per-class 12 --batch-size 8 "
    words += f"--head-epochs 1 --epochs 1 --rows patched -o {tmp_path / 'run'}"
    assert cli.main(words.split()) == 0
    first = capsys.readouterr()
    assert "epoch 2/2 (fine-tuning)" in first.err
    assert "test accuracy" in first.out
    assert cli.main(words.split()) == 2
    assert "already holds" in capsys.readouterr().err
    assert cli.main([*words.split(), "--resume"]) == 0
    again = capsys.readouterr()
    assert again.err == ""  # nothing was trained
    assert again.out == first.out
