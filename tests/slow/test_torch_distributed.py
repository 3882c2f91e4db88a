"""Freezing and splitting under DistributedDataParallel, in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)


def test_frozen_statistics_stay_and_ranks_agree(tmp_path: Path) -> None:
    script = Path(__file__).parent / "distributed_torch.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "meeting")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("meeting.[01]"))) == 2, "a rank did not come to the end"
