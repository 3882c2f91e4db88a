"""Dropout of one side of a Keras model: which rates it has, to be turned off and given back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import keras

from frostline.adapters.dropout_rate import Knob, Rates, knobs, turned_on
from frostline.adapters.keras.graph import walk, wrapped_module
from frostline.adapters.keras.noise import noise_layers
from frostline.graph.addresses import Place
from frostline.types import ModelError

_INNER = ("dropout", "_dropout", "recurrent_dropout")


def rates(model: Any) -> Rates:
    """Every rate of a model as it is now."""
    return Rates.of(
        knob for place in walk(model) for owner in _inside(place.layer) for knob in knobs(owner)
    )


def turn_off(model: Any, chosen: Sequence[Place]) -> int:
    """Turn off all dropout in these places; returns the number of layers that dropped something.

    Raises:
        ModelError: A layer that drops, but none of whose attributes is known to be its rate; no
            rate has changed then.
    """
    kinds = noise_layers(model)
    parents = {place.path: place.layer for place in walk(model)}
    found: list[list[Knob]] = []
    for place in chosen:
        if wrapped_module(place.layer) is not None:
            found += _in_torch(place.layer)
            continue
        if kinds.get(place.path) != "dropout":
            continue
        # A recurrent layer's rates are those of its cell; other rates in there are not its own.
        own = knobs(place.layer)
        own += [k for each in walk(place.layer) for k in knobs(each.layer) if k.name in _INNER]
        own = [knob for knob in own if not knob.is_off]
        if not own:
            raise ModelError(
                f"'{place.path}' drops values in training, but none of its attributes is known to "
                "be the rate; set it to 0 yourself and freeze without dropout=True. "
                f"Received: {type(place.layer).__module__}.{type(place.layer).__qualname__}"
            )
        # Attention keeps the rate of the dropout layer inside of it, and saves that one.
        parent = parents.get(place.parent or "")
        around = [] if parent is None or isinstance(parent, keras.Model) else knobs(parent)
        found.append(own + [k for k in around if k.name in _INNER and not k.is_off])
    for group in found:
        for knob in group:
            knob.turn_off()
    return len(found)


def turn_on(chosen: Sequence[Place]) -> int:
    """Give back what :func:`turn_off` took in these places; returns the number of layers."""
    changed = [
        place.path
        for place in chosen
        if turned_on(knob for owner in _inside(place.layer) for knob in knobs(owner))
    ]
    return sum(not any(other.startswith(f"{path}/") for other in changed) for path in changed)


def _in_torch(wrapper: Any) -> list[list[Knob]]:
    drop = sys.modules["torch"].nn.modules.dropout._DropoutNd
    modules = [each for each in _inside(wrapper) if isinstance(each, drop) and each.p]
    return [knobs(each) for each in modules]


def _inside(layer: Any) -> list[Any]:
    """A layer, and the torch modules in it where it wraps one."""
    module = wrapped_module(layer)
    return [layer] if module is None else [layer, *module.modules()]
