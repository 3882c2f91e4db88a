"""``cut``: the largest flow against SciPy's, the cut against all cuts there are."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
from hypothesis import given
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from frostline.graph.mincut import later_cut

GRAPHS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=24
)


def capacities(triples: list[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    return {(a, b): c for a, b, c in triples if a != b}


def value(edges: dict[tuple[int, int], int], side: frozenset[int]) -> int:
    return sum(c for (a, b), c in edges.items() if a in side and b not in side)


@given(GRAPHS)
def test_the_cut_is_as_large_as_scipys_flow(triples: list[tuple[int, int, int]]) -> None:
    edges = capacities(triples)
    matrix = np.zeros((7, 7), dtype=np.int32)
    for (a, b), c in edges.items():
        matrix[a, b] = c
    side = later_cut(edges, 0, 6)
    assert 0 in side
    assert 6 not in side
    assert value(edges, side) == maximum_flow(csr_array(matrix), 0, 6).flow_value


@given(GRAPHS)
def test_of_all_smallest_cuts_it_is_the_one_closest_to_the_sink(
    triples: list[tuple[int, int, int]],
) -> None:
    edges = capacities(triples)
    nodes = sorted({n for edge in edges for n in edge} - {0, 6})
    sides = [
        frozenset({0, *chosen})
        for size in range(len(nodes) + 1)
        for chosen in itertools.combinations(nodes, size)
    ]
    least = min(value(edges, side) for side in sides)
    best = max((side for side in sides if value(edges, side) == least), key=len)
    assert later_cut(edges, 0, 6) == best


def test_capacities_may_be_larger_than_any_machine_integer() -> None:
    huge = 10**30
    edges = {("s", "a"): huge, ("a", "b"): huge + 1, ("b", "t"): huge + 2}
    assert later_cut(edges, "s", "t") == {"s"}
