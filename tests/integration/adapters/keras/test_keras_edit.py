"""Converting and restoring a Keras model: all of it or nothing, wherever it is interrupted."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline import layers
from frostline.adapters.keras.state import all_that_edits_touch, models_in, variables_of
from frostline.atomic import atomically

L = keras.layers

#: Places of an interruption that are tried, evenly spread over all lines that run.
PLACES = 60

VERBS: dict[str, Callable[[Any], Any]] = {
    "convert": lambda model: fl.convert(model, version="2.2.4"),
    "restore": fl.restore,
}


class StoppedError(BaseException):
    """As a key press or a signal: no line of the verb expects it."""


def build(verb: str) -> Any:
    inputs = keras.Input((6,))
    inner_input = keras.Input((4,))
    inner = keras.Model(inner_input, L.BatchNormalization(name="inner_bn")(inner_input))
    x = L.Dense(4, use_bias=False)(inputs)
    x = L.BatchNormalization(name="frozen", gamma_regularizer="l2", trainable=False)(x)
    model = keras.Model(inputs, L.Dense(1)(inner(x)))
    if verb == "restore":
        fl.convert(model)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    rng = np.random.default_rng(0)
    model.fit(rng.normal(size=(16, 6)), rng.normal(size=(16, 1)), batch_size=8, verbose=0)
    return model


def state(model: Any) -> dict[str, Any]:
    """What a change would show in: classes, attributes, objects, values, compiled steps."""
    places = [model, *model.layers, *models_in(model)[1].layers]
    found: dict[str, Any] = {}
    for number, layer in enumerate(places):
        attributes = {name: id(value) for name, value in vars(layer).items()}
        found[f"{number} attributes"] = attributes | {"class": type(layer)}
        found[f"{number} config"] = layer.get_config()
        found[f"{number} variables"] = [
            (id(v), v.trainable, id(v.regularizer)) for v in layer.variables
        ]
        found[f"{number} trains"] = [id(v) for v in layer.trainable_variables]
        if keras.backend.backend() == "torch":
            found[f"{number} torch"] = [
                (name, id(p), p.requires_grad) for name, p in layer.named_parameters()
            ]
    found["optimizer"] = [id(v) for v in model.optimizer.variables]
    found["values"] = [keras.ops.convert_to_numpy(v).tobytes() for v in variables_of(model)]
    return found


def interrupted(call: Callable[[], Any], at: int | None) -> int:
    """Run ``call``, raise before the line of this number; returns how many lines ran."""
    ours = ("adapters/keras/edit.py", "adapters/keras/optimizer.py", "layers/")
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if not any(f"frostline/{part}" in frame.f_code.co_filename for part in ours):
            return None
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)
                raise StoppedError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("verb", VERBS)
def test_an_exception_at_any_line_leaves_the_model_as_it_was(verb: str) -> None:
    for whole in (build(verb), build(verb)):  # the first call also imports
        total = interrupted(functools.partial(VERBS[verb], whole), None)
    assert total > PLACES
    model = build(verb)
    before = state(model)
    for at in sorted({round(place) for place in np.linspace(1, total, PLACES)}):
        with pytest.raises(StoppedError):
            interrupted(functools.partial(VERBS[verb], model), at)
        after = state(model)
        for name, value in before.items():
            assert after[name] == value, (name, at)
    VERBS[verb](model)
    assert state(model) != before
    model.fit(np.ones((8, 6)), np.ones((8, 1)), verbose=0)


class Stubborn(keras.optimizers.SGD):  # type: ignore[misc]
    """Does not take what its own ``get_config`` gives."""

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "unknown": 1}


def test_an_optimizer_that_cannot_be_made_anew_stops_convert() -> None:
    model = build("convert")
    model.compile(Stubborn(0.01), "mse")
    model.optimizer.build(model.trainable_variables)
    before = state(model)
    with pytest.raises(fl.ModelError, match=r"cannot be made anew.*Received: Stubborn"):
        fl.convert(model)
    assert state(model) == before
    assert not any(isinstance(layer, layers.BatchNormalization) for layer in model.layers)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX has traces")
def test_an_exception_at_the_exit_of_a_trace_leaves_none() -> None:
    """Everything that was computed later went to the trace that had ended."""
    import jax
    from jax._src import core

    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn")])
    back, held = all_that_edits_touch(model), []

    def traced(x: Any) -> Any:
        held.append(core.trace_ctx.trace)
        return x

    def edit() -> None:
        jax.jit(traced)(1.0)
        core.trace_ctx.set_trace(held[0])  # as if the exit of its block had not been called
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomically(back, edit)
    assert core.trace_ctx.trace is not held[0]
    np.testing.assert_allclose(np.asarray(keras.ops.ones(2) + 1), 2)


def _flags(model: Any) -> list[bool]:
    return [layer.trainable for layer in model._flatten_layers()]


def test_undo_leaves_the_input_layer_of_a_part_that_was_frozen_before_it_was_built() -> None:
    part = keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization()])
    part.trainable = False
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.Dense(2)(part(x)))
    before = _flags(model)
    fl.unfreeze(model).undo()
    assert _flags(model) == before


def test_undo_sets_a_layer_that_two_containers_share() -> None:
    shared, x = keras.layers.Dense(4), keras.Input((4,))
    one = keras.Sequential([keras.Input((4,)), shared])
    other = keras.Sequential([keras.Input((4,)), shared, keras.layers.Dense(4)])
    model = keras.Model(x, keras.layers.Dense(2)(other(one(x))))
    other.trainable, shared.trainable = False, True
    before = _flags(model)
    change = fl.unfreeze(model)
    assert _flags(model) != before
    change.undo()
    assert _flags(model) == before


def test_an_exception_at_the_exit_of_a_block_that_tracks_nothing_leaves_it() -> None:
    """Layers that were built later had no weights: "everything is frozen" was said of them."""
    from keras.src.utils import tracking

    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])

    def edit() -> None:
        tracking.DotNotTrackScope().__enter__()  # as if its exit had not been called
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomically(all_that_edits_touch(model), edit)
    assert tracking.is_tracking_enabled()
