"""The formula that mixes stored and batch statistics."""

from __future__ import annotations

import numpy as np
import pytest

from frostline.numerics.blend import mixed

RNG = np.random.default_rng(0)
STORED, BATCH = RNG.normal(size=7), RNG.normal(size=7)


@pytest.mark.parametrize("blend", [0.0, 0.25, 0.7, 1.0])
def test_it_is_linear_in_the_blend(blend: float) -> None:
    expected = np.array(
        [np.interp(blend, [0, 1], pair) for pair in zip(STORED, BATCH, strict=True)]
    )
    np.testing.assert_allclose(mixed(blend, STORED, BATCH, np), expected, rtol=1e-14)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_the_unused_operand_is_ignored_even_if_it_is_not_finite(broken: float) -> None:
    lost = np.full(7, broken)
    np.testing.assert_array_equal(mixed(0.0, STORED, lost, np), STORED)
    np.testing.assert_array_equal(mixed(1.0, lost, BATCH, np), BATCH)
    for used in (mixed(1.0, STORED, lost, np), mixed(0.0, lost, BATCH, np)):
        assert not np.isfinite(used).any()
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(mixed(0.5, STORED, lost, np)).any()


def test_the_blend_may_differ_by_channel() -> None:
    blend = np.array([0.0, 1.0, 0.5, 0.0, 1.0, 0.5, 0.5])
    stored = np.where(blend == 1, np.nan, STORED)
    batch = np.where(blend == 0, np.nan, BATCH)
    expected = np.where(blend == 0, STORED, np.where(blend == 1, BATCH, (STORED + BATCH) / 2))
    np.testing.assert_allclose(mixed(blend, stored, batch, np), expected, rtol=1e-14)
