"""``frostline diagnose``: exit codes, forms, files; what a person types wrong changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline import cli
from frostline.cli import best_remedy, diagnose as command, reports
from frostline.cli.options import DataOptions, OutputOptions, ReportFormat, ReportOptions, Split
from frostline.cli.samples import read_samples
from frostline.types.measured import Cause, Remedy
from frostline.types.report import Report

keras = pytest.importorskip("keras")

# The command is the same on every backend; what it calls is tested on all three elsewhere.
pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose one BN layer has never seen data, its samples, and a log of its training."""
    folder = tmp_path_factory.mktemp("diagnose")
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    y = np.arange(64) % 2
    x = (3 + rng.normal(size=(64, 4)) + 4 * y[:, None]).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(2, activation="softmax", name="head"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    # The kernel is right for normalised inputs: batch statistics give it what it wants.
    model.get_layer("head").set_weights([np.array([[-2.0, 2.0]] * 4), np.zeros(2)])
    model.save(folder / "model.keras")
    np.savez(folder / "data.npz", x=x, y=y)
    (folder / "log.json").write_text(json.dumps({"loss": [0.9, 0.2], "accuracy": [0.5, 1.0]}))
    (folder / "half.json").write_text("{")
    return folder


def test_a_diagnosis(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    words = ["diagnose", folder / "model.keras", folder / "data.npz", "--format", "json",
             "--history", folder / "log.json", "-o", page, "--ignore", "FL115"]  # fmt: skip
    assert cli.main([str(word) for word in words]) == 1
    out, err = capsys.readouterr()
    read = Report.from_dict(json.loads(out))
    assert read.gap is not None
    assert read.gap.loss.high < 0
    assert read.measurement is not None
    assert read.measurement.history["loss"] == (0.9, 0.2)
    assert [site.path for site in read.sites] == ["bn"]
    assert any(cause.is_bn and "bn" in cause.sites for cause in read.causes)
    shells = [each.shell for each in read.remedies if each.shell]
    assert shells
    assert all(str(folder / "model.keras") in shell for shell in shells)
    assert not any(word in shell.split() for shell in shells for word in ("MODEL", "DATA"))
    assert "FL115" in {each.code for each in read.skipped}
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "Traceback" not in err
    model = keras.models.load_model(folder / "model.keras")
    data = np.load(folder / "data.npz")
    direct = fl.diagnose(model, (data["x"], data["y"]), max_samples=64, batch_size=32, verbose=0)
    assert direct.gap is not None
    assert direct.gap.loss.estimate == pytest.approx(read.gap.loss.estimate, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["no.keras", "data.npz"], "no.keras"),
        (["model.keras", "no.npz"], "no such file: no.npz"),
        (["model.keras", "data.npz", "--select", "FL7"], "no rule 'FL7'"),
        (["model.keras", "data.npz", "-o", "report.pdf"], ".html, .json or .txt"),
        (["model.keras", "data.npz", "-o", "data.npz"], ".html, .json or .txt"),
        (["model.keras", "data.npz", "-o", "log.json"], "log.json exists"),
        (["model.keras", "data.npz", "-o", "no/report.html"], "no folder no"),
        (["model.keras", "data.npz", "--history", "no.csv"], "no such file: no.csv"),
        (["model.keras", "data.npz", "--history", "half.json"], "half.json: not a readable JSON"),
        (["model.keras", "data.npz", "--validation", "data.npz"], "same samples as the data"),
        (["model.keras", "data.npz", "--reference", "no.keras"], "no.keras"),
        (["model.keras", "data.npz", "--max-samples", "1"], "--max-samples"),
        (["model.keras", "data.npz", "--format", "pdf"], "--format"),
        (["model.keras"], "DATA"),
    ],
)
def test_what_cannot_be(
    words: list[str], told: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["diagnose", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told in line
    assert "unexpected" not in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


CLEAN = Report(verdict="fine")


@pytest.mark.parametrize("form", ["text", "json", "html", "github"])
def test_forms(form: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.txt"
    assert (
        reports.show(CLEAN, ReportOptions(format=ReportFormat(form), output=path), "model.keras")
        == 0
    )
    out = capsys.readouterr().out
    starts = {"text": "fine\n", "json": "{\n", "html": "<!DOCTYPE html>", "github": ""}
    assert out.startswith(starts[form])
    assert path.read_text() == "fine\n"


def test_exit_zero(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lint", str(folder / "model.keras")]
    assert cli.main([*words, "--select", "FL1"]) == 0
    report = Report(verdict="bad", findings=fl.lint(_frozen_untouched()).findings)
    github = ReportOptions(format=ReportFormat.github)
    assert reports.show(report, github, "model.keras") == 1
    assert reports.show(report, replace(github, exit_zero=True), "model.keras") == 0
    assert "::error title=FL204" in capsys.readouterr().out


def _frozen_untouched() -> Any:
    layer = keras.layers.BatchNormalization(name="bn", trainable=False)
    return keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)])


def test_a_command_to_paste_names_the_model_and_the_data() -> None:
    options = DataOptions(
        data="my images", classes=["cat", "dog"], per_class=5, preprocess="unit", split=Split.all,
        seed=3,
    )  # fmt: skip
    remedy = Remedy(name="r", fix="recalibrate", causes=(), text="t",
                    shell="frostline recalibrate MODEL DATA --output FIXED.keras")  # fmt: skip
    words = {"MODEL": "it's.keras", "DATA": command._data_as_typed(options)}
    assert command._filled(remedy, words).shell == (
        "frostline recalibrate it's.keras 'my images' --classes cat,dog --per-class 5 "
        "--preprocess unit --split all --seed 3 --output FIXED.keras"
    )
    assert command._filled(replace(remedy, shell=None), words).shell is None
    assert command._data_as_typed(DataOptions(data="digits")) == "digits"


def test_images_have_the_channels_where_the_model_wants_them() -> None:
    for layout, shape in (("channels_first", (3, 8, 8)), ("channels_last", (8, 8, 3))):
        model = keras.Sequential(
            [keras.Input(shape), keras.layers.Conv2D(2, 3, data_format=layout)]
        )
        x, _ = read_samples(DataOptions(data="digits", per_class=1), model)
        assert x.shape == (10, *shape)


def test_force(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(fl.OutputError, match="--force"):
        reports.check_output(path, force=False)
    reports.check_output(path, force=True)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(fl.OutputError, match="is a folder"):
        reports.check_output(tmp_path / "folder.html", force=True)


# --- --fix ----------------------------------------------------------------------------------------


def test_fix_writes_what_it_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, fixed = folder / "model.keras", tmp_path / "fixed.keras"
    given = source.read_bytes()
    words = ["diagnose", source, folder / "data.npz", "--fix", "-o", fixed]
    assert cli.main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    # The oracle: statistics by numpy, loss and accuracy by Keras' own evaluate.
    data = np.load(folder / "data.npz")
    written = keras.models.load_model(fixed)
    _, _, mean, variance = (np.asarray(w) for w in written.get_layer("bn").get_weights())
    np.testing.assert_allclose(mean, data["x"].mean(0, dtype="float64"), rtol=1e-6)
    np.testing.assert_allclose(variance, data["x"].var(0, dtype="float64"), rtol=1e-5)
    told = []
    for path in (source, fixed):
        loss, accuracy = keras.models.load_model(path).evaluate(data["x"], data["y"], verbose=0)
        told.append(f"loss {loss:.4g}, accuracy {accuracy:.4g}")
    assert f"inference: {told[0]} -> {told[1]}, measured on {fixed}" in out.splitlines()
    assert accuracy == 1.0
    assert source.read_bytes() == given
    assert [path.name for path in tmp_path.iterdir()] == ["fixed.keras"]


def test_fix_of_what_is_sound_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, again = tmp_path / "sound.keras", tmp_path / "again.keras"
    words = [str(folder / "data.npz"), "--fix", "--format", "json", "-o"]
    assert cli.main(["diagnose", str(folder / "model.keras"), *words, str(sound)]) == 0
    capsys.readouterr()
    code = cli.main(["diagnose", str(sound), *words, str(again)])
    out, err = capsys.readouterr()
    json.loads(out)  # the report alone: what --fix says goes to stderr
    assert code == 0, err
    assert f"nothing to fix: {again} is not written" in err
    assert not again.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "-o OUT.keras"),
        (["-o", "report.html"], ".keras or .h5"),
        (["-o", "model.keras"], "the model itself"),
    ],
)
def test_fix_needs_a_place_of_its_own(
    words: list[str], told: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["diagnose", "model.keras", "data.npz", "--fix", *words]) == 2
    assert told in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


