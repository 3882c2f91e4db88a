"""Layers of a Keras model that are no BN and act in training only."""

from __future__ import annotations

import sys
from typing import Any

import keras

from frostline.adapters.dropout_rate import all_off
from frostline.adapters.keras import graph as keras_graph
from frostline.adapters.keras.calls import graph_of as keras_graph_of, takes_training

#: Words in a class name -> kind, in the order in which they are looked for. A layer whose class
#: says none of them is noise if it holds a seed generator.
_WORDS = (
    ("augmentation", ("random", "augment", "augmix", "mixup", "cutmix", "cutout", "erasing")),
    ("dropout", ("dropout", "droppath", "dropblock", "stochasticdepth")),
    ("noise", ("noise", "jitter")),
)


def noise_layers(model: Any) -> dict[str, str]:
    """Path -> ``"dropout"``, ``"noise"`` or ``"augmentation"``.

    A layer counts when its ``call`` can tell training from inference and it holds a seed generator
    or its class is named after one of these; recurrent layers when they have a dropout rate.
    """
    found: dict[str, str] = {}
    if _draws(model):
        found[model.name] = "noise"
    for place in keras_graph.walk(model):
        layer = place.layer
        if keras_graph.is_site(layer) or place.parent in found:  # a cell in its recurrent layer
            continue
        if modules := keras_graph.torch_modules(place):
            drop = sys.modules["torch"].nn.modules.dropout._DropoutNd
            found |= {p: "dropout" for p, m in modules if isinstance(m, drop) and m.p > 0}
        elif (kind := _kind(layer, place.leaf)) is not None:
            found[place.path] = kind
    return found


def _draws(layer: Any) -> bool:
    """Whether a model with a ``call`` of its own draws random numbers in it, as a VAE does."""
    written = isinstance(layer, keras.Model) and keras_graph_of(layer) is None
    return written and bool(layer._seed_generators)


def _kind(layer: Any, leaf: bool) -> str | None:
    if isinstance(layer, keras.Model):
        return "noise" if _draws(layer) else None
    if not takes_training(layer):
        return None
    rates = [getattr(layer, name, None) for name in ("dropout", "recurrent_dropout")]
    if any(isinstance(rate, (int, float)) and rate for rate in rates) and not _inner(layer):
        return "dropout"
    if not leaf or all_off(layer):
        return None
    kind = _named(type(layer).__name__)
    seeded = bool(layer._seed_generators) or hasattr(layer, "generator")
    if kind is None and seeded and not any(hasattr(layer, name) for name in _RECURRENT):
        return "noise"
    return kind


#: Recurrent layers and cells make a seed generator even when they drop nothing.
_RECURRENT = ("recurrent_dropout", "state_size")


def _inner(layer: Any) -> bool:
    """Whether a layer with a rate leaves the work to a dropout layer inside it."""
    return any(_named(type(place.layer).__name__) for place in keras_graph.walk(layer))


def drops(layer: Any) -> bool:
    """Whether what a random layer does is dropout."""
    return _named(type(layer).__name__) == "dropout" or bool(getattr(layer, "dropout", 0))


def _named(name: str) -> str | None:
    lower = name.lower()
    return next((kind for kind, words in _WORDS if any(w in lower for w in words)), None)
