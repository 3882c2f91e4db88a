"""What all scenarios share: real pixels, one small net, its pretrained weights, and two modes.

The images are scikit-learn's digits, 8x8, doubled to 16x16. The net is that of the casebook: four
blocks of convolution, BN and ReLU with few filters. Nothing here knows how Frostline works.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import numpy as np

BACKENDS = ("tensorflow", "jax", "torch")
FILTERS = (8, 8, 16, 16)
NORMS = ("bn1", "bn2", "bn3", "bn4")
CLASSES = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """A model in trouble, and what its owner would hand to ``fl.diagnose``.

    Attributes:
        model: Compiled, as its owner has it.
        data: Second argument of ``fl.diagnose``.
        options: Further arguments.
        closable: A repair is known that brings inference to where training mode is.
        shown: What shows that the mechanism is at work, by name: measured without Frostline.
    """

    model: Any
    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    closable: bool = False
    shown: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case of the book, with the answer that its thread gives.

    Attributes:
        number: As in the book; ``H`` numbers are not in it.
        title: In a few words.
        expected: Codes of the causes that a right diagnosis names first; two for compound cases.
        build: Seed -> scenario; asserts that the mechanism shows.
        also: Codes that the book counts as right, too, in the place of the first.
        sites: Names of the BN layers to blame; ``None`` where the book names none.
        backends: Where the scenario can be built.
        everywhere: Belongs to the third that also runs on JAX and torch.
    """

    number: str
    title: str
    expected: tuple[str, ...]
    build: Callable[[int], Scenario]
    also: tuple[str, ...] = ()
    sites: frozenset[str] | None = None
    backends: tuple[str, ...] = BACKENDS
    everywhere: bool = False


class Score(NamedTuple):
    """Mean loss and accuracy on some samples."""

    loss: float
    accuracy: float


# --- images -----------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1797 digits in a fixed random order: (n, 16, 16, 1) in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    order = np.random.default_rng(2026).permutation(len(bundle.target))
    images = (bundle.images[order] / 16.0).astype("float32")[..., None]
    return images.repeat(2, axis=1).repeat(2, axis=2), bundle.target[order].astype("int32")


def part(name: str) -> tuple[np.ndarray, np.ndarray]:
    """``"old"`` 600 images of the source, ``"new"`` 960 for fine-tuning, ``"held out"`` 237."""
    x, y = digits()
    rows = {"old": slice(0, 600), "new": slice(600, 1560), "held out": slice(1560, None)}[name]
    return x[rows].copy(), y[rows].copy()


def target(x: np.ndarray) -> np.ndarray:
    """The target domain: less contrast, brighter."""
    return 0.4 * x + 0.5


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
