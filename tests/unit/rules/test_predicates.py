"""What rules and causes both ask, on facts written by hand."""

from __future__ import annotations

import pytest
from written_cases import site_facts

from frostline.rules.predicates import in_place_of
from frostline.types.facts import LayerFacts, ModelFacts
from frostline.types.measured import Behaviour, Measurement

TRAINED, TAKEN, BOTH = (1, 0), (0, 1), (1, 1)


@pytest.mark.parametrize(
    ("calls", "layers", "found"),
    [
        ({"b/bns/0": TAKEN, "b/bns/1": TRAINED}, (), {"b/bns/1": "b/bns/0"}),
        ({"b/bns/0": (1, 2), "b/bns/1": TRAINED}, (), {"b/bns/1": "b/bns/0"}),
        ({"bns/0/a": TAKEN, "bns/1/a": TRAINED}, (), {"bns/1/a": "bns/0/a"}),
        ({"bns/0": BOTH, "bns/1": TRAINED}, (), {}),  # a second head, or one width of many
        ({"head/bn": BOTH, "aux/bn": TRAINED}, ("aux/conv",), {}),
        ({"teacher/bn": TAKEN, "student/bn": TRAINED}, ("teacher/conv", "student/conv"), {}),
        ({"a/b/bn": TAKEN, "c/d/bn": TRAINED}, (), {}),
    ],
)
def test_a_site_that_takes_the_place_of_another(
    calls: dict[str, tuple[int, int]], layers: tuple[str, ...], found: dict[str, str]
) -> None:
    model = ModelFacts(
        sites=tuple(site_facts(path) for path in calls),
        layers=tuple(LayerFacts(path=path, order=i, trains=True) for i, path in enumerate(layers)),
    )
    behaviour = {
        path: Behaviour(path=path, training=1.0, inference=0.0, moves=True, calls=counted)
        for path, counted in calls.items()
    }
    measured = Measurement(samples=1, batch_size=1, task="unknown", behaviour=behaviour)
    assert in_place_of(model, measured) == found
