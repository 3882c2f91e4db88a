"""The pytest plugin, run by pytest on test files of its own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
# Where the clone was installed before it had the plugin, no entry point names it.
LOADED = entry_points(group="pytest11", name="frostline")
PLUGIN = [] if LOADED else ["-p", "frostline.pytest_plugin"]
native = pytest.mark.skipif(
    os.environ["KERAS_BACKEND"] != "torch", reason="torch has a process of its own"
)
TESTS = """
import pytest, torch

@pytest.fixture
def net():
    layers = [torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)]
    return torch.nn.Sequential(*layers)

@pytest.mark.frozen(until="2")
def test_marked_and_frozen(net, frostline):
    frostline.freeze(net, until="2")
    net.train()(torch.randn(8, 3) + 5)

@pytest.mark.frozen(until="2")
def test_marked_and_moving(net):
    net.requires_grad_(False)
    net.train()(torch.randn(8, 3) + 5)

def test_kept_and_moving(net, frostline):
    frostline.freeze(net)
    frostline.keep_frozen(net)
    net[2].running_mean += 3

@pytest.mark.frozen
def test_without_model():
    pass

def test_untouched(net):
    net.train()(torch.randn(8, 3))
"""


@native
def test_a_failure_names_the_layers(pytester: Any) -> None:
    pytester.makepyfile(TESTS)
    done = pytester.runpytest_subprocess(*PLUGIN, "--strict-markers", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=2, failed=3)
    done.stdout.fnmatch_lines(["*'1': statistics drifted by * standard deviations*"])
    done.stdout.fnmatch_lines(["*'2': statistics drifted by 3 standard deviations*"])
    done.stdout.fnmatch_lines(["*needs the model as a fixture of the test: 'model' or 'net'*"])
    assert "pytest_plugin.py" not in done.stdout.str().partition("test_without_model")[0]


@pytest.mark.once
def test_the_plugin_loads_no_framework() -> None:
    code = (
        "import sys, frostline.pytest_plugin\n"
        "print([name for name in ('numpy', 'torch', 'keras', 'tensorflow', 'jax', 'scipy', 'rich')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.once
def test_the_hook_runs_the_command_on_each_file(tmp_path: Path) -> None:
    entry = re.search(r"entry: (.*)", (ROOT / ".pre-commit-hooks.yaml").read_text())
    assert entry is not None
    command = tmp_path / "frostline"
    command.write_text('#!/bin/sh\necho "$1 $2"\n[ "$2" != "bad one.keras" ]\n')
    command.chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def run(*files: str) -> Any:
        whole = [*shlex.split(entry[1]), *files]
        return subprocess.run(whole, env={**os.environ, **path}, capture_output=True, text=True)

    good = run("a.keras", "b c.h5")
    assert (good.returncode, good.stdout) == (0, "lint a.keras\nlint b c.h5\n")
    assert run("bad one.keras").returncode == 1


@pytest.mark.once
def test_the_action_gives_no_input_to_a_shell() -> None:
    lines = (ROOT / "action.yml").read_text().splitlines()
    # An expression inside `run:` would execute what an input holds; they go through `env:`.
    assert not [line for line in lines if "run:" in line and "${{" in line]
    assert any("frostline lint" in line and "--format github" in line for line in lines)
