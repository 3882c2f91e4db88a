"""What is built is what the tag says, and the workflow that publishes it holds no secret."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import make_dist
import version_matrix

ROOT = Path(__file__).parents[2]
DATED = "# Changelog\n\n## [0.2.0] - 2027-01-05\n\n## [0.1.0] - 2026-12-01\n"


def objections(version: str, changelog: str, *tags: str) -> list[str]:
    return list(make_dist.objections(version, changelog, tags))


def test_a_tag_that_is_not_the_version_is_refused() -> None:
    assert objections("0.2.0", DATED, "v0.2.0") == []
    assert objections("0.2.0", DATED, "v0.3.0") == ["the tag is v0.3.0, pyproject.toml says 0.2.0"]
    assert objections("0.3.0", DATED) == ["the top entry of CHANGELOG.md is not 0.3.0"]
    unreleased = DATED.replace("2027-01-05", "unreleased")
    assert objections("0.2.0", unreleased) == []  # nothing is released without a tag
    (refused,) = objections("0.2.0", unreleased, "v0.2.0")
    assert "unreleased" in refused
    assert len(objections("0.2.0", "no entry")) == 1


def test_this_tree_can_be_built() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert objections(project["version"], (ROOT / "CHANGELOG.md").read_text()) == []


def test_the_workflow_publishes_without_a_secret() -> None:
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    assert "id-token: write" in text
    assert "scripts/make_dist.py" in text
    assert not re.search(r"secrets\.|password|(?<!id-)token:", text)


def test_the_lowest_rows_hold_the_bounds_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def lowest(requirements: list[str]) -> dict[str, str]:
        return dict(each.split(">=") for each in requirements)

    bounds = {name: lowest(extras[name]) for name in ("jax", "tensorflow", "torch")}
    core = lowest(project["dependencies"])
    for row in version_matrix.ROWS:
        if row.name.endswith("lowest"):
            pins = dict(pin.split("==") for pin in row.pins)
            for name, bound in {**bounds[row.extra], **core}.items():
                if name in pins:
                    assert pins[name].removesuffix(".*") == bound, (row.name, name)
            assert bounds[row.extra].keys() <= pins.keys()
