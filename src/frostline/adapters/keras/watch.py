"""What must not move while a BN site is frozen, and which weights a model holds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import copied
from frostline.adapters.keras.graph import is_site, torch_modules, walk
from frostline.types import Array

#: Names of the stored statistics of a BN layer; the last three with ``renorm`` only.
STATISTICS = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
_PARAMETERS = ("gamma", "beta")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One value of a frozen site that a training step must leave alone.

    Attributes:
        path: The site.
        name: ``"gamma"``, ``"moving_mean"``, ...; in the framework's word.
        read: Returns its present value.
        write: Puts a value in its place.
    """

    path: str
    name: str
    read: Callable[[], Array]
    write: Callable[[Array], None]


def frozen_values(model: Any, *, parameters: bool, statistics: bool) -> list[Kept]:
    """Values of every site whose ``trainable`` is ``False``, whatever its policy says.

    Args:
        model: A Keras model.
        parameters: Whether gamma and beta are meant.
        statistics: Whether stored statistics are meant.

    Returns:
        In execution order; of torch modules inside a frozen wrapper as well.
    """
    found: list[Kept] = []
    for place in walk(model):
        layer = place.layer
        if layer.trainable:
            continue
        if is_site(layer):
            names = [*(_PARAMETERS if parameters else ()), *(STATISTICS if statistics else ())]
            found += [
                _of_variable(place.path, name, layer)
                for name in names
                if getattr(layer, name, None) is not None
            ]
        for path, module in torch_modules(place):
            found += _of_module(path, module, parameters, statistics)
    return found


def _of_variable(path: str, name: str, layer: Any) -> Kept:
    # Asked for by name each time: our layer's gamma is another variable after thawing.
    def read() -> Array:
        return copied(getattr(layer, name))

    def write(value: Array) -> None:
        getattr(layer, name).assign(value)

    return Kept(path=path, name=name, read=read, write=write)


def _of_module(path: str, module: Any, parameters: bool, statistics: bool) -> list[Kept]:
    if getattr(module, "running_mean", None) is None:
        return []
    names = [*(("weight", "bias") if parameters else ())]
    names += ("running_mean", "running_var") if statistics else ()
    tensors = {name: getattr(module, name) for name in names}
    return [_of_tensor(path, key, tensor) for key, tensor in tensors.items() if tensor is not None]


def _of_tensor(path: str, name: str, tensor: Any) -> Kept:
    def read() -> Array:
        return np.array(tensor.detach().cpu().numpy())

    def write(value: Array) -> None:
        tensor.data.copy_(tensor.new_tensor(value))

    return Kept(path=path, name=name, read=read, write=write)


def weights_mark(model: Any, sites: Collection[str]) -> int:
    """A checksum of all weights but the stored statistics of these sites."""
    left_out = {
        id(getattr(place.layer, name, None))
        for place in walk(model)
        if place.path in sites
        for name in STATISTICS
    }
    mark = 0
    for variable in model.weights:
        if id(variable) not in left_out:
            value = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
            mark = zlib.crc32(value.view(np.uint8).reshape(-1).data, mark)
    return mark
