"""Change and train a Keras model as one likes, and have it back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.backend.common import global_state

from frostline.adapters.keras import graph as keras_graph, state as keras_state
from frostline.adapters.keras.cached_data import randomness_kept
from frostline.adapters.keras.optimizer import retarget
from frostline.adapters.keras.random import generators, seed_states, seeds
from frostline.adapters.keras.trial import fresh_step
from frostline.atomic import taken_back
from frostline.types import ModelError

#: Keras' own seed, and the generator that follows from it.
_GLOBAL = ("global_random_seed", "global_seed_generator")


@contextmanager
def rehearsal(model: Any, seed: int, data: Any = None) -> Iterator[None]:
    """Seed everything for a block; on any exit the model is what it was, classes included.

    Args:
        model: A built Keras model.
        seed: Of Python, numpy, the backend and the layers' own generators.
        data: A loader with generators of its own.
    """
    state, back = keras_state.snapshot(model, classes=True), generators(model, data)
    kept = {name: global_state.get_global_attribute(name) for name in _GLOBAL}

    def whole() -> None:
        keras_state.restore(state)
        for name, value in kept.items():
            global_state.set_global_attribute(name, value)
        back()

    with randomness_kept(), taken_back(whole):
        keras.utils.set_random_seed(seed)
        moved = seeds(model, seed)
        for (variable, _), value in zip(seed_states(model), moved, strict=True):
            variable.assign(value)
        yield


@contextmanager
def trains_anew(model: Any) -> Iterator[None]:
    """Let ``fit`` compile its step for the flags of now, with the optimizer's slots as they are."""
    with fresh_step(model):
        retarget(model)
        yield


def start_ramp(model: Any, paths: Sequence[str], steps: int) -> None:
    """Let λ of these sites go from 0 to 1 over the next training steps.

    Raises:
        ModelError: A site that is not Frostline's, or of another policy.
    """
    places = {place.path: place for place in keras_graph.walk(model)}
    for path in paths:
        layer = places[path].layer
        if not hasattr(layer, "reserve_ramp"):
            raise ModelError(f"'{path}' is no layer of Frostline's. Received: {path!r}")
        try:
            layer.reserve_ramp()
            layer.start_ramp(max(1, steps) * places[path].calls)
        except ValueError as problem:
            raise ModelError(str(problem)) from problem
