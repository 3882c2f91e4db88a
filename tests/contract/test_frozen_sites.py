"""``freeze`` and ``unfreeze`` with ``sites=``: BN layers alone, whatever is around them."""

from __future__ import annotations

from typing import Any

import pytest

import frostline as fl
from frostline.adapters import adapter_of
from frostline.types import ModelError

#: Two sites with something that is not linear between them.
TWO_SITES = {"d1": "dense", "bn1": "norm", "act": "tanh", "d2": "dense", "bn2": "norm"}


def flags(model: Any) -> tuple[list[tuple[bool, bool]], list[bool]]:
    """(gamma and beta, statistics) of each site, and whether each other layer trains."""
    adapter = adapter_of(model)
    sites = [(site.params_frozen, site.stats_frozen) for site in adapter.sites()]
    return sites, [layer.trains for layer in adapter.facts().layers]


def test_all_bn_is_frozen_while_the_layers_around_it_train(framework: Any) -> None:
    model = framework.build(TWO_SITES)
    change = fl.freeze(model, sites="all")
    assert flags(model) == ([(True, True)] * 2, [True, True])
    assert "2 BN sites" in str(change)
    fl.unfreeze(model, sites="bn2")
    assert flags(model) == ([(True, True), (False, False)], [True, True])
    change.undo()
    assert flags(model) == ([(False, False)] * 2, [True, True])


def test_statistics_alone(framework: Any) -> None:
    model = framework.build(TWO_SITES)
    fl.freeze(model, "d2")
    fl.freeze(model, sites="unfrozen", params=False)
    assert flags(model) == ([(True, True), (False, True)], [False, True])


@pytest.mark.parametrize("ways", [{"until": "bn2"}, {"dropout": True}])
def test_sites_stand_in_the_place_of_a_boundary(framework: Any, ways: Any) -> None:
    model = framework.build(TWO_SITES)
    with pytest.raises(ModelError, match="sites="):
        fl.freeze(model, sites="all", **ways)
    with pytest.raises(ModelError, match="no BN layer"):
        fl.freeze(model, sites="bn9")
    assert flags(model) == ([(False, False)] * 2, [True, True])
