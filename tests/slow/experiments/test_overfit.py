"""The overfit experiment against stock Keras by hand; its files; what an interruption leaves."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from frostline.data import files
from frostline.experiments import figures, overfit, records
from frostline.experiments.run import Silent
from frostline.experiments.settings import data_name
from frostline.types import DataError, ModelError, OutputError, PhaseRow, PhaseTable
from frostline.types.report import Report

SETTINGS = overfit.OverfitSettings(
    backbone="tiny",
    data="digits",
    classes=("3", "8"),
    per_class=16,
    image_size=32,
    boundary=0.5,
    rows=("batch", "inference"),
    epochs=2,
    batch_size=8,
    learning_rate=0.02,
    weights=None,
)


def numbers(row: overfit.RowResult) -> list[float]:
    """All that a row measured, without the times."""
    found: list[float] = []
    for epoch in row.epochs:
        found += [epoch.train_loss, epoch.train_accuracy, epoch.phase0_loss]
        found += [epoch.phase0_accuracy, epoch.phase1_loss, epoch.phase1_accuracy]
    for phase in row.phases.rows:
        found += [float(phase.loss or 0.0), *phase.metrics.values()]
    return found


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> overfit.OverfitResult:
    """Run every row once, written to a folder."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    return overfit.run_overfit(replace(SETTINGS, rows=tuple(overfit.ROWS)), output=folder)


