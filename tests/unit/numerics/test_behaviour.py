"""λ estimated from outputs that were made with a known one, by the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest

from frostline.numerics.behaviour import CallSums, observed_blend, sums_of_formula
from frostline.types import Array

EPSILON = 1e-3
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(64, 5)) * [1, 2, 3, 0.5, 1] + [0, 1, -1, 5, 2]).astype(np.float32)
GAMMA, BETA = RNG.normal(1, 0.2, 5), RNG.normal(size=5)
STORED = (np.array([0.5, 0.0, 0.3, 4.0, 2.5]), np.array([2.0, 1.0, 4.0, 1.0, 0.5]))


def outputs(blend: float, stored: tuple[Array, Array] = STORED) -> Array:
    x = X.astype(np.float64)
    batch = (x.mean(axis=0), x.var(axis=0))
    mean, variance = (
        old if blend == 0 else new if blend == 1 else (1 - blend) * old + blend * new
        for old, new in zip(stored, batch, strict=True)
    )
    return (GAMMA * (x - mean) / np.sqrt(variance + EPSILON) + BETA).astype(np.float32)


def sums(y: Array, stored: tuple[Array, Array] = STORED, middle: float = 0.5) -> CallSums:
    return sums_of_formula(X, y, stored, (GAMMA, BETA), epsilon=EPSILON, middle=middle)


@pytest.mark.parametrize("blend", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_the_blend_that_made_the_outputs_is_found(blend: float) -> None:
    found = observed_blend([sums(outputs(blend), middle=blend or 0.5 if blend < 1 else 0.5)],
                           rounding=2.0**-24)  # fmt: skip
    assert found == pytest.approx(blend, abs=2e-3)


def test_sums_are_those_of_the_outputs_themselves() -> None:
    found = sums(outputs(0.3))
    low, half, high = (outputs(blend).astype(np.float64) for blend in (0.0, 0.5, 1.0))
    r, h, b = outputs(0.3) - low, half - low, high - low
    for name, expected in {
        "rr": r * r, "rh": r * h, "rb": r * b, "hh": h * h, "hb": h * b, "bb": b * b,
        "output": outputs(0.3) ** 2, "stored": low**2, "batch": high**2,
    }.items():  # fmt: skip
        np.testing.assert_allclose(
            getattr(found, name), expected.sum(axis=0), rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_half_precision_outputs_are_judged_by_their_rounding() -> None:
    assert observed_blend([sums(outputs(1.0).astype(np.float16).astype(np.float32))],
                          rounding=2.0**-11) == 1.0  # fmt: skip
    x = X.astype(np.float64)
    near = (x.mean(axis=0), x.var(axis=0) * (1 + 1e-4))
    rounded = outputs(1.0, near).astype(np.float16).astype(np.float32)
    assert observed_blend([sums(rounded, near)], rounding=2.0**-11) is None


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_statistics_that_are_not_finite_tell_by_the_output(broken: float) -> None:
    stored = (STORED[0].copy(), np.full(5, broken))
    stored[0][:] = broken
    assert observed_blend([sums(outputs(1.0), stored)], rounding=2.0**-24) == 1.0
    assert observed_blend([sums(np.full_like(X, np.nan), stored)], rounding=2.0**-24) == 0.0


def test_one_broken_channel_does_not_decide_for_the_others() -> None:
    stored = (STORED[0].copy(), STORED[1].copy())
    stored[0][2] = stored[1][2] = np.nan
    with np.errstate(invalid="ignore"):
        between = outputs(0.5, stored)
    assert np.isnan(between[:, 2]).all()
    assert observed_blend([sums(between, stored)], rounding=2.0**-24) == pytest.approx(0.5)


def test_statistics_that_are_alike_tell_nothing() -> None:
    x = X.astype(np.float64)
    stored = (x.mean(axis=0), x.var(axis=0))
    assert observed_blend([sums(outputs(1.0, stored), stored)], rounding=2.0**-24) is None
    assert observed_blend([], rounding=2.0**-24) is None
