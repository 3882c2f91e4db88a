"""What several rules need of a model, computed once per check and handed to them by name.

A rule names what it needs as parameters: ``model``, ``measurement`` or a fixture::

    @rule("FL203", ...)
    def stale_running_statistics(model, old_shares, *, max_share=0.1): ...

Two rules that name the same fixture see the same numbers. A fixture may name others in turn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from frostline.numerics.averages import old_share
from frostline.rules.predicates import frozen_layer_fed
from frostline.types import Array
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts
from frostline.types.measured import Behaviour, Measurement, SiteMeasurement

#: Sites that are built, in use and keep statistics, with mean and variance.
Stored = tuple[tuple[SiteFacts, Array, Array], ...]

#: Sites that were measured and whose numbers are finite.
Measured = tuple[tuple[SiteFacts, SiteMeasurement], ...]

#: Sites whose behaviour in training and at inference was measured.
Behaved = tuple[tuple[SiteFacts, Behaviour], ...]

_FIXTURES: dict[str, Callable[..., Any]] = {}


def fixture(make: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function as the fixture of its name."""
    _FIXTURES[make.__name__] = make
    return make


class Fixtures:
    """The model and the measurement of one check, and what was computed of them so far."""

    def __init__(self, model: ModelFacts, measurement: Measurement | None) -> None:
        self._known: dict[str, Any] = {"model": model, "measurement": measurement}

    def arguments(self, check: Callable[..., Any]) -> tuple[Any, ...]:
        """What the positional parameters of a rule ask for.

        A name that is no fixture's is the model in the first place and the measurement in the
        second one, as rules of other packages may call them.
        """
        names = [
            parameter.name
            for parameter in inspect.signature(check).parameters.values()
            if parameter.kind is not parameter.KEYWORD_ONLY
        ]
        places = ("model", "measurement", *names[2:])
        return tuple(
            self._get(name if name in self._known or name in _FIXTURES else place)
            for name, place in zip(names, places, strict=False)
        )

    def _get(self, name: str) -> Any:
        if name not in self._known:
            make = _FIXTURES[name]
            self._known[name] = make(*map(self._get, inspect.signature(make).parameters))
        return self._known[name]


@fixture
def used(model: ModelFacts, measurement: Measurement | None) -> tuple[SiteFacts, ...]:
    """Sites that a pass over the data came to; all of them where none was made."""
    unused = frozenset() if measurement is None else measurement.unused
    return tuple(site for site in model if site.site.path not in unused)


@fixture
def stored(used: tuple[SiteFacts, ...]) -> Stored:
    """Sites that are built, in use and keep statistics, with mean and variance."""
    return tuple(
        (site, site.mean, site.variance)
        for site in used
        if site.mean is not None and site.variance is not None
    )


@fixture
def old_shares(model: ModelFacts, used: tuple[SiteFacts, ...]) -> Mapping[str, float]:
    """Path of a thawed site -> share of its statistics from before training, where known."""
    shares = {
        site.site.path: old_share(site, model.steps) for site in used if not site.site.stats_frozen
    }
    return {path: share for path, share in shares.items() if share is not None}


@fixture
def frozen_behind(model: ModelFacts) -> Mapping[str, LayerFacts]:
    """Path of a thawed site -> the frozen layer that it feeds."""
    found = {site.site.path: frozen_layer_fed(model, site) for site in model}
    return {path: layer for path, layer in found.items() if layer is not None}


@fixture
def measured_sites(model: ModelFacts, measurement: Measurement) -> Measured:
    """Sites that were measured and whose numbers are finite, in execution order."""
    return tuple(
        (site, numbers)
        for site in model
        if (numbers := measurement.sites.get(site.site.path)) is not None
        and all(
            np.isfinite(values).all()
            for values in (
                numbers.stored_mean,
                numbers.stored_variance,
                numbers.mean,
                numbers.variance,
            )
        )
    )


@fixture
def behaved(model: ModelFacts, measurement: Measurement) -> Behaved:
    """Sites whose behaviour was measured, in execution order."""
    return tuple(
        (site, seen)
        for site in model
        if (seen := measurement.behaviour.get(site.site.path)) is not None
    )
