"""Lock a torch BN module to its stored statistics so that nothing but :func:`unlock` undoes it.

``requires_grad=False`` freezes gamma and beta only, ``eval()`` is undone by the next ``train()`` of
any parent, and ``track_running_stats=False`` switches to batch statistics. A locked module keeps
its identity and its exact class, which tools that fuse, quantise or script look up: what changes
are a few methods of the one instance. Its mode stays inference, and its ``forward`` uses the stored
statistics whatever the flags say.

A copy is locked as well. Pickled (``torch.save`` of a whole model), the module is one of its own
class whose methods are torch's alone: loading it needs no Frostline, its statistics do not move
there either, and Frostline, where it is installed, knows it as locked.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_module_registration_hook

#: Says that a module is locked. TorchScript sees it, and so compiles a locked module anew.
_MARK = "locked_by_frostline"
#: A ``forward`` that the instance had before.
_OWN = "forward_before_lock"
#: Whether parts of a model are pickled for a process that has Frostline.
EXACT: ContextVar[bool] = ContextVar("EXACT", default=False)
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _train(self: Any, mode: bool = True) -> Any:
    """Set the mode of the children, if any; the module itself stays in inference."""
    type(self).train(self, mode)
    self.training = False
    return self


def _reset_running_stats(self: Any) -> None:
    """Keep the statistics: `update_bn` and others would start them anew."""


class _Stored(nn.Module):  # type: ignore[misc]
    """Lends its ``forward`` to torch's own classes; TorchScript can compile it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def _guarded_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the class's own ``forward`` with the flags that mean stored statistics."""
    # The flags are public: other tools set them to "freeze" or to "recalibrate".
    before = self.training, getattr(self, "track_running_stats", None)
    self.training = False
    if before[1] is not None:
        self.track_running_stats = True
    try:
        own = vars(self).get(_OWN) or functools.partial(type(self).forward, self)
        return own(*args, **kwargs)
    finally:
        self.training = before[0]
        if before[1] is not None:
            self.track_running_stats = before[1]


def _extra_repr(self: Any) -> str:
    own = type(self).extra_repr(self)
    return f"{own}, locked" if own else "locked"


def _deepcopy(self: Any, memo: Any) -> Any:
    before = dict(vars(self))
    try:
        unlock(self, training=self.training)
        made = copy.deepcopy(self, memo)
    finally:
        vars(self).update(before)
    lock(made)
    return made


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle as a module of its class, with methods that are torch's.

    A twin that no ``train()`` reaches computes, with the same parameters and buffers: both hold the
    very same dictionaries. Calls of ``nn.Identity`` take any arguments and change nothing.

    For a process that has Frostline (:data:`EXACT`), as what it is, which is locked again there:
    ``torch.fx`` sees another call in the plain module.
    """
    kind: Any = type(self)
    if EXACT.get():
        unlocked: Any = kind.__new__(kind)
        lock_s = (*OF_THE_LOCK, _OWN)
        vars(unlocked).update({k: v for k, v in vars(self).items() if k not in lock_s})
        if _OWN in vars(self):
            vars(unlocked)["forward"] = vars(self)[_OWN]
        return _locked_again, (unlocked,)
    made, arguments, *_ = kind.__reduce_ex__(self, protocol)
    state = {name: value for name, value in vars(self).items() if name not in _METHODS}
    twin: Any = kind.__new__(kind)
    vars(twin).update({name: value for name, value in state.items() if name != _MARK})
    vars(twin)["training"] = False
    if "track_running_stats" in state:
        vars(twin)["track_running_stats"] = True
    if _OWN in state:
        vars(twin)["forward"] = vars(twin).pop(_OWN)
    idle = dict.fromkeys(("train", "reset_running_stats"), nn.Identity)
    return made, arguments, {**state, **idle, "forward": twin}


def _locked_again(module: Any) -> Any:
    lock(module)
    return module


def _replicated(self: Any) -> Any:
    """What ``DataParallel`` runs on another device: its methods use the tensors that are there."""
    made = type(self)._replicate_for_data_parallel(self)
    _bind(made)
    return made


_METHODS: dict[str, Any] = {
    "train": _train,
    "forward": _guarded_forward,
    "reset_running_stats": _reset_running_stats,
    "extra_repr": _extra_repr,
    "__deepcopy__": _deepcopy,
    "__reduce_ex__": _reduce_ex,
    "_replicate_for_data_parallel": _replicated,
}
#: Names in ``vars`` of a locked module that are the lock's.
OF_THE_LOCK = frozenset({_MARK, *_METHODS})


def is_locked(module: Any) -> bool:
    """Whether the module is locked to its stored statistics by Frostline."""
    return _MARK in getattr(module, "__dict__", ())


def lock(module: Any) -> None:
    """Lock a module that has stored statistics, in place."""
    _guard_conversion()
    held = vars(module)
    if _MARK not in held and "forward" in held:
        held[_OWN] = held["forward"]
    _bind(module)
    held[_MARK] = True
    module.training = False


def _bind(module: Any) -> None:
    for name, function in _METHODS.items():
        vars(module)[name] = types.MethodType(function, module)
    if type(module) in _PLAIN and _OWN not in vars(module):
        vars(module)["forward"] = types.MethodType(_Stored.forward, module)


def unlock(module: Any, *, training: bool) -> None:
    """Give a module its own methods back, in place, and set its mode."""
    if is_locked(module):
        held = vars(module)
        own = held.pop(_OWN, None)
        for name in OF_THE_LOCK:
            held.pop(name, None)
        if own is not None:
            held["forward"] = own
        module.training = training


def remembered(module: Any) -> Callable[[], None]:
    """Return what locks or unlocks a module as it is now."""
    names = {*OF_THE_LOCK, _OWN}
    held = {name: value for name, value in vars(module).items() if name in names}

    def undo() -> None:
        for name in names:
            vars(module).pop(name, None)
        vars(module).update(held)

    return undo


@functools.cache
def _guard_conversion() -> None:
    """From the first lock on, ``convert_sync_batchnorm`` leaves locked modules as they are.

    By a hook that torch offers: importing this room changes nothing.
    """
    register_module_module_registration_hook(_left_locked)


def _left_locked(owner: Any, name: str, module: Any) -> Any:
    """What stays in the place of a locked module that would be synchronised: that module.

    The new one would not be locked, and its statistics would move.
    """
    old = owner._modules.get(name)
    if not isinstance(module, nn.SyncBatchNorm) or old is module or not is_locked(old):
        return None
    return old if module.running_mean is old.running_mean else None
