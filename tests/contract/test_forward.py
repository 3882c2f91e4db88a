"""The λ pass: its ends are the model's own passes, its slope is that of its losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from frostline.adapters.protocol import Condition
from frostline.data.batch import Batch
from frostline.types import DataError

Y = np.arange(8) % 4


def forward(network: Any) -> Any:
    return network.adapter.blend_forward(loss=network.framework.cross_entropy())


@pytest.fixture(autouse=True)
def _nothing_changes(network: Any) -> Any:
    network.spoil(network.paths[0], 0.5)
    before = network.state()
    yield
    after = network.state()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_ends_are_inference_and_training(network: Any, x: Any) -> None:
    passes = forward(network)
    assert passes.paths == network.paths
    stored = passes.outputs(Batch(x), Condition(0.0))
    np.testing.assert_allclose(stored, network.inference(x), rtol=1e-5, atol=1e-6)
    batch = passes.outputs(Batch(x), Condition(1.0))
    np.testing.assert_allclose(batch, network.training(x), rtol=1e-5, atol=1e-5)
    assert np.abs(stored - batch).max() > 1e-2


def test_own_passes_are_those_ends(network: Any, x: Any) -> None:
    passes = forward(network)
    for training, wanted in ((False, network.inference(x)), (True, network.training(x))):
        found = passes.own(Batch(x, Y), training=training)
        np.testing.assert_allclose(found.outputs, wanted, rtol=1e-5, atol=1e-5)


def test_statistics_take_the_place_of_stored_ones(network: Any, x: Any) -> None:
    passes, path = forward(network), network.paths[1]
    given = {path: (np.full(4, 0.25), np.ones(4))}
    found = passes.outputs(Batch(x), Condition(0.0, statistics=given))
    before = network.state()
    network.spoil(path, 0.25)
    wanted = network.inference(x)
    changed = [name for name, value in network.state().items() if (value != before[name]).any()]
    network.spoil(path, 0.0)  # what it was
    assert len(changed) == 1
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_recorded_moments_are_those_of_the_inputs(network: Any, x: Any) -> None:
    """With a site's own moments in the place of what is stored, λ = 0 gives what λ = 1 gives."""
    passes, batch = forward(network), Batch(x)
    wanted, seen = passes.outputs(batch, Condition(1.0, record=True))
    given = {path: (moments.mean, moments.variance) for path, moments in seen.items()}
    assert set(given) == set(network.paths)
    assert {moments.count for moments in seen.values()} == {len(x)}
    found = passes.outputs(batch, Condition(0.0, statistics=given))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_slope_against_differences(network: Any, x: Any) -> None:
    passes, batch, middle = forward(network), Batch(x, Y), np.array([0.4, 0.7])
    losses, slope = passes.gradient(batch, Condition(middle))
    alone = passes.outcome(batch, Condition(middle)).losses
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    for index in range(2):
        step = np.eye(2)[index] * 2.0**-6
        high, low = (
            passes.outcome(batch, Condition(middle + sign * step)).losses.mean() for sign in (1, -1)
        )
        assert slope[index] == pytest.approx((high - low) / 2.0**-5, rel=2e-2, abs=1e-4)


def test_a_loss_without_labels_is_an_error_of_ours(network: Any, x: Any) -> None:
    with pytest.raises(DataError, match="Received"):
        forward(network).outcome(Batch(x), Condition(0.0))
