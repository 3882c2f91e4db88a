"""Networks beside the model that a pass calls: a discriminator, a teacher, BN in a plain list.

In training mode they move their statistics whenever they are called. Looking changes nothing, so
what they keep is put back. Passes side by side (:mod:`lockstep`) share them; the last one to leave
puts back what the first one found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from frostline.adapters.torch.state_kept import state_kept
from frostline.atomic import taken_back


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

    That is what :func:`.state_kept` remembers.
    """
    entry, before = object(), (_here.root, _here.inside)

    def leave() -> None:
        _here.root, _here.inside = before
        _entered.discard(entry)
        if not _entered:
            while _hooks:
                _hooks[-1].remove()
                _hooks.pop()
            with _unseen():
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


@contextmanager
def _unseen() -> Iterator[None]:
    """Let modes that watch what the user's code calls see nothing of a block.

    By itself the switch would stay where an interruption hits the very call of its exit.
    """
    switch = torch._C.DisableTorchFunction()
    with taken_back(partial(switch.__exit__, None, None, None)):
        switch.__enter__()
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
    with _unseen():
        _backs.append(state_kept(others))
    _seen.update((id(other), other) for other in others)
