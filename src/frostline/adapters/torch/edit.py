"""Change a torch module in place: freeze, thaw, momentum; and what takes all of it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from frostline.adapters.protocol import FlagCounts, FreezeRequest
from frostline.adapters.torch import dropout as torch_dropout, script
from frostline.adapters.torch.graph import (
    fixed_in_graphs,
    is_fixed,
    is_frozen_kind,
    is_site,
    keeps_unknown_statistics,
    not_built,
    unwrapped,
    walk,
)
from frostline.adapters.torch.keeping import by_hand, mean_of
from frostline.adapters.torch.locked import is_locked, lock, remembered, unlock
from frostline.adapters.torch.random import forked
from frostline.adapters.torch.state_kept import state_kept
from frostline.adapters.torch.surroundings import surroundings
from frostline.atomic import Attributes, restored, taken_back
from frostline.graph import addresses
from frostline.graph.addresses import Place
from frostline.types import Boundary, ModelError


def set_frozen(model: Any, request: FreezeRequest) -> tuple[FlagCounts, Callable[[], None]]:
    """Freeze or thaw every module on one side of a boundary.

    Parameters stay the objects that they are, with ``requires_grad`` off and no gradient left over,
    so that an optimizer that knows them does not move them. Statistics are locked: see
    :mod:`frostline.adapters.torch.locked`.

    Raises:
        ModelError: Thawing a FrozenBatchNorm of another library, which has no parameters.
    """
    undo, frozen = snapshot(model), request.frozen
    there = addresses.side(
        walk(model), request.boundary, before=request.before, paths=request.paths
    )
    root = unwrapped(model)
    chosen = [p for p in there if p.leaf or any(True for _ in p.module.parameters(recurse=False))]
    changed: list[Place] = []
    fixed = fixed_in_graphs(root)
    touched = dropouts = 0
    for place in chosen:
        count = _set_params(place.module, frozen, place.path) if request.params else 0
        keeps = is_site(place.module) or keeps_unknown_statistics(place.module)
        moved = _set_statistics(place, frozen, fixed) if request.statistics and keeps else False
        touched += count
        if count or moved:
            changed.append(place)
    if request.everything and request.params and not any(p.module is root for p in chosen):
        # A token or an embedding that the model itself holds.
        touched += _set_params(root, frozen, type(root).__name__)
    if request.dropout:
        turn_off = torch_dropout.turn_off
        dropouts = turn_off(model, there) if frozen else torch_dropout.turn_on(there)
    script.handed_on(root)
    sites = sum(is_site(place.module) for place in changed)
    counts = FlagCounts(layers=len(changed), sites=sites, parameters=touched, dropouts=dropouts)
    return counts, undo


def freezer(modules: Sequence[Any]) -> tuple[Callable[[], FlagCounts], Callable[[], None]]:
    """What freezes modules with all that they contain, and what takes it back."""
    restores = [snapshot(module) for module in modules]

    def freeze() -> FlagCounts:
        whole = FreezeRequest(boundary=Boundary(path=None, index=0), before=True, frozen=True)
        counts = [set_frozen(module, whole)[0] for module in modules]
        return FlagCounts(
            layers=sum(count.layers for count in counts),
            sites=sum(count.sites for count in counts),
            parameters=sum(count.parameters for count in counts),
        )

    def undo() -> None:
        for restore in reversed(restores):
            restore()

    return freeze, undo


def _set_params(module: Any, frozen: bool, path: str) -> int:
    """Set ``requires_grad`` of a module's own parameters; returns how many numbers changed."""
    if is_frozen_kind(module):
        return 0
    count = 0
    for parameter in module.parameters(recurse=False):
        trainable = parameter.is_floating_point() or parameter.is_complex()
        if parameter.requires_grad == frozen and trainable:
            if _lazy(parameter):
                raise not_built(path)
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None
            count += parameter.numel()
    return count


def _set_statistics(place: Place, frozen: bool, fixed: set[Any]) -> bool:
    module = place.module
    if is_frozen_kind(module):
        if frozen:
            return False
        raise ModelError(
            f"'{place.path}' is a {type(module).__name__}, which has no parameters and cannot be "
            "thawed; rebuild the model with BatchNorm2d, or choose a later boundary. "
            f"Received: {place.path!r}"
        )
    if is_fixed(module, fixed):
        if frozen:
            return False
        raise ModelError(
            f"'{place.path}' normalises with stored statistics in this program, whatever its mode: "
            "it was made at inference. Thaw its parameters alone, "
            "fl.unfreeze(model, statistics=False), or thaw the module that the program was made "
            f"from and make it anew. Received: {place.path!r}"
        )
    if frozen == is_locked(module):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if frozen and is_site(module) and mean_of(module) is None:
        raise ModelError(
            f"'{place.path}' keeps no statistics (track_running_stats=False), so it always uses "
            f"those of the batch and cannot be frozen. Received: {place.path!r}"
        )
    if type(module) is nn.Module:
        raise ModelError(
            f"'{place.path}' is part of a graph that was exported in training mode, and uses the "
            "statistics of the batch in any mode; freeze the module before torch.export. "
            f"Received: {place.path!r}"
        )
    if frozen:
        if hasattr(module, "track_running_stats"):
            module.track_running_stats = True
        lock(module)
    else:
        unlock(module, training=True)
    return True


