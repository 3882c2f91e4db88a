"""CHANGELOG.md is kept by hand; its top entry is the version that the package says it is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import frostline

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r"^## \[(?P<version>[^\]]+)\] - (?P<date>\S+)$", re.MULTILINE)


@pytest.fixture
def entries() -> list[re.Match[str]]:
    return list(ENTRY.finditer((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))


def test_top_entry_is_the_version_of_the_project(entries: list[re.Match[str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert entries[0]["version"] == project["version"] == frostline.__version__


def test_entries_are_dated_or_unreleased_and_no_version_appears_twice(
    entries: list[re.Match[str]],
) -> None:
    for entry in entries:
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}|unreleased", entry["date"]), entry[0]
    versions = [entry["version"] for entry in entries]
    assert len(versions) == len(set(versions))


def test_every_second_level_heading_is_an_entry() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## .*$", text, re.MULTILINE)
    assert headings
    assert [heading for heading in headings if not ENTRY.fullmatch(heading)] == []
