"""How a reference differs from a torch module: another module, a state, or a file with one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from frostline.adapters.torch.forward_pass import arrays, run
from frostline.adapters.torch.graph import site_places, sites, unwrapped
from frostline.adapters.torch.keeping import is_statistic, mean_of, names, variance_of
from frostline.data.arrays import leaves
from frostline.numerics.compare import relative_difference
from frostline.types import Array, ModelError, as_float64
from frostline.types.measured import Difference
from frostline.types.reasons import first_line


def difference(model: Any, reference: Any, x: Any) -> Difference:
    """Compare a module with a reference.

    Args:
        model: A torch module.
        reference: A module, a ``state_dict``, or the path of a file with one (read with
            ``weights_only=True``).
        x: Inputs of one batch, for the outputs of a reference that is a module.

    Raises:
        ModelError: A file that holds no state, or one without a single name of the model, or with
            other shapes under most of its names.
    """
    module = unwrapped(reference) if isinstance(reference, nn.Module) else None
    theirs = module.state_dict() if module is not None else read_state(reference)
    ours = unwrapped(model).state_dict()
    shared = [name for name in ours if name in theirs and _fits(ours[name], theirs[name])]
    unlike = [name for name in ours if name in theirs and name not in shared]
    if len(unlike) > len(shared):
        shape = tuple(getattr(theirs[unlike[0]], "shape", ()))
        raise ModelError(
            f"the reference has another architecture: {len(unlike)} of its weights have other "
            f"shapes than those of the model, '{unlike[0]}' {tuple(ours[unlike[0]].shape)}. "
            f"Received: {shape}"
        )
    if not shared:
        raise ModelError(
            "the reference has no parameter of this model. "
            f"Received: {type(reference).__name__} with {', '.join(list(theirs)[:3]) or 'nothing'}"
        )
    places = site_places(model)
    stored = _stored(places, theirs, shared)
    return Difference(
        params=_params(ours, theirs, shared),
        statistics=_statistics(places, stored),
        stored=stored,
        epsilons=_epsilons(model, module),
        outputs=None if module is None else _outputs(model, module, x),
    )


def read_state(source: Any) -> Mapping[str, Any]:
    """A ``state_dict`` from a mapping or a file; nothing is unpickled but tensors.

    Raises:
        ModelError: No such file, or no state in it.
    """
    state = source
    if isinstance(source, (str, os.PathLike)):
        try:
            state = torch.load(Path(source), map_location="cpu", weights_only=True)
        except Exception as problem:
            raise ModelError(
                f"cannot read a state_dict from {source}: {first_line(problem)} Received: {source}"
            ) from problem
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(
        isinstance(v, torch.Tensor) for v in state.values()
    ):
        raise ModelError(
            "a reference is a module, a state_dict, or the path of a file with one. "
            f"Received: {type(source).__name__}"
        )
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _fits(ours: Any, theirs: Any) -> bool:
    return isinstance(theirs, torch.Tensor) and ours.shape == theirs.shape


def _numbers(tensor: Any) -> Array:
    return as_float64(arrays(tensor))


def _params(ours: Any, theirs: Any, shared: list[str]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for name in shared:
        owner, _, kind = name.rpartition(".")
        if is_statistic(kind) or kind == "num_batches_tracked":
            continue
        entry = sums.setdefault(owner.replace(".", "/"), [0.0, 0.0])
        entry[0] += float(np.square(_numbers(ours[name]) - _numbers(theirs[name])).sum())
        entry[1] += float(np.square(_numbers(theirs[name])).sum())
    return {path: float(np.sqrt(moved / (size or 1.0))) for path, (moved, size) in sums.items()}


def _stored(places: Any, theirs: Any, shared: list[str]) -> dict[str, tuple[Array, Array]]:
    """Path of a site -> the mean and variance that the reference stores there."""
    found: dict[str, tuple[Array, Array]] = {}
    for place in places:
        owner, kinds = place.path.replace("/", "."), names(place.module)
        mean, variance = (f"{owner}.{kind}" for kind in kinds or ("", ""))
        if mean in shared and variance in shared:
            found[place.path] = (
                _numbers(theirs[mean]).reshape(-1),
                _numbers(theirs[variance]).reshape(-1),
            )
    return found


def _statistics(places: Any, stored: Mapping[str, tuple[Array, Array]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for place in places:
        if place.path not in stored:
            continue
        mean, variance = stored[place.path]
        own, spread = (_numbers(f(place.module)) for f in (mean_of, variance_of))
        scale = variance + float(getattr(place.module, "eps", 1e-5))
        shift, wide = np.abs(own - mean) / np.sqrt(scale), np.abs(spread - variance) / scale
        found[place.path] = float(max(shift.max(), wide.max()))
    return found


def _epsilons(model: Any, module: Any) -> dict[str, tuple[float, float]]:
    if module is None:
        return {}
    theirs = {site.path: site.epsilon for site in sites(module)}
    pairs = {
        site.path: (site.epsilon, theirs[site.path]) for site in sites(model) if site.path in theirs
    }
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def _outputs(model: Any, module: Any, x: Any) -> float:
    found, wanted = (
        [array for _, array in leaves(arrays(run(root, x, training=False)))]
        for root in (model, module)
    )
    return relative_difference(found, wanted)
