"""Print who re-estimates BN statistics rightly, and who freezes, in situations that people meet.

The scenarios and the tools are in ``tests/slow/peers``; tools that are not installed are left out.

Usage: ``python scripts/compare_peers.py [--json docs/results/peers-torch.json]``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "fvcore", "pytorch-lightning")


def main() -> int:
    """Run every tool in every scenario."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT / "tests" / "slow"))
    freezing, scenarios, tools = (
        importlib.import_module(f"peers.{name}") for name in ("freezing", "scenarios", "tools")
    )

    table: dict[str, dict[str, bool]] = {}
    for name, tool in tools.available().items():
        table[name] = {each.name: _right(each, tool) for each in scenarios.SCENARIOS}
    show(table, [each.name for each in scenarios.SCENARIOS])
    frozen: dict[str, dict[str, bool]] = {}
    if "pytorch-lightning" in _versions():
        with tempfile.TemporaryDirectory() as folder:
            frozen = {name: freezing.keeps(name, folder) for name in freezing.FREEZERS}
        print()
        show(frozen, list(freezing.KEEPS))
    if arguments.json:
        content = {"versions": _versions(), "recalibration": table, "freezing": frozen}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def _right(scenario: Any, tool: Any) -> bool:
    try:
        return bool(scenario.run(tool))
    except Exception:  # what a tool raises in the middle of its work is not the right answer
        return False


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def show(table: dict[str, dict[str, bool]], rows: list[str]) -> None:
    """Print rows by tools."""
    width = max(map(len, rows))
    print(" " * width, *table, sep=" | ")
    for row in rows:
        cells = [("right" if table[tool][row] else "wrong").center(len(tool)) for tool in table]
        print(row.ljust(width), *cells, sep=" | ")


if __name__ == "__main__":
    raise SystemExit(main())
