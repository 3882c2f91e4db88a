"""The state of torch in this process: put back where a verb is interrupted, or a part of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from frostline.adapters.torch.calls import function_modes
from frostline.adapters.torch.forward_pass import precisions
from frostline.adapters.torch.random import generators


def surroundings() -> Callable[[], None]:
    """Remember :func:`modes` and the random generators.

    Returns:
        What puts them back; can be repeated.
    """
    around, drawn = modes(), generators()

    def back() -> None:
        around()
        drawn()

    return back


def modes() -> Callable[[], None]:
    """Remember gradients, default dtype, modes, precision and what torch.fx patches.

    Returns:
        What puts them back; can be repeated.
    """
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    entered, switches, traced = function_modes(), precisions(), _tracing()

    def back() -> None:
        entered()
        torch._C._set_grad_enabled(gradients)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        for switch, name, before, _ in switches:
            if getattr(switch, name) != before:
                setattr(switch, name, before)
        traced()

    return back


def _tracing() -> Callable[[], None]:
    """Remember what ``torch.fx`` replaces in the whole process while it traces.

    One that was interrupted while it put that back would leave every module's call and every
    wrapped ``len`` as they are in a trace.
    """
    methods = {name: vars(torch.nn.Module)[name] for name in ("__call__", "__getattr__")}
    fx: Any = sys.modules.get("torch.fx._symbolic_trace")
    patcher, flag = getattr(fx, "CURRENT_PATCHER", None), getattr(fx, "_is_fx_tracing_flag", False)

    def back() -> None:
        fx: Any = sys.modules.get("torch.fx._symbolic_trace")
        left = getattr(fx, "CURRENT_PATCHER", None)
        if left is not None and left is not patcher:
            for patch in reversed(left.patches_made):
                with suppress(KeyError):  # of a builtin that is reverted already
                    patch.revert()
            fx.CURRENT_PATCHER = patcher
        if getattr(fx, "_is_fx_tracing_flag", flag) != flag:
            fx._is_fx_tracing_flag = flag
        for name, method in methods.items():
            if vars(torch.nn.Module)[name] is not method:
                setattr(torch.nn.Module, name, method)

    return back
