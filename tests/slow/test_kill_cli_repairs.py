"""SIGKILL during command-line repairs: the input stays, outputs are absent or complete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_cli_repairs.py"


def test_killed_repairs_leave_nothing_half_written() -> None:
    if os.environ["KERAS_BACKEND"] != "torch":
        pytest.skip("only on torch can a process with all imports be forked")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "3", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith("3 kills, ")
    assert "0 broken; the input is unchanged" in done.stdout
