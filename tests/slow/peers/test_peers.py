"""Ours gets every row right; what the others get is printed by ``scripts/compare_peers.py``."""

from __future__ import annotations

import os

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

from .freezing import BACKBONE_FINETUNING, KEEPS, keeps
from .scenarios import SCENARIOS, Scenario
from .tools import available, ours, ours_in_one_pass

#: Statistics of one pass with batch statistics are another quantity than what inference sees.
NOT_OF_ONE_PASS = "what inference sees"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.name)
def test_ours(scenario: Scenario) -> None:
    assert scenario.run(ours)
    assert scenario.run(ours_in_one_pass) == (scenario.name != NOT_OF_ONE_PASS)


def test_the_scenarios_tell_tools_apart() -> None:
    """A table in which every tool gets every row right would show nothing."""
    update_bn = available()["torch update_bn"]
    wrong = {scenario.name for scenario in SCENARIOS if not _right(scenario, update_bn)}
    assert {"unequal batches", "variance between batches", "frozen site", "dropout"} <= wrong


def _right(scenario: Scenario, tool: object) -> bool:
    try:
        return scenario.run(tool)  # type: ignore[arg-type]
    except Exception:
        return False


@pytest.mark.filterwarnings("ignore")
def test_a_backbone_frozen_in_lightning(tmp_path: object) -> None:
    pytest.importorskip("pytorch_lightning")
    assert keeps("frostline freeze", tmp_path) == dict.fromkeys(KEEPS, True)
    assert not all(keeps(BACKBONE_FINETUNING, tmp_path).values())  # the scenario can be got wrong
