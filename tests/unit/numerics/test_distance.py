"""How far two sets of arrays are apart."""

from __future__ import annotations

import numpy as np
import pytest

from frostline.numerics.compare import relative_difference


@pytest.mark.parametrize(
    ("want", "have", "error"),
    [
        ([1.0, -4.0], [1.0, -4.2], 0.05),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], np.inf),
        ([np.nan, 2.0], [np.nan, 2.0], 0.0),
        ([np.nan, 2.0], [1.0, 2.0], np.inf),
        ([np.inf, 2.0], [-np.inf, 2.0], np.inf),
        ([1.0, 2.0], [np.nan, 2.0], np.inf),
        ([1.0, 2.0], [1.0], np.inf),
    ],
)
def test_the_largest_difference_is_a_share_of_the_largest_expected_value(
    want: list[float], have: list[float], error: float
) -> None:
    received = relative_difference([np.array(have)], [np.array(want)])
    assert received == pytest.approx(error)


def test_the_worst_array_counts_and_each_has_a_scale_of_its_own() -> None:
    expected = [np.array([1000.0]), np.array([1.0, -2.0])]
    found = [np.array([1001.0]), np.array([1.0, -1.5])]
    assert relative_difference(found, expected) == pytest.approx(0.25)


def test_values_that_are_not_finite_can_be_left_out() -> None:
    expected, found = [np.array([np.nan, 2.0, 4.0])], [np.array([1.0, 3.0, np.inf])]
    assert relative_difference(found, expected, finite_only=True) == pytest.approx(0.5)
    assert np.isnan(relative_difference([np.array([np.nan])], [np.ones(1)], finite_only=True))
