"""Fill the tables of README.md from measured results; no number in them is typed by hand.

A table stands between ``<!-- overfit FILE -->`` or ``<!-- layer FILE FILE ... -->`` and
``<!-- end -->``. ``FILE`` is what a command of this repository wrote: the ``results.json`` of
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"(<!-- (overfit|layer) ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def overfit_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per policy: loss, accuracy and AUC of the three phases."""
    found = results[0]
    lines = [
        "| policy | dynamic loss / acc | phase 0 loss / acc / AUC | phase 1 loss / acc / AUC |",
        "|---|---|---|---|",
    ]
    for row in found["rows"]:
        phases = row["phases"]
        cells = [_cell(phases["dynamic"], ("loss", "accuracy"))]
        cells += [_cell(phases[phase], ("loss", "accuracy", "auc")) for phase in ("0", "1")]
        lines.append(f"| `{row['name']}` | {' | '.join(cells)} |")
    settings, place = found["settings"], found["environment"]
    versions = place["versions"]
    caption = [
        f"{settings['backbone']} at {settings['image_size']}²",
        f"{' and '.join(settings['classes'])}, {settings['per_class']} images each",
        f"layers before `{found['rows'][0]['boundary']}` frozen",
        f"{settings['epochs']} epochs of {settings['optimizer'].upper()}",
        f"learning rate {settings['learning_rate']}, momentum {settings['momentum']}",
        f"batch {settings['batch_size']}",
        f"seed {settings['seed']}",
        "evaluated on the training images",
        f"Keras {versions['keras']} on {place['backend']}, {place['cores']} cores",
    ]
    lines += ["", "; ".join(caption) + "."]
    return "\n".join(lines)


def _cell(phase: dict[str, Any], names: Sequence[str]) -> str:
    return " / ".join(f"{phase[name]:.3f}" for name in names if name in phase)


def layer_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per case: time of ours divided by time of the stock layer, per backend."""
    backends = [result["backend"] for result in results]
    lines = [
        "| ours / stock, median [quartiles] | " + " | ".join(backends) + " |",
        "|---|" + "---|" * len(backends),
    ]
    for case in results[0]["figures"]:
        cells = []
        for result in results:
            figure = result["figures"][case]
            low, high = figure["quartiles"]
            cells.append(f"{figure['ratio']:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def filled(text: str, root: Path = ROOT) -> str:
    """Return ``text`` with every table made anew from its files."""

    def table(match: re.Match[str]) -> str:
        opening, kind, files, closing = match.groups()
        results = [json.loads((root / name).read_text()) for name in files.split()]
        made = overfit_table(results) if kind == "overfit" else layer_table(results)
        return f"{opening}{made}\n{closing}"

    return _TABLE.sub(table, text)


def main(arguments: Sequence[str]) -> int:
    """Fill or check README.md; returns the exit code."""
    path = ROOT / "README.md"
    text = path.read_text()
    wanted = filled(text)
    if arguments == ["--check"]:
        if wanted != text:
            print("README.md: a table differs from its files; run scripts/fill_tables.py")
            return 1
        return 0
    if arguments:
        print(__doc__)
        return 2
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
