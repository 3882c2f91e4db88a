"""Where a model is cut, what crosses, and what is refused: the same in every framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline.types import ModelError

LAYOUT = {
    "stem": "dense",
    "block": {"d1": "dense", "bn1": "norm", "act": "relu"},
    "middle": "dense",
    "head": "dense",
}


def centred(framework: Any, name: str) -> Any:
    return framework.centred(name)


def test_both_parts_together_are_the_model(framework: Any, x: Any) -> None:
    model = framework.build(LAYOUT)
    fl.freeze(model, "middle")
    before = framework.run(model, x)
    parts = fl.split(model, sample=x)
    assert [(c.path, c.shape, c.dtype) for c in parts.frontier] == [("block/act", (4,), "float32")]
    assert parts.bytes_per_sample == 16
    assert parts.notes == ()
    found = framework.run(parts.suffix, framework.run(parts.prefix, x))
    np.testing.assert_allclose(found, before, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(framework.run(model, x), before)


@pytest.mark.parametrize(
    ("at", "frontier"),
    [("block/bn1", "block/d1"), ("block", "stem"), (-1, "middle"), (0.7, "block/act")],
)
def test_a_cut_where_the_user_says(framework: Any, x: Any, at: Any, frontier: str) -> None:
    model = framework.build(LAYOUT)
    fl.freeze(model)
    parts = fl.split(model, at, sample=x)
    assert [c.path for c in parts.frontier] == [frontier]


def test_dropout_ends_the_prefix_and_is_named(framework: Any, x: Any) -> None:
    model = framework.build({"stem": "dense", "drop": "dropout", "head": "dense"})
    fl.freeze(model, "head")
    parts = fl.split(model, sample=x)
    assert [c.path for c in parts.frontier] == ["stem"]
    assert parts.notes == (
        "the prefix ends at 'drop': it is random in training; freeze(dropout=True) turns it off",
    )


CULPRIT = {"stem": "dense", "culprit": centred, "head": "dense"}
REFUSALS: list[tuple[str, dict[str, Any], Any, Any, str]] = [
    ("nothing", LAYOUT, 0, None, "nothing is frozen at the beginning of the model: 'stem' comes"),
    ("everything", LAYOUT, None, None, "everything is frozen: nothing is left to train"),
    ("end", LAYOUT, "head", 1.0, "the boundary is the end of the model"),
    ("none", LAYOUT, "head", "stem", "no {word} is before the boundary 'stem'"),
    (
        "live",
        LAYOUT,
        "block",
        "middle",
        "before the boundary 'middle' but not pure: it is trainable",
    ),
    ("batch", CULPRIT, "head", None, "function of its input: its output for one sample depends on"),
]


@pytest.mark.parametrize(("layout", "until", "at", "message"), [r[1:] for r in REFUSALS],
                         ids=[r[0] for r in REFUSALS])  # fmt: skip
def test_a_refusal_in_the_same_words(
    framework: Any, x: Any, layout: Any, until: Any, at: Any, message: str
) -> None:
    model = framework.build(layout)
    fl.freeze(model, until)
    with pytest.raises(ModelError) as caught:
        fl.split(model, at, sample=x)
    assert message.format(word=framework.word) in str(caught.value)
    assert "Received: " in str(caught.value)


def test_a_site_that_is_frozen_by_half_is_refused(framework: Any, x: Any) -> None:
    model = framework.build(LAYOUT)
    fl.freeze(model, "middle")
    fl.unfreeze(model, "block/bn1", params=False)
    with pytest.raises(ModelError, match="'block/bn1' is frozen, but in training it normalises"):
        fl.split(model, sample=x)
