"""A short run of the fuzzer; a long one by hand: ``python scripts/fuzz_cli.py --runs 10000``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_cli import hostile_folder, run

ROOT = Path(__file__).parents[3]
FOUND = sorted((Path(__file__).parent / "found").glob("*.json"))

pytestmark = [
    # The inputs hold exported programs: torch.export loads Triton, which must not meet TensorFlow.
    pytest.mark.skipif(os.environ["KERAS_BACKEND"] != "torch", reason="torch has its own process"),
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux"),
]


def test_no_command_line_ends_in_what_must_not_be(tmp_path: Path) -> None:
    place = tmp_path / "found.json"
    words = ["scripts/fuzz_cli.py", "--runs", "200", "--seed", "2026", "--json", str(place)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(place.read_text())
    assert found["runs"] == 200
    assert found["failures"] == {}
    # Which lines succeed depends on the optional packages.
    assert found["codes"]["0"] >= 20
    assert found["codes"]["2"] > 50


@pytest.mark.skipif(not FOUND, reason="no line that failed is kept")
def test_lines_that_failed_once_do_not_fail_again() -> None:
    with hostile_folder():
        for path in FOUND:
            known = json.loads(path.read_text())
            assert known["kind"] not in run(known["words"]).kinds, path.name
