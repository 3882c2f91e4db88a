"""Facts of a torch module for the rules: stored numbers, flags, modes. Reads only."""

from __future__ import annotations

from typing import Any

import numpy as np

from frostline.models.facts import LayerFacts, ModelFacts, SiteFacts
from frostline.models.torch_frozen import is_locked
from frostline.models.torch_graph import (
    is_frozen_kind,
    is_site,
    modes_in_training,
    site_places,
    sites,
    unwrapped,
    walk,
)
from frostline.models.torch_pass import arrays
from frostline.types import Array


def facts(model: Any) -> ModelFacts:
    """Collect what rules without data may look at; arrays are float64 copies."""
    root = unwrapped(model)
    places = {place.path: place for place in site_places(model)}
    thawed = dict(zip(places, modes_in_training(model, tuple(places.values())), strict=True))
    found = []
    for site in sites(model):
        module = places[site.path].module
        own = list(module.parameters(recurse=False))
        found.append(
            SiteFacts(
                site=site,
                mean=_numbers(module.running_mean),
                variance=_numbers(module.running_var),
                gamma=_numbers(module.weight),
                beta=_numbers(module.bias),
                dtype=site.dtype,
                live=is_locked(module) or is_frozen_kind(module),
                optimized=any(p.requires_grad for p in own) if own else None,
                undone=root.training and not module.training and thawed[site.path],
                cumulative=getattr(module, "momentum", 0.0) is None,
            )
        )
    return ModelFacts(
        name=type(root).__name__,
        backend="torch",
        sites=tuple(found),
        layers=tuple(
            LayerFacts(
                path=place.path,
                order=place.order,
                trains=any(p.requires_grad for p in place.module.parameters(recurse=False)),
            )
            for place in walk(model)
            if not is_site(place.module)
            and any(True for _ in place.module.parameters(recurse=False))
        ),
        order={path: place.order for path, place in places.items()},
        steps=_steps(places),
    )


def _steps(places: Any) -> int | None:
    """Updates that the statistics have seen; a module has no optimizer that would say so."""
    counts = [getattr(place.module, "num_batches_tracked", None) for place in places.values()]
    return max((int(count) for count in counts if count is not None), default=0) or None


def _numbers(tensor: Any) -> Array | None:
    if tensor is None or not hasattr(tensor, "detach") or not tensor.numel():
        return None
    return np.array(arrays(tensor), dtype=np.float64)
