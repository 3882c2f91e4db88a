"""What the sites of a torch module do when the module itself runs, read off their calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from frostline.adapters.torch.asking import call, with_gradients
from frostline.adapters.torch.calls import Call, answered, of_several_models
from frostline.adapters.torch.forward_pass import mover, set_phase, untouched
from frostline.adapters.torch.graph import site_modules, unknown_keepers
from frostline.adapters.torch.keeping import owner_of, tensors_of
from frostline.adapters.torch.outside import outside_kept
from frostline.adapters.torch.state_kept import same_values
from frostline.data.batch import Batch
from frostline.types import ModelError
from frostline.types.measured import Behaviour


def behaviour(model: Any, batches: Iterable[Any], step: Any = None) -> dict[str, Behaviour]:
    """Watch every site in a training-mode and in an inference pass over some batches.

    The model runs as its own ``train()`` and ``eval()`` leave it. λ is 1 for a call that asks for
    the statistics of its input and 0 for one that takes stored ones; flags are not asked. Of what
    keeps running statistics but computes by hand only ``moves`` is reported. A call that uses
    the batch in training and statistics that no site owns at inference is reported under the module
    that holds them, or under the model's class; so is one of several models at once
    (``torch.vmap``), whose sites cannot be told apart.

    Args:
        model: A torch module.
        batches: ``(x, y, ...)`` tuples, or :class:`frostline.data.batch.Batch`.
        step: The user's ``step(model, batch)``, which runs the module instead.
    """
    sites, move = site_modules(model), mover(model)
    watched = {**sites, **unknown_keepers(model)}
    weights: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    moved: dict[str, bool] = {}
    stacked: set[str] = set()
    uncounted: set[str] = set()

    def pass_over(given: Batch, number: int, step: Any, *, training: bool) -> None:
        seen = weights[training]

        def answer(call: Call) -> Any:
            if call.path in sites:
                seen.setdefault(call.path, []).append(float(call.training))
            elif call.mean is not None:
                several = of_several_models(call.mean)
                owner = None if several else owner_of(call.mean, root)
                path = owner or type(root).__name__
                seen.setdefault(path, []).append(float(call.training))
                stacked.update([path] if several else [])
            return call.run()

        # What BN does that the model does not know of is read before it is put back.
        with untouched(model, number=number) as root, outside_kept(root), torch.no_grad():
            before = {path: _stored(module) for path, module in watched.items()}
            counts = {path: _count(module) for path, module in watched.items()}
            set_phase(root, training=training)
            with answered(sites, answer):
                try:
                    call(root, given, move, step=step, targets=training)
                except ModelError as error:
                    if training or step is None or with_gradients(step, error) is not None:
                        raise
                    seen.clear()  # a step of losses that exist in training mode only
            if training:
                for path, module in watched.items():
                    changed = not _alike(before[path], _stored(module))
                    moved[path] = moved.get(path, False) or changed
                    count = counts[path]
                    if changed and count is not None and count == _count(module):
                        uncounted.add(path)

    for number, batch in enumerate(batches):
        given = Batch(*batch) if isinstance(batch, tuple) else batch
        for training in weights:
            while True:
                try:
                    pass_over(given, number, step, training=training)
                except ModelError as error:
                    more = with_gradients(step, error)
                    if more is None:
                        raise
                    step = more
                else:
                    break
    foreign = [
        path
        for path, seen in weights[True].items()
        if path not in watched and any(seen) and not all(weights[False].get(path, [0.0]))
    ]
    moved |= dict.fromkeys(foreign, True)
    return {
        path: Behaviour(
            path=path,
            training=_middle(weights[True].get(path, [])),
            inference=_middle(weights[False].get(path, [])),
            moves=moved.get(path),
            uncounted=path in uncounted,
            calls=(len(weights[True].get(path, [])), len(weights[False].get(path, []))),
        )
        for path in (*watched, *foreign, *sorted(stacked - {*watched, *foreign}))
    }


def moved_at_inference(model: Any, batch: Batch, step: Any = None) -> dict[str, str]:
    """Path -> class of the modules whose own tensors an inference pass moves, sites left out.

    Observers of quantisation do, until they are turned off. What is inside another one is its part.
    """
    sites, move = site_modules(model), mover(model)
    with untouched(model) as root, outside_kept(root), torch.no_grad():
        modules = {name.replace(".", "/"): module for name, module in root.named_modules()}
        before = {path: _own_tensors(module, copied=True) for path, module in modules.items()}
        set_phase(root, training=False)
        call(root, batch, move, step=step, targets=False)
        moved: dict[str, str] = {}
        for path, module in modules.items():
            inside = any(path.startswith(f"{other}/") for other in moved)
            if path in sites or inside or _same_tensors(before[path], _own_tensors(module)):
                continue
            moved[path or type(root).__name__] = _kind(module)
        return moved


def _own_tensors(module: Any, *, copied: bool = False) -> dict[str, Any]:
    """Buffers and plain tensors of a module itself."""
    held = {**vars(module), **module._buffers}
    return {
        name: value.detach().clone() if copied else value
        for name, value in held.items()
        if isinstance(value, torch.Tensor)
    }


def _same_tensors(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        value.shape == after[name].shape and same_values(value, after[name])
        for name, value in before.items()
    )


def _kind(module: Any) -> str:
    """The class, and what stops it where it is an observer of ``torch.ao.quantization``."""
    name = type(module).__name__
    if isinstance(getattr(module, "observer_enabled", None), torch.Tensor):
        return f"{name}: model.apply(torch.ao.quantization.disable_observer) stops it"
    return name


def _middle(found: list[float]) -> float | None:
    return float(np.median(found)) if found else None


def _stored(module: Any) -> tuple[Any, ...]:
    """Copies of all statistics that it keeps, but not of counters of batches."""
    held = tensors_of(module).items()
    return tuple(value.detach().clone() for name, value in held if "num_batches" not in name)


def _count(module: Any) -> int | None:
    """How many updates a module of torch has counted; ``None`` where it counts none."""
    count = getattr(module, "num_batches_tracked", None)
    return int(count) if isinstance(count, torch.Tensor) and count.numel() == 1 else None


def _alike(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return all(same_values(a, b) for a, b in zip(before, after, strict=True))
