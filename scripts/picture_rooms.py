"""Draw the rooms of the house from the import contract: ``docs/images/rooms.svg``.

    python scripts/picture_rooms.py

A room imports only from rooms below it. The rows are those of ``[tool.importlinter]`` in
``pyproject.toml``, so the picture cannot say anything else than what is checked.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import matplotlib as mpl
import matplotlib.patches

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "images" / "rooms.svg"
#: Room -> what happens there, in three words or so.
WORDS = {
    "cli": "one file per command",
    "experiments": "the essay's two",
    "callbacks": "Keras callbacks",
    "integrations": "other loops",
    "scale": "workers of Ray",
    "verbs": "what fl exports",
    "cache": "features on disk",
    "engines": "run a prefix fast",
    "report": "text, HTML, JSON",
    "causes": "why is there a gap",
    "remedies": "what a fix gives",
    "rules": "findings FL1xx–FL3xx",
    "measure": "probes and shares",
    "adapters": "keras/ and torch/",
    "layers": "the Keras layer",
    "data": "what users have",
    "graph": "addresses, cuts",
    "numerics": "statistics, blend",
    "types": "nouns and errors",
}


def rows() -> list[list[str]]:
    """The layers of the contract, top to bottom; rooms that need not exist are left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    parted = [[room.strip() for room in layer.split("|")] for layer in layers]
    there = [[room for room in row if room in WORDS] for row in parted]
    return [row for row in there if row]


def main() -> None:
    """Draw and write."""
    mpl.rcParams["svg.hashsalt"] = "frostline"
    found = rows()
    figure, axes = plt.subplots(figsize=(8, 0.72 * len(found)))
    for index, row in enumerate(found):
        width = 12 / len(row)
        for place, room in enumerate(row):
            left, low = place * width, len(found) - index
            corner = (left + 0.08, low + 0.1)
            box = mpl.patches.Rectangle(corner, width - 0.16, 0.8, fc="#e8f1fa", ec="#356")
            axes.add_patch(box)
            axes.text(left + width / 2, low + 0.62, room, ha="center", va="center", weight="bold")
            axes.text(left + width / 2, low + 0.3, WORDS[room], ha="center", va="center", size=8)
    axes.annotate(
        "", (12.5, 1.1), (12.5, len(found) + 0.9), arrowprops={"arrowstyle": "->", "color": "#356"}
    )
    axes.text(12.75, len(found) / 2 + 1, "imports", rotation=270, va="center", size=9)
    axes.set(xlim=(0, 13.1), ylim=(0.9, len(found) + 1.1))
    axes.axis("off")
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, bbox_inches="tight", metadata={"Date": None})
    print(f"wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