RECALIBRATE = Remedy(name="recalibrate all", fix="recalibrate", causes=(), text="store exact ones",
                     shell="frostline recalibrate m d", before={"loss": 2.0}, after={"loss": 1.0},
                     recommended=True)  # fmt: skip
LOCK = Remedy(name="lock frozen sites and train on", fix="freeze", causes=(), text="keep 3 sites",
              shell="frostline freeze m", recommended=True)  # fmt: skip


@pytest.mark.parametrize(
    ("remedies", "told"),
    [
        ((LOCK,), "keep 3 sites (frostline freeze m). "),
        ((LOCK, RECALIBRATE), "Less, but now: frostline recalibrate m d (loss 2 -> loss 1). "),
        ((replace(RECALIBRATE, recommended=False),), "helps for sure (recalibrate all) for "),
        ((), "there is no remedy for EMA_LAG. "),
    ],
)
def test_fix_refuses_what_it_cannot_do_and_says_what_helps(
    remedies: tuple[Remedy, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cause = Cause(code="EMA_LAG", share=1.0, sites=("bn",), certainty="is", message="it lags")
    report = Report(verdict="bad", causes=(cause,), remedies=remedies)
    path = tmp_path / "out.keras"
    assert (
        best_remedy.apply(None, report, SAMPLES, target=OutputOptions(output=path), plain=True) == 1
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("not fixed: ")
    assert told in err
    assert not path.exists()


SAMPLES = best_remedy.Samples(
    x=np.zeros((2, 4)), y=np.zeros(2), loss=None, batch_size=2, max_samples=2, seed=0
)
