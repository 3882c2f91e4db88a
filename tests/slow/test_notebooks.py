"""The notebooks run from top to bottom and print what they were committed with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fill_examples
import pytest

pytest.importorskip("nbmake")
EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
pytestmark = pytest.mark.once


def shown(notebook: Path) -> list[str]:
    """What each cell with code prints, without numbers."""

    def text(output: dict[str, Any]) -> str:
        return "".join(output.get("text", ""))

    cells = json.loads(notebook.read_text())["cells"]
    return [
        fill_examples.words("".join(text(each) for each in cell["outputs"]
                                    if each.get("name") != "stderr"))
        for cell in cells if cell["cell_type"] == "code"
    ]  # fmt: skip


def test_the_notebooks_run_and_print_what_they_show(tmp_path: Path) -> None:
    assert [path.stem for path in NOTEBOOKS] == ["fine_tuning", "first_diagnosis"]
    for path in [*NOTEBOOKS, *EXAMPLES.glob("*_torch.py")]:
        shutil.copy(path, tmp_path)
    (tmp_path / "pytest.ini").touch()  # not this project's settings
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbmake", "--overwrite", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "torch", "IPYTHONDIR": str(tmp_path / "ipython")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for path in NOTEBOOKS:
        committed = shown(path)
        assert len(committed) >= 4
        assert all(committed[-2:]), "outputs are committed"
        assert shown(tmp_path / path.name) == committed
