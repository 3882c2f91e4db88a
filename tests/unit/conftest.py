"""A unit test loads no framework: it is what tells that Frostline works without one."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

FRAMEWORKS = ("keras", "tensorflow", "torch", "jax")


def _loaded() -> set[str]:
    return {name for name in FRAMEWORKS if name in sys.modules}


@pytest.fixture(autouse=True)
def no_framework() -> Iterator[None]:
    """Fail a test that loads a framework into a process that had none."""
    before = _loaded()
    yield
    new = sorted(_loaded() - before)
    assert not new, f"this unit test loads {', '.join(new)}; it belongs into tests/integration"
