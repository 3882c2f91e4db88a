"""Compare a Keras model with a reference: another model, a file, or arrays; and with itself, saved.

Weights of a file or arrays are put into the model for a moment and taken out again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras import graph as keras_graph, state as keras_state
from frostline.adapters.keras.arrays import float64
from frostline.adapters.keras.files import read_model
from frostline.numerics.compare import relative_difference
from frostline.types import Array, ModelError, as_float64
from frostline.types.measured import Difference
from frostline.types.reasons import first_line

#: What a configuration may differ in without a difference in what the layer computes.
_IRRELEVANT = ("name", "trainable", "build_config", "epsilon", "momentum", "decay", "synchronized")
_HOW_IT_BEGAN = ("initializer", "regularizer", "constraint", "seed")


@dataclass(frozen=True, eq=False)
class _LayerState:
    """One leaf layer in numpy: its trained weights, stored statistics and settings."""

    name: str
    params: tuple[Array, ...]
    statistics: tuple[Array, Array] | None
    epsilon: float | None
    config: Mapping[str, Any]


def round_trip(model: Any, outputs: Callable[[Any], Any]) -> float:
    """Largest change of an inference output after saving and loading, relative to the largest.

    Args:
        model: A Keras model.
        outputs: A model -> its inference outputs.

    Raises:
        ModelError: The model cannot be saved or loaded; the text says which and why.
    """
    with tempfile.TemporaryDirectory(prefix="frostline-") as folder:
        path = Path(folder, "model.keras")
        try:
            model.save(path)
        except Exception as error:  # user code runs in get_config
            raise ModelError(
                f"model '{model.name}' cannot be saved: {first_line(error)}"
            ) from error
        loaded = read_model(path, custom_objects=_classes(model))
    return _relative(outputs(model), outputs(loaded))


def difference(model: Any, reference: Any, outputs: Callable[[Any], Any] | None) -> Difference:
    """See :meth:`frostline.adapters.Adapter.difference`.

    Args:
        model: A built Keras model.
        reference: A Keras model; a ``.keras``, ``.h5`` or ``.weights.h5`` file; arrays of all
            layers, one list for each as in ``[layer.get_weights() for layer in model.layers]``, or
            one flat list as from ``model.get_weights()``.
        outputs: A model -> its inference outputs; ``None``: outputs are not compared.

    Raises:
        ModelError: An unreadable file, another architecture, or arrays of other shapes.
    """
    if isinstance(reference, (str, os.PathLike)):
        path = Path(reference)
        if not path.is_file():
            raise ModelError(f"no such reference file: {path}")
        if _holds_a_model(path):
            reference = read_model(path, custom_objects=_classes(model))
    if isinstance(reference, keras.Model):
        change = None if outputs is None else _relative(outputs(model), outputs(reference))
        return _compared(_states(model), _states(reference), outputs=change, settings=True)
    own = _states(model)
    with keras_state.preserved(model):
        _fill(model, reference)
        other = _states(model)
    return _compared(own, other, outputs=None, settings=False)


def _holds_a_model(path: Path) -> bool:
    if path.name.endswith(".weights.h5"):
        return False
    if path.suffix != ".h5":
        return True
    import h5py  # type: ignore[import-untyped]

    try:
        with h5py.File(path) as file:
            return "model_config" in file.attrs
    except OSError as error:
        raise ModelError(f"{path}: not a readable HDF5 file ({first_line(error)})") from error


def _fill(model: Any, reference: Any) -> None:
    """Put the weights of a file or the arrays into the model."""
    try:
        if isinstance(reference, (str, os.PathLike)):
            model.load_weights(reference)
        elif all(isinstance(entry, (list, tuple)) for entry in reference):
            if len(reference) != len(model.layers):
                raise ModelError(
                    f"the reference must have one list of arrays for each of {len(model.layers)} "
                    f"layers. Received: {len(reference)} lists"
                )
            for layer, arrays in zip(model.layers, reference, strict=True):
                layer.set_weights(list(arrays))
        else:
            model.set_weights(list(reference))
    except ModelError:
        raise
    except Exception as error:  # Keras raises many kinds, by format
        raise ModelError(
            f"the reference does not fit model '{model.name}': {first_line(error)}"
        ) from error


def _states(model: Any) -> dict[str, _LayerState]:
    found = {}
    for place in keras_graph.walk(model):
        layer = place.layer
        if not place.leaf:
            continue
        statistics, epsilon = None, None
        own = [float64(variable) for variable in layer.weights]
        if keras_graph.is_site(layer):
            epsilon = float(layer.epsilon)
            if layer.moving_mean is not None:
                pair = (layer.moving_mean, layer.moving_variance)
                statistics = (float64(pair[0]), float64(pair[1]))
                own = [float64(v) for v in (layer.gamma, layer.beta) if v is not None]
        found[place.path] = _LayerState(layer.name, tuple(own), statistics, epsilon, _config(layer))
    return found


def _config(layer: Any) -> dict[str, Any]:
    try:
        config = layer.get_config()
    except Exception:  # a layer of the user's without one
        return {}
    return {
        key: value
        for key, value in config.items()
        if key not in _IRRELEVANT and not any(word in key for word in _HOW_IT_BEGAN)
    }


def _compared(
    own: Mapping[str, _LayerState],
    other: Mapping[str, _LayerState],
    *,
    outputs: float | None,
    settings: bool,
) -> Difference:
    pairs = _matched(own, other)
    statistics, epsilons, changed = {}, {}, {}
    for path, (mine, theirs) in pairs.items():
        if mine.statistics is not None and theirs.statistics is not None:
            epsilon = theirs.epsilon or 0.0
            statistics[path] = _moved(mine.statistics, theirs.statistics, epsilon)
        known = mine.epsilon is not None and theirs.epsilon is not None
        if settings and known and mine.epsilon != theirs.epsilon:
            epsilons[path] = (float(mine.epsilon or 0), float(theirs.epsilon or 0))
        if settings and (words := _settings(mine.config, theirs.config)):
            changed[path] = words
    return Difference(
        params={path: _distance(*pair) for path, pair in pairs.items() if pair[0].params},
        statistics=statistics,
        epsilons=epsilons,
        outputs=outputs,
        settings=changed,
        stored={
            path: theirs.statistics
            for path, (_, theirs) in pairs.items()
            if theirs.statistics is not None
        },
    )


def _matched(
    own: Mapping[str, _LayerState], other: Mapping[str, _LayerState]
) -> dict[str, tuple[_LayerState, _LayerState]]:
    """Layers of one path, else those with weights one by one: names count up in every process."""
    if set(own) == set(other):
        pairs = {path: (own[path], other[path]) for path in own}
    else:
        mine, theirs = (
            {p: s for p, s in side.items() if s.params or s.statistics} for side in (own, other)
        )
        if len(mine) != len(theirs):
            raise ModelError(
                "the reference has another architecture: the model has "
                f"{len(mine)} layers with weights. Received: a reference with {len(theirs)}"
            )
        both = zip(mine.items(), theirs.values(), strict=True)
        pairs = {path: (state, reference) for (path, state), reference in both}
    for path, (state, reference) in pairs.items():
        shapes = [[param.shape for param in side.params] for side in (state, reference)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"the reference has another architecture: layer '{path}' has weights of shapes "
                f"{shapes[0]}. Received: {shapes[1]} at '{reference.name}'"
            )
    return pairs


def _distance(own: _LayerState, other: _LayerState) -> float:
    """``‖model − reference‖ / ‖reference‖`` over all trained weights of a layer."""
    moved = sum(
        float(np.sum(np.square(a - b))) for a, b in zip(own.params, other.params, strict=True)
    )
    size = sum(float(np.sum(np.square(param))) for param in other.params)
    if not moved:
        return 0.0
    return float(np.sqrt(moved / size)) if size else float("inf")


def _moved(own: tuple[Array, Array], other: tuple[Array, Array], epsilon: float) -> float:
    """Largest move of a mean or a standard deviation, in the reference's standard deviations."""
    (mean, variance), (old_mean, old_variance) = own, other
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.sqrt(old_variance + epsilon)
        spread = np.abs(np.sqrt(variance + epsilon) - deviation)
        return float(np.max(np.maximum(np.abs(mean - old_mean), spread) / deviation))


def _settings(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    differing = [key for key in own if key in other and own[key] != other[key]]
    return ", ".join(f"{key} {_short(own[key])}, not {_short(other[key])}" for key in differing)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("config", {}).get("name", value.get("class_name", value))
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _relative(own: Any, other: Any) -> float:
    """Largest difference of an output, relative to the largest value of the model's own."""
    mine, theirs = (
        [as_float64(leaf) for leaf in keras.tree.flatten(side)] for side in (own, other)
    )
    if [leaf.shape for leaf in mine] != [leaf.shape for leaf in theirs]:
        raise ModelError(
            f"the outputs have other shapes: {[leaf.shape for leaf in mine]}. "
            f"Received: {[leaf.shape for leaf in theirs]} from the reference"
        )
    return relative_difference(theirs, mine)


def _classes(model: Any) -> dict[str, Any]:
    """The user's own classes in the model: Keras finds those that are not registered by name."""
    layers: Sequence[Any] = [model, *(place.layer for place in keras_graph.walk(model))]
    kinds = {type(layer) for layer in layers}
    return {
        kind.__name__: kind for kind in kinds if not kind.__module__.startswith(("keras.", "frost"))
    }
