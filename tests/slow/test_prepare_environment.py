"""The environment behind ``make demo`` and ``make test``: when it is reused and when it is not."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import prepare_environment as prepare
import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record what would be installed instead of installing it; the environment itself is real."""
    installed: list[list[str]] = []

    def install(environment: prepare.Environment, arguments: list[str]) -> None:
        installed.append(arguments)
        environment.unfinished.unlink(missing_ok=True)

    monkeypatch.setattr(prepare.Environment, "install", install)
    return installed


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> prepare.Environment:
    """A virtual environment with pip, made by the real thing once; tests leave it sound."""
    made = prepare.Environment(tmp_path_factory.mktemp("clone") / ".venv")
    made.create()
    made.unfinished.unlink()
    return made


@pytest.fixture(autouse=True)
def no_stamps(environment: prepare.Environment) -> None:
    for purpose in ("demo", "test", "docs"):
        environment.stamp(purpose).unlink(missing_ok=True)


def test_second_run_installs_nothing(
    environment: prepare.Environment, installs: list[list[str]]
) -> None:
    prepare.prepare(environment, "test", "jax")
    prepare.prepare(environment, "test", "jax")
    assert len(installs) == 1


def test_demo_reuses_the_environment_of_the_tests_and_tests_add_to_the_demo(
    environment: prepare.Environment, installs: list[list[str]]
) -> None:
    prepare.prepare(environment, "demo", "jax")
    prepare.prepare(environment, "test", "jax")
    prepare.prepare(environment, "demo", "jax")
    prepare.prepare(environment, "demo", "tensorflow")
    assert [arguments[-1] for arguments in installs] == ["backend-jax", "test"]


def test_changed_project_file_installs_again(
    environment: prepare.Environment,
    installs: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    project = tmp_path / "pyproject.toml"
    for text in ("[project]", "[project]", "[project] # another"):
        project.write_text(text, encoding="utf-8")
        prepare.prepare(environment, "test", "jax")
    assert len(installs) == 2


def test_interrupted_install_is_made_anew_and_leaves_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installs: list[list[str]]
) -> None:
    interrupted = prepare.Environment(tmp_path / ".venv")

    def interrupt(environment: prepare.Environment, arguments: list[str]) -> None:
        environment.unfinished.touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare.Environment, "install", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(interrupted, "test", "jax")
    assert not interrupted.stamp("test").exists()
    assert not interrupted.is_sound()
    half_installed = interrupted.folder / "half-installed"
    half_installed.touch()
    prepare.prepare(interrupted, "test", "jax")
    assert not half_installed.exists()
    assert interrupted.is_sound()


def test_environment_of_another_place_or_without_python_is_not_trusted(
    environment: prepare.Environment, tmp_path: Path
) -> None:
    assert environment.is_sound()
    copied = tmp_path / ".venv"
    subprocess.run(["cp", "-a", str(environment.folder), str(copied)], check=True)
    assert not prepare.Environment(copied).is_sound()
    assert not prepare.Environment(tmp_path / "absent").is_sound()


def test_environment_of_another_python_is_not_trusted(
    environment: prepare.Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_version", lambda: "3.99.0")
    assert not environment.is_sound()


def test_folder_of_the_user_is_never_deleted(tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(prepare.SetupError, match="not a virtual environment"):
        prepare.Environment(folder).create()
    assert (folder / "thesis.tex").exists()


def test_python_without_ensurepip_installs_pip_with_the_one_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setattr(prepare, "run", commands.append)
    made = prepare.Environment(tmp_path / ".venv")
    made.create()
    without_pip, install_pip = commands
    assert "--without-pip" in without_pip
    assert install_pip[-4:] == ["--python", str(made.python), "install", "pip"]


def test_failing_command_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(prepare.SetupError, match="exit code 3"):
        prepare.run([sys.executable, "-c", "raise SystemExit(3)"])
    assert "SystemExit(3)" in capfd.readouterr().out


def test_old_python_is_told_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "OLDEST_PYTHON", (3, 99))
    assert prepare.main(["test"]) == 2
    assert "needs Python 3.99 or newer" in capsys.readouterr().err


def test_oldest_python_is_the_one_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">={}.{}".format(*prepare.OLDEST_PYTHON)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_groups_that_are_asked_for_exist(backend: str) -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "dependency-groups"
    ]
    for purpose in ("demo", "test", "docs"):
        arguments = prepare.pip_arguments(purpose, backend)
        named = [group for flag, group in pairwise(arguments) if flag == "--group"]
        assert named
        assert set(named) <= set(groups)
