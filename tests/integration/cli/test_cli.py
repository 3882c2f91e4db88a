"""The command line as a user meets it: exit codes, one-line errors, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline import cli
from frostline.cli.options import boundary

BLOCK = "import sys\nsys.modules.update({name: None for name in %r})\n"
CIFAR = Path(__file__).parents[3].parent / "shared" / "data"


def frostline(*words: Any, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, in an own folder."""
    return subprocess.run(
        [sys.executable, "-m", "frostline", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_error(*words: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """Run in this process and return the error, after checking that it is one line and all."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert "unexpected" not in err
    return err


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with small models: with BN (trained and shifted), and without."""
    import keras

    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("models")
    layers = keras.layers
    net = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv1"),
            layers.BatchNormalization(name="bn1"),
            layers.Conv2D(4, 3, name="conv2"),
            layers.BatchNormalization(name="bn2"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dense(2, activation="softmax", name="head"),
        ]
    )
    net.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    net.save(folder / "net.keras")
    plain = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(2)])
    plain.save(folder / "plain.keras")
    (folder / "half.keras").write_bytes((folder / "net.keras").read_bytes()[:2000])
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write a folder of images: 4 cats, 4 dogs."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.jpg")
    return tmp_path / "images"


# Starting up


@pytest.mark.once
def test_help_imports_no_framework(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom frostline import cli\n"
        "assert cli.main(['--help']) == 0\n"
        "assert cli.main(['experiment', 'overfit', '--help']) == 0\n"
        "assert cli.main(['--version']) == 0\n"
        "heavy = {'keras', 'tensorflow', 'jax', 'torch', 'scipy', 'matplotlib', 'sklearn', 'PIL'}\n"
        "print('loaded', heavy & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.endswith("loaded set()\n")
    for command in ("sites", "phases", "freeze", "convert", "demo", "experiment", "env"):
        assert command in done.stdout


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--classes", "cat", "dog"], ["--classes", "cat", "--classes", "dog"]),
        (["--rows", "a", "b", "-o", "x"], ["--rows", "a", "--rows", "b", "-o", "x"]),
        (["--classes", "cat", "--classes", "dog"], ["--classes", "cat", "--classes", "dog"]),
        (["--classes", "cat,dog", "model"], ["--classes", "cat,dog", "model"]),
        (["--classes=cat,dog", "model"], ["--classes=cat,dog", "model"]),
        (["--seed", "1", "a", "b"], ["--seed", "1", "a", "b"]),
        (["--rows", "batch", "inference"], ["--rows", "batch", "--rows", "inference"]),
        (["--classes"], ["--classes"]),
        ([], []),
    ],
)  # fmt: skip
def test_several_values_after_one_option(words: list[str], expected: list[str]) -> None:
    assert cli.application.spread_values(words) == expected


