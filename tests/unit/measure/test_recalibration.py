"""Recalibration without a framework: a small fake model in numpy, checked against numpy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_view import FakeView
from hypothesis import given, strategies as st

from frostline.adapters import spool
from frostline.adapters.spool import Workspace
from frostline.adapters.staged import in_stages, with_batch_statistics
from frostline.graph.selection import select
from frostline.measure.recalibration import recalibrated
from frostline.numerics.stats import Moments
from frostline.types import DataError, ModelError, OutputError, Site

EPSILON = 1e-3


@dataclass(frozen=True)
class Program:
    paths: tuple[str, ...]
    passes: int | None = 1
    closed: bool = False
    takes: tuple[int, ...] = (0,)
    gives: tuple[int, ...] = (1,)  # nothing goes on as it is


class Chain:
    """x -> bn0 -> +1, relu -> bn1 -> +1, relu -> ...; float64."""

    def __init__(self, sites: int, *, closed: bool = False) -> None:
        self.paths = tuple(f"bn{index}" for index in range(sites))
        self.statistics = {path: (np.full(2, 5.0), np.full(2, 9.0)) for path in self.paths}
        self.closed = closed
        self.fail_at: int | None = None
        self.calls = 0

    def normalised(self, x: Any, path: str) -> Any:
        mean, variance = self.statistics[path]
        return np.maximum((x - mean) / np.sqrt(variance + EPSILON) + 1, 0)

    def tick(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt

    def start(self, x: Any) -> tuple[Any, ...]:
        return (x,)

    def programs(self, inputs: int, paths: Collection[str]) -> Sequence[Program]:
        if self.closed:
            return [Program(self.paths, len(self.paths), closed=True)]
        return [Program((path,)) for path in self.paths]

    def stage(self, program: Program) -> Callable[..., Any]:
        def run(values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, list[Moments]]]:
            self.tick()
            (x,), seen = values, {}
            index = self.paths.index(program.paths[0])
            if not self.closed and index:
                x = self.normalised(x, self.paths[index - 1])
            for path in program.paths:
                seen[path] = [Moments.of(x)]
                if self.closed:
                    x = self.normalised(x, path)
            return (x,), seen

        return run

    def batch(self) -> Callable[[Any], Any]:
        def run(batch: Any) -> dict[str, list[Moments]]:
            self.tick()
            x, seen = batch.x, {}
            for path in self.paths:
                seen[path] = [Moments.of(x)]
                with np.errstate(invalid="ignore"):  # of a batch that is not finite
                    x = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) + 1, 0)
            return seen

        return run

    def batchwise(self, source: Any, paths: Any) -> Any:
        return with_batch_statistics(self.batch(), source, paths)

    def sequential(self, source: Any, paths: Any, memory_limit: int) -> Any:
        return in_stages(self, source, paths, memory_limit)

    def stored(self, path: str) -> Any:
        return self.statistics[path]

    def epsilon(self, path: str) -> float:
        return EPSILON

    def store(self, path: str, mean: Any, variance: Any) -> None:
        self.tick()
        self.statistics[path] = (mean, variance)

    def snapshot(self) -> Callable[[], None]:
        before = dict(self.statistics)
        return lambda: self.statistics.update(before)

    def site_by_site(self, x: Any) -> dict[str, tuple[Any, Any]]:
        """Site by site over the whole data set: what `sequential` means."""
        found = {}
        for path in self.paths:
            found[path] = (x.mean(0), x.var(0))
            mean, variance = found[path]
            x = np.maximum((x - mean) / np.sqrt(variance + EPSILON) + 1, 0)
        return found


def data(samples: int = 100, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(3, 2, (samples, 2))


def assert_same(found: dict[str, Any], wanted: dict[str, Any], rtol: float = 1e-12) -> None:
    for path, pair in wanted.items():
        for ours, theirs in zip(found[path], pair, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=rtol, err_msg=path)


class Feedback(Chain):
    """A site that is used again behind itself, on what falls by 4 where its mean rises by 1."""

    def programs(self, inputs: int, paths: Collection[str]) -> Sequence[Program]:
        return [Program(self.paths, None, closed=True)]

    def stage(self, program: Program) -> Callable[..., Any]:
        def run(values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, list[Moments]]]:
            (x,), (mean, _) = values, self.statistics["bn0"]
            return (x,), {"bn0": [Moments.of(x), Moments.of(np.zeros_like(x) + 8 - 4 * mean)]}

        return run


def test_statistics_that_lead_back_and_forth_settle_all_the_same() -> None:
    meter = Feedback(1)
    done = recalibrated(meter, meter.paths, data(), batch_size=32)
    assert done.notes == ()
    mean = (data().mean(0) + 8) / 6  # = (x.mean + 8 - 4 mean) / 2, from which whole steps lead away
    variance = data().var(0) / 2 + np.square((data().mean(0) - 8 + 4 * mean) / 2)
    assert_same(meter.statistics, {"bn0": (mean, variance)}, rtol=1e-5)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("batch_size", [7, 32, 100])
def test_sequential_stores_what_the_inference_network_sees(closed: bool, batch_size: int) -> None:
    meter = Chain(4, closed=closed)
    done = recalibrated(meter, meter.paths, data(), batch_size=batch_size)
    assert_same(meter.statistics, meter.site_by_site(data()))
    assert done.samples == 100
    assert done.passes == (4 if closed else 1)
    assert [shift.count for shift in done.shifts] == [100] * 4


def test_sequential_twice_changes_nothing() -> None:
    meter = Chain(3)
    recalibrated(meter, meter.paths, data())
    before = dict(meter.statistics)
    again = recalibrated(meter, meter.paths, data())
    for path, pair in before.items():
        np.testing.assert_array_equal(meter.statistics[path], pair)
    assert max(shift.mean for shift in again.shifts) == 0
    assert max(shift.variance for shift in again.shifts) == 1


@given(
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_any_cut_into_batches_gives_the_moments_of_the_whole(
    cuts: list[int], offset: float, seed: int
) -> None:
    x = data(sum(cuts), seed) + offset
    meter = Chain(1)
    pieces = [(piece,) for piece in np.split(x, np.cumsum(cuts)[:-1])]
    recalibrated(meter, meter.paths, pieces, method="batch")
    mean, variance = meter.statistics["bn0"]
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    # Between-batch part and counts included; the mean of batch variances would be far off.
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-7, atol=1e-12)


def test_shift_is_in_new_standard_deviations() -> None:
    meter = Chain(1)
    (shift,) = recalibrated(meter, meter.paths, data()).shifts
    x = data()
    assert shift.mean == pytest.approx(np.max(np.abs(x.mean(0) - 5) / np.sqrt(x.var(0) + EPSILON)))
    assert shift.variance == pytest.approx(np.max((9 + EPSILON) / (x.var(0) + EPSILON)))


@pytest.mark.parametrize("method", ["sequential", "batch"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_batches_that_are_not_finite_are_skipped_and_named(method: Any, bad: float) -> None:
    x = data()
    x[40, 1] = bad
    meter, clean = Chain(2), Chain(2)
    done = recalibrated(meter, meter.paths, x, method=method, batch_size=10)
    recalibrated(
        clean, clean.paths, np.delete(x, range(40, 50), axis=0), method=method, batch_size=10
    )
    assert_same(meter.statistics, clean.statistics)
    assert list(done.skipped) == [4]
    assert done.samples == 90
    assert "skipped 1 of 10 batches (batch 4: x has NaN or infinite values)" in done.remarks()


def test_a_batch_that_overflows_inside_is_skipped_from_there_on() -> None:
    meter = Chain(2)
    inner = meter.normalised
    meter.normalised = lambda x, path: inner(x, path) * np.where(x[:1] > 1e3, np.inf, 1.0)  # type: ignore[method-assign]
    x = data()
    x[0] = 1e6
    done = recalibrated(meter, meter.paths, x, batch_size=10)
    assert done.skipped == {0: "the input of 'bn1' is not finite"}
    assert [shift.count for shift in done.shifts] == [100, 90]
    assert all(np.isfinite(meter.statistics[path]).all() for path in meter.paths)


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_nothing_finite_is_an_error_and_changes_nothing(method: Any) -> None:
    meter = Chain(2)
    before = dict(meter.statistics)
    with pytest.raises(DataError, match=r"none of the 2 batches is finite.*batch 0: x has NaN"):
        recalibrated(meter, meter.paths, np.full((8, 2), np.nan), method=method, batch_size=4)
    assert meter.statistics == before


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_interrupted_at_any_step_the_model_is_as_before(method: Any) -> None:
    complete = Chain(3)
    recalibrated(complete, complete.paths, data(), method=method)
    for step in range(1, complete.calls + 1):
        meter = Chain(3)
        before = dict(meter.statistics)
        meter.fail_at = step
        with pytest.raises(KeyboardInterrupt):
            recalibrated(meter, meter.paths, data(), method=method)
        assert meter.statistics == before, step


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_data_that_break_off_leave_the_model_as_it_was(method: Any) -> None:
    """fvcore leaves momentum at 1.0 and half-made statistics behind a short or broken loader."""

    def broken() -> Iterator[Any]:
        yield (data(5),)
        raise OSError("disk gone")

    meter = Chain(2)
    before = dict(meter.statistics)
    with pytest.raises(OSError, match="disk gone"):
        recalibrated(meter, meter.paths, broken(), method=method)
    assert meter.statistics == before


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_an_iterator_is_read_once(method: Any) -> None:
    meter, whole = Chain(3), Chain(3)
    recalibrated(
        meter, meter.paths, ((data()[i : i + 9],) for i in range(0, 100, 9)), method=method
    )
    recalibrated(whole, whole.paths, data(), method=method, batch_size=9)
    assert_same(meter.statistics, whole.statistics)


def test_an_iterator_is_refused_where_the_data_are_read_again() -> None:
    meter = Chain(3, closed=True)
    before = dict(meter.statistics)
    with pytest.raises(DataError, match="reads the data more than once"):
        recalibrated(meter, meter.paths, iter([(data(),)]))
    assert meter.statistics == before


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_a_long_stream_is_held_one_batch_at_a_time(method: Any) -> None:
    held: list[weakref.ref[Any]] = []
    most = 0

    def stream() -> Iterator[Any]:
        nonlocal most
        for seed in range(50):
            array = data(4, seed)
            held.append(weakref.ref(array))
            yield (array,)
            del array
            most = max(most, sum(ref() is not None for ref in held))

    meter = Chain(1)
    assert recalibrated(meter, meter.paths, stream(), method=method).samples == 200
    assert most <= 2


def test_activations_spill_to_disk_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    original = spool._Slots.write
    monkeypatch.setattr(
        spool._Slots, "write", lambda *given: written.append(original(*given)) or written[-1]
    )
    meter, roomy = Chain(4), Chain(4)
    recalibrated(meter, meter.paths, data(), batch_size=10, memory_limit=500)
    recalibrated(roomy, roomy.paths, data(), batch_size=10)
    assert len(written) == 3 * 7  # 160 bytes a batch: three of ten fit
    assert len({entry.place for entry in written}) <= 7 + 1  # what was read is written over
    assert_same(meter.statistics, roomy.statistics, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "bool"])
def test_a_spool_returns_every_bit(dtype: str) -> None:
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(3, 4, 2)).astype(dtype),
        np.array(1, dtype),
        np.zeros((0, 3), dtype),
        np.asfortranarray(rng.normal(size=(5, 6)).astype(dtype)),
    )
    with Workspace(0) as workspace:
        kept = workspace.spool()
        kept.append(7, arrays)
        for read in (kept.read, kept.read, kept.drain):
            ((index, found),) = list(read())
            assert index == 7
            for ours, theirs in zip(found, arrays, strict=True):
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)
        assert list(kept.read()) == []


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_what_goes_on_as_it_is_waits_where_it_is(limit: int) -> None:
    with Workspace(limit) as workspace:
        first, second = workspace.spool(), workspace.spool()
        for number in range(3):
            first.append(number, (np.full(8, number), np.full(4, -number)))
        for number, (left, _) in first.drain([1]):
            if number != 1:  # a batch that is left out
                part = first.moving[1]
                second.append(number, (left + 1, np.zeros(4)), first.hand_over({1: 1}))
                assert second.entries[-1][1][1] is part
        found = {number: [array[0] for array in arrays] for number, arrays in second.drain()}
        assert found == {0: [1, 0], 2: [3, -2]}
        assert workspace.used == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is full")
def test_a_full_disk_is_an_output_error_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meter = Chain(3)
    before = dict(meter.statistics)
    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr(Workspace, "stream", lambda _: full)
        with pytest.raises(OutputError, match="TMPDIR"):
            recalibrated(meter, meter.paths, data(), memory_limit=0)
    assert meter.statistics == before


def test_text_has_the_numbers() -> None:
    meter = Chain(2)
    done = recalibrated(meter, meter.paths, data(), batch_size=30)
    assert done.text().startswith(
        "recalibrated 2 sites (sequential) on 100 samples in 4 batches: largest shift of a mean "
    )
    worst = max(done.shifts, key=lambda shift: shift.mean)
    assert f"{worst.mean:.3g} standard deviations at '{worst.path}'" in done.text()
    assert done.remarks() == ()


def test_unknown_method() -> None:
    meter = Chain(1)
    with pytest.raises(ModelError, match=r"'sequential' or 'batch'\. Received: method='precise'"):
        recalibrated(meter, meter.paths, data(), method="precise")  # type: ignore[arg-type]


# --- sites= -----------------------------------------------------------------------------------


def site(path: str, *, frozen: bool = False) -> Site:
    return Site(
        path=path, name=path.rpartition("/")[2], kind="BatchNormalization", index=0, channels=2,
        axis=-1, decay=0.99, epsilon=1e-3, params_frozen=frozen, stats_frozen=frozen,
        policy="inference",
    )  # fmt: skip


SITES = (site("stem/bn", frozen=True), site("block1/bn1"), site("block1/bn2"), site("head_bn"))


@pytest.mark.parametrize(
    ("wanted", "paths"),
    [
        ("all", ["stem/bn", "block1/bn1", "block1/bn2", "head_bn"]),
        ("unfrozen", ["block1/bn1", "block1/bn2", "head_bn"]),
        ("frozen", ["stem/bn"]),
        ("block1/bn2", ["block1/bn2"]),
        ("bn2", ["block1/bn2"]),
        ("block1/*", ["block1/bn1", "block1/bn2"]),
        ("bn?", ["block1/bn1", "block1/bn2"]),
        (["head_bn", "block1/bn1", "bn1"], ["block1/bn1", "head_bn"]),
        (("frozen", "head*"), ["stem/bn", "head_bn"]),
        (SITES[0], ["stem/bn"]),
    ],
)
def test_sites_are_chosen_by_group_path_name_and_pattern(wanted: Any, paths: list[str]) -> None:
    assert [each.path for each in select(SITES, wanted)] == paths


@pytest.mark.parametrize(
    ("sites", "wanted", "message"),
    [
        ((), "all", "no BN layer"),
        (SITES[:1], "unfrozen", "no BN layer is unfrozen: all 1 are frozen; pass sites='all'"),
        (SITES[1:], "frozen", "no BN layer is frozen"),
        (SITES, "block1/bn3", r"Closest: 'block1/bn\d'.*Received: sites='block1/bn3'"),
        (SITES, [], "names no BN layer"),
        (SITES, 3, "sites must be"),
        (SITES, [3], "sites must be"),
    ],
)
def test_sites_that_cannot_be_chosen(sites: Any, wanted: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        select(sites, wanted)


@pytest.mark.parametrize("error", [TypeError("no act"), KeyError("x"), AttributeError("x")])
def test_what_a_model_says_of_inputs_it_does_not_take_is_one_of_our_errors(error: Any) -> None:
    class Fussy(FakeView):
        def run(self, *_: Any) -> Any:
            raise error

    view = Fussy()
    before = dict(view.stored)
    with pytest.raises(ModelError, match=r"\(\(a, b\), y\).*Received: " + type(error).__name__):
        recalibrated(view.meter(view._paths), view._paths, data())
    assert view.stored == before
