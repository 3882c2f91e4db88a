"""``import frostline`` loads no framework and none of the slow libraries.

It runs in a process of its own: this one has most of them loaded. How long the import takes is a
matter for the benchmarks, not for a test on a busy machine.
"""

from __future__ import annotations

import json
import subprocess
import sys

FRAMEWORKS = {"keras", "tensorflow", "torch", "jax", "ray"}
SLOW = {"scipy", "sklearn", "matplotlib", "rich", "typer", "jinja2", "pyarrow", "PIL", "filelock"}


def loaded_after(statements: str) -> set[str]:
    """Top-level modules in ``sys.modules`` of a fresh interpreter that ran ``statements``."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return {name.partition(".")[0] for name in json.loads(result.stdout)}


def test_package_loads_no_framework_and_no_slow_library() -> None:
    loaded = loaded_after("import frostline")
    assert "frostline" in loaded
    assert loaded & (FRAMEWORKS | SLOW) == set()


def test_rooms_below_the_frameworks_load_none() -> None:
    loaded = loaded_after(
        "import frostline.types, frostline.numerics.stats, frostline.data.batches"
    )
    assert loaded & (FRAMEWORKS | SLOW) == set()


def test_choosing_models_does_not_choose_a_framework() -> None:
    loaded = loaded_after("import frostline.adapters")
    assert loaded & (FRAMEWORKS | SLOW) == set()


def test_the_check_itself_sees_a_library_that_is_loaded() -> None:
    assert "filelock" in loaded_after("import filelock, frostline")


def test_showing_a_result_moves_no_random_numbers() -> None:
    """rich draws from Python's generator when it is imported."""
    code = "import random; before = random.getstate(); import frostline.report.text as text"
    code += "; text.console(); assert random.getstate() == before; import rich.console"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
