"""Batches that a torch module may take, read off its first layer, for checks without a sample."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from frostline.adapters.torch.forward_pass import mover, tensors
from frostline.adapters.torch.graph import is_site

ROWS = 3  # samples in a trial batch
_SIZES = (64, 224, 32, 28, 128, 16)  # sides of images that are tried
_VOLUMES = (16, 32, 64)  # of volumes, whose cost grows with the cube


def guesses(root: Any, modules: Any = None) -> Iterator[Any]:
    """Batches of ``2 * ROWS`` random samples, as the first module with weights may take them.

    They are drawn one by one: with a thousand channels one of large images is gigabytes.

    Args:
        root: What will be called with one of them, as its only argument.
        modules: Its modules in execution order; without them, in order of registration.
    """
    found = root.modules() if modules is None else modules
    first = next((m for m in found if any(True for _ in m.parameters(recurse=False))), None)
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, nn.Linear):
        shapes = [(first.in_features,), (8, first.in_features)]
    elif isinstance(first, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        axes = len(first.kernel_size)
        sides = _SIZES if axes < 3 else _VOLUMES
        shapes = [(first.in_channels, *[side] * axes) for side in sides]
    elif first is not None and is_site(first):
        channels = len(first.weight)
        shapes = [(channels,), (channels, 16), (channels, 16, 16)]
    elif isinstance(first, nn.Embedding):
        yield tensors(rng.integers(0, first.num_embeddings, (2 * ROWS, 16)), root)
    for shape in shapes:
        yield tensors(rng.normal(size=(2 * ROWS, *shape)).astype(np.float32), root)


def arguments(root: Any, sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How ``forward`` is called with a sample: what goes by position, and what by name.

    Args:
        root: The module.
        sample: A tuple of its arguments, a mapping by name, or its only argument; a list is either.
    """
    given = mover(root)(sample)
    if isinstance(given, Mapping):
        return ((), dict(given)) if _names(root, given) else ((given,), {})
    packed = hasattr(given, "to")  # a PackedSequence is a tuple, and one argument
    several = isinstance(given, tuple) or (isinstance(given, list) and _fits(root, given))
    several = several and not packed
    return (tuple(given) if several else (given,)), {}


def _names(root: Any, given: Mapping[str, Any]) -> bool:
    """Whether ``forward`` knows a key of a mapping; where it knows none, that is one argument."""
    known = inspect.signature(root.forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD or p.name in given for p in known)


def _fits(root: Any, given: list[Any]) -> bool:
    """Whether ``forward`` has a place for each item; the images of a detector are one argument."""
    try:
        inspect.signature(root.forward).bind(*given)
    except TypeError:
        return False
    return True


def flat(value: Any, _opened: frozenset[int] = frozenset()) -> list[Any]:
    """The tensors in a structure of outputs, in order; objects that hold some are opened."""
    if isinstance(value, torch.Tensor):
        return [value]
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    elif dataclasses.is_dataclass(value):
        items = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif hasattr(value, "__dict__") and not callable(value) and not inspect.ismodule(value):
        items = list(vars(value).values())  # a distribution, a namespace
    if id(value) in _opened:  # two objects may hold each other
        return []
    return [leaf for item in items for leaf in flat(item, _opened | {id(value)})]
