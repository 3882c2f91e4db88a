"""Every statistic against SciPy, scikit-learn, exact rational arithmetic or a closed form."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from frostline.numerics import stats
from frostline.numerics.stats import Moments
from frostline.types import DataError

scipy_stats = pytest.importorskip("scipy.stats")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

#: Few distinct values, so that ties are common.
tied = hnp.arrays(np.float64, st.integers(2, 40), elements=st.integers(-3, 3).map(float))


class TestMoments:
    @pytest.mark.parametrize("axis", [0, 1, -1, 2, 3])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
    def test_of_matches_numpy(self, axis: int, dtype: type) -> None:
        values = (np.random.default_rng(0).normal(20, 3, (5, 4, 3, 6))).astype(dtype)
        got = Moments.of(values, axis)
        others = tuple(a for a in range(4) if a != axis % 4)
        exact = values.astype(np.float64)
        np.testing.assert_allclose(got.mean, exact.mean(others), rtol=1e-13)
        np.testing.assert_allclose(got.variance, exact.var(others), rtol=1e-11)
        assert got.count == values.size // values.shape[axis]
        assert got.mean.dtype == got.m2.dtype == np.float64

    @settings(deadline=None)
    @given(
        sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda s: sum(s) > 0),
        offset=st.sampled_from([0.0, 1e4, -1e8]),
        seed=st.integers(0, 10),
    )
    def test_merge_of_unequal_batches_is_the_whole(
        self, sizes: list[int], offset: float, seed: int
    ) -> None:
        whole = np.random.default_rng(seed).normal(offset, 1, (sum(sizes), 3))
        parts = np.split(whole, np.cumsum(sizes)[:-1])
        merged = Moments.of(parts[0])
        for part in parts[1:]:
            merged = merged.merge(Moments.of(part))
        for channel in range(3):
            exact = [Fraction(float(v)) for v in whole[:, channel]]
            mean = sum(exact) / len(exact)
            variance = sum((v - mean) ** 2 for v in exact) / len(exact)
            assert merged.mean[channel] == pytest.approx(float(mean), rel=1e-14)
            assert merged.variance[channel] == pytest.approx(float(variance), rel=1e-6, abs=1e-13)
        assert merged.count == len(whole)

    def test_mean_much_larger_than_std_in_float32(self) -> None:
        values = np.random.default_rng(1).normal(1e4, 1, (4096, 2)).astype(np.float32)
        halves = Moments.of(values[:1000]).merge(Moments.of(values[1000:]))
        np.testing.assert_allclose(halves.variance, values.astype(np.float64).var(0), rtol=1e-10)
        naive = (values**2).mean(0) - values.mean(0) ** 2  # what this must not do
        assert np.abs(naive / halves.variance - 1).max() > 0.1

    def test_constant_channel_has_zero_variance(self) -> None:
        values = np.full((1001, 1), 0.1, np.float32)
        assert Moments.of(values).variance[0] == pytest.approx(0, abs=1e-30)
        assert Moments.of(values).m2[0] >= 0

    def test_empty_and_non_finite(self) -> None:
        empty = Moments.of(np.empty((0, 2)))
        full = Moments.of(np.ones((3, 2)))
        assert empty.count == 0
        assert empty.merge(full) is full
        assert full.merge(empty) is full
        assert np.isnan(empty.variance).all()
        assert full.finite
        for bad in (np.inf, -np.inf, np.nan):
            assert not Moments.of(np.array([[1.0], [bad]])).finite

    def test_wrong_shapes(self) -> None:
        with pytest.raises(DataError, match=r"\(2,\) and \(3,\)"):
            Moments.of(np.ones((1, 2))).merge(Moments.of(np.ones((1, 3))))
        with pytest.raises(DataError, match="channel axis"):
            Moments.of(np.float64(3))


class TestRanks:
    @given(tied)
    def test_ranks(self, values: np.ndarray) -> None:
        np.testing.assert_array_equal(stats.ranks(values), scipy_stats.rankdata(values))

    @given(tied, st.integers(0, 1000))
    def test_auc(self, scores: np.ndarray, seed: int) -> None:
        labels = np.random.default_rng(seed).integers(0, 2, len(scores))
        if 0 < labels.sum() < len(labels):
            expected = sklearn_metrics.roc_auc_score(labels, scores)
            assert stats.auc(labels, scores) == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(stats.auc(labels, scores))

    @given(tied, st.integers(0, 1000))
    def test_spearman(self, a: np.ndarray, seed: int) -> None:
        b = a + np.random.default_rng(seed).integers(-2, 3, len(a))
        if np.ptp(a) > 0 and np.ptp(b) > 0:
            expected = scipy_stats.spearmanr(a, b).statistic
            assert stats.spearman(a, b) == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(stats.spearman(a, b))

    def test_known_ends(self) -> None:
        assert stats.auc(np.array([0, 0, 1, 1]), np.array([1, 2, 3, 4])) == 1
        assert stats.auc(np.array([1, 1, 0, 0]), np.array([1, 2, 3, 4])) == 0
        assert stats.auc(np.array([0, 1]), np.array([5, 5])) == 0.5
        assert stats.spearman(np.array([1, 2, 3]), np.array([1, 4, 9])) == 1
        assert stats.spearman(np.array([1, 2, 3]), np.array([0, -4, -9])) == -1
        assert np.isnan(stats.auc(np.array([0, 1]), np.array([np.nan, 5])))
        assert np.isnan(stats.spearman(np.array([0, 1]), np.array([np.nan, 5])))


class TestLosses:
    def test_cross_entropy(self) -> None:
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(0, 3, (50, 4)), rng.integers(0, 4, 50)
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        expected = sklearn_metrics.log_loss(labels, probabilities, labels=range(4))
        for outputs, from_logits in ((probabilities, False), (logits, True), (logits + 1e3, True)):
            got = stats.cross_entropy(labels, outputs, from_logits=from_logits)
            assert got.shape == (50,)
            assert got.mean() == pytest.approx(expected, rel=1e-9)

    def test_binary_cross_entropy(self) -> None:
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(0, 3, 50), rng.integers(0, 2, 50)
        probabilities = 1 / (1 + np.exp(-logits))
        expected = sklearn_metrics.log_loss(labels, probabilities)
        for outputs, from_logits in ((probabilities, False), (logits, True)):
            got = stats.cross_entropy(labels, outputs, from_logits=from_logits)
            assert got.mean() == pytest.approx(expected, rel=1e-9)

    def test_certain_and_wrong_is_finite(self) -> None:
        got = stats.cross_entropy(np.array([1, 0]), np.array([[1.0, 0.0], [1.0, 0.0]]))
        assert got[0] == pytest.approx(-np.log(1e-7))
        assert got[1] == pytest.approx(0, abs=1e-6)
        far = stats.cross_entropy(np.array([1]), np.array([-1e4]), from_logits=True)
        assert far[0] == pytest.approx(1e4)

    def test_accuracy_and_mse(self) -> None:
        assert stats.accuracy(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])) == 0.75
        a, b = np.random.default_rng(0).normal(size=(2, 7, 3))
        assert stats.mse(a, b) == pytest.approx(sklearn_metrics.mean_squared_error(a, b))
        with pytest.raises(DataError, match=r"\(7, 3\) and \(7,\)"):
            stats.mse(a, b[:, 0])  # would broadcast to 7 x 7 pairs, or fail without a reason
        with pytest.raises(DataError, match=r"\(3,\) and \(4,\)"):
            stats.accuracy(np.ones(3), np.ones(4))
        with pytest.raises(DataError, match="with n labels"):
            stats.cross_entropy(np.ones(3), np.ones((4, 2)))


class TestBootstrap:
    def test_matches_scipy(self) -> None:
        rng = np.random.default_rng(3)
        a, b = rng.exponential(1, 200), rng.exponential(0.8, 200)
        got = stats.paired_bootstrap(a, b, seed=0, resamples=20_000)
        expected = scipy_stats.bootstrap(
            (a - b,), np.mean, n_resamples=20_000, method="percentile", rng=1
        ).confidence_interval
        assert got.estimate == pytest.approx((a - b).mean())
        width = expected.high - expected.low
        assert abs(got.low - expected.low) < 0.02 * width
        assert abs(got.high - expected.high) < 0.02 * width

    def test_percentiles_of_few_samples_are_expanded(self) -> None:
        """Hesterberg (2015): for n = 10 the 95% interval takes percentiles of 0.9 and 99.1%."""
        a = np.random.default_rng(3).normal(size=10)
        got = stats.paired_bootstrap(a, np.zeros(10), seed=0, resamples=20_000)
        level = 2 * scipy_stats.norm.cdf(np.sqrt(10 / 9) * scipy_stats.t.ppf(0.975, 9)) - 1
        assert level == pytest.approx(0.983, abs=1e-3)
        expected = scipy_stats.bootstrap(
            (a,), np.mean, n_resamples=20_000, method="percentile", confidence_level=level, rng=1
        ).confidence_interval
        assert abs(got.low - expected.low) < 0.05 * (expected.high - expected.low)
        assert abs(got.high - expected.high) < 0.05 * (expected.high - expected.low)

    def test_one_sample_tells_nothing(self) -> None:
        got = stats.paired_bootstrap(np.ones(1), np.zeros(1), seed=0)
        assert (got.estimate, got.low, got.high) == (1, -np.inf, np.inf)
        assert not got.excludes_zero

    def test_pairs_are_kept(self) -> None:
        base = np.random.default_rng(0).normal(0, 100, 50)
        got = stats.paired_bootstrap(base + 1, base, seed=0)
        assert got.low == pytest.approx(1)  # unpaired it would be about 1 ± 40
        assert got.high == pytest.approx(1)
        assert got.excludes_zero

    def test_seeded_and_level(self) -> None:
        a, b = np.random.default_rng(0).normal(size=(2, 30))
        assert stats.paired_bootstrap(a, b, seed=5) == stats.paired_bootstrap(a, b, seed=5)
        assert stats.paired_bootstrap(a, b, seed=5) != stats.paired_bootstrap(a, b, seed=6)
        wide = stats.paired_bootstrap(a, b, seed=5, level=0.99)
        narrow = stats.paired_bootstrap(a, b, seed=5, level=0.5)
        assert wide.low < narrow.low < narrow.high < wide.high
        assert not wide.excludes_zero

    def test_chunks_do_not_change_the_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = np.random.default_rng(0).normal(size=(2, 30))
        whole = stats.paired_bootstrap(a, b, seed=5)
        monkeypatch.setattr(stats, "_CHUNK", 7 * 30)
        assert stats.paired_bootstrap(a, b, seed=5) == whole

    @pytest.mark.parametrize("kwargs", [{"resamples": 0}, {"level": 1.0}, {"level": 0.0}])
    def test_wrong_arguments(self, kwargs: dict[str, float]) -> None:
        with pytest.raises(DataError, match="Received"):
            stats.paired_bootstrap(np.ones(3), np.ones(3), seed=0, **kwargs)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"\(0,\)"):
            stats.paired_bootstrap(np.ones(0), np.ones(0), seed=0)


@pytest.mark.parametrize("nodes", [1, 2, 5, 16])
def test_gauss_legendre_is_exact_up_to_its_degree(nodes: int) -> None:
    t, weight = stats.gauss_legendre(nodes)
    assert ((t > 0) & (t < 1)).all()
    for degree in range(2 * nodes):
        assert weight @ t**degree == pytest.approx(1 / (degree + 1), rel=1e-12)
    with pytest.raises(DataError, match="nodes must"):
        stats.gauss_legendre(0)


def test_distances() -> None:
    shift = stats.mean_shift(np.array([3.0, 1.0]), np.ones(2), np.array([4.0, 0.0]), epsilon=0.0)
    assert shift.tolist() == [1.0, 0.0]
    dead = stats.mean_shift(np.array([2.0]), np.ones(1), np.zeros(1), epsilon=0.0)
    assert np.isinf(dead[0])
    ratio = stats.variance_ratio(np.array([8.0, 0.0]), np.array([2.0, 0.0]), epsilon=1e-3)
    np.testing.assert_allclose(ratio, [8.001 / 2.001, 1.0])


def test_normals_apart_is_the_divergence_to_second_order():
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(size=7), rng.uniform(0.5, 2, 7)
    near = mean + 0.01 * np.sqrt(variance), variance * 1.01
    ratio = near[1] / variance
    divergence = 0.5 * (ratio + (near[0] - mean) ** 2 / variance - 1 - np.log(ratio))
    wanted = np.median(np.sqrt(2 * divergence))
    assert stats.normals_apart(near, (mean, variance)) == pytest.approx(wanted, rel=0.01)
    assert stats.normals_apart((mean, variance), (mean, variance)) == 0
    assert np.isnan(stats.normals_apart((mean, -variance), (mean, variance)))
