"""Deep copies of torch modules, whatever they keep in their attributes."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

from frostline.adapters.torch.state_kept import is_plain
from frostline.types import ModelError
from frostline.types.reasons import first_line

M = TypeVar("M")


class _Detached(TorchFunctionMode):  # type: ignore[misc]
    """Copy tensors that a computation made without what made them; torch copies none of those.

    Nor does it copy sparse or nested ones of every layout.

    ``torch.nn.utils.weight_norm`` leaves one in each layer until the first forward pass, and code
    that looks at features keeps its last ones.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        if function is torch.Tensor.__deepcopy__ and _needs_help(args[0]):
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return function(*args, **(kwargs or {}))


def _needs_help(tensor: Any) -> bool:
    odd = type(tensor) is torch.Tensor and not is_plain(tensor)
    return tensor.grad_fn is not None or odd


def copied(module: M, memo: dict[int, Any] | None = None) -> M:
    """Copy a module with all that it holds.

    Args:
        module: A torch module.
        memo: As for ``copy.deepcopy``: what is taken as it is, by ``id``.

    Raises:
        ModelError: It holds something that Python cannot copy.
    """
    try:
        with _Detached():
            return copy.deepcopy(module, memo)
    except Exception as problem:  # every class may say in its own way that it has no copy
        raise ModelError(
            f"the model cannot be copied ({first_line(problem)}). Keep what Python cannot copy (a "
            "lock, an open file, a generator) outside of the modules. "
            f"Received: {type(module).__name__}"
        ) from problem


def copied_for_inference(module: M) -> M:
    """Copy a module, and put the copy into evaluation mode."""
    twin = copied(module)
    cast(Any, twin).eval()  # one of a user's own may return nothing
    return twin
