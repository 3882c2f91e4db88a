"""Aligned networks compute what they did; their average needs statistics of its own."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    os.environ["KERAS_BACKEND"] != "torch", reason="torch has a process of its own"
)
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "merge_weights.py"))


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_alignment_permutes_units_and_changes_no_output(example: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    build, groups = (
        (example["mlp"], example["mlp_groups"])
        if kind == "mlp"
        else (lambda: example["ResNet20"](4), example["resnet_groups"])
    )
    first, second = build().eval(), build().eval()
    x = torch.randn(6, 64) if kind == "mlp" else torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        second.train()(x * 2 + 1)  # statistics of its own
        expected = second.eval()(x)
        before = second.state_dict()
        state = example["aligned"](first.state_dict(), before, groups(first))
        assert any(not torch.equal(state[name], before[name]) for name in state)
        second.load_state_dict(state)
        np.testing.assert_allclose(second(x), expected, rtol=1e-4, atol=1e-5)


def test_a_permuted_copy_is_found_again(example: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = example["mlp"](depth=3)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    order = torch.randperm(64)
    for name, axis in example["mlp_groups"](net)[0]:
        state[name] = state[name].index_select(axis, order)
    found = example["aligned"](net.state_dict(), state, example["mlp_groups"](net))
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())


def test_the_average_of_aligned_networks_is_repaired(example: dict[str, Any]) -> None:
    """Of three pairs: how well one of them aligns changes with the rounding of a processor."""
    ways, data = (example["mlp"], example["mlp_groups"]), example["digits"]()
    found = [
        example["merge"](*ways, *data, epochs=20, seeds=(seed, seed + 1)) for seed in (2, 4, 6)
    ]
    assert min(min(each.first, each.second) for each in found) > 0.95
    averaged, aligned, recalibrated = (
        np.mean([getattr(each, name) for each in found])
        for name in ("averaged", "aligned", "recalibrated")
    )
    assert averaged < 0.5
    assert aligned > averaged + 0.2
    assert recalibrated > aligned + 0.05
    assert recalibrated > 0.9
