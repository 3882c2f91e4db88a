"""`fl.phases`, `fl.diagnose` and `fl.watch` in gloo processes: one answer, that of all the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)


def ranks(processes: int, folder: Path, *words: str) -> list[Any]:
    """What each rank wrote down; rank 0 is the one that is killed."""
    script = Path(__file__).parent / "distributed_measuring.py"
    command = [sys.executable, str(script), str(processes), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    files = [folder / f"{rank}.json" for rank in range(bool(words), processes)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("processes", [2, 4])
def test_all_ranks_return_what_one_process_finds(processes: int, tmp_path: Path) -> None:
    found = ranks(processes, tmp_path)
    for rank, notes in enumerate(found):
        together, alone = notes["samples"]
        assert together == alone == {2: 157, 4: 181}[processes]
        assert notes["phase 0"][0] == pytest.approx(notes["phase 0"][1], rel=1e-6)
        for name in ("phase 1", "report", "watch", "patterns", "notes"):
            assert notes[name] == found[0][name], (rank, name)
        assert 112 <= notes["drawn"] <= 128
        assert any("1 of 2 BN layers, means up to" in text for text in notes["patterns"])
        assert any("those of rank 0 are looked at" in text for text in notes["notes"])
        assert notes["phase 0 sharded"] == pytest.approx(notes["phase 0"][0], rel=1e-6)
        assert notes["report sharded"] == notes["report"]
        assert notes["watch sharded"] == notes["watch"][1]
        assert notes["sharded as before"] is True
        assert notes["still sharded"] == ["DTensor"]
        assert notes["phases as before"] is notes["as before"] is notes["still as before"] is True
        own = "OSError: the disk of this rank is gone"
        other = f"FrostlineError: rank 0 of {processes} raised {own}"
        for verb in ("raise phases", "raise diagnose"):
            assert notes[verb].startswith(other if rank else own), (rank, verb)
        assert "hold no samples, here or on any other rank" in notes["nothing"]
        assert "process_group=False looks at this process alone" in notes["odd"]
        before, _, after, _ = notes["watch"]
        assert set(before.values()) == {0.0}
        assert after["4"] == pytest.approx(1.0, rel=1e-4)  # the last rank's layer moved


@pytest.mark.parametrize("verb", ["phases", "diagnose"])
def test_a_rank_that_is_killed_lets_the_others_raise(verb: str, tmp_path: Path) -> None:
    for notes in ranks(3 if verb == "phases" else 2, tmp_path, verb):
        assert notes["kill"].startswith("FrostlineError: rank")
        assert "lost the others" in notes["kill"]
        assert notes["as before"] is True
        assert notes["seconds"] < 60  # the timeout of the group is 20 s
