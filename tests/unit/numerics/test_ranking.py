"""A winner is named only where intervals show it: exact cases, and SciPy's own intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from frostline.numerics.ranking import crossed_interval, lead, proportion_interval, standing
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
    assert (found.winner, found.leads["b"].low) == (None, -1.0)
    assert standing({"a": same}, higher=True).winner is None


def test_what_diverged_has_lost_and_where_all_did_nobody_has_won() -> None:
    sound, broken = np.ones((1, 5)), np.full((1, 5), np.nan)
    found = standing({"broken": broken, "sound": sound}, higher=False)
    assert (found.order, found.winner) == (("sound", "broken"), "sound")
    assert standing({"a": broken, "b": broken}, higher=False).winner is None


def test_fewer_seeds_are_compared_with_the_same_ones() -> None:
    three, one = np.array([[1.0, 1], [5, 5], [9, 9]]), np.array([[0.5, 0.5]])
    assert lead(three, one, higher=True, comparisons=1, level=0.95).estimate == 0.5


@pytest.mark.parametrize(("right", "of"), [(0, 3), (1, 3), (2, 3), (3, 3), (17, 20), (900, 1000)])
@pytest.mark.parametrize("seeds", [1, 4])
def test_a_share_of_right_answers_has_the_interval_of_wilson(
    right: int, of: int, seeds: int
) -> None:
    """As SciPy has it; seeds that answer alike say no more about the samples than one."""
    hits = np.tile(np.arange(of) < right, (seeds, 1))
    found = proportion_interval(hits, level=0.9)
    theirs = scipy_stats.binomtest(right, of).proportion_ci(0.9, method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert found.estimate == right / of


def test_seeds_that_differ_widen_the_interval_of_a_share_up_to_students() -> None:
    shares = np.array([0.5, 0.52, 0.54])
    hits = np.arange(1000) < 1000 * shares[:, None]
    found = proportion_interval(np.tile(hits, 1000))  # so many samples that they say all they can
    theirs = scipy_stats.ttest_1samp(shares, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    alone = proportion_interval(hits[1:2])
    both = proportion_interval(hits)
    assert both.high - both.low > alone.high - alone.low


def test_two_seeds_and_three_samples_do_not_leave_what_a_share_can_be() -> None:
    right, wrong = np.array([[1, 1, 1], [1, 0, 1.0]]), np.array([[0, 0, 0], [0, 1, 0.0]])
    for found in map(proportion_interval, (right, wrong)):
        assert 0 <= found.low < found.estimate < found.high <= 1
    ahead = lead(right, wrong, higher=True, comparisons=7, level=0.95)
    assert -1 <= ahead.low < ahead.estimate < ahead.high <= 1


@pytest.mark.parametrize("chance", [0.6, 0.95])
def test_the_interval_of_a_share_covers_it_as_often_as_it_says(chance: float) -> None:
    """Samples differ in how hard they are, seeds in how good they are."""
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        hardness, skill = rng.normal(size=(1, 40)), 0.3 * rng.normal(size=(3, 1))
        spread = math.sqrt(1 + 0.09 + 1)
        limit = scipy_stats.norm.ppf(chance) * spread
        hits = hardness + skill + rng.normal(size=(3, 40)) < limit
        found = proportion_interval(hits)
        inside += found.low <= chance <= found.high
    assert 0.93 <= inside / 400 <= 1.0


@pytest.mark.parametrize(("samples", "certain"), [(2, False), (3, False), (8, True)])
def test_a_few_samples_that_all_speak_for_one_side_are_not_yet_certainty(
    samples: int, certain: bool
) -> None:
    """The sign test says 0.5, 0.25 and 0.008."""
    right = np.ones((1, samples))
    found = standing({"right": right, "wrong": 0 * right}, higher=True)
    assert (found.winner == "right") == certain


def test_the_difference_of_shares_by_hand() -> None:
    """5 of 8 samples speak for the one, 1 for the other; half a sample more in each cell."""
    better, other = np.array([[1, 1, 1, 1, 1, 0, 1, 0]]), np.array([[0, 0, 0, 0, 0, 1, 1, 0]])
    found = lead(better, other, higher=True, comparisons=1, level=0.95)
    middle = 4 / 10
    half = scipy_stats.t.ppf(0.975, 7) * math.sqrt((7 / 10 - middle**2) / 10)
    assert found.estimate == 0.5
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), rel=1e-12)
    mirrored = lead(other, better, higher=False, comparisons=1, level=0.95)
    assert mirrored == found


@pytest.mark.parametrize("hits", [np.ones(3), np.ones((0, 3)), np.full((1, 3), 0.5)])
def test_what_is_no_share_is_refused(hits: np.ndarray) -> None:
    with pytest.raises(DataError, match="0 or 1"):
        proportion_interval(hits)


@pytest.mark.parametrize("values", [np.ones(3), np.ones((0, 3))])
def test_other_shapes_are_refused(values: np.ndarray) -> None:
    with pytest.raises(DataError, match="seeds, samples"):
        crossed_interval(values)
    with pytest.raises(DataError, match="no training"):
        standing({}, higher=True)
