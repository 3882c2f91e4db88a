"""The only rooms that know a framework: a table of them, and which one a model belongs to.

An adapter answers questions about a model in numpy and dataclasses and is the only way to change
it. Nothing above this package imports or names a framework. A new framework is one line in
:data:`FRAMEWORKS` and one folder whose ``__init__`` has the functions of :class:`Room`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

from frostline.adapters.protocol import (
    Adapter,
    FlagCounts,
    Forward,
    Meter,
    Outcome,
    OutputDistance,
    Population,
    SplitModel,
)
from frostline.types import Array, ModelError
from frostline.types.arguments import listed
from frostline.types.facts import ModelFacts

#: Framework -> its room, in the order of asking: on the torch backend every Keras model *is* an
#: ``nn.Module``, so Keras comes first. A room is asked only once its framework has been imported.
FRAMEWORKS = {"keras": "frostline.adapters.keras", "torch": "frostline.adapters.torch"}


class Room(Protocol):
    """What the ``__init__`` of a framework's folder has; importing it loads no framework."""

    __name__: str

    def is_layer(self, value: Any) -> bool: ...
    def is_model(self, value: Any) -> bool: ...
    def adapter_of(self, model: Any) -> Adapter: ...
    def why_not(self, value: Any) -> str | None: ...


def rooms(*, loaded: bool = True) -> Iterator[Room]:
    """Rooms of the frameworks that this process has imported, or of all of them."""
    for framework, room in FRAMEWORKS.items():
        if framework in sys.modules or not loaded:
            yield cast(Room, importlib.import_module(room))


def room_of(value: Any) -> Room | None:
    """The room that a model or layer belongs to; ``None``: no framework's that is loaded."""
    return next((room for room in rooms() if room.is_model(value) or room.is_layer(value)), None)


def adapter_of(model: Any) -> Adapter:
    """Return the adapter of ``model``.

    Args:
        model: A Keras 3 model: functional, sequential or subclassed, on any backend; or a torch
            module, DataParallel, DDP and ``torch.compile`` around it included.

    Returns:
        An adapter; it holds the model and nothing of it is changed.

    Raises:
        ModelError: Not a model that Frostline can read; the text says what it is instead.
    """
    for room in rooms():
        if room.is_model(model):
            return room.adapter_of(model)
    raise ModelError(_why_not(model))


def read_facts(model: Any) -> ModelFacts:
    """Collect the facts of a model; nothing of it changes.

    Args:
        model: A Keras 3 model, which need not be built or compiled, or a torch module.

    Returns:
        The facts.

    Raises:
        ModelError: Not a model that Frostline can read.
    """
    return adapter_of(model).facts()


def part(room: Room, name: str) -> Any:
    """A module of a room, imported on use: ``edit``, ``files`` or ``prefix``."""
    return importlib.import_module(f"{room.__name__}.{name}")


def store(framework: str) -> Any:
    """The module that reads and writes a framework's files; the framework is loaded."""
    return importlib.import_module(f"{FRAMEWORKS[framework]}.files")


def data_set(cache: Any, labels: Any, *, view: int) -> Any:
    """Cached features as a data set of torch, which is loaded."""
    room = importlib.import_module(f"{FRAMEWORKS['torch']}.cached_data")
    return room.FeatureDataset(cache, labels, view=view)


def freezer(target: Any) -> tuple[Callable[[], FlagCounts], Callable[[], None]]:
    """What freezes a model, a layer, a torch module or several of one framework, and takes it back.

    Nothing is frozen before the first is called; see :func:`frostline.frozen`.

    Raises:
        ModelError: Something else, or nothing.
    """
    # torch containers can be iterated and are modules nevertheless.
    several = isinstance(target, (list, tuple, Iterator))
    layers = tuple(listed(target, "model_or_layers")) if several else (target,)
    if not layers:
        raise ModelError("expected a model, a layer or a list of layers. Received: an empty list")
    for room in rooms():
        if all(map(room.is_layer, layers)):
            freeze, back = part(room, "edit").freezer(layers)
            return freeze, back
    first = room_of(layers[0])
    other = next(layer for layer in layers if first is None or not first.is_layer(layer))
    raise ModelError(_why_not(other))


def _why_not(value: Any) -> str:
    """Say what ``value`` is where it is no model of a framework that is loaded."""
    reasons = (room.why_not(value) for room in rooms(loaded=False))
    reason = next(filter(None, reasons), None)
    received = f"Received: {type(value).__module__}.{type(value).__qualname__}"
    return f"{reason or 'not a model: expected a keras.Model or a torch.nn.Module.'} {received}"


__all__ = [
    "Adapter",
    "Array",
    "FlagCounts",
    "Forward",
    "Meter",
    "Outcome",
    "OutputDistance",
    "Population",
    "SplitModel",
    "adapter_of",
    "store",
]
