"""The suggested momentum against a simulated moving average."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from frostline.numerics.averages import suggest_momentum
from frostline.types import ModelError


@given(steps=st.integers(7, 4000))
def test_one_percent_of_the_old_value_is_left(steps: int) -> None:
    stored, momentum = 1.0, suggest_momentum(steps)
    for _ in range(steps):
        stored = stored * momentum + 0.0 * (1 - momentum)
    assert stored == pytest.approx(0.01)


@given(steps=st.integers(1, 10**7), ratio=st.floats(1e-3, 1e3))
def test_it_stays_within_bounds_and_grows_with_the_steps(steps: int, ratio: float) -> None:
    assert 0.5 <= suggest_momentum(steps, ratio) <= suggest_momentum(steps + 1, ratio) <= 0.999


def test_a_tenth_of_the_learning_rate_averages_ten_times_as_long() -> None:
    assert suggest_momentum(70, 0.1) == pytest.approx(suggest_momentum(700))
    assert suggest_momentum(70, 0.1) ** 70 == pytest.approx(0.01**0.1)


def test_bounds() -> None:
    assert suggest_momentum(6) == 0.5 < suggest_momentum(7)
    assert suggest_momentum(10**6) == 0.999
    assert suggest_momentum(np.int64(70)) == suggest_momentum(70)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "70", None])
def test_steps_must_be_a_whole_number(steps: Any) -> None:
    with pytest.raises(ModelError, match="steps must be a whole number"):
        suggest_momentum(steps)


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan"), float("inf")])
def test_the_ratio_must_be_positive(ratio: float) -> None:
    with pytest.raises(ModelError, match="learning_rate_ratio must be a positive number"):
        suggest_momentum(70, ratio)
