"""The mixture of populations against the pooled samples, and weights that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from frostline.numerics.mixture import mixture, shares
from frostline.types import DataError


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    offset=st.floats(-1e4, 1e4),
    seed=st.integers(0, 99),
)
def test_mixture_weighted_by_counts_is_that_of_the_pooled_samples(
    counts: list[int], offset: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset + i, 1 + i, (count, 3)) for i, count in enumerate(counts)]
    pooled = np.concatenate(parts)
    share = shares([float(count) for count in counts], len(counts))
    mean, variance = mixture([p.mean(0) for p in parts], [p.var(0) for p in parts], share)
    np.testing.assert_allclose(mean, pooled.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, pooled.var(0), rtol=1e-7, atol=1e-9)


def test_equal_shares_are_the_default() -> None:
    assert shares(None, 4).tolist() == [0.25] * 4
    assert shares([1, 3], 2).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [[1.0, 2.0]]]
)
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="2 finite numbers"):
        shares(weights, 2)
