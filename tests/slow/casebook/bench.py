"""What all Keras scenarios share: one small net, its pretrained weights, and two modes.

The net is that of the casebook: four blocks of convolution, BN and ReLU with few filters. Nothing
here knows how Frostline works.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from .scenario import (
    BACKENDS,
    CLASSES,
    FILTERS,
    NORMS,
    Case,
    Scenario,
    Score,
    digits,
    part,
    target,
)

__all__ = [
    "BACKENDS",
    "CLASSES",
    "FILTERS",
    "NORMS",
    "Case",
    "Scenario",
    "Score",
    "digits",
    "part",
    "target",
]

# --- the net ----------------------------------------------------------------------------------


def stock(momentum: float = 0.99, **arguments: Any) -> Callable[[str], Any]:
    """BN layers by name, of stock Keras."""
    return lambda name: keras.layers.BatchNormalization(momentum=momentum, name=name, **arguments)


def in_blocks(
    chosen: Sequence[str], there: Callable[[str], Any], elsewhere: Callable[[str], Any]
) -> Callable[[str], Any]:
    """One kind of BN in some blocks, another in the rest."""
    return lambda name: there(name) if name in chosen else elsewhere(name)


def net(
    norm: Callable[[str], Any] | None = None,
    *,
    side: int | None = 16,
    channels: int = 1,
    before: Sequence[Any] = (),
    head: Sequence[Any] | None = None,
) -> Any:
    """The net: four blocks, global average, and a head; layers conv1, bn1, relu1, ..., head.

    Args:
        norm: Name -> BN layer; stock with momentum 0.99 by default.
        side: Height and width of the input.
        channels: Of the input.
        before: Layers in front of the first block.
        head: Layers behind the global average; a softmax over the digits by default.
    """
    norm = norm or stock()
    layers = [keras.Input((side, side, channels)), *before]
    for block, filters in enumerate(FILTERS, 1):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", name=f"conv{block}"),
            norm(f"bn{block}"),
            keras.layers.ReLU(name=f"relu{block}"),
        ]
        if block == 2:
            layers.append(keras.layers.MaxPooling2D(name="pool"))
    layers.append(keras.layers.GlobalAveragePooling2D(name="gap"))
    layers += head or [keras.layers.Dense(CLASSES, activation="softmax", name="head")]
    return keras.Sequential(layers)


@functools.cache
def old_weights(channels: int = 1) -> Mapping[str, list[np.ndarray]]:
    """Layer name -> weights after 513 updates on the source domain; made once per process."""
    keras.utils.set_random_seed(7)
    model = net(channels=channels)
    x, y = part("old")
    x = np.repeat(x, channels, axis=-1)
    fit(model, x, y, epochs=17)
    fit(model, x, y, epochs=10, lr=2e-4)  # small steps at the end: the averages catch up
    return {layer.name: layer.get_weights() for layer in model.layers if layer.get_weights()}


def load_old(model: Any, *, head: bool = True, channels: int = 1) -> Any:
    """Give the layers of a net their pretrained weights; without ``head`` that one stays new."""
    weights = old_weights(channels)
    for layer in model.layers:
        if layer.name in weights and (head or layer.name != "head"):
            layer.set_weights(weights[layer.name])
    return model


def freeze_blocks(model: Any, count: int = 3, *, norms: bool = True) -> Any:
    """Freeze convolutions, and BN if asked, of the first blocks."""
    for block in range(1, count + 1):
        for kind in ("conv", "bn") if norms else ("conv",):
            model.get_layer(f"{kind}{block}").trainable = False
    return model


def compiled(model: Any, *, lr: float = 3e-3, loss: Any = None, optimizer: Any = None) -> Any:
    """Compile for labels 0 to 9, or another loss."""
    model.compile(
        optimizer or keras.optimizers.Adam(lr),
        loss or "sparse_categorical_crossentropy",
        metrics=["accuracy"] if loss is None else [],
    )
    return model


def fit(
    model: Any,
    x: Any,
    y: Any,
    *,
    epochs: int,
    batch_size: int = 32,
    lr: float = 3e-3,
    loss: Any = None,
    optimizer: Any = None,
    **more: Any,
) -> dict[str, list[float]]:
    """Compile and train; returns the history."""
    compiled(model, lr=lr, loss=loss, optimizer=optimizer)
    run = model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0, **more)
    return dict(run.history)


def statistics(model: Any, names: Sequence[str] = NORMS) -> np.ndarray:
    """All moving means and variances in one array."""
    layers = [model.get_layer(name) for name in names]
    return np.concatenate(
        [
            np.ravel(keras.ops.convert_to_numpy(variable))
            for layer in layers
            for variable in (layer.moving_mean, layer.moving_variance)
        ]
    )


# --- two modes, without Frostline -------------------------------------------------------------


def outputs(model: Any, x: Any, *, training: bool, batch_size: int = 32) -> np.ndarray:
    """Forward passes batch by batch; what a training-mode pass moves is put back."""
    before = model.get_weights()
    count = len(keras.tree.flatten(x)[0])
    found = []
    for start in range(0, count, batch_size):
        rows = keras.tree.map_structure(lambda a, s=start: a[s : s + batch_size], x)
        found.append(keras.ops.convert_to_numpy(model(rows, training=training)))
    model.set_weights(before)
    return np.concatenate(found)


def score(model: Any, x: Any, y: np.ndarray, *, training: bool, batch_size: int = 32) -> Score:
    """Cross-entropy and accuracy in one mode, by numpy."""
    probabilities = outputs(model, x, training=training, batch_size=batch_size).astype("float64")
    if probabilities.shape[-1] == 1:
        probabilities = np.concatenate([1 - probabilities, probabilities], axis=-1)
    labels = np.ravel(y).astype(int)
    chosen = probabilities[np.arange(len(labels)), labels]
    return Score(
        float(-np.log(np.clip(chosen, 1e-7, 1)).mean()),
        float((probabilities.argmax(-1) == labels).mean()),
    )


def both(model: Any, x: Any, y: np.ndarray, *, batch_size: int = 32) -> tuple[Score, Score]:
    """Scores at inference and in training mode."""
    return (
        score(model, x, y, training=False, batch_size=batch_size),
        score(model, x, y, training=True, batch_size=batch_size),
    )


def gap(
    model: Any, x: Any, y: np.ndarray, *, at_least: float, batch_size: int = 32
) -> dict[str, float]:
    """Assert that inference has a loss higher by ``at_least`` than training mode; the numbers."""
    inference, training = both(model, x, y, batch_size=batch_size)
    shown = {
        "inference loss": inference.loss,
        "training loss": training.loss,
        "inference accuracy": inference.accuracy,
        "training accuracy": training.accuracy,
    }
    assert inference.loss - training.loss > at_least, shown
    return shown
