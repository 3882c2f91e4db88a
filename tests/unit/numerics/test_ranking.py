"""A winner is named only where intervals show it: exact cases, and SciPy's own intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from frostline.numerics.ranking import crossed_interval, lead, standing
from frostline.types import DataError


def test_one_seed_is_the_paired_t_interval_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40), rng.normal(size=40)
    found = lead(a[None], b[None], higher=True, comparisons=1, level=0.95)
    theirs = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert found.estimate == pytest.approx(float((a - b).mean()))


def test_seeds_without_spread_among_samples_are_the_t_interval_over_seeds() -> None:
    seeds = np.array([0.1, 0.4, 0.3])
    found = crossed_interval(np.repeat(seeds[:, None], 50, axis=1))
    theirs = scipy_stats.ttest_1samp(seeds, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_both_kinds_of_spread_by_hand() -> None:
    """2 seeds, 3 samples: the variances of their means are 9/4 and 1/2."""
    values = np.array([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]])
    by_samples, by_seeds = 2.25 / 3, 0.5 / 2  # means 0, 1.5, 3 and 1, 2
    freedom = (by_samples + by_seeds) ** 2 / (by_samples**2 / 2 + by_seeds**2 / 1)
    half = scipy_stats.t.ppf(0.975, freedom) * math.sqrt(by_samples + by_seeds)
    found = crossed_interval(values)
    assert (found.low, found.high) == pytest.approx((1.5 - half, 1.5 + half), rel=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Samples and seeds both drawn; the seeds' part is few draws of a large spread."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        values = rng.normal(size=(1, 60)) + 0.3 * rng.normal(size=(3, 1)) + rng.normal(size=(3, 60))
        found = crossed_interval(values)
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / 400 <= 1.0


def test_certain_leads_make_a_winner_and_uncertain_ones_do_not() -> None:
    hits = np.zeros((1, 100))
    hits[0, :80] = 1
    close, far = hits.copy(), hits.copy()
    close[0, 78:80] = 0
    far[0, 20:80] = 0
    found = standing({"far": far, "best": hits}, higher=True)
    assert (found.order, found.winner, found.tied) == (("best", "far"), "best", ())
    found = standing({"close": close, "best": hits, "far": far}, higher=True)
    assert (found.order, found.winner, found.tied) == (("best", "close", "far"), None, ("close",))
    assert found.leads["far"].low > 0
    assert found.leads["close"].level == pytest.approx(0.975)  # one of two comparisons
    swapped = standing({"far": far, "best": hits}, higher=False)  # of losses the smaller one leads
    assert (swapped.winner, swapped.leads["best"].estimate) == ("far", pytest.approx(0.6))


def test_equal_numbers_one_sample_and_one_training_give_no_winner() -> None:
    same = np.ones((1, 5))
    assert standing({"a": same, "b": same}, higher=True).winner is None
    found = standing({"a": same[:, :1], "b": 0 * same[:, :1]}, higher=True)
    assert (found.winner, found.leads["b"].low) == (None, -math.inf)
    assert standing({"a": same}, higher=True).winner is None


def test_what_diverged_has_lost_and_where_all_did_nobody_has_won() -> None:
    sound, broken = np.ones((1, 5)), np.full((1, 5), np.nan)
    found = standing({"broken": broken, "sound": sound}, higher=False)
    assert (found.order, found.winner) == (("sound", "broken"), "sound")
    assert standing({"a": broken, "b": broken}, higher=False).winner is None


def test_fewer_seeds_are_compared_with_the_same_ones() -> None:
    three, one = np.array([[1.0, 1], [5, 5], [9, 9]]), np.array([[0.5, 0.5]])
    assert lead(three, one, higher=True, comparisons=1, level=0.95).estimate == 0.5


@pytest.mark.parametrize("values", [np.ones(3), np.ones((0, 3))])
def test_other_shapes_are_refused(values: np.ndarray) -> None:
    with pytest.raises(DataError, match="seeds, samples"):
        crossed_interval(values)
    with pytest.raises(DataError, match="no training"):
        standing({}, higher=True)