def by_hand(row: str) -> dict[str, float]:
    """The row's last epoch with stock layers and stock Keras only."""
    import keras

    from frostline.data import image_sets
    from frostline.experiments import backbones

    data = image_sets.load(
        SETTINGS.data, classes=SETTINGS.classes, per_class=SETTINGS.per_class,
        image_size=SETTINGS.image_size, seed=SETTINGS.seed,
    )  # fmt: skip
    x = np.asarray(backbones.preprocess(SETTINGS.backbone, data.images), dtype=np.float32)
    y = data.labels.astype(np.int32)
    keras.utils.clear_session()
    keras.utils.set_random_seed(SETTINGS.seed)
    model = backbones.build(SETTINGS.backbone, image_size=SETTINGS.image_size, classes=2,
                            weights=SETTINGS.weights)  # fmt: skip
    leaves = [layer for layer in model.layers if not getattr(layer, "layers", None)]
    assert leaves == model.layers, "the test freezes by position, so the model must be flat"
    if row != "none-frozen":
        for layer in leaves[: round(0.5 * len(leaves))]:
            layer.trainable = False
    if row == "all-bn-frozen":
        for layer in leaves:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
    model.compile(
        keras.optimizers.SGD(SETTINGS.learning_rate, momentum=SETTINGS.momentum),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    keras.utils.set_random_seed(SETTINGS.seed)
    rng = np.random.default_rng(SETTINGS.seed)
    for _ in range(SETTINGS.epochs):
        order = rng.permutation(len(y))
        logs = model.fit(
            x[order], y[order], batch_size=SETTINGS.batch_size, shuffle=False, verbose=0,
            validation_data=(x, y),
        ).history  # fmt: skip
    return {name: values[0] for name, values in logs.items()}


@pytest.mark.parametrize("row", ["inference", "none-frozen", "all-bn-frozen"])
def test_a_row_is_what_stock_keras_does(row: str, result: overfit.OverfitResult) -> None:
    # Keras 3 freezes as the `inference` row does, so stock layers are an independent oracle.
    expected = by_hand(row)
    found = next(r for r in result.rows if r.row.name == row).epochs[-1]
    assert found.train_loss == pytest.approx(expected["loss"], rel=2e-4)
    assert found.phase0_loss == pytest.approx(expected["val_loss"], rel=2e-3)
    assert found.phase0_accuracy == pytest.approx(expected["val_accuracy"], abs=1e-6)


def test_rows_differ_where_they_should(result: overfit.OverfitResult) -> None:
    rows = {row.row.name: row for row in result.rows}
    assert tuple(rows) == tuple(overfit.ROWS)
    sites = rows["batch"].sites
    assert 0 < rows["batch"].sites_frozen < sites
    assert rows["none-frozen"].sites_frozen == 0
    assert rows["none-frozen"].boundary is None
    assert rows["all-bn-frozen"].sites_frozen == sites
    assert rows["batch"].boundary == rows["inference"].boundary is not None
    # In training, batch and update are the same computation: only what is stored differs.
    same = [(e.train_loss, f.train_loss) for e, f in zip(
        rows["batch"].epochs, rows["update"].epochs, strict=True)]  # fmt: skip
    for batch, update in same:
        assert batch == pytest.approx(update, rel=1e-4)
    assert rows["batch"].epochs[-1].phase0_loss != pytest.approx(
        rows["update"].epochs[-1].phase0_loss, rel=1e-5
    )
    assert rows["inference"].epochs[0].train_loss != pytest.approx(same[0][0], rel=1e-3)
    # Every BN frozen on stored statistics: the two phases are one function.
    last = rows["all-bn-frozen"].phases
    assert last["1"].loss == pytest.approx(last["0"].loss, rel=1e-5)


def test_phases_agree_with_the_curves(result: overfit.OverfitResult) -> None:
    for row in result.rows:
        last = row.epochs[-1]
        if row.row.recalibrate:  # the curves end before the statistics were measured anew
            assert row.phases["0"].loss != pytest.approx(last.phase0_loss, rel=1e-3)
        else:
            assert row.phases["0"].loss == pytest.approx(last.phase0_loss, rel=1e-4)
        assert row.phases["1"].loss == pytest.approx(last.phase1_loss, rel=1e-4)
        assert row.phases["1"].metrics["accuracy"] == pytest.approx(last.phase1_accuracy)
        assert row.phases.samples == 32
        assert all(phase.outputs is None for phase in row.phases.rows)


def test_rows_do_not_influence_each_other(result: overfit.OverfitResult) -> None:
    alone = overfit.run_overfit(replace(SETTINGS, rows=("inference",))).rows[0]
    after_others = next(row for row in result.rows if row.row.name == "inference")
    np.testing.assert_allclose(numbers(alone), numbers(after_others), rtol=1e-4, atol=1e-6)


def test_files(result: overfit.OverfitResult) -> None:
    folder = result.files[0].parent
    names = {"results.json", "history.csv", "figure.png", "figure.svg"}
    assert {path.name for path in folder.iterdir()} == names  # and no temporary file
    assert {path.name for path in result.files} == names
    found = json.loads((folder / "results.json").read_text())
    assert found["schema_version"] == records.SCHEMA_VERSION
    assert found["interrupted"] is False
    assert found["settings"]["optimizer"] == "sgd"
    assert found["settings"]["boundary"] == 0.5
    assert found["selection"]["classes"] == ["3", "8"]
    assert len(found["selection"]["indices"]) == 32
    assert found["environment"]["versions"]["keras"]
    assert found["environment"]["cores"] >= 1
    assert [row["name"] for row in found["rows"]] == list(overfit.ROWS)
    for plain, row in zip(found["rows"], result.rows, strict=True):
        assert plain["phases"]["1"]["loss"] == row.phases["1"].loss
        assert set(plain["phases"]["0"]) == {"loss", "accuracy", "auc"}
        assert len(plain["epochs"]) == SETTINGS.epochs
    with (folder / "history.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(overfit.ROWS) * SETTINGS.epochs
    assert {line["policy"] for line in lines} == set(overfit.ROWS)
    first = result.rows[0].epochs[0]
    assert float(lines[0]["val_accuracy"]) == pytest.approx(first.phase0_accuracy)
    assert float(lines[0]["phase1_loss"]) == pytest.approx(first.phase1_loss)


def test_each_trained_network_is_diagnosed_when_asked(tmp_path: Path) -> None:
    settings = replace(SETTINGS, rows=("update", "all-bn-frozen"), epochs=1)
    done = overfit.run_overfit(settings, output=tmp_path / "run", diagnosed=True)
    found = json.loads((tmp_path / "run" / records.DIAGNOSIS).read_text())
    assert list(found["rows"]) == ["update", "all-bn-frozen"]
    for row in done.rows:
        assert row.report is not None
        name = f"diagnosis-{row.row.name}"
        page, plain = (tmp_path / "run" / f"{name}{ending}" for ending in (".html", ".json"))
        assert {page, plain} < set(done.files)
        assert page.read_text().lstrip().startswith("<!")
        read = Report.from_dict(json.loads(plain.read_text()))
        assert read.verdict == row.report.verdict == found["rows"][row.row.name]["verdict"]
        # The report is about the images and weights that the table is about.
        probe = row.report.measurement.probes["inference"]  # type: ignore[union-attr]
        assert probe.loss == pytest.approx(row.phases["0"].loss, rel=1e-4)
    gap = found["rows"]["all-bn-frozen"]["gap_in_loss"]
    assert abs(gap["estimate"]) < 1e-5


def test_defaults_are_recorded_as_what_was_used() -> None:
    settings = overfit.resolved(overfit.OverfitSettings(backbone="resnet50", optimizer="adam"))
    assert settings.boundary == 140  # the essay's
    assert settings.learning_rate == 1e-4
    assert records.default_folder(settings) == Path("runs/overfit-resnet50-digits-seed0")
    kept = overfit.resolved(overfit.OverfitSettings(boundary="conv", learning_rate=0.5))
    assert (kept.boundary, kept.learning_rate) == ("conv", 0.5)


@pytest.mark.once
def test_a_path_gives_a_folder_name(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for source, name in (
        ("digits", "digits"),
        (str(tmp_path / "photos"), "photos"),
        (f"{tmp_path}/photos/", "photos"),
        ("../shared/data", "data"),
        ("a/cifar10-train.parquet", "cifar10-train"),
    ):
        assert data_name(source) == name


class Interrupts(Silent):
    """Press Ctrl-C in the first epoch of the second row."""

    def __init__(self) -> None:
        self.rows = 0

    def started(self, row: overfit.Row, number: int, total: int) -> None:
        self.rows = number

    def epoch(self, epoch: overfit.Epoch, total: int) -> None:
        if self.rows == 2:
            raise KeyboardInterrupt


def test_interrupted_rows_that_are_done_are_kept(tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=1)
    done = overfit.run_overfit(settings, output=tmp_path / "run", progress=Interrupts())
    assert done.interrupted
    assert [row.row.name for row in done.rows] == ["batch"]
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["interrupted"] is True
    assert [row["name"] for row in found["rows"]] == ["batch"]
    assert (tmp_path / "run" / "figure.png").stat().st_size > 1000


def test_interrupted_before_the_first_row_is_done_leaves_nothing(tmp_path: Path) -> None:
    at_once = Interrupts()
    at_once.started = lambda *_: setattr(at_once, "rows", 2)  # type: ignore[method-assign]
    done = overfit.run_overfit(SETTINGS, output=tmp_path / "a" / "run", progress=at_once)
    assert done.interrupted
    assert done.rows == ()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_run_leaves_nothing(tmp_path: Path) -> None:
    def refused(error: type[Exception], **changes: Any) -> str:
        with pytest.raises(error) as caught:
            overfit.run_overfit(replace(SETTINGS, **changes), output=tmp_path / "run")
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    assert "no-such-layer" in refused(ModelError, boundary="no-such-layer")
    assert "nonsense" in refused(ModelError, backbone="nonsense")
    assert "99" in refused(DataError, classes=("3", "99"))
    assert "per_class=5000" in refused(DataError, per_class=5000)
    assert "diverged" in refused(DataError, learning_rate=1e30, epochs=3)
    assert "epochs=0" in refused(DataError, epochs=0)
    assert "batch_size=1" in refused(DataError, batch_size=1)


@pytest.mark.once
def test_the_folder_is_tried_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write into"):
        records.check_folder(tmp_path / "file" / "run", force=True)
    made = records.check_folder(tmp_path / "a" / "b", force=False)
    assert made == (tmp_path / "a" / "b", tmp_path / "a")
    (tmp_path / "a" / "kept").write_text("")
    records.remove_empty(made)
    assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "kept").exists()
    (tmp_path / "a" / "history.csv").write_text("old")
    with pytest.raises(OutputError, match=r"already holds history\.csv"):
        records.check_folder(tmp_path / "a", force=False)
    assert records.check_folder(tmp_path / "a", force=True) == ()


@pytest.mark.once
def test_a_file_is_old_or_new_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "results.json"
    target.write_bytes(b"old")

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OutputError, match="No space left"):
        files.write(target, b"new content")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


# Made-up measurements: what is drawn and said about them


def made_up(rows: int, epochs: int = 3, low: float = 0.785) -> overfit.OverfitResult:
    found = []
    for row in list(overfit.ROWS.values())[:rows]:
        curve = tuple(
            overfit.Epoch(
                number=number, train_loss=0.5, train_accuracy=0.9, phase0_loss=0.5,
                phase0_accuracy=low, phase1_loss=0.1, phase1_accuracy=1.0, seconds=1.0,
            )
            for number in range(1, epochs + 1)
        )  # fmt: skip
        phases = PhaseTable(
            rows=(
                PhaseRow(phase="dynamic", loss=math.nan, metrics={"accuracy": low}),
                PhaseRow(phase="0", loss=0.513, metrics={"accuracy": low}),
                PhaseRow(phase="1", loss=0.064, metrics={"accuracy": 1.0}),
            ),
            task="binary",
            samples=200,
            sites=49,
        )
        found.append(
            overfit.RowResult(
                row=row,
                epochs=curve,
                phases=phases,
                sites=49,
                sites_frozen=34,
                boundary="conv",
                seconds=1.0,
            )
        )
    return overfit.OverfitResult(
        settings=replace(SETTINGS, rows=tuple(row.row.name for row in found)),
        selection={"n": np.int64(3)},
        environment={},
        rows=tuple(found),
    )


@pytest.mark.once
def test_a_sentence_says_what_was_measured() -> None:
    assert overfit.describe(made_up(1).rows[0]) == (
        "100.0% of the 200 training images are right in training mode, 78.5% at inference: "
        "43 images are lost in between."
    )
    assert overfit.describe(made_up(1, low=1.0).rows[0]).endswith("nothing is lost.")


@pytest.mark.once
def test_json_has_no_nan_and_no_numpy() -> None:
    plain = records.as_json(made_up(1))
    text = json.dumps(plain, allow_nan=False)
    assert plain["rows"][0]["phases"]["dynamic"]["loss"] is None
    assert '"selection": {"n": 3}' in text


@pytest.mark.once
@pytest.mark.parametrize(("rows", "epochs"), [(1, 1), (2, 3), (6, 10), (7, 10)])
def test_the_figure_shows_every_row_and_its_last_values(rows: int, epochs: int) -> None:
    result = made_up(rows, epochs)
    svg = figures.draw(result, suffix=".svg")
    words = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(
        "{http://www.w3.org/2000/svg}text")]  # fmt: skip
    for row in result.rows:
        assert row.row.name in words
    assert words.count("0.785") + words.count("0.785 ") >= rows - 1
    assert figures.draw(result, suffix=".svg") == svg  # the bytes depend on the numbers only
    assert figures.draw(made_up(rows, epochs, low=0.8), suffix=".svg") != svg
    png = figures.draw(result, suffix=".png")
    assert png.startswith(b"\x89PNG")


@pytest.mark.once
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
def test_nothing_sticks_out_of_the_figure(rows: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = figures.overfit_figure(made_up(rows))
    assert sum(ax.get_visible() for ax in figure.axes) == rows  # no empty panel
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    renderer = canvas.get_renderer()
    for words in [*figure.texts, *(t for ax in figure.axes for t in ax.texts)]:
        box = words.get_window_extent(renderer)
        assert box.x0 >= 0, words
        assert box.x1 <= width, words
        assert box.y0 >= 0, words
        assert box.y1 <= height, words