@pytest.mark.once
@pytest.mark.parametrize(
    ("text", "value"), [("140", 140), ("-3", -3), ("0.75", 0.75), ("conv4", "conv4")]
)
def test_a_boundary_is_an_index_a_share_or_a_name(text: str, value: object) -> None:
    found = boundary(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sites"], "MODEL"),
        (["sites", "m.keras", "--bogus"], "--bogus"),
        (["nonsense"], "nonsense"),
        (["phases", "m.keras", "digits", "--batch-size", "0"], "--batch-size"),
        (["phases", "m.keras", "digits", "--batch-size", "-4"], "--batch-size"),
        (["phases", "m.keras", "digits", "--per-class", "0"], "--per-class"),
        (["phases", "m.keras", "digits", "--image-size", "x"], "--image-size"),
        (["experiment", "overfit", "--epochs", "0"], "--epochs"),
        (["experiment", "overfit", "--per-class", "-1"], "--per-class"),
        (["experiment", "overfit", "--seed", "-1"], "--seed"),
        (["experiment", "overfit", "--optimizer", "lion"], "--optimizer"),
        (["sites", "m.keras", "--backend", "theano"], "--backend"),
    ],
)
def test_wrong_options(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert told in one_error(*words, capsys=capsys)
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("option", "value"),
    [("--learning-rate", "0"), ("--learning-rate", "nan"), ("--learning-rate", "-0.1"),
     ("--momentum", "1"), ("--boundary", "1.5"), ("--rows", "bogus"), ("--rows", "batch,batch")],
)  # fmt: skip
def test_settings_that_cannot_run(
    option: str, value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    error = one_error("experiment", "overfit", option, value, capsys=capsys)
    assert option.removeprefix("--").replace("-", "_") in error or "row" in error
    assert files(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


# No backend, another backend


@pytest.mark.once
@pytest.mark.parametrize("words", [["sites", "m.keras"], ["experiment", "overfit"], ["demo"]])
def test_no_backend_installed(words: list[str], tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(BLOCK % (["tensorflow", "jax", "torch"],))
    path = os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")])
    work = tmp_path / "work"
    work.mkdir()
    done = frostline(*words, cwd=work, PYTHONPATH=path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Keras backend is installed. Install one of: pip ")
    assert done.stderr.count("\n") == 1
    assert 'pip install "frostline[jax]"' in done.stderr
    assert done.stdout == ""
    assert list(work.iterdir()) == []


@pytest.mark.once
def test_env_without_a_backend(tmp_path: Path) -> None:
    blocked = ["tensorflow", "jax", "torch", "keras"]
    (tmp_path / "sitecustomize.py").write_text(BLOCK % (blocked,))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = frostline("env", "--format", "json", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backends"] == []
    assert found["backend_choice"] == "none: no Keras backend is installed"
    assert found["cores"] >= 1
    shown = frostline("env", cwd=tmp_path, PYTHONPATH=path)
    assert shown.returncode == 0
    assert "no Keras backend is installed" in shown.stdout


@pytest.mark.once
def test_env_names_the_backend_and_why(tmp_path: Path) -> None:
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    settings = {"KERAS_HOME": str(tmp_path), "FROSTLINE_CACHE_DIR": str(tmp_path / "cache")}
    asked = frostline("env", cwd=tmp_path, KERAS_BACKEND="torch", **settings)
    assert "torch (KERAS_BACKEND)" in asked.stdout
    assert str(tmp_path / "cache") in asked.stdout.replace("\n", "").replace(" ", "")
    configured = frostline("env", cwd=tmp_path, KERAS_BACKEND="", **settings)
    assert "jax (keras.json)" in configured.stdout
    (tmp_path / "keras.json").write_text("{broken")
    first = frostline("env", cwd=tmp_path, KERAS_BACKEND="", **settings)
    assert "(first installed of tensorflow, jax, torch)" in first.stdout


@pytest.mark.once
def test_an_unknown_backend_in_the_environment(tmp_path: Path) -> None:
    done = frostline("sites", "m.keras", cwd=tmp_path, KERAS_BACKEND="theano")
    assert done.returncode == 2
    assert "KERAS_BACKEND='theano'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_backend_than_the_running_one(
    backend: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "torch" if backend != "torch" else "jax"
    error = one_error("sites", models / "net.keras", "--backend", other, capsys=capsys)
    assert "already runs on" in error


# sites, phases


def test_sites_of_a_file(models: Path, tmp_path: Path) -> None:
    done = frostline("sites", models / "net.keras", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing of TensorFlow's start-up chatter either
    assert "bn1" in done.stdout
    assert "2 BN layers: statistics frozen in 0, gamma/beta frozen in 0." in done.stdout
    assert "boundary" not in done.stdout


def test_sites_of_a_function_in_the_current_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "import keras\n"
        "def build():\n"
        "    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name='d'),\n"
        "                             keras.layers.BatchNormalization(name='norm')])\n"
        "def broken():\n"
        "    raise RuntimeError('first line\\nsecond line')\n"
    )
    done = frostline("sites", "mine:build", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [site["path"] for site in found["sites"]] == ["norm"]
    assert found["boundary"] is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert "first line" in one_error("sites", "mine:broken", capsys=capsys)
    del sys.modules["mine"]


def test_freeze_draws_the_boundary_and_keeps_the_original(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(models)
    out = tmp_path / "frozen.keras"
    assert cli.main(["freeze", str(models / "net.keras"), "--until", "conv2", "-o", str(out)]) == 0
    assert "1 of 2 BN layers frozen" in capsys.readouterr().out
    assert cli.main(["sites", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("boundary: conv2 is the first layer that trains ─")
    assert cli.main(["sites", str(out), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [site["stats_frozen"] for site in found["sites"]] == [True, False]
    assert found["boundary"] == "conv2"
    assert files(models) == before
    written = out.read_bytes()
    again = ("freeze", models / "net.keras", "--until", "pool", "-o", out)
    assert "--force" in one_error(*again, capsys=capsys)
    assert out.read_bytes() == written
    assert cli.main([*map(str, again), "--force"]) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]  # no temporary file is left


def test_convert_and_back_to_the_same_predictions(models: Path, tmp_path: Path) -> None:
    import keras

    import frostline as fl

    out = tmp_path / "ours.keras"
    words = ["convert", str(models / "net.keras"), "-o", str(out), "--policy", "batch", "--debias"]
    assert cli.main(words) == 0
    converted, stock = (keras.saving.load_model(p) for p in (out, models / "net.keras"))
    found = fl.sites(converted)
    assert [(site.policy, site.debias) for site in found] == [("batch", True)] * 2
    x = np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(converted.predict(x, verbose=0), stock.predict(x, verbose=0),
                               rtol=1e-6, atol=1e-7)  # fmt: skip


def test_phases_of_images(models: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["phases", str(models / "net.keras"), str(images), "--format", "json", "--split", "all",
             "--batch-size", "8", "--classes", "dog", "cat"]  # fmt: skip
    assert cli.main(words) in (0, 1)
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["samples"] == 8
    assert found["sites"] == 2
    assert set(found["phases"]) == {"dynamic", "0", "1"}
    gap = found["phases"]["1"]["accuracy"] - found["phases"]["0"]["accuracy"]
    assert found["gap"]["accuracy"] == pytest.approx(gap)


def test_recalibrate_a_file_to_the_statistics_of_its_data(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import keras

    rng = np.random.default_rng(1)
    x = rng.normal(2, 3, (24, 8, 8, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(24) % 2)
    before = files(models)
    out = tmp_path / "recalibrated.keras"
    words = ["recalibrate", str(models / "net.keras"), str(tmp_path / "data.npz"), "-o", str(out)]
    assert cli.main([*words, "--batch-size", "10"]) == 0
    assert "recalibrated 2 sites (sequential) on 24 samples in 3 batches" in capsys.readouterr().out
    stock, done = (keras.saving.load_model(path) for path in (models / "net.keras", out))
    inputs = keras.Model(stock.inputs, stock.get_layer("bn1").input).predict(x, verbose=0)
    stored = done.get_layer("bn1").get_weights()
    np.testing.assert_allclose(stored[2], inputs.mean((0, 1, 2), dtype="float64"), rtol=1e-5)
    np.testing.assert_allclose(stored[3], inputs.var((0, 1, 2), dtype="float64"), rtol=1e-5)
    assert files(models) == before
    assert "--force" in one_error(*words, capsys=capsys)
    unknown = [*words, "--force", "--sites", "bn7"]
    written = out.read_bytes()
    assert "bn7" in one_error(*unknown, capsys=capsys)
    assert out.read_bytes() == written


def test_fold_a_file(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import keras

    out = tmp_path / "plain.keras"
    assert cli.main(["fold", str(models / "net.keras"), "-o", str(out)]) == 0
    assert "2 BN layers folded" in capsys.readouterr().out
    x = np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype(np.float32)
    plain, stock = (keras.saving.load_model(path) for path in (out, models / "net.keras"))
    np.testing.assert_allclose(plain.predict(x, verbose=0), stock.predict(x, verbose=0), atol=1e-5)
    assert one_error("sites", out, capsys=capsys).startswith("error: no BatchNormalization layer")
    assert "--force" in one_error("fold", models / "net.keras", "-o", out, capsys=capsys)


def test_set_momentum_of_a_file(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import frostline as fl
    from frostline.adapters.keras.files import load_model

    out = tmp_path / "quick.keras"
    assert cli.main(["set-momentum", str(models / "net.keras"), "0.9", "-o", str(out)]) == 0
    assert "0.9 in Keras' convention (0.1 in PyTorch's)" in capsys.readouterr().out
    assert {site.decay for site in fl.sites(load_model(str(out)))} == {0.9}
    assert cli.main(["set-momentum", str(models / "net.keras"), "1.5", "-o", str(out)]) == 2


def test_lint_and_rule(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "swapped.keras"
    assert cli.main(["set-momentum", str(models / "net.keras"), "0.1", "-o", str(out)]) == 0
    capsys.readouterr()
    assert cli.main(["lint", str(out), "--format", "json", "--select", "FL1", "FL2"]) == 1
    found = json.loads(capsys.readouterr().out)
    code = next(f["code"] for f in found["findings"] if "momentum" in f["name"])
    assert cli.main(["lint", str(out), "--ignore", code, "--select", code]) == 0
    capsys.readouterr()
    assert cli.main(["rule", code]) == 0
    assert "## Why is this bad?" in capsys.readouterr().out
    assert cli.main(["rule", "FL999"]) == 2


def test_phases_exit_code_says_whether_there_is_a_gap(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import keras

    # Stored statistics far from the data's: at inference everything becomes one class, in
    # training mode the two classes are as far apart as their pixels.
    net = keras.saving.load_model(models / "net.keras")
    rng = np.random.default_rng(0)
    y = np.arange(32) % 2
    x = (rng.normal(size=(32, 8, 8, 3)) + 2.0 * y[:, None, None, None]).astype(np.float32)
    net.fit(x, y, epochs=60, batch_size=32, verbose=0)
    data = tmp_path / "data.npz"
    np.savez(data, x=x, y=y)
    for name in ("bn1", "bn2"):
        layer = net.get_layer(name)
        layer.moving_mean.assign(np.full(4, 50.0))
    net.save(tmp_path / "shifted.keras")
    assert cli.main(["phases", str(tmp_path / "shifted.keras"), str(data)]) == 1
    out = capsys.readouterr().out
    assert "phase 0 (inference)" in out
    assert "gap (phase 1 − phase 0)" in out
    frozen = ["freeze", str(tmp_path / "shifted.keras"), "--until", "head"]
    assert cli.main([*frozen, "-o", str(tmp_path / "frozen.keras")]) == 0
    # Really frozen: both phases use the stored statistics, however wrong they are.
    assert cli.main(["phases", str(tmp_path / "frozen.keras"), str(data)]) == 0


# Bad input: each one line, exit code 2, nothing written


def test_bad_models(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.keras"
    for command in ("sites", "phases", "freeze", "convert"):
        rest: list[Any] = {
            "sites": [],
            "phases": ["digits"],
            "freeze": ["--until", "x", "-o", tmp_path / "out.keras"],
            "convert": ["-o", tmp_path / "out.keras"],
        }[command]
        assert "missing.keras" in one_error(command, missing, *rest, capsys=capsys)
        assert "half.keras" in one_error(command, models / "half.keras", *rest, capsys=capsys)
        error = one_error(command, models / "plain.keras", *rest, capsys=capsys)
        assert error == "error: no BatchNormalization layer: BN cannot be the cause\n"
    assert list(tmp_path.iterdir()) == []
    assert "folder" in one_error("sites", tmp_path, capsys=capsys).lower()
    for source in ("nosuchmodule:build", "json:nosuch", "json:JSONDecoder"):
        assert source.split(":")[0] in one_error("sites", source, capsys=capsys)


def test_an_unknown_boundary_names_the_closest(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.keras"
    words = ("freeze", models / "net.keras", "-o", out, "--until")
    assert "'conv2'" in one_error(*words, "conv22", capsys=capsys)
    assert "99" in one_error(*words, "99", capsys=capsys)
    assert "1.5" in one_error(*words, "1.5", capsys=capsys)
    assert list(tmp_path.iterdir()) == []


def test_bad_outputs(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    before = files(tmp_path)
    for out, told in (
        (tmp_path / "file" / "out.keras", "folder"),
        (tmp_path / "out.txt", ".keras"),
        (tmp_path / "nowhere" / "out.keras", "nowhere"),
        (tmp_path, ".keras"),
        (Path("/proc/out.keras"), "/proc"),
    ):
        assert told in one_error("convert", models / "net.keras", "-o", out, capsys=capsys)
    # Onto itself: never without --force.
    own = tmp_path / "own.keras"
    own.write_bytes((models / "net.keras").read_bytes())
    assert "the model itself" in one_error("convert", own, "-o", own, capsys=capsys)
    own.unlink()
    assert files(tmp_path) == before


def test_bad_data(
    models: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    net = models / "net.keras"
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 half")
    np.savez(tmp_path / "names.npz", a=np.zeros(3))
    np.savez(tmp_path / "unequal.npz", x=np.zeros((3, 8, 8, 3)), y=np.zeros(2))
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "other.parquet")

    def told(data: Any, *options: Any) -> str:
        return one_error("phases", net, data, *options, capsys=capsys)

    assert "nowhere" in told(tmp_path / "nowhere")
    assert "empty" in told(tmp_path / "empty")
    assert "half.npz" in told(tmp_path / "half.npz")
    assert "names.npz" in told(tmp_path / "names.npz")
    assert "3 and 2" in told(tmp_path / "unequal.npz")
    assert "other.parquet" in told(tmp_path / "other.parquet")
    error = told(images, "--classes", "cat", "dgo")
    assert "dgo" in error
    assert "Closest: dog" in error
    assert "'cat'" in told(images, "--per-class", "500", "--split", "all")
    assert "backbone" in told(images, "--preprocess", "nonsense", "--split", "all")
    corrupt = images / "dog" / "2.jpg"
    corrupt.write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    assert "2.jpg" in told(images, "--split", "all")


@pytest.mark.once
def test_an_experiment_checks_its_folder_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "runs", Path("/proc/runs")):
        told = one_error("experiment", "overfit", "-o", folder, capsys=capsys)  # no row was begun
        assert told.startswith(f"error: cannot write into {folder}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text("{}")
    assert "--force" in one_error("experiment", "overfit", "-o", "old", capsys=capsys)
    assert (tmp_path / "old" / "results.json").read_text() == "{}"
    one_error("experiment", "overfit", "--data", "nowhere", "-o", "new/run", capsys=capsys)
    assert not (tmp_path / "new").exists()


# What nobody foresaw


@pytest.mark.once
def test_an_unforeseen_error_is_one_line_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from frostline import environment

    def broken() -> dict[str, object]:
        raise ZeroDivisionError("some\nreason")

    monkeypatch.setattr(environment, "facts", broken)
    monkeypatch.delenv("FROSTLINE_LOG_LEVEL", raising=False)
    assert cli.main(["env"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "error: ZeroDivisionError: some reason (unexpected; --traceback shows where)\n",
    )
    assert cli.main(["env", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("FROSTLINE_LOG_LEVEL", "debug")
    assert cli.main(["env"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.once
def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from frostline import environment

    def interrupted() -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "facts", interrupted)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
