"""What modules keep beside their parameters, remembered and put back."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

#: What every module has; its tables of hooks are not the user's state.
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NOT_KEPT = OF_EVERY_MODULE - {"training"}
#: Where a module registers things, which ``forward`` may do when it first needs them.
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def state_kept(modules: Sequence[Any]) -> Callable[[], None]:
    """Remember what modules keep beside their parameters; returns what puts it back.

    That is every tensor, with its value, plain attributes, and what is registered; of containers
    what they hold. A class of a user's own may put a new tensor in the place of a buffer, keep
    tensors as plain attributes, make layers when it is first called, count its calls, and draw from
    a generator of its own.
    """
    tensors, attributes = _tensors_kept(modules), attributes_kept(modules)

    def restore() -> None:
        attributes()
        tensors()

    return restore


def gradients_kept(model: Any) -> Callable[[], None]:
    """Remember the gradients of parameters, which a step takes off or sets to zero."""
    kept = [
        (parameter, gradient, None if gradient is None else gradient.detach().clone())
        for parameter in model.parameters()
        for gradient in [parameter.grad]
    ]

    def restore() -> None:
        for parameter, gradient, value in kept:
            parameter.grad = gradient
            if gradient is not None and not same_values(gradient.detach(), value):
                gradient.detach().copy_(value)

    return restore


def attributes_kept(modules: Sequence[Any]) -> Callable[[], None]:
    """Remember plain attributes and what is registered; returns what puts it back."""
    kept = [(vars(module), dict(vars(module))) for module in modules]
    values = [v for _, own in kept for name, v in own.items() if name not in _NOT_KEPT]
    containers = [*values, *_registered(modules)]
    held = [(value, value.copy()) for value in containers if type(value) in _CONTAINERS]
    drawn = [back for value in values if (back := _generator_kept(value)) is not None]

    def restore() -> None:
        for attributes, own in kept:
            for name in [k for k in attributes if k not in own and k not in _NOT_KEPT]:
                del attributes[name]
            attributes.update({k: v for k, v in own.items() if k not in _NOT_KEPT})
            if list(attributes) != list(own):
                for name, value in own.items():
                    attributes[name] = attributes.pop(name, value)
        for container, before in held:
            if _identities(container) != _identities(before):
                container.clear()
                add = container.extend if isinstance(container, (list, deque)) else container.update
                add(before)
        for back in drawn:
            back()

    return restore


_CONTAINERS = (list, dict, OrderedDict, set, deque)


def _registered(modules: Sequence[Any]) -> list[Any]:
    """The tables of modules; FSDP itself puts whole parameters in the place of shards, and back."""
    kinds = {kind.__name__ for module in modules for kind in type(module).__mro__}
    sharded = kinds & {"FSDPModule", "FullyShardedDataParallel"}
    names = [name for name in _TABLES if not (sharded and name == "_parameters")]
    return [vars(module).get(name) for module in modules for name in names]


def _identities(container: Any) -> Any:
    if isinstance(container, dict):
        return [(name, id(value)) for name, value in container.items()]
    return container if isinstance(container, set) else list(map(id, container))


def _generator_kept(value: Any) -> Callable[[], None] | None:
    """Remember a generator of random numbers; ``None``: it is none."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        source = value.bit_generator
        return partial(setattr, source, "state", source.state)
    return None


def _tensors_kept(modules: Sequence[Any]) -> Callable[[], None]:
    kept = [
        (holder, name, value, value.detach().clone(), _counter(value))
        for module in modules
        for holder in (module._buffers, vars(module))
        for name, value in holder.items()
        if isinstance(value, torch.Tensor)
        and not value.requires_grad
        and not isinstance(value, nn.parameter.UninitializedTensorMixin)
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
    """Whether two tensors of one shape and layout hold the same; NaN equals NaN."""
    return all(map(_same, plain(a), plain(b)))


def _same(a: Any, b: Any) -> bool:
    if torch.equal(a, b):
        return True
    nan = a.isnan()
    return bool(torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan]))


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is neither sparse nor nested nor quantized nor of a library's own layout."""
    odd = tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized
    return not odd


def plain(tensor: Any) -> tuple[Any, ...]:
    """The plain tensors that hold what a tensor holds.

    Of a sparse one these are its indices and values: a graph's adjacency may be too large to fill.
    """
    layout = tensor.layout
    if is_plain(tensor):
        return (tensor,)
    if tensor.is_nested:
        return tuple(tensor.unbind())
    if tensor.is_quantized:
        return (tensor.dequantize(),)
    if layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor.to_dense(),)
