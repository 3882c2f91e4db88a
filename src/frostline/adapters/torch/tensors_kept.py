"""Tensors that modules keep beside their parameters, remembered and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch


def tensors_kept(modules: Iterable[Any]) -> Callable[[], None]:
    """Remember every tensor that modules keep beside their parameters, with its value.

    A class of a user's own may put a new tensor in the place of a buffer, and keep tensors as
    plain attributes.
    """
    kept = [
        (holder, name, value, value.detach().clone(), _counter(value))
        for module in modules
        for holder in (module._buffers, vars(module))
        for name, value in holder.items()
        if isinstance(value, torch.Tensor) and not value.requires_grad
    ]

    def restore() -> None:
        with torch.no_grad():
            for holder, name, tensor, value, counter in kept:
                holder[name] = tensor
                if not same_values(tensor, value):
                    with counter:
                        tensor.copy_(value)

    return restore


def _counter(tensor: Any) -> Any:
    """Set the count of writes to a tensor back on exit to what it is now.

    Autograd refuses a backward pass through a tensor that was written to since it was saved. One
    that holds its value again is as it was.
    """
    if tensor.is_inference():
        return nullcontext()
    return torch.autograd._unsafe_preserve_version_counter(tensor)


def same_values(a: Any, b: Any) -> bool:
    """Whether two tensors of one shape hold the same; NaN equals NaN, sparse ones are filled."""
    a, b = (t if t.layout is torch.strided else t.to_dense() for t in (a, b))
    if torch.equal(a, b):
        return True
    nan = a.isnan()
    return bool(torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan]))
