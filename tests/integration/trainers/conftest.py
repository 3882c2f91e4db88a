"""Small networks and their data for the trainers of other packages."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    collect_ignore_glob = ["test_*.py"]  # torch has a process of its own
elif importlib.util.find_spec("torchvision") is not None:
    importlib.import_module("tests.slow.thirdparty.torchvision_operators").load()


@pytest.fixture
def recipe() -> Callable[[str], str]:
    """The block of docs/integrations.md behind a title; at most five lines beside imports."""

    def behind(title: str) -> str:
        text = (Path(__file__).parents[3] / "docs/integrations.md").read_text()
        found = re.search(r"```python\n(.*?)```", text[text.index(title) :], re.DOTALL)
        assert found is not None
        assert len([line for line in found[1].splitlines() if line and "import" not in line]) <= 5
        return found[1]

    return behind


@pytest.fixture
def samples() -> tuple[Any, Any]:
    """48 samples of five features whose scale is not that of fresh statistics."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 5, generator=generator) * 2 + 1
    return x, (x.mean(dim=1) > 1).long()


@pytest.fixture
def network() -> Any:
    """Two BN layers, ``1`` and ``3``, with a linear layer before each."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4),
            torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2),
        )  # fmt: skip
