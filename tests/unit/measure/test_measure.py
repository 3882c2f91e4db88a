"""All measurements of a diagnosis on a network in numpy; no framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
from fake_view import EPSILON, FakeView, data

from frostline.adapters.protocol import Condition
from frostline.measure import measure
from frostline.measure.samples import draw, rebatched
from frostline.measure.shares import part_for
from frostline.types import DataError, ModelError
from frostline.types.measured import Measurement


def measured(view: FakeView, given: Any = None, **how: Any) -> Measurement:
    how = {"batch_size": 25, **how}
    return measure(view, data(shift=1.5) if given is None else given, **how)[0]  # type: ignore[arg-type]


class TestProbesAndGaps:
    def test_gap_of_thawed_sites(self) -> None:
        """Stored statistics 0 and 1, inputs around 1.5 and more: training mode is better."""
        found = measured(FakeView())
        assert (found.samples, found.batch_size, found.task, found.classes) == (
            200,
            25,
            "multiclass",
            3,
        )
        probes = found.probes
        for one, other in (("training", "batch"), ("training blend", "batch")):
            np.testing.assert_array_equal(probes[one].losses, probes[other].losses)
        np.testing.assert_array_equal(probes["stored"].losses, probes["inference"].losses)
        gap = found.gaps["bn"]
        differences = probes["batch"].losses - probes["inference"].losses
        assert gap.loss.estimate == pytest.approx(differences.mean())
        # The oracle of the interval is SciPy's bootstrap of the same differences.
        oracle = scipy.stats.bootstrap(
            (differences,), np.mean, method="percentile", rng=np.random.default_rng(3)
        ).confidence_interval
        width = oracle.high - oracle.low
        assert gap.loss.low == pytest.approx(oracle.low, abs=0.1 * width)
        assert gap.loss.high == pytest.approx(oracle.high, abs=0.1 * width)
        assert gap.loss.excludes_zero
        assert gap.accuracy is not None
        hits = probes["batch"].accuracy, probes["inference"].accuracy
        assert gap.accuracy.estimate == pytest.approx(hits[0] - hits[1])  # type: ignore[operator]
        assert probes["population"].loss < 0.3 * probes["inference"].loss
        np.testing.assert_array_equal(
            probes["population"].losses, probes["population unfrozen"].losses
        )
        assert found.skipped["population frozen"] == "no site is frozen"
        assert found.skipped["dropout"] == "no layer but BN acts in training only"
        assert found.sites["second"].noisy_mean is None

    def test_behaviour_decides_not_flags(self) -> None:
        """A frozen site that uses the batch, a thawed one that does not."""
        view = FakeView(frozen=["first"], training={"first": 1.0, "second": 0.0}, dropout=0.7)
        found = measured(view)
        blended = found.probes["training blend"]
        assert blended.loss not in (found.probes["batch"].loss, found.probes["stored"].loss)
        assert found.gaps["dropout"].loss.estimate > 0
        assert found.noise_layers == {"drop": "dropout"}
        second = found.sites["second"]  # the fake's dropout is behind it
        np.testing.assert_allclose(second.noisy_mean, second.batch_mean)
        np.testing.assert_allclose(second.noisy_variance, second.batch_variance)
        sites = found.attribution
        assert sites is not None
        assert sites.shares[1] == 0
        assert sites.shares[0] == pytest.approx(sites.gap, rel=0.05)
        names = [name for name in found.probes if name.startswith("population")]
        assert names == ["population", "population unfrozen", "population frozen"]
        assert len({found.probes[name].loss for name in names}) == 3

    def test_training_mode_that_lambda_gives_is_run_on_one_batch(self) -> None:
        view = FakeView(training={"first": 0.0, "second": 1.0})
        found = measured(view)
        own = [size for kind, size in view.calls if kind == "own"]
        assert sum(own) < 2 * 200 + 3 * 25  # inference and neighbours; of training mode one batch
        np.testing.assert_array_equal(
            found.probes["training"].losses, found.probes["training blend"].losses
        )

    def test_training_mode_that_lambda_does_not_give_is_run_whole(self) -> None:
        """A layer that acts in training, and that nobody knows for one that does."""

        class Hidden(FakeView):
            def noise_layers(self) -> dict[str, str]:
                return {}

        view = Hidden(dropout=0.7)
        found = measured(view)
        assert sum(size for kind, size in view.calls if kind == "own") > 2 * 200
        moved = found.probes["training"].losses - found.probes["training blend"].losses
        assert (np.abs(moved) > 1e-3).mean() > 0.9

    def test_inference_on_the_batch(self) -> None:
        view = FakeView(inference={"first": 1.0, "second": 1.0})
        found = measured(view)
        assert found.neighbours is not None
        assert found.neighbours > 0.01
        assert found.gaps["bn"].loss.estimate == 0
        assert found.probes["stored"].loss > 1.5 * found.probes["inference"].loss
        healthy = measured(FakeView())
        assert healthy.neighbours is not None
        assert healthy.neighbours < 1e-6

    def test_a_corrupt_batch_size(self) -> None:
        view = FakeView()
        plain = view.run

        def corrupt(x: Any, blend: Any, statistics: Any, dropout: bool) -> Any:
            outputs, seen = plain(x, blend, statistics, dropout)
            return (outputs[:, ::-1] if len(x) == 8 else outputs), seen

        view.run = corrupt  # type: ignore[method-assign]
        changes = {each.batch_size: each.inference_change for each in measured(view).sweep}
        assert list(changes) == [2, 8, 25, 64]
        assert changes[8] > 0.3
        assert max(changes[2], changes[25], changes[64]) < 1e-9

    def test_without_sites(self) -> None:
        found = measured(FakeView(sites=()), data(shift=0))
        assert set(found.probes) == {"inference", "training", "stored"}
        assert found.gaps["total"].loss.estimate == 0
        assert found.skipped["batch"] == "the model has no BN layer"
        assert found.skipped["attribution"] == "the model has no BN layer"
        assert (found.attribution, found.sites) == (None, {})
        assert len(found.sweep) == 4

    def test_class_sorted_batches_are_compared_sample_by_sample(self) -> None:
        found = measured(FakeView())
        assert found.gaps["sorted"].loss.estimate > 0.2
        one_class = measured(FakeView(), (data()[0], np.zeros(200, int)))
        assert "sorting changes nothing" in one_class.skipped["sorted"]

    def test_class_sorted_batches_that_do_worse_for_certain_are_given_up_after_a_quarter(
        self,
    ) -> None:
        given = data(800, shift=1.5)
        view = FakeView()
        found = measured(view, given)
        assert "do worse for certain on the first 200 samples" in found.skipped["sorted"]
        assert "sorted" not in found.probes
        assert found.cost["sorted (passes)"] == 0.25

    def test_class_sorted_batches_that_promise_something_are_all_tried_once(self) -> None:
        """Labels at random: nothing tells them from mixed batches."""
        x, y = data(800, shift=1.5)
        given = x, np.random.default_rng(2).permutation(y)
        found, bench = measure(FakeView(), given, batch_size=25)  # type: ignore[arg-type]
        assert found.cost["sorted (passes)"] == 1
        assert bench.labels is not None
        order = np.argsort(bench.labels, kind="stable")
        again = bench.probe("again", blend=1.0, batches=rebatched(bench.samples, 25, order))
        np.testing.assert_array_equal(found.probes["sorted"].losses[order], again.losses)
        hits = found.probes["sorted"].hits
        assert hits is not None
        np.testing.assert_array_equal(hits[order], again.hits)

    def test_the_interval_says_how_little_16_samples_tell(self) -> None:
        few, many = (measured(FakeView(), data(n, shift=0.05), batch_size=16) for n in (16, 800))
        width = [each.gaps["bn"].loss.high - each.gaps["bn"].loss.low for each in (few, many)]
        assert width[0] > 3 * width[1]


class TestBroken:
    def test_one_broken_sample_is_left_out_of_intervals(self) -> None:
        x, y = data(shift=1.5)
        x[7] = 100
        view = FakeView()
        plain = view.run

        def overflow(x: Any, blend: Any, statistics: Any, dropout: bool) -> Any:
            outputs, seen = plain(x, blend, statistics, dropout)
            return np.where(x[:, :1] > 90, np.nan, outputs), seen

        view.run = overflow  # type: ignore[method-assign]
        found = measured(view, (x, y))
        assert found.probes["inference"].broken == 1
        gap = found.gaps["bn"].loss
        assert np.isfinite([gap.estimate, gap.low, gap.high]).all()
        x[::10] = 100  # too many to be left out of the part that is differentiated
        found = measured(view, (x, y))
        assert found.attribution is None

    def test_samples_that_are_no_numbers_spoil_no_batch(self) -> None:
        x, y = data(shift=1.5)
        x[7] = np.inf
        found = measured(FakeView(), (x, y))
        assert (found.samples, found.batch_size) == (192, 24)  # of 199 that are left
        assert any("1 of 200 samples hold NaN or infinite inputs" in n for n in found.notes)
        assert not any(probe.broken for probe in found.probes.values())
        x[:] = np.nan
        found = measured(FakeView(), (x, y))
        assert found.probes["inference"].broken == found.samples == 200

    def test_poisoned_statistics(self) -> None:
        view = FakeView()
        view.stored["second"] = (np.full(3, np.nan), np.ones(3))
        found = measured(view)
        assert found.probes["inference"].broken == 200
        assert found.probes["inference"].accuracy == 0
        assert found.probes["population"].broken == 0
        assert np.isnan(found.gaps["bn"].loss.estimate)
        assert not found.gaps["bn"].loss.excludes_zero
        accuracy = found.gaps["bn"].accuracy
        assert accuracy is not None
        assert accuracy.low > 0.8


class TestSites:
    def test_moments_are_those_of_numpy(self) -> None:
        given = data(shift=1.5)
        view = FakeView()
        found, bench = measure(view, given, batch_size=25)  # type: ignore[arg-type]
        whole = bench.samples.whole
        first, second = found.sites["first"], found.sites["second"]
        np.testing.assert_allclose(first.mean, given[0].mean(0))
        np.testing.assert_allclose(first.shift, given[0].mean(0) / np.sqrt(1 + EPSILON))
        batches = whole.x.reshape(8, 25, 3)
        np.testing.assert_allclose(first.batch_variance, batches.var(1).mean(0))
        deviation = batches.mean(1).std(0, ddof=1) / np.sqrt(given[0].var(0) + EPSILON)
        assert first.noise == pytest.approx(np.median(deviation))
        hidden = [np.tanh((b - b.mean(0)) / np.sqrt(b.var(0) + EPSILON)) for b in batches]
        np.testing.assert_allclose(second.batch_mean, np.mean(hidden, axis=(0, 1)), atol=1e-12)
        np.testing.assert_allclose(
            second.ratio, (second.variance + EPSILON) / (second.stored_variance + EPSILON)
        )
        assert first.values == 1
        within = [given[0][given[1] == c].var(0) for c in range(3)]
        assert first.within_variance is not None
        # Whole batches of each class only: 50 to 75 of some 67 samples.
        np.testing.assert_allclose(first.within_variance, np.mean(within, axis=0), rtol=0.2)
        assert first.within_variance.mean() < 0.5 * first.variance.mean()

    def test_distances_from_batches_of_one_class(self) -> None:
        given = data(shift=1.5)
        view = FakeView()
        of_two = given[0][given[1] == 2]
        view.stored["first"] = (of_two.mean(0), of_two.var(0))
        view.stored["second"] = (np.full(3, 5.0), np.ones(3))
        found, _ = measure(view, given, batch_size=25)  # type: ignore[arg-type]
        apart = found.sites["first"].class_distances
        assert apart is not None
        assert apart.shape == (3,)
        assert apart.argmin() == 2
        assert apart[2] < 0.2  # whole batches only: not each of the class's samples
        assert apart[:2].min() > 1
        assert measured(FakeView(), given).sites["first"].class_distances is not None
        plain = FakeView()
        plain.stored["first"] = (given[0].mean(0), given[0].var(0))
        assert measured(plain, given).sites["first"].class_distances is None  # one site is off

    def test_one_batch_tells_no_noise(self) -> None:
        found = measured(FakeView(), data(30), batch_size=32)
        assert np.isnan(found.sites["first"].noise)


class TestAttribution:
    def test_shares_add_up_and_the_curve_ends_at_the_probes(self) -> None:
        view = FakeView()
        view.stored = {"first": (np.zeros(3), np.full(3, 2e-3)), "second": view.stored["second"]}
        whole = measured(view)
        found, probes = whole.attribution, whole.probes
        assert found is not None
        assert found.complete
        assert found.residual <= 0.05
        assert found.shares.sum() == pytest.approx(found.gap, rel=0.05)
        (start, low), *_, (end, high) = found.curve
        assert (start, end) == (0, 1)
        assert high - low == pytest.approx(found.gap)
        assert len(found.curve) >= 7
        # One site alone: by hand, from passes of the network itself.
        for path, effect in found.alone.items():
            blend = [float(each != path) for each in found.paths]
            _, bench = measure(view, data(shift=1.5), batch_size=25)  # type: ignore[arg-type]
            gaps = (probes["training blend"].losses - probes["stored"].losses).reshape(8, 25)
            part = part_for(bench.samples, found.nodes, gaps.mean(axis=1))
            assert len(part) * 25 == found.samples
            chosen = [bench.batches[index] for index in part]
            losses = [
                view.blend_forward().outcome(b, Condition(blend)).losses.mean() for b in chosen
            ]
            assert effect == pytest.approx(high - np.mean(losses))

    def test_batches_that_speak_for_all_are_differentiated(self) -> None:
        samples = draw(data(200), max_samples=200, batch_size=25)
        gaps = np.array([0.0, 0.0, 8.0, 1.1, 0.0, 0.0, 0.5, 0.4])  # mean 1.25
        assert part_for(samples, 20, gaps) == (3,)
        assert part_for(samples, 5, gaps) == (3, 6)  # 0.8 is nearer than 0.75 or 4.55
        gaps[3] = np.nan
        assert part_for(samples, 20, gaps) == (6,)  # 8.9 / 7 = 1.27
        assert part_for(samples, 20, np.full(8, np.nan)) == (0,)
        assert len(part_for(samples, 40, gaps)) == 1

    def test_no_shares_of_a_gap_that_may_be_chance(self) -> None:
        view = FakeView()
        x, y = data(400)
        view.stored["first"] = (x.mean(0), x.var(0))
        hidden = np.tanh((x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON))
        view.stored["second"] = (hidden.mean(0), hidden.var(0))
        found = measured(view, (x, y), batch_size=100)
        low, high = found.gaps["bn"].loss.low, found.gaps["bn"].loss.high
        assert low < 0 < high
        assert found.attribution is None
        assert found.skipped["attribution"].startswith("the BN gap is not told from 0")

    def test_frozen_sites_have_no_share(self) -> None:
        view = FakeView(training={"first": 0.0, "second": 0.0}, frozen=["first", "second"])
        found = measured(view)
        assert found.skipped["attribution"] == "no site uses batch statistics in training"


class TestLabels:
    def test_permuted_classes_are_found_by_renaming(self) -> None:
        x, y = data()
        view = FakeView()
        found = measured(view, (x - x.mean(), (y + 1) % 3))
        assert found.probes["inference"].accuracy is not None
        assert found.probes["inference"].accuracy < 0.1
        assert found.relabelled is not None
        assert found.relabelled > 0.9
        assert found.confusion is not None
        assert found.confusion.sum() == 200
        assert found.chance == pytest.approx(np.bincount(y).max() / 200)

    def test_loss_is_inferred_and_said(self) -> None:
        found = measured(FakeView(loss=None))
        (note,) = found.notes
        assert note.endswith("from labels and outputs: SparseCategoricalCrossentropy")
        with pytest.raises(ModelError, match=r"pass loss=, .* Received: loss=None"):
            measured(FakeView(loss=None), (data()[0], np.ones((200, 2, 2))))


class TestGiven:
    def test_validation_data_are_judged_by_themselves(self) -> None:
        found = measured(FakeView(), validation=data(100, shift=4.0, seed=5))
        assert found.probes["validation inference"].losses.shape == (100,)
        assert found.probes["validation population"].loss > 2 * found.probes["population"].loss
        assert found.validation_input is not None
        assert found.input is not None
        np.testing.assert_allclose(found.validation_input.mean - found.input.mean, 2.5, atol=0.4)

    def test_reasons_for_what_was_not_measured(self) -> None:
        found = measured(FakeView(), reference="here", round_trip=True)
        assert found.skipped["validation"] == "no validation data given: validation="
        assert found.skipped["difference"] == "models of this framework cannot be compared yet"
        assert found.skipped["round trip"].startswith("models of this framework cannot be saved")
        assert found.skipped["input trials"] == "the inputs are not images"

    def test_one_measurement_that_fails_leaves_the_others(self) -> None:
        class Broken(FakeView):
            def difference(self, reference: Any, x: Any) -> Any:
                raise OSError("no such file\nand more")

        found = measured(Broken(), reference="here")
        assert found.skipped["difference"] == "OSError: no such file"
        assert found.attribution is not None

    def test_history(self) -> None:
        found = measured(FakeView(), history={"loss": [2.0, 1.0]})
        assert found.history == {"loss": (2.0, 1.0)}

    def test_progress_names_every_step(self) -> None:
        told: list[tuple[str, float]] = []
        measured(FakeView(), progress=lambda name, done: told.append((name, done)))
        assert [name for name, _ in told][:3] == ["samples", "inference", "training"]
        assert all(0 <= done < 1 for _, done in told)

    def test_words_for_bad_arguments(self) -> None:
        with pytest.raises(DataError, match="max_samples=0"):
            measured(FakeView(), max_samples=0)
        with pytest.raises(DataError, match="need labels"):
            measured(FakeView(), data()[0])


def test_same_seed_same_numbers_another_seed_another_draw() -> None:
    given = data(300)
    one, two, other = (measured(FakeView(), given, max_samples=100, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.probes["training"].losses, two.probes["training"].losses)
    assert one.gaps["bn"] == two.gaps["bn"]
    assert one.probes["training"].loss != other.probes["training"].loss


@pytest.mark.parametrize("stop_at", [1, 12, 30, 60, 130])
def test_the_model_is_as_before_wherever_it_is_interrupted(stop_at: int) -> None:
    view = FakeView(stop_at=stop_at)
    before = dict(view.stored)
    with pytest.raises(KeyboardInterrupt):
        measured(view)
    assert len(view.calls) == stop_at
    assert view.stored == before


def test_cost_is_counted_in_passes_over_the_samples() -> None:
    view = FakeView()
    found, bench = measure(view, data(shift=1.5), batch_size=25)  # type: ignore[arg-type]
    samples = len(bench.samples)
    # Every pass of the network, but the first batch once more, which is judged before there is a
    # bench; a gradient of the fake takes five passes where a framework takes three, and is counted
    # as three.
    seen = (sum(n for kind, n in view.calls if kind in ("own", "outcome")) - 25) / samples
    nodes = sum(n for kind, n in view.calls if kind == "gradient") / samples / 4
    counted = sum(v for name, v in found.cost.items() if name.endswith("(passes)"))
    statistics = found.cost["statistics of all sites (passes)"]
    assert counted - statistics - found.cost["attribution (passes)"] == pytest.approx(seen - nodes)
    assert found.cost["attribution (passes)"] == pytest.approx(3 * nodes)
    assert found.cost["sorted (passes)"] == 1


def test_a_diagnosis_of_1024_samples_goes_through_the_network_at_most_18_times() -> None:
    """Counted by the network itself, derivatives and the passes for statistics included."""
    view = FakeView(frozen=["first"])
    found = measured(view, data(1024, shift=1.5), batch_size=32)
    forward = sum(n for kind, n in view.calls if kind in ("own", "outcome")) / 1024
    assert found.attribution is not None
    assert 8 < forward <= 18
    by_kind = {name: n for name, n in found.cost.items() if name.endswith("(passes)")}
    assert sum(by_kind.values()) <= 18, by_kind
