"""Outputs, caches and reports are not written through links; their temporary names are drawn."""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.adapters import store
from frostline.data import files
from frostline.verbs.merge_statistics import merge_statistics

pytestmark = pytest.mark.once  # files are the same on any backend

X = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


class Prefix:
    identity = "three times"

    def __call__(self, x: Any) -> Any:
        return [3 * x]


@pytest.fixture(scope="module")
def model() -> Any:
    layers = keras.layers
    made = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(2)]
    )
    made.compile("sgd", "mse")
    return made


def _features(path: Path) -> Any:
    return fl.cache_features(Prefix(), X, path, verbose=0)


#: Name of the output -> what writes it.
WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "report.html": lambda model, path: fl.lint(model).save(path),
    "report.json": lambda model, path: fl.lint(model).save(path),
    "report.txt": lambda model, path: fl.lint(model).save(path),
    "model.keras": lambda model, path: store("keras").save_model(model, path, overwrite=True),
    "model.h5": lambda model, path: store("keras").save_model(model, path, overwrite=True),
    "statistics.safetensors": lambda model, path: merge_statistics([model]).save(
        path, overwrite=True
    ),
    "features.parquet": lambda _, path: _features(path.parent / "kept").to_parquet(
        path, overwrite=True
    ),
    "features.arrow": lambda _, path: _features(path.parent / "kept").to_dataset(
        path, overwrite=True
    ),
    "cache": lambda _, path: _features(path),
}
NEEDS = {".parquet": "pyarrow", ".arrow": "datasets", ".safetensors": "safetensors"}
if os.environ["KERAS_BACKEND"] == "torch":
    import torch

    TENSORS = {"weight": torch.ones(3)}
    for name in ("state.pt", "state.safetensors"):
        WRITERS[name] = lambda _, path: store("torch").write_state(TENSORS, path, overwrite=True)


def _everything(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_in_the_place_of_a_temporary_file_is_not_written_through(
    name: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone who may write to the folder watches it, and puts a link there as a name appears."""
    if (suffix := Path(name).suffix) in NEEDS:
        pytest.importorskip(NEEDS[suffix])
    victim, folder = tmp_path / "victim", tmp_path / "shared"
    victim.write_bytes(b"precious")
    folder.mkdir()
    target = folder / name
    if suffix:
        target.write_bytes(b"old")
    if suffix in (".parquet", ".arrow"):
        _features(folder / "kept")
    before = _everything(folder)
    make = tempfile.mkstemp
    linked: list[Path] = []

    def watched(*args: Any, **kwargs: Any) -> tuple[int, str]:
        descriptor, path = make(*args, **kwargs)
        if Path(path).is_relative_to(folder):
            linked.append(Path(path))
            Path(path).unlink()
            Path(path).symlink_to(victim)
        return descriptor, path

    monkeypatch.setattr(tempfile, "mkstemp", watched)
    with pytest.raises(fl.OutputError, match="something else in the place of its temporary file"):
        WRITERS[name](model, target)
    assert linked
    assert victim.read_bytes() == b"precious"
    assert {key: _everything(folder).get(key) for key in before} == before
    assert not any(os.path.lexists(path) for path in linked)


@pytest.mark.parametrize("name", WRITERS)
def test_temporary_names_are_drawn_anew_and_nobody_elses_file_is_opened(
    name: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (suffix := Path(name).suffix) in NEEDS:
        pytest.importorskip(NEEDS[suffix])
    drawn: list[list[str]] = []
    opened = os.open
    found: list[str] = []

    def watched(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        descriptor = opened(path, flags, *args, **kwargs)
        if ".tmp" in str(path):
            for flag in (os.O_CREAT, os.O_EXCL, os.O_NOFOLLOW):
                assert flags & flag
            assert os.fstat(descriptor).st_mode & 0o777 == 0o600  # nobody else reads it half done
            found.append(Path(path).name)
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    for turn in range(3):
        found = []
        folder = tmp_path / str(turn)
        folder.mkdir()
        for names in drawn:  # someone guesses that they come again
            for guessed in names:
                (folder / guessed).symlink_to(tmp_path / "victim")
        WRITERS[name](model, folder / name)
        drawn.append(found)
    assert all(drawn)
    assert len({each for names in drawn for each in names}) == sum(map(len, drawn))
    assert not (tmp_path / "victim").exists()


def test_nothing_else_in_the_sources_writes_a_file() -> None:
    """What is written goes through ``data/files.py``, or into a temporary folder of its own."""
    sources = Path(fl.__file__).parent
    own_folder = {"adapters/spool.py", "adapters/keras/compare.py"}
    found = [
        f"{name}:{node.lineno}"
        for path in sorted(sources.rglob("*.py"))
        if (name := path.relative_to(sources).as_posix()) not in own_folder
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and _writes(node)
    ]
    assert found == [f"data/files.py:{line}" for line in _lines_of("mkstemp(", "opener=")]


def _lines_of(*texts: str) -> list[int]:
    lines = Path(files.__file__).read_text("utf-8").splitlines()
    return [n for n, line in enumerate(lines, 1) if any(text in line for text in texts)]


def _writes(node: ast.Call) -> bool:
    function = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if function in ("write_text", "write_bytes", "mkstemp", "NamedTemporaryFile", "mktemp"):
        return True
    modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    modes += [k.value.value for k in node.keywords
              if k.arg == "mode" and isinstance(k.value, ast.Constant)]  # fmt: skip
    return function == "open" and any(
        set(m) <= set("rwaxbt+") and set(m) & set("wax+") for m in modes
    )
