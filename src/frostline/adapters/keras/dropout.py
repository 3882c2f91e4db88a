"""Dropout of one side of a Keras model: which rates it has, to be turned off and given back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import keras

from frostline.adapters.dropout_rate import DropoutRate, Rates, dropout_rates, turned_on
from frostline.adapters.keras.graph import walk, wrapped_module
from frostline.adapters.keras.noise import noise_layers
from frostline.graph.addresses import Place
from frostline.types import ModelError

_INNER = ("dropout", "_dropout", "recurrent_dropout")


def rates(model: Any) -> Rates:
    """Every rate of a model as it is now."""
    return Rates.of(
        rate
        for place in walk(model)
        for owner in _inside(place.layer)
        for rate in dropout_rates(owner)
    )


def turn_off(model: Any, chosen: Sequence[Place]) -> int:
    """Turn off all dropout in these places; returns the number of layers that dropped something.

    Raises:
        ModelError: A layer that drops, but none of whose attributes is known to be its rate; no
            rate has changed then.
    """
    kinds = noise_layers(model)
    parents = {place.path: place.layer for place in walk(model)}
    found: list[list[DropoutRate]] = []
    for place in chosen:
        if wrapped_module(place.layer) is not None:
            found += _in_torch(place.layer)
            continue
        if kinds.get(place.path) != "dropout":
            continue
        # A recurrent layer's rates are those of its cell; other rates in there are not its own.
        own = dropout_rates(place.layer)
        own += [
            k for inner in walk(place.layer) for k in dropout_rates(inner.layer) if k.name in _INNER
        ]
        own = [rate for rate in own if not rate.is_off]
        if not own:
            raise ModelError(
                f"'{place.path}' drops values in training, but none of its attributes is known to "
                "be the rate; set it to 0 yourself and freeze without dropout=True. "
                f"Received: {type(place.layer).__module__}.{type(place.layer).__qualname__}"
            )
        # Attention keeps the rate of the dropout layer inside of it, and saves that one.
        parent = parents.get(place.parent or "")
        around = [] if parent is None or isinstance(parent, keras.Model) else dropout_rates(parent)
        found.append(own + [r for r in around if r.name in _INNER and not r.is_off])
    for group in found:
        for rate in group:
            rate.turn_off()
    return len(found)


def turn_on(chosen: Sequence[Place]) -> int:
    """Give back what :func:`turn_off` took in these places; returns the number of layers."""
    changed = [
        place.path
        for place in chosen
        if turned_on(rate for owner in _inside(place.layer) for rate in dropout_rates(owner))
    ]
    return sum(not any(other.startswith(f"{path}/") for other in changed) for path in changed)


def _in_torch(wrapper: Any) -> list[list[DropoutRate]]:
    drop = sys.modules["torch"].nn.modules.dropout._DropoutNd
    modules = [module for module in _inside(wrapper) if isinstance(module, drop) and module.p]
    return [dropout_rates(module) for module in modules]


def _inside(layer: Any) -> list[Any]:
    """A layer, and the torch modules in it where it wraps one."""
    module = wrapped_module(layer)
    return [layer] if module is None else [layer, *module.modules()]
