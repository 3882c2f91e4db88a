"""The suggested momentum against a simulated moving average."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from frostline.numerics.averages import (
    is_short,
    old_share,
    remaining_share,
    run_length,
    suggest_momentum,
)
from frostline.types import DataError, ModelError, Site
from frostline.types.facts import SiteFacts


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


def test_remaining_share() -> None:
    assert remaining_share(0.99, 48) == pytest.approx(0.617, abs=5e-4)
    average = 1.0
    for _ in range(70):
        average = 0.99 * average + 0.01 * 0.0
    assert remaining_share(0.99, 70) == pytest.approx(average)
    assert remaining_share(0.5, 0) == 1
    for decay, updates in ((1.1, 1), (-0.1, 1), (0.9, -1)):
        with pytest.raises(DataError, match="Received"):
            remaining_share(decay, updates)


def site(*, calls: int = 1, decay: float = 0.9, debias: bool = False, **known: Any) -> SiteFacts:
    return SiteFacts(
        site=Site(
            path="bn", name="bn", kind="BatchNorm2d", index=0, channels=4, axis=1, decay=decay,
            epsilon=1e-5, params_frozen=False, stats_frozen=False, policy="update", calls=calls,
            debias=debias,
        ),
        **known,
    )  # fmt: skip


def test_the_sites_own_count_comes_before_that_of_the_model() -> None:
    assert old_share(site(updates=10), 1000) == pytest.approx(0.9**10)  # 35%
    assert old_share(site(), 10) == pytest.approx(0.9**10)
    assert old_share(site(calls=2), 10) == pytest.approx(0.9**20)
    assert old_share(site(updates=0), 1000) == 1
    assert run_length(site(updates=10), 1000) == pytest.approx(1)


def test_no_share_is_known_without_updates_or_of_another_kind_of_average() -> None:
    assert old_share(site(), None) is None
    assert old_share(site(updates=0), None) is None
    for odd in (site(cumulative=True), site(debias=True), site(decay=1.0), site(decay=0.0)):
        assert old_share(odd, 1000) is None
    assert [is_short(site(decay=value)) for value in (0.49, 0.5)] == [True, False]
    assert not is_short(site(decay=0.0, cumulative=True))
