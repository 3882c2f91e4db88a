"""Networks beside the model that a step or a loss calls: a discriminator, a teacher, a memory.

In training mode they move their statistics whenever they are called. Looking changes nothing, so
what they keep is put back. Passes side by side (:mod:`lockstep`) share them; the last one to leave
puts back what the first one found.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from frostline.adapters.torch.tensors_kept import tensors_kept
from frostline.atomic import taken_back

#: What every module has; its tables of parameters and hooks are not the user's state.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class _Here(threading.local):
    """The model that this thread asks, and its modules, once something was called."""

    root: Any = None
    inside: set[int] | None = None


_here = _Here()
_entered: set[object] = set()
#: Modules that were called, by identity, and what puts them back.
_seen: dict[int, Any] = {}
_backs: list[Callable[[], None]] = []
_hooks: list[Any] = []


@contextmanager
def outside_kept(root: Any) -> Iterator[None]:
    """Put back what modules that are not in ``root`` keep, if the block calls them.

    Tensors beside the parameters, with their values, and plain attributes; containers with what
    they hold.
    """
    entry, before = object(), (_here.root, _here.inside)

    def leave() -> None:
        _here.root, _here.inside = before
        _entered.discard(entry)
        if not _entered:
            while _hooks:
                _hooks[-1].remove()
                _hooks.pop()
            with torch._C.DisableTorchFunction():  # no call of the user's
                for back in reversed(_backs):
                    back()
            _backs.clear()
            _seen.clear()

    with taken_back(leave):
        _entered.add(entry)
        _here.root, _here.inside = root, None
        if not _hooks:
            _hooks.append(torch_module.register_module_forward_pre_hook(_note))
        yield


def _note(module: Any, _: Any) -> None:
    """Remember a module of another model before its first call."""
    if _here.root is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if _here.inside is None:
        _here.inside = {id(own) for own in _here.root.modules()}
    if id(module) in _here.inside or id(module) in _seen:
        return
    others = [m for m in module.modules() if id(m) not in _here.inside and id(m) not in _seen]
    with torch._C.DisableTorchFunction():
        _backs.extend((tensors_kept(others), _attributes_kept(others)))
    _seen.update((id(other), other) for other in others)


def _attributes_kept(modules: Sequence[Any]) -> Callable[[], None]:
    """Remember plain attributes of modules; returns what puts them back."""
    kept = [
        (vars(module), {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE})
        for module in modules
    ]
    held = [
        (value, value.copy())
        for _, own in kept
        for value in own.values()
        if isinstance(value, (list, dict, set, deque))
    ]

    def back() -> None:
        for attributes, own in kept:
            for name in [k for k in attributes if k not in own and k not in _OF_EVERY_MODULE]:
                del attributes[name]
            attributes.update(own)
        for container, before in held:
            container.clear()
            add = container.extend if isinstance(container, (list, deque)) else container.update
            add(before)

    return back
