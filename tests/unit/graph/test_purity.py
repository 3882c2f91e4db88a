"""The purity check and the cut on graphs of plain functions: no framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frostline.graph.addresses import Layers, Place
from frostline.graph.mincut import frontier, smallest
from frostline.graph.purity import (
    Graph,
    Impurity,
    Node,
    NotRunError,
    before,
    notes,
    observe,
    others,
    pure_nodes,
    require_frozen,
)
from frostline.types import ModelError

Function = Callable[[Any, bool], Any]


class Fake:
    """A layer."""


def same(x: Any, _: bool) -> Any:
    return x


def node(path: str, reads: str, writes: str, function: Function = same, **more: Any) -> Node:
    return Node(
        call=function, path=path, kind="Fake", reads=tuple(reads), writes=tuple(writes), layer=True,
        **more,
    )  # fmt: skip


def graph(*nodes: Node, outputs: str, trains: bool = True) -> Graph:
    return Graph(
        nodes=nodes, inputs=("x",), outputs=tuple(outputs), word="layer", received="a fake",
        trains=trains,
    )  # fmt: skip


LIVE = Impurity(why="trains", path="head", text="it is trainable")


def run(each: Node, values: dict[Any, Any], training: bool) -> str | None:
    values[each.writes[0]] = each.call(values[each.reads[0]], training)
    return None


def observed(*nodes: Node) -> Any:
    rows = np.random.default_rng(0).normal(size=(6, 4))
    first, second = {"x": rows[:3]}, {"x": rows[others(6, 3)]}
    made = graph(*nodes, outputs="y")
    return observe(made, nodes, (first, second, first), 3, run, lambda v: v, lambda v: str(v.dtype))


def test_the_second_batch_ends_with_the_first_sample_among_others() -> None:
    assert others(6, 3) == [3, 4, 0]
    assert others(4, 3) == [3, 3, 0]
    assert others(2, 1) == [0]


def test_shapes_are_of_one_sample_and_only_of_what_has_samples() -> None:
    seen = observed(
        node("a", "x", "a", lambda x, _: np.concatenate([x, x], axis=1)),
        node("b", "a", "b", lambda x, _: np.float64(x.shape[1])),
    )
    assert seen.shapes == {"x": (4,), "a": (8,)}
    assert seen.dtypes["a"] == "float64"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, _: x - x.mean(0), "its output for one sample depends on the other samples"),
        (lambda x, training: x + training, "it computes something else in training than at inf"),
    ],
)
def test_what_is_not_pure_is_named(function: Function, message: str) -> None:
    with pytest.raises(ModelError, match=f"'culprit' is frozen but not a pure .*: {message}"):
        observed(node("fine", "x", "a"), node("culprit", "a", "b", function))


def test_rounding_is_no_impurity_and_nan_is_itself() -> None:
    observed(node("a", "x", "a", lambda x, training: x * (1 + 1e-9 * training)))
    observed(node("a", "x", "a", lambda x, _: x * np.nan))


def test_a_call_that_knows_no_phase_is_not_made_again() -> None:
    calls: list[str] = []

    def counted(x: Any, _: bool) -> Any:
        calls.append("call")
        return x * 2

    observed(node("a", "x", "a", counted, phased=False), node("b", "a", "b", counted, phased=False))
    assert len(calls) == 4
    observed(node("a", "x", "a", counted), node("b", "a", "b", counted, phased=False))
    assert len(calls) == 9


def test_what_does_not_run_is_told_apart_from_what_is_not_pure() -> None:
    with pytest.raises(NotRunError) as caught:
        observed(node("broken", "x", "a", lambda x, _: x[9]))
    assert caught.value.path == "broken"
    assert isinstance(caught.value.problem, IndexError)


def test_the_cut_is_where_the_least_crosses() -> None:
    """A wide tensor, a light call that makes it wider, a second reader of the wide one."""
    wide, light, small = (
        node("wide", "x", "w", weights=True), node("light", "w", "l", light=True),
        node("small", "w", "s", weights=True),
    )  # fmt: skip
    sizes = {"x": 100, "w": 16, "l": 20, "s": 2}
    head = node("head", "s", "y", blame=LIVE)
    model = graph(wide, light, small, head, outputs="y")
    pure, ends = pure_nodes(model)
    assert [each.path for each in pure] == ["wide", "light", "small"]
    require_frozen(model, pure, ends)
    assert notes(ends) == ()
    inside = smallest(model, pure, sizes, set(), forced=False)
    assert frontier(model, inside) == ["s"]
    both = graph(wide, light, small, head, node("late", "l", "z", blame=LIVE), outputs="yz")
    assert frontier(both, smallest(both, pure, sizes, set(), forced=False)) == ["w", "s"]
    assert frontier(both, smallest(both, pure, sizes, set(), forced=True)) == ["l", "s"]
    assert frontier(both, smallest(both, pure, sizes, {"s"}, forced=False)) == ["w"]
    with pytest.raises(ModelError, match="nothing is worth storing"):
        smallest(model, pure, sizes, {"w", "s"}, forced=False)


def test_refusals() -> None:
    head = node("head", "x", "y", blame=LIVE)
    with pytest.raises(ModelError, match=r"nothing is frozen .*: 'head' comes first, and"):
        require_frozen(graph(head, outputs="y"), [], [head])
    state = Impurity(why="state", path="sn", text="it changes", kind="SN", seems=True)
    first = node("sn", "x", "s", blame=state)
    with pytest.raises(ModelError, match=r"'sn' comes first, and it changes: .*without a cache"):
        require_frozen(graph(first, outputs="s"), [], [first])
    with pytest.raises(ModelError, match=r"'head' comes first.*fl\.freeze"):
        require_frozen(graph(first, head, outputs="sy"), [], [first, head])
    with pytest.raises(ModelError, match="everything is frozen"):
        require_frozen(graph(head, outputs="y", trains=False), [], [head])
    seems = Impurity(why="statistics", path="bn", text="it normalises", kind="BN", seems=True)
    with pytest.raises(ModelError, match=r"'bn' is frozen, but it normalises: .* Received: BN"):
        require_frozen(graph(head, outputs="y"), [], [node("bn", "x", "b", blame=seems)])


def test_before_a_boundary_all_must_be_pure_but_what_only_one_phase_calls() -> None:
    places = tuple(
        Place(path=path, name=path, layer=Fake(), order=order, top=order, calls=1, leaf=True)
        for order, path in enumerate(["a", "aux", "b", "head"])
    )
    layers = Layers(places=places, top=(), word="layer", kind=Fake)
    phase = Impurity(why="phase", path="aux", text="it is called in training only")
    nodes = [
        node(place.path, reads, writes, place=place, blame=blame)
        for place, reads, writes, blame in zip(
            places, "xaab", "aubh", (None, phase, None, LIVE), strict=True
        )
    ]
    model = graph(*nodes, outputs="h")
    pure, _ = pure_nodes(model)
    assert [each.path for each in before(model, pure, layers, "head")] == ["a", "b"]
    with pytest.raises(ModelError, match="end of the model"):
        before(model, pure, layers, 1.0)
    with pytest.raises(ModelError, match="no layer is before the boundary 'a'"):
        before(model, pure, layers, "a")
