"""What sites are seen to do, population moments, and what puts everything back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from frostline.data.batch import Batch
from frostline.measure.recalibration import recalibrated

RNG = np.random.default_rng(1)
BATCHES = [RNG.normal(3, 2, (16, 4)).astype(np.float32) for _ in range(3)]


def test_behaviour_of_plain_sites(network: Any) -> None:
    before = network.state()
    seen = network.adapter.behaviour([Batch(x) for x in BATCHES])
    assert set(seen) == set(network.paths)
    for found in seen.values():
        assert found.training == pytest.approx(1.0, abs=1e-6)
        assert found.inference == pytest.approx(0.0, abs=1e-6)
        assert found.moves
    assert_same(before, network.state())


def test_sequential_moments_are_a_fixed_point(network: Any) -> None:
    """A second run changes nothing, and on one batch inference becomes what training computes."""
    x = np.concatenate(BATCHES)
    meter = network.adapter.meter(network.paths)
    first = recalibrated(meter, network.paths, (x,), batch_size=len(x))
    assert max(shift.mean for shift in first.shifts) > 0.1
    np.testing.assert_allclose(network.inference(x), network.training(x), rtol=1e-4, atol=1e-4)
    again = recalibrated(meter, network.paths, (x,), batch_size=len(x))
    assert max(shift.mean for shift in again.shifts) < 1e-5


def test_batches_pool_to_the_moments_of_the_whole(network: Any) -> None:
    meter, paths = network.adapter.meter(network.paths), network.paths
    whole = recalibrated(meter, paths, (np.concatenate(BATCHES),), batch_size=48)
    one = {path: meter.stored(path) for path in paths}
    parts = recalibrated(meter, paths, (np.concatenate(BATCHES),), batch_size=16)
    assert (whole.batches, parts.batches, whole.samples, parts.samples) == (1, 3, 48, 48)
    for path in paths:
        np.testing.assert_allclose(meter.stored(path), one[path], rtol=1e-4, atol=1e-5)


def test_the_snapshot_of_a_recorder_puts_every_bit_back(network: Any) -> None:
    before, meter = network.state(), network.adapter.meter(network.paths)
    undo = meter.snapshot()
    recalibrated(meter, network.paths, (BATCHES[0],))
    assert any((value != before[name]).any() for name, value in network.state().items())
    undo()
    assert_same(before, network.state())


@pytest.mark.parametrize("problem", [RuntimeError("bang"), KeyboardInterrupt()], ids=repr)
def test_what_is_preserved_comes_back_on_any_exit(network: Any, problem: BaseException) -> None:
    before = network.state()

    def interrupted() -> None:
        with network.adapter.preserved():
            network.spoil(network.paths[0], 9.0)
            raise problem

    with pytest.raises(type(problem)):
        interrupted()
    assert_same(before, network.state())


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
