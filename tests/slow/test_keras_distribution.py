"""`fl.recalibrate` under Keras' own distribution: data-parallel on JAX, mirrored on TensorFlow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEVICES = {"jax": 4, "tensorflow": 2}

if os.environ["KERAS_BACKEND"] not in DEVICES:
    pytest.skip("torch has process groups instead", allow_module_level=True)


def test_several_devices_store_what_one_does(tmp_path: Path) -> None:
    script = Path(__file__).parent / "keras_distribution.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "notes.json")],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    notes = json.loads((tmp_path / "notes.json").read_text())
    assert notes["devices"] == DEVICES[os.environ["KERAS_BACKEND"]]
    assert notes["sequential"] < 1e-5
    assert notes["batch"] < 1e-5
    assert notes["undo sequential"] is notes["undo batch"] is True
