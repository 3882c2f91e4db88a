"""Inputs of a torch module as columns with one entry per sample, by the rule of ``fl.cached``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from frostline.adapters.torch.graph import unwrapped
from frostline.adapters.torch.replay import is_record, is_samples, mapped, row_count
from frostline.adapters.torch.replayed_parts import ReplayedPrefix
from frostline.data.arrays import Table, description, has_shape, leaves, map_leaves, to_numpy
from frostline.types import Array, ModelError


def columns(prefix: Any, x: Any) -> Any:
    """Inputs as arrays of one length, in their structure where they are such, else in a table.

    Tensors and lists that have an entry per sample are columns; what belongs to all samples is in
    the names of the columns.

    Args:
        prefix: What takes them. One that is a run of the model was split with a sample, where a
            list of images is known from a list of several inputs.
        x: Its inputs.

    Raises:
        ModelError: They have no samples, or something whose content cannot be read.
    """
    arrays = [leaf for _, leaf in leaves(x)]
    if not isinstance(unwrapped(prefix), ReplayedPrefix) and _of_one_length(arrays):
        return x
    given = (x,) if is_samples(x) else x  # one argument
    count = row_count(((given,), {}))
    found: dict[str, Array] = {}
    shared: list[str] = []

    def rows(name: str, value: Any) -> Any:
        found[name] = column(value)
        return value

    def other(name: str, value: Any) -> Any:
        if value is not None:
            shared.append(f"{name}={_text(value)}")
        return value

    mapped(given, count, rows, other)
    plain = not any(map(is_record, arrays))
    if plain and not shared and all(each.dtype.kind != "O" for each in found.values()):
        return map_leaves(to_numpy, x)
    common = "".join(f"{text} " for text in sorted(shared))

    def restored(columns: Mapping[str, Any]) -> Any:
        return mapped(given, count, lambda name, _: columns[common + name], lambda _, value: value)

    return Table({common + name: found[name] for name in sorted(found)}, restored)


def _of_one_length(arrays: list[Any]) -> bool:
    known = all(isinstance(leaf, np.ndarray) and leaf.ndim for leaf in arrays)
    return known and len({len(leaf) for leaf in arrays}) == 1


def column(value: Any) -> Array:
    """What has an entry per sample, as an array; a list of samples as an array of objects."""
    if not isinstance(value, list):
        return to_numpy(value)
    made: Array = np.empty(len(value), object)
    for number, sample in enumerate(value):
        made[number] = map_leaves(lambda x: to_numpy(x) if has_shape(x) else x, sample)
    return made


def _text(value: Any) -> str:
    """What belongs to all samples, in words that another value does not have."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and not value.ndim:
        value = to_numpy(value).item()
    if isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype,
                          torch.device)):  # fmt: skip
        return repr(value)
    raise ModelError(
        "cached features are found by the arrays of a sample, and these inputs hold something that "
        "has no entry per sample and is no number or text, such as the edges of a graph: train "
        f"with fl.cached. Received: {description(value)}"
    )
