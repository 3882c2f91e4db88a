"""The public surface is what ``public_api.json`` lists; each intended change is named there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from public_api import surface

LISTED = Path(__file__).parent / "public_api.json"


@pytest.fixture(scope="module")
def now():
    return json.loads(json.dumps(surface()))


@pytest.mark.parametrize("part", ["names", "layers", "callbacks", "commands", "rules"])
def test_the_public_surface_is_as_listed(part, now):
    listed = json.loads(LISTED.read_text(encoding="utf-8"))
    assert now[part] == listed[part], (
        "the public surface changed; where that is meant, write it anew with "
        "`python scripts/public_api.py > tests/unit/public_api.json` and name it in CHANGELOG.md"
    )
