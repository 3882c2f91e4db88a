"""The state of torch in this process: put back where a verb is interrupted."""

from __future__ import annotations

from collections.abc import Callable

import torch

from frostline.adapters.torch.forward_pass import generators, precisions


def surroundings() -> Callable[[], None]:
    """Remember gradients, default dtype, modes, precision and generators.

    Returns:
        What puts them back; can be repeated.
    """
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    functions = torch._C._len_torch_function_stack()
    drawn, switches = generators(), precisions()

    def back() -> None:
        # A mode that was interrupted while it left is still there, and would answer every call.
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        torch._C._set_grad_enabled(gradients)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        for switch, name, before, _ in switches:
            setattr(switch, name, before)
        drawn()

    return back
