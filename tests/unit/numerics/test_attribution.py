"""The path integral on functions whose shares are known in closed form; no framework."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from frostline.numerics import attribution
from frostline.numerics.attribution import path_integral
from frostline.types import DataError


def test_a_product_is_split_by_its_exponents() -> None:
    # L = λ₁³ λ₂ λ₃²: ∂L/∂λᵢ along the diagonal is kᵢ t⁵, the shares are kᵢ / 6.
    powers = np.array([3.0, 1.0, 2.0])
    found = path_integral(lambda t: powers * t**5, 1.0)
    np.testing.assert_allclose(found.shares, powers / 6, rtol=1e-14)
    assert (found.nodes, found.gradients, found.complete) == (5, 5, True)
    assert found.residual < 1e-14


@given(st.lists(st.lists(st.floats(-10, 10), min_size=10, max_size=10), min_size=1, max_size=4))
def test_polynomial_gradients_up_to_degree_9_are_exact(coefficients: Any) -> None:
    table = np.array(coefficients)
    exact = (table / np.arange(1, 11)).sum(axis=1)
    found = path_integral(lambda t: table @ t ** np.arange(10), float(exact.sum()), floor=1e-9)
    np.testing.assert_allclose(found.shares, exact, atol=1e-12 * max(1, np.abs(table).max()) * 10)
    assert found.nodes == 5


def sigmoid(z: Any) -> Any:
    return 0.5 * (1 + np.tanh(z / 2))


def steep(k: float) -> tuple[Any, float]:
    """L = σ(k (λ₁ + 3 λ₂ − 1.7)): one and three quarters of the gap."""
    direction = np.array([1.0, 3.0])

    def gradient(t: float) -> Any:
        value = sigmoid(k * (4 * t - 1.7))
        return k * value * (1 - value) * direction

    return gradient, float(sigmoid(k * 2.3) - sigmoid(-k * 1.7))


def test_nodes_are_doubled_until_the_shares_add_up() -> None:
    gradient, gap = steep(8.0)
    found = path_integral(gradient, gap)
    assert found.nodes in (10, 20, 40)
    assert found.gradients == 2 * found.nodes - 5
    assert found.complete
    assert found.residual <= 0.05
    np.testing.assert_allclose(found.shares, gap * np.array([0.25, 0.75]), rtol=0.05)
    # The attempt before it was not good enough: that is why it was doubled.
    coarser = path_integral(gradient, gap, max_nodes=found.nodes // 2)
    assert not coarser.complete
    assert coarser.residual > 0.05


def test_what_does_not_add_up_is_returned_and_says_so() -> None:
    gradient, gap = steep(1e4)  # a step that falls between the nodes
    found = path_integral(gradient, gap)
    assert found.nodes == 40
    assert not found.complete
    assert found.residual == pytest.approx(abs(found.shares.sum() - gap) / gap)
    assert found.residual > 0.05


def test_shares_that_cancel() -> None:
    def gradient(t: float) -> Any:
        return np.array([1.0, -1.0])

    none = path_integral(gradient, 0.0)
    np.testing.assert_allclose(none.shares, [1, -1], rtol=1e-14)
    assert none.complete == (none.shares.sum() == 0.0)
    assert path_integral(gradient, 1e-9, floor=1e-6).nodes == 5
    assert not path_integral(gradient, 1e-9).complete
    wrong = path_integral(lambda t: np.array([1.0]), 0.0)
    assert wrong.residual == np.inf
    assert not wrong.complete


def test_no_sites_no_shares() -> None:
    found = path_integral(lambda t: np.zeros(0), 0.0)
    assert found.shares.shape == (0,)
    assert found.complete
    assert found.residual == 0.0


def test_words_for_bad_input() -> None:
    with pytest.raises(DataError, match="nodes=3"):
        path_integral(lambda t: np.ones(1), 1.0, nodes=3)
    with pytest.raises(DataError, match="max_nodes=5"):
        path_integral(lambda t: np.ones(1), 1.0, nodes=10, max_nodes=5)
    with pytest.raises(DataError, match=r"gap must be finite.*nan"):
        path_integral(lambda t: np.ones(1), float("nan"))
    with pytest.raises(DataError, match=r"not finite at λ = 0\.0469.*site 1 has inf"):
        path_integral(lambda t: np.array([0.0, np.inf]), 1.0)
    with pytest.raises(DataError, match=r"shape \(1, 1\)"):
        path_integral(lambda t: np.ones((1, 1)), 1.0)
    sizes = iter(range(1, 9))
    with pytest.raises(DataError, match=r"shape \(2,\)"):
        path_integral(lambda t: np.ones(next(sizes)), 1.0)


def test_example_in_the_docstring() -> None:
    assert doctest.testmod(attribution).failed == 0


@pytest.mark.parametrize("k", [8.0, 100.0, 1e4])
def test_intervals_are_halved_where_the_loss_bends(k: float) -> None:
    gradient, gap = steep(k)
    taken: list[float] = []

    def recorded(t: float) -> Any:
        taken.append(t)
        return gradient(t)

    def value(t: float) -> float:
        assert t in (0.0, 1.0, *taken)  # no pass of its own
        return float(sigmoid(k * (4 * t - 1.7)))

    found = path_integral(recorded, gap, max_nodes=75, value=value)
    assert found.complete
    assert found.residual <= 0.05
    assert found.nodes == found.gradients == len(taken) <= 40
    np.testing.assert_allclose(found.shares, gap * np.array([0.25, 0.75]), rtol=0.02)


def test_a_bend_whose_direction_changes() -> None:
    """Two steps of different sites far apart: each gets its own, 100 and −40."""

    def step(t: float, where: float) -> float:
        return float(sigmoid(2000 * (t - where)))

    def gradient(t: float) -> Any:
        return np.array([
            2000 * height * step(t, where) * (1 - step(t, where))
            for where, height in ((0.013, 100.0), (0.71, -40.0))
        ])  # fmt: skip

    def value(t: float) -> float:
        return 100 * step(t, 0.013) - 40 * step(t, 0.71)

    found = path_integral(gradient, value(1.0) - value(0.0), max_nodes=75, value=value)
    assert found.residual <= 0.05
    np.testing.assert_allclose(found.shares, [100, -40], rtol=0.05)
    assert not path_integral(gradient, value(1.0) - value(0.0)).complete


def test_an_easy_path_costs_what_it_did() -> None:
    powers = np.array([3.0, 1.0, 2.0])
    plain = path_integral(lambda t: powers * t**5, 1.0)
    found = path_integral(lambda t: powers * t**5, 1.0, max_nodes=75, value=lambda t: t**6)
    np.testing.assert_array_equal(found.shares, plain.shares)
    assert found.gradients == plain.gradients == 5


def test_a_gradient_that_contradicts_the_loss_is_not_scaled() -> None:
    found = path_integral(lambda t: np.array([-1.0]), 1.0, max_nodes=20, value=lambda t: t)
    assert not found.complete
    assert found.nodes == 20
    assert found.residual == pytest.approx(2)
