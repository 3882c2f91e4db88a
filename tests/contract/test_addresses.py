"""Every way to name a place means the same in every framework, and is refused in the same words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline.adapters import adapter_of
from frostline.types import Boundary, ModelError

LAYOUT = {
    "stem": "dense",
    "first": {"d1": "dense", "bn1": "norm"},
    "second": {"d1": "dense", "bn1": "norm", "act": "relu"},
    "head": "dense",
}
LEAVES = ["stem", "first/d1", "first/bn1", "second/d1", "second/bn1", "second/act", "head"]


def test_one_boundary_by_every_way_to_name_it(framework: Any, adapter: Any) -> None:
    seen = adapter(LAYOUT)
    inner = framework.child(seen.model, "second/bn1")
    wanted = Boundary(path="second/bn1", index=2)
    for reference in ("second/bn1", "second.bn1", inner, wanted):
        assert seen.boundary(reference) == wanted
    for reference in (3, -1, np.int64(3), "head", framework.top(seen.model)[3]):
        assert seen.boundary(reference) == Boundary(path="head", index=3)
    assert seen.boundary("act") == Boundary(path="second/act", index=2)
    for reference in (None, 4, 1.0):
        assert seen.boundary(reference) == Boundary(path=None, index=4)
    assert seen.boundary(-4) == seen.boundary(0) == Boundary(path="stem", index=0)


def test_a_fraction_counts_leaves(adapter: Any) -> None:
    seen = adapter(LAYOUT)
    found = [seen.boundary(cut / len(LEAVES)).path for cut in range(len(LEAVES))]
    assert found == LEAVES


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("firzt/bn1", "is not a {word} of this model. Closest: 'first/bn1'"),
        ("zzzz", "Its {word}s go from 'stem' to 'head'. Received: 'zzzz'"),
        ("bn1", "names 2 {word}s; use one of the paths 'first/bn1', 'second/bn1'. Received: 'bn1'"),
        (5, "must be between -4 and 4 for this model's 4 {word}s. Received: 5"),
        (-5, "must be between -4 and 4 for this model's 4 {word}s. Received: -5"),
        (1.01, "must be between 0.0 and 1.0. Received: 1.01"),
        (float("nan"), "must be between 0.0 and 1.0. Received: nan"),
        (
            True,
            "a {word} name, a path, an index, a fraction or a {word}. Received: True (bool)",
        ),
        ([1], "Received: [1] (list)"),
    ],
)
def test_a_wrong_boundary_is_refused_in_the_same_words(
    framework: Any, adapter: Any, reference: Any, message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        adapter(LAYOUT).boundary(reference)
    assert message.format(word=framework.word) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_of_another_model(framework: Any, adapter: Any) -> None:
    other = framework.child(framework.build(LAYOUT), "head")
    with pytest.raises(ModelError, match="is not part of this model"):
        adapter(LAYOUT).boundary(other)


def test_what_is_before_a_boundary(adapter: Any) -> None:
    seen = adapter(LAYOUT)
    before = seen.before(seen.boundary("second/bn1"))
    assert {"stem", "first/d1", "first/bn1", "second/d1"} <= before
    assert before.isdisjoint({"second", "second/bn1", "second/act", "head"})
    assert seen.before(seen.boundary(0)) == frozenset()


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (0, (None, None)),
        ("first/bn1", (0, "first/bn1")),
        ("second", (1, "second/d1")),
        ("second/bn1", (1, "second/bn1")),
        ("head", (2, "head")),
        (None, (2, None)),
    ],
)
def test_where_the_frozen_prefix_ends(framework: Any, until: Any, expected: Any) -> None:
    model = framework.build(LAYOUT)
    fl.freeze(model, until)
    assert adapter_of(model).frozen_prefix() == expected


@pytest.mark.parametrize("half", ["params", "statistics"])
def test_a_site_that_is_frozen_by_half_ends_the_prefix(framework: Any, half: str) -> None:
    model = framework.build(LAYOUT)
    fl.freeze(model)
    fl.unfreeze(model, "second/bn1", **{half: False})
    assert adapter_of(model).frozen_prefix() == (1, "second/bn1")


def test_a_layer_that_is_first_met_deeper_down_is_still_counted_by_its_index(
    framework: Any,
) -> None:
    shared: dict[str, Any] = {}

    def norm(made: Any, name: str) -> Any:
        if "norm" not in shared:
            shared["norm"] = made.build({"norm": "norm"})
            shared["norm"] = framework.child(shared["norm"], "norm")
        return shared["norm"]

    model = framework.build({"inner": {"norm": norm}, "norm": norm, "head": "dense"})
    found = [adapter_of(model).boundary(index).path for index in range(4)]
    assert found == ["inner", "inner/norm", "head", None]
