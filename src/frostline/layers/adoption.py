"""A stock layer turned into ours, and back, in place."""

from __future__ import annotations

from typing import Any

import keras

from frostline.atomic import atomically
from frostline.layers.normalization import BatchNormalization, behaviour
from frostline.layers.state import WhileTrainable
from frostline.layers.undo import remembered
from frostline.types import Policy

#: Attributes that a stock layer does not have; `dismiss` takes them away.
_OWN = ("_state", "_live", "_release", "policy", "debias", "version")
#: Stock attribute -> where ours keeps it, because ours computes it.
_MOVED = {"gamma": "_trained_gamma", "beta": "_trained_beta", "momentum": "_momentum"}


def adopt(
    layer: Any, *, policy: Policy = "inference", debias: bool = False, version: str | None = None
) -> None:
    """Turn a built stock layer into ours, in place: same object, same weight variables.

    The model's graph, its optimizer's slots and every reference to the layer stay valid. A layer
    that is ours already gets the new settings.

    Args:
        layer: A built ``keras.layers.BatchNormalization`` or one of ours.
        policy: As in :class:`BatchNormalization`.
        debias: As in :class:`BatchNormalization`.
        version: As in :class:`BatchNormalization`.

    Raises:
        ValueError: Settings that contradict each other or the layer; the layer is unchanged.
    """
    back = remembered([layer], layer.variables)
    atomically(back, lambda: _adopt(layer, policy, debias, version))


def dismiss(layer: BatchNormalization) -> None:
    """Turn one of our layers back into a stock layer, in place, with the weights it has now.

    If anything fails, the layer is unchanged.
    """
    atomically(remembered([layer], layer.variables), lambda: _dismiss(layer))


def _adopt(layer: Any, policy: Policy, debias: bool, version: str | None) -> None:
    if isinstance(layer, BatchNormalization):
        before = layer.debias
        layer._behave(policy, debias, version)
        if layer.debias != before:
            with layer._open_name_scope():
                layer._state = layer._make_state()
            layer._offer_to_optimizer()
        return
    chosen = behaviour(policy, debias, version)
    if getattr(layer, "renorm", False) and chosen != ("inference", False, None):
        BatchNormalization._behave(layer, policy, debias, version)  # raises with the reason
    attributes = layer.__dict__
    for stock, ours in _MOVED.items():
        attributes[ours] = attributes.pop(stock)
    attributes |= {"_state": None, "_live": True}
    layer.__class__ = BatchNormalization
    layer._behave(policy, debias, version)
    with layer._open_name_scope():
        layer._add_state()


def _dismiss(layer: Any) -> None:
    if layer._live and not layer.trainable:
        layer._exchange(thaw=True)
    for trained, _ in layer._twins():
        trained.trainable = layer.trainable
        if isinstance(trained.regularizer, WhileTrainable):
            trained.regularizer = trained.regularizer.regularizer
    attributes = layer.__dict__
    for stock, ours in _MOVED.items():
        attributes[stock] = attributes.pop(ours)
    for name in _OWN:
        attributes.pop(name)
    layer.__class__ = keras.layers.BatchNormalization
    if keras.backend.backend() == "torch":
        layer._track_variables()