def _lazy(tensor: Any) -> bool:
    return isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin)


def set_decay(model: Any, paths: Sequence[str], decay: float) -> tuple[int, Callable[[], None]]:
    """Give sites a decay; torch stores its complement, and every step reads it anew.

    Returns:
        0 (no site holds its momentum as a constant of a step), and a function that puts the old
        values back.

    Raises:
        ModelError: A path is no BN site with a momentum; nothing is changed then.
    """
    if script.program_of(unwrapped(model)) is not None:
        raise ModelError(
            "the momentum of a TorchScript program is a number in its code; set it on the module "
            "that the program was made from, and make it anew. Received: a TorchScript program"
        )
    owners = {place.path: place.module for place in walk(model) if is_site(place.module)}
    unknown = [path for path in paths if not _has_momentum(owners.get(path))]
    if unknown:
        others = [path for path in paths if path not in unknown]
        raise ModelError(
            f"'{unknown[0]}' is no BN site with a momentum that can be set: a BN class of one's "
            "own may keep it in its code. "
            + (f"Choose the others: sites={others!r}. " if others else "Set it there. ")
            + f"Received: {unknown!r}"
        )
    before = [(owners[path], owners[path].momentum) for path in paths]

    def undo() -> None:
        for module, value in before:
            module.momentum = value

    for path in paths:
        hand = by_hand(owners[path])
        owners[path].momentum = decay if hand and hand.keeps else 1.0 - decay
    return 0, undo


def _has_momentum(module: Any) -> bool:
    hand = None if module is None else by_hand(module)
    return hasattr(module, "momentum") and (hand is None or hand.keeps is not None)


def snapshot(model: Any) -> Callable[[], None]:
    """Remember flags, modes, locks, rates and gradients; returns what puts them back."""
    root = unwrapped(model)
    modules = [
        (module, remembered(module), module.training, getattr(module, "track_running_stats", None))
        for module in root.modules()
    ]
    parameters = [(p, p.requires_grad, p.grad) for p in root.parameters()]
    rates = torch_dropout.rates(root)

    def undo() -> None:
        for module, locked, training, tracks in modules:
            locked()
            module.training = training
            if tracks is not None and module.track_running_stats != tracks:
                module.track_running_stats = tracks
        for parameter, flag, gradient in parameters:
            if parameter.requires_grad != flag:  # a lazy one would refuse
                parameter.requires_grad_(flag)
            parameter.grad = gradient
        rates.restore()
        script.handed_on(root)

    return undo


def all_that_edits_touch(model: Any) -> Callable[[], None]:
    """Remember modules, hooks, flags, gradients, the sites' statistics and the state of torch.

    Returns:
        What puts it all back, and can be repeated. Weights are not copied: no edit writes to them.
    """
    root = unwrapped(model)
    script.brought_up(root)
    kept = [Attributes.of(module) for module in root.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in root.parameters()]
    buffers = [
        (buffer, buffer.detach().clone())
        for module in root.modules()
        if is_site(module)
        for buffer in module._buffers.values()
        if buffer is not None and not _lazy(buffer)
    ]
    around = surroundings()

    def undo() -> None:
        around()
        restored(kept)
        for parameter, flag, gradient in parameters:
            if parameter.requires_grad != flag:  # a lazy one would refuse
                parameter.requires_grad_(flag)
            parameter.grad = gradient
        for buffer, value in buffers:
            buffer.detach().copy_(value)
        script.handed_on(root)

    return undo


@contextmanager
def preserved(model: Any) -> Iterator[None]:
    """Put back parameters, gradients, flags, modes, and what modules keep, bit for bit."""
    root = unwrapped(model)
    undo, state = snapshot(root), state_kept([*root.modules()])
    tensors = [
        (tensor, tensor.detach().clone())
        for tensor in [*root.parameters(), *root.buffers()]
        if not _lazy(tensor)
    ]
    gradients = [(p.grad, p.grad.clone()) for p in root.parameters() if p.grad is not None]
    momenta = [(m, m.momentum) for m in root.modules() if is_site(m) and hasattr(m, "momentum")]

    def back() -> None:
        undo()
        with torch.no_grad():
            for tensor, value in [*tensors, *gradients]:
                tensor.copy_(value)
        for module, momentum in momenta:
            module.momentum = momentum

    with taken_back(state), taken_back(back), forked():
        yield
