"""Models that prepare their data themselves, in ``fit``, ``evaluate`` and ``predict`` of their own.

A keras-hub task puts batches through ``preprocess_samples`` there, which calling the model leaves
out. What asks the model about a user's batch does the same first, and runs Keras' own loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras

from frostline.data.arrays import to_numpy


def prepares(model: Any) -> bool:
    """Whether the model changes batches before it sees them."""
    has_step = callable(getattr(model, "preprocess_samples", None))
    return has_step and getattr(model, "preprocessor", True) is not None


def prepared(model: Any, x: Any, y: Any = None, weight: Any = None) -> tuple[Any, Any, Any]:
    """One batch as the model's own loops would hand it on."""
    if not prepares(model):
        return x, y, weight
    found = keras.utils.unpack_x_y_sample_weight(model.preprocess_samples(x, y, weight))
    x, y, weight = (keras.tree.map_structure(_array, part) for part in found)
    return x, y, weight


def all_prepared(model: Any, batches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Every ``(x[, y[, sample_weight]])`` tuple, prepared; tf.data takes no ``None`` at its end."""
    for batch in batches:
        parts = prepared(model, *batch)
        yield parts[: max(i for i, part in enumerate(parts, 1) if i == 1 or part is not None)]


def own(model: Any, name: str) -> bool:
    """Whether the class has a method of Keras' models, ``fit`` for example, of its own."""
    return getattr(type(model), name) is not getattr(keras.Model, name)


def own_steps(model: Any) -> list[str]:
    """The methods of a training that the class has of its own, which may read the inputs."""
    return [name for name in ("train_step", "test_step", "compute_loss") if own(model, name)]


def _array(leaf: Any) -> Any:
    """A tensor of whatever framework the preparation runs in, as numpy."""
    return leaf if leaf is None else to_numpy(leaf)
