"""Randomness of a Keras model, made the same in every pass over one batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras import graph as keras_graph
from frostline.adapters.keras.arrays import copied
from frostline.atomic import taken_back
from frostline.graph.addresses import Place

#: Where Keras keeps the generator of everything that has no seed.
_SHARED = "global_seed_generator"


def seed_states(model: Any, places: Iterable[Place] | None = None) -> list[tuple[Any, Any]]:
    """(state variable, generator) of every seed generator below the model, or at these places."""
    found = keras_graph.walk(model) if places is None else places
    layers = [model, *(place.layer for place in found)]
    return [(s.state, s) for layer in layers for s in getattr(layer, "_seed_generators", ())]


def seeds(model: Any, step: int) -> list[Any]:
    """Seed states for one batch: those of the model, moved on by the batch's number."""
    moved = []
    for state, _ in seed_states(model):
        value = copied(state)
        value[..., -1] += np.asarray(step, dtype=value.dtype) * np.asarray(9973, value.dtype)
        moved.append(keras.ops.convert_to_tensor(value, dtype=state.dtype))
    return moved


def generators(
    model: Any, data: Any = None, *, places: Iterable[Place] | None = None
) -> Callable[[], None]:
    """Remember the seed states of a model, of Keras and of torch where a loader or Keras uses it.

    Returns what puts them back.
    """
    attributes = keras.src.backend.common.global_state
    held = [state for state, _ in seed_states(model, places)]
    # Made at its first use, from Python's generator: to ask for it would draw from that one.
    shared = attributes.get_global_attribute(_SHARED)
    if shared is not None:
        held.append(shared.state)
    values = [(state, copied(state)) for state in held]
    back = None
    if "torch" in sys.modules:
        from frostline.adapters.torch.random import generators as of_torch

        back = of_torch(data)

    def restore() -> None:
        if shared is None:
            attributes.set_global_attribute(_SHARED, None)
        for state, value in values:
            state.assign(value)
        if back is not None:
            back()

    return restore


@contextmanager
def fixed_randomness(model: Any, step: int) -> Iterator[None]:
    """Torch: draw unseeded dropout from the batch's number, and undo what the pass moved.

    Keras' unseeded dropout uses torch's global generator, and torch modules inside a model update
    buffers that Keras does not know; both are outside any StatelessScope.
    """
    if keras.backend.backend() != "torch":
        yield
        return
    from frostline.adapters.torch.random import forked

    torch = sys.modules["torch"]
    wrapped = [
        module
        for place in keras_graph.walk(model)
        if (module := keras_graph.wrapped_module(place.layer)) is not None
    ]
    buffers = [(b, b.detach().clone()) for w in wrapped for b in w.buffers()]
    modes = [(m, m.training) for w in wrapped for m in w.modules()]

    def back() -> None:
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, mode in modes:
            module.training = mode

    with forked(), taken_back(back):
        torch.manual_seed(step)
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Torch: no gradients, and unseeded layers draw from a generator that is put back."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    from frostline.adapters.torch.random import forked

    with torch.no_grad(), forked():
        yield
