"""Facts of a torch module for the rules: stored numbers, flags, modes. Reads only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

from frostline.adapters.torch.forward_pass import arrays
from frostline.adapters.torch.graph import (
    calls_in_graphs,
    fixed_in_graphs,
    handing_over,
    is_frozen_kind,
    is_site,
    modes_in_training,
    own_parameters,
    sites,
    unknown_keepers,
    unwrapped,
    walk,
)
from frostline.adapters.torch.keeping import mean_of, variance_of
from frostline.adapters.torch.locked import is_locked
from frostline.adapters.torch.vocabulary import EXPORTED, TORCH
from frostline.types import Array
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts

#: Cosine from which on the weights of two parts point the same way.
_SAME_DIRECTION = 0.5
#: Values of a weight that are compared.
_VALUES = 4096


def facts(model: Any) -> ModelFacts:
    """Collect what rules without data may look at; arrays are float64 copies."""
    root = unwrapped(model)
    all_places = walk(model)
    places = {place.path: place for place in all_places if is_site(place.module)}
    known = sites(model)
    # Of frozen sites that move, which one may be a teacher's.
    twins = _twins(root) if any(s.params_frozen and not s.stats_frozen for s in known) else {}
    thawed = dict(zip(places, modes_in_training(model, tuple(places.values())), strict=True))
    found, fixed = [], fixed_in_graphs(root)
    counts = _updates(root, places)
    for site in known:
        module = places[site.path].module
        own = own_parameters(module)
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
                updates=counts[site.path],
                words=TORCH,
                cumulative=getattr(module, "momentum", 0.0) is None,
                twin=None if site.stats_frozen else twins.get(id(module)),
            )
        )
    modules = {*root.modules()}
    return ModelFacts(
        name=type(root).__name__,
        backend="torch",
        words=EXPORTED if calls_in_graphs(root, exported=True) else TORCH,
        mode=bool(root.training),
        sites=tuple(found),
        layers=tuple(
            LayerFacts(
                path=place.path,
                order=place.order,
                trains=any(p.requires_grad for p in own),
            )
            for place in all_places
            if place.path not in places and (own := own_parameters(place.module))
        ),
        order={path: place.order for path, place in places.items()},
        # A module has no optimizer that would say so: the most that a layer has counted.
        steps=max((n for n in counts.values() if n is not None), default=0) or None,
        unknown={
            path: type(module).__name__ + ("" if module in modules else _UNREGISTERED)
            for path, module in unknown_keepers(model).items()
            if not is_locked(module)
        },
        handed=handing_over(model),
        any_size=True,  # a module declares no input
    )


#: What is wrong with BN in a plain list.
_UNREGISTERED = " in no nn.ModuleList or ModuleDict, so that train() and eval() do not reach it"


def _twins(root: Any) -> dict[int, str]:
    """Module in a part without gradients -> path of its counterpart in a part that trains.

    Such a part is a whole module, of one class, with parameters of the same names and shapes that
    point the same way, as those of a copy or a moving average do. Blocks that follow each other in
    a network may have one structure, but not one direction.
    """
    trained: dict[Any, list[str]] = {}
    frozen: dict[str, Any] = {}
    outer = ""
    for name, module in root.named_modules():
        named = list(module.named_parameters())
        if not named or not any(True for _ in module.children()):
            continue
        structure = type(module), tuple((own, tuple(value.shape)) for own, value in named)
        if any(value.requires_grad for _, value in named):
            trained.setdefault(structure, []).append(name)
        elif not outer or not name.startswith(f"{outer}."):  # what is inside comes right behind
            frozen[name], outer = (module, structure), name
    directions = {
        name: _direction(root.get_submodule(name))
        for _, structure in frozen.values()
        for name in trained.get(structure, ())
    }
    return {
        id(inner): f"{twin}.{path}".lstrip(".").replace(".", "/")
        for module, structure in frozen.values()
        if structure in trained and (own := _direction(module)) is not None
        for twin in trained[structure]
        if (other := directions[twin]) is not None and float(own @ other) >= _SAME_DIRECTION
        for path, inner in module.named_modules()
        if path
    }


def _direction(module: Any) -> Any:
    """Unit vector of some of a module's weights, float64; ``None``: it has none with a direction.

    The first values of each weight are enough to tell a copy from another block.
    """
    weights = [value for value in module.parameters() if value.ndim > 1]
    if not weights or not all(map(_built, weights)):
        return None
    values = torch.cat([w.detach().flatten()[:_VALUES].double() for w in weights])
    length = values.norm()
    return values / length if length > 0 else None


def _updates(root: Any, places: Any) -> dict[str, int | None]:
    """Updates that the statistics of each site have seen, as far as its count is one.

    `AveragedModel` with its buffers averages the counts, too.
    """
    averaged = {
        id(part)
        for module in root.modules()
        if isinstance(module, AveragedModel) and module.use_buffers
        for part in module.modules()
    }
    found: dict[str, int | None] = {}
    for path, place in places.items():
        count = getattr(place.module, "num_batches_tracked", None)
        if id(place.module) in averaged:
            count = None
        found[path] = None if count is None else int(arrays(count))
    return found


def _numbers(tensor: Any) -> Array | None:
    if not isinstance(tensor, torch.Tensor) or not _built(tensor) or not tensor.numel():
        return None
    return np.array(arrays(tensor), dtype=np.float64)


def _built(tensor: Any) -> bool:
    """Whether it has a shape: lazy modules get theirs with the first batch."""
    return not isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin)
