"""Fill the tables of README.md and docs/*.md from measured results; none of them is typed by hand.

A table stands between ``<!-- KIND FILE FILE ... -->`` and ``<!-- end -->``. ``KIND`` is one of
``scripts/tables.py``; ``FILE`` is JSON that a command of this repository wrote, as in
``frostline experiment overfit`` or ``benchmarks/bench_layer.py --json``. ``--check`` changes
nothing and fails when a table is not what its files say.

Usage: ``python scripts/fill_tables.py [--check]``
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tables

ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(
    rf"(<!-- ({'|'.join(tables.KINDS)}) ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL
)


def documents(root: Path = ROOT) -> list[Path]:
    """Files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(text: str, root: Path = ROOT) -> str:
    """Return ``text`` with every table made anew from its files."""

    def table(match: re.Match[str]) -> str:
        opening, kind, files, closing = match.groups()
        results = [json.loads((root / name).read_text()) for name in files.split()]
        return f"{opening}{tables.KINDS[kind](results)}\n{closing}"

    return _TABLE.sub(table, text)


def main(arguments: Sequence[str]) -> int:
    """Fill or check the documents; returns the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    stale = 0
    for path in documents():
        text = path.read_text()
        wanted = filled(text)
        if wanted == text:
            continue
        if arguments:
            print(f"{path.name}: a table differs from its files; run scripts/fill_tables.py")
            stale = 1
        else:
            path.write_text(wanted)
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
