"""What docs/architecture.md and CONTRIBUTING.md name exists, and every room has its paragraph."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "frostline"
PAGES = ("docs/architecture.md", "CONTRIBUTING.md")
#: What a page names and a framework that is not there yet would have.
PLANNED = ("adapters/flax/",)


def named(page: str) -> list[str]:
    """Files, folders and what files define, as a page writes them between backticks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)  # commands
    found = re.findall(r"`([\w./-]+/|[\w./-]+\.(?:py|md|toml|json)(?:::[\w.]+)?)`", text)
    return [name for name in found if not name.startswith(PLANNED)]


def defined(tree: ast.AST, names: list[str]) -> bool:
    """Whether a module, or a class in it, defines a name, and that name the next one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if names == [ast.unparse(targets[0])]:
                return True
        elif getattr(node, "name", None) == names[0]:
            return len(names) == 1 or defined(node, names[1:])
    return False


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_name_on_the_page_exists(page: str) -> None:
    names = named(page)
    assert len(names) > 20
    missing = []
    for name in names:
        file, _, member = name.partition("::")
        path = next((root / file for root in (SOURCE, ROOT) if (root / file).exists()), None)
        if path is None or (member and not defined(ast.parse(path.read_text()), member.split("."))):
            missing.append(name)
    assert missing == []


def test_every_room_has_one_paragraph_and_stands_in_the_picture() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = {room.strip("() ") for row in layers for room in row.split("|")}
    rooms = {room for room in rooms if (SOURCE / room).is_dir()}
    page = (ROOT / PAGES[0]).read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\*\*(\w+)\*\*", page, flags=re.MULTILINE)) == sorted(rooms)
    picture = (ROOT / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8")
    assert {room for room in rooms if f"<!-- {room} -->" not in picture} == set()


def test_the_walk_turns_nowhere_back() -> None:
    """Each of the six calls is in the same room as the one before, or in one further down."""
    page = (ROOT / PAGES[0]).read_text(encoding="utf-8")
    steps = re.findall(r"^\d\. (?:Inside the model.*\n\s+)?`(\w+)/", page, flags=re.MULTILINE)
    assert steps == ["verbs", "measure", "measure", "adapters", "adapters", "numerics"]
