"""Samples and bench against numpy; no framework."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_view import EPSILON, FakeView, data

from frostline.measure import Bench, draw
from frostline.measure.samples import size_near
from frostline.types import DataError, ModelError


def bench(view: FakeView, n: int = 200, batch_size: int = 25, **how: Any) -> Bench:
    samples = draw(data(n, **how), max_samples=n, batch_size=batch_size)
    return Bench(
        adapter=view,  # type: ignore[arg-type]
        forward=view.blend_forward(),
        samples=samples,
        task="multiclass",
        noisy=bool(view.dropout),
    )


class TestDraw:
    def test_each_sample_once_with_its_label_and_weight_in_mixed_order(self) -> None:
        x = np.arange(100)[:, None]
        samples = draw((x, x[:, 0] // 10, x[:, 0] * 0.5), max_samples=100, batch_size=10)
        whole = samples.whole
        np.testing.assert_array_equal(np.sort(whole.x[:, 0]), np.arange(100))
        np.testing.assert_array_equal(whole.y, whole.x[:, 0] // 10)
        np.testing.assert_array_equal(whole.sample_weight, whole.x[:, 0] * 0.5)
        # Labels came sorted; no batch has one class only, as all ten of the sorted ones would.
        assert all(len(np.unique(batch.y)) > 3 for batch in samples.batches)

    def test_draw_is_random_seeded_and_from_all_of_the_data(self) -> None:
        x = np.arange(3000)

        def drawn(seed: int, source: Any = (x, x)) -> Any:
            return draw(source, max_samples=100, batch_size=25, seed=seed).whole.x

        first = drawn(0)
        assert len(np.unique(first)) == 100
        np.testing.assert_array_equal(first, drawn(0))
        assert set(first.tolist()) != set(drawn(1).tolist())
        # Mean of 100 of 0..2999 without replacement: sd 86.6 * sqrt(1 - 1/30).
        assert abs(first.mean() - 1499.5) < 4 * 86.6

        def stream() -> Iterator[Any]:
            yield from ((x[s : s + 32], x[s : s + 32]) for s in range(0, 3000, 32))

        streamed = draw(stream(), max_samples=100, seed=0)
        assert (streamed.natural, len(streamed)) == (32, 99)
        assert abs(streamed.whole.x.mean() - 1499.5) < 4 * 86.6

    def test_endless_generator_is_bounded(self) -> None:
        def endless() -> Iterator[Any]:
            while True:
                yield np.zeros((8, 2)), np.zeros(8)

        samples = draw(endless(), max_samples=16)
        assert (samples.read, len(samples), samples.batch_size) == (1024, 16, 8)
        assert samples.notes == ("only the first 1,024 samples of the data were read",)

    def test_batches_have_one_size(self) -> None:
        pairs = ((1024, 32), (1000, 32), (48, 32), (47, 32), (5, 32))
        assert [size_near(*pair) for pair in pairs] == [32, 32, 24, 47, 5]
        for count in (1000, 257, 90, 40, 3):
            samples = draw((np.zeros((count, 1)), np.zeros(count)), max_samples=1024)
            assert {len(batch) for batch in samples.batches} == {samples.batch_size}
            assert count - len(samples) < samples.batch_size / 2
            assert count - len(samples) <= count / 8
        assert samples.batch_size == 3
        fixed = draw((np.zeros((90, 1)), np.zeros(90)), max_samples=1024, batch_size=32, fixed=True)
        assert [len(batch) for batch in fixed.batches] == [32, 32]
        assert fixed.notes == ("26 of 90 samples beyond the last full batch were left out",)

    def test_words_for_bad_data(self) -> None:
        with pytest.raises(DataError, match=r"need labels: pass \(x, y\)"):
            draw(np.zeros((4, 2)), max_samples=4)
        with pytest.raises(DataError, match=r"batches of 32 samples only\. Received: 4 samples"):
            draw((np.zeros((4, 2)), np.zeros(4)), max_samples=9, batch_size=32, fixed=True)
        with pytest.raises(DataError, match="batch_size=0"):
            draw((np.zeros((4, 2)), np.zeros(4)), max_samples=9, batch_size=0)


class TestProbe:
    def test_losses_and_hits_are_those_of_numpy(self) -> None:
        made = bench(FakeView(), shift=1.0)
        probe = made.probe("half", blend={"second": 0.5})
        whole = made.samples.whole
        losses, hits = [], []
        for start in range(0, 200, 25):
            h = np.tanh(whole.x[start : start + 25] / np.sqrt(1 + EPSILON))
            mean, var = h.mean(0) / 2, (1 + h.var(0)) / 2
            logits = 3 * np.tanh((h - mean) / np.sqrt(var + EPSILON))
            y = whole.y[start : start + 25]
            losses.append(np.log(np.exp(logits).sum(1)) - logits[np.arange(25), y])
            hits.append(logits.argmax(1) == y)
        np.testing.assert_allclose(probe.losses, np.concatenate(losses), rtol=1e-9)
        np.testing.assert_array_equal(probe.hits, np.concatenate(hits))
        assert made.cost["half (passes)"] == 1

    def test_equal_conditions_run_once(self) -> None:
        view = FakeView()
        made = bench(view)
        first = made.probe("one", blend=1.0)
        calls = len(view.calls)
        again = made.probe("two", blend=[1, 1], statistics={}, dropout=True)  # no dropout layer
        assert len(view.calls) == calls
        assert (again.name, again.losses is first.losses) == ("two", True)
        made.probe("three", blend=1.0, statistics={"first": (np.ones(3), np.ones(3))})
        made.probe("four", blend=1.0, transform=lambda x: 2 * x)
        assert len(view.calls) == calls + 16

    def test_broken_samples_are_counted(self) -> None:
        made = bench(FakeView())
        made.samples.batches[2].x[4] = np.nan
        probe = made.probe("stored")
        assert probe.broken == 1
        assert np.isnan(probe.losses[54])
        assert probe.hits is not None
        assert probe.hits[54] == 0

    def test_nominal_passes(self) -> None:
        view = FakeView(training={"first": 0.0, "second": 1.0}, dropout=1.0)
        made = bench(view)
        np.testing.assert_allclose(made.nominal(False).losses, made.probe("stored").losses)
        wanted = made.probe("blend", blend={"second": 1}, dropout=True)
        np.testing.assert_allclose(made.nominal(True).losses, wanted.losses)

    def test_words_for_bad_blends(self) -> None:
        made = bench(FakeView())
        with pytest.raises(ModelError, match="Received: 'third'"):
            made.probe("x", blend={"third": 1.0})
        with pytest.raises(DataError, match=r"Received: shape \(3,\)"):
            made.probe("x", blend=[0, 0, 1])


class TestPopulation:
    def test_site_by_site_and_the_model_as_before(self) -> None:
        view = FakeView(frozen=["first"])
        made = bench(view, shift=2.0)
        before = dict(view.stored)
        x = made.samples.whole.x
        every = made.population()
        np.testing.assert_allclose(every["first"][0], x.mean(0))
        h = np.tanh((x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON))
        np.testing.assert_allclose(every["second"][1], h.var(0))
        unfrozen = made.population("unfrozen")
        assert list(unfrozen) == ["second"]
        np.testing.assert_allclose(unfrozen["second"][0], np.tanh(x / np.sqrt(1 + EPSILON)).mean(0))
        assert list(made.population("frozen")) == ["first"]
        assert all(view.stored[path] is before[path] for path in before)
        calls = len(view.calls)
        assert made.population(["second"]) is unfrozen  # the same choice is measured once
        assert len(view.calls) == calls

    def test_no_such_group_and_no_such_path(self) -> None:
        made = bench(FakeView())
        assert made.population("frozen") == {}
        with pytest.raises(ModelError, match="Received: 'nowhere'"):
            made.population(["nowhere"])

    @pytest.mark.parametrize("stop_at", [1, 5, 12, 16])
    def test_interrupted(self, stop_at: int) -> None:
        view = FakeView(stop_at=stop_at)
        made = bench(view, shift=2.0)
        before = dict(view.stored)
        with pytest.raises(KeyboardInterrupt):
            made.population()
        assert all(view.stored[path] is before[path] for path in before)
