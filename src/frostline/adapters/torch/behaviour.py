"""What BN sites of a torch module do when the module itself runs; flags are not asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from frostline.adapters.torch.blend import along, batch_statistics
from frostline.adapters.torch.forward_pass import (
    called,
    replaced_forward,
    set_phase,
    tensors,
    untouched,
)
from frostline.adapters.torch.graph import site_places
from frostline.types.measured import Behaviour

#: Two outputs this near, relative to their spread, are the same one in float32.
_SAME = 1e-4


def behaviour(model: Any, batches: Iterable[Any]) -> dict[str, Behaviour]:
    """Watch every site in a training-mode and in an inference pass over some batches.

    The model runs as its own ``train()`` and ``eval()`` leave it. With a site's input normalised by
    stored (``low``) and by batch statistics (``high``), λ is the least squares fit of its output by
    ``low + λ (high − low)``.

    Args:
        model: A torch module.
        batches: ``(x, ...)`` tuples, or :class:`frostline.data.batches.Batch`.
    """
    places = site_places(model)
    weights: dict[str, dict[bool, list[float]]] = {p.path: {True: [], False: []} for p in places}
    moved: dict[str, bool] = {}
    for step, batch in enumerate(batches):
        inputs = tensors(batch[0] if isinstance(batch, tuple) else batch.x, model)
        for training in (True, False):
            changes: dict[Any, Callable[..., Any]] = {
                place.module: functools.partial(
                    _watched, place.module, place.module.forward, weights[place.path][training]
                )
                for place in places
            }
            before = {place.path: _stored(place.module) for place in places}
            with untouched(model, step=step) as root, torch.no_grad(), replaced_forward(changes):
                set_phase(root, training=training)
                called(root, inputs)
                if training:
                    for place in places:
                        changed = not _alike(before[place.path], _stored(place.module))
                        moved[place.path] = moved.get(place.path, False) or changed
    return {
        path: Behaviour(
            path=path,
            training=_middle(found[True]),
            inference=_middle(found[False]),
            moves=moved.get(path),
        )
        for path, found in weights.items()
    }


def _middle(found: list[float]) -> float | None:
    return float(np.median(found)) if found else None


def _stored(module: Any) -> tuple[Any, ...]:
    pair = (module.running_mean, module.running_var)
    return tuple(each.detach().clone() for each in pair if each is not None)


def _alike(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _watched(
    module: Any, forward: Callable[..., Any], found: list[float], x: Any, *args: Any, **kwargs: Any
) -> Any:
    """Run the module and note the λ that explains its output."""
    own = module.running_mean is not None
    wide = x.detach().double()
    batch = batch_statistics(wide)
    stored = tuple(each.double() for each in _stored(module)) if own else batch
    output = forward(x, *args, **kwargs)
    weight = 1.0 if not own else _weight(module, wide, output.detach().double(), stored, batch)
    if weight is not None:
        found.append(weight)
    return output


def _weight(module: Any, x: Any, output: Any, stored: Any, batch: Any) -> float | None:
    """λ that explains the output; ``None`` where stored and batch statistics are alike."""
    if output.shape != x.shape:
        return None
    epsilon = float(getattr(module, "eps", 1e-5))
    low, high = (_normalised(module, x, mean, var, epsilon) for mean, var in (stored, batch))
    spread = float((high - low).square().mean().sqrt())
    scale = float(low.square().mean().sqrt()) or 1.0
    if not np.isfinite(spread) or spread <= _SAME * scale:
        return None
    # A BN layer with an activation of its own changes the output where it is negative.
    kept = torch.isclose(output, low, rtol=1e-3, atol=1e-3 * scale)
    kept |= torch.isclose(output, high, rtol=1e-3, atol=1e-3 * scale)
    if float(kept.double().mean()) < 0.2:
        kept = torch.ones_like(kept)
    direction = (high - low)[kept]
    along_it = float((direction * (output - low)[kept]).sum())
    length = float(direction.square().sum())
    if length == 0:
        return None
    weight = along_it / length
    return float(np.clip(round(weight, 3), 0.0, 1.0))


def _normalised(module: Any, x: Any, mean: Any, variance: Any, epsilon: float) -> Any:
    out = (x - along(mean, x)) * along(torch.rsqrt(variance + epsilon), x)
    if module.weight is not None:
        out = out * along(module.weight.detach().double(), x)
    return out if module.bias is None else out + along(module.bias.detach().double(), x)
