"""Facts of a torch module for the rules: stored numbers, flags, modes. Reads only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from frostline.adapters.torch.forward_pass import arrays
from frostline.adapters.torch.graph import (
    fixed_in_graphs,
    is_frozen_kind,
    is_site,
    modes_in_training,
    site_places,
    sites,
    unknown_keepers,
    unwrapped,
    walk,
)
from frostline.adapters.torch.keeping import mean_of, variance_of
from frostline.adapters.torch.locked import is_locked
from frostline.adapters.torch.vocabulary import TORCH
from frostline.types import Array
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts


def facts(model: Any) -> ModelFacts:
    """Collect what rules without data may look at; arrays are float64 copies."""
    root = unwrapped(model)
    places = {place.path: place for place in site_places(model)}
    thawed = dict(zip(places, modes_in_training(model, tuple(places.values())), strict=True))
    found, fixed = [], fixed_in_graphs(root)
    for site in sites(model):
        module = places[site.path].module
        own = list(module.parameters(recurse=False))
        live = is_locked(module) or is_frozen_kind(module) or module in fixed
        found.append(
            SiteFacts(
                site=site,
                mean=_numbers(mean_of(module)),
                variance=_numbers(variance_of(module)),
                gamma=_numbers(getattr(module, "weight", None)),
                beta=_numbers(getattr(module, "bias", None)),
                dtype=site.dtype,
                live=live,
                optimized=any(p.requires_grad for p in own) if own else None,
                undone=not live and root.training and not module.training and thawed[site.path],
                mode=bool(module.training),
                updates=_updates(module),
                words=TORCH,
                cumulative=getattr(module, "momentum", 0.0) is None,
            )
        )
    return ModelFacts(
        name=type(root).__name__,
        backend="torch",
        words=TORCH,
        mode=bool(root.training),
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
        unknown={
            path: type(module).__name__
            for path, module in unknown_keepers(model).items()
            if not is_locked(module)
        },
    )


def _steps(places: Any) -> int | None:
    """Updates that the statistics have seen; a module has no optimizer that would say so."""
    counts = [_updates(place.module) for place in places.values()]
    return max((count for count in counts if count is not None), default=0) or None


def _updates(module: Any) -> int | None:
    count = getattr(module, "num_batches_tracked", None)
    return None if count is None else int(count)


def _numbers(tensor: Any) -> Array | None:
    if not isinstance(tensor, torch.Tensor) or not _built(tensor) or not tensor.numel():
        return None
    return np.array(arrays(tensor), dtype=np.float64)


def _built(tensor: Any) -> bool:
    """Whether it has a shape: lazy modules get theirs with the first batch."""
    return not isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin)
