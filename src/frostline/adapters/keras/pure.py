"""What the flags of a Keras layer say against its purity, and trial runs of Keras calls.

This room reads only: it never changes a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from frostline.adapters.dropout_rate import TURN_OFF, all_off
from frostline.adapters.keras.calls import Graph as Calls, run, takes_training
from frostline.adapters.keras.graph import is_site, walk, wrapped_module
from frostline.adapters.keras.noise import drops
from frostline.adapters.keras.random import undisturbed
from frostline.data.arrays import leaves
from frostline.graph import purity
from frostline.graph.purity import Graph, Impurity, Node, NotRunError, Observed, Why
from frostline.types import Array, ModelError
from frostline.types.arguments import shown

L = keras.layers

_UNKNOWN_SIZE = 48  # stands for a size that the model leaves open, in the trial batches


def impurity(operation: Any, model: Any, names: Mapping[int, str]) -> Impurity | None:
    """What the flags say against the purity of a layer; ``None``: nothing.

    Args:
        operation: A layer or operation of the model's graph.
        model: The model; frozen as a whole it trains nothing.
        names: ``id(layer)`` -> path.
    """
    if not isinstance(operation, keras.Layer):
        return None
    layers = [operation, *(place.layer for place in walk(operation))]
    training = [part for part in layers if any(v.trainable for v in part.weights)]
    if model.trainable and training:  # the last one is the innermost
        return Impurity(why="trains", path=names[id(training[-1])], text="it is trainable")
    for layer in layers:
        found = _impurity(layer)
        if found is not None:
            why, text = found
            inference = getattr(layer, "policy", "inference") == "inference"
            return Impurity(
                why=why,
                path=names[id(layer)],
                text=text,
                kind=type(layer).__name__,
                seems=_seems_frozen(layer),
                **({} if inference else {"remedy": "Convert it to policy='inference'"}),
            )
    return None


def _seems_frozen(layer: Any) -> bool:
    own = [v for v in (getattr(layer, "gamma", 0), getattr(layer, "beta", 0)) if v is not None]
    return not layer.trainable or bool(own and not any(getattr(v, "trainable", 0) for v in own))


def _impurity(layer: Any) -> tuple[Why, str] | None:
    if is_site(layer):
        policy = getattr(layer, "policy", "inference")
        if layer.trainable or policy != "inference":
            return "statistics", "in training it normalises with the statistics of the batch"
    module = wrapped_module(layer)
    if module is not None:
        inside = list(module.modules())
        if any("BatchNorm" in type(inner).__name__ for inner in inside):
            return "statistics", "Keras puts the BN inside of it into training mode in every step"
        if any("Dropout" in type(inner).__name__ and not all_off(inner) for inner in inside):
            return "random", f"its dropout is active in training{TURN_OFF}"
    if isinstance(layer, L.SpectralNormalization):
        return "state", "it changes its weights in every training step, whatever its flag says"
    if getattr(layer, "stateful", False):
        return "state", "it carries state from batch to batch"
    if _random(layer):
        return "random", f"it is random in training{TURN_OFF if drops(layer) else ''}"
    if layer.activity_regularizer is not None:
        return "loss", "it adds to the loss in every step"
    return None


def _random(layer: Any) -> bool:
    own = [*getattr(layer, "_seed_generators", ()), *vars(layer).values()]
    if not any(type(value).__name__ == "SeedGenerator" for value in own):
        return False
    return not all_off(layer)  # recurrent layers have a generator in any case


# --- behaviour ------------------------------------------------------------------------------------


def observe(calls: Calls, graph: Graph, nodes: Sequence[Node], sample: Any = None) -> Observed:
    """Run pure nodes on trial batches: see :func:`frostline.graph.purity.observe`.

    Args:
        calls: The model's calls.
        graph: The same as nodes.
        nodes: Nodes in execution order, pure by their flags.
        sample: A batch of the model's inputs, or ``None`` for random numbers.

    Raises:
        ModelError: A node is not pure; names the layer and says how it showed.
    """
    rows = None if sample is None else _given(calls, sample)
    try:
        one, other = _batches(calls, rows)
    except ModelError as problem:
        return Observed(shapes=None, reason=str(problem))
    first, second = (dict(zip(calls.inputs, batch, strict=True)) for batch in (one, other))
    try:
        with undisturbed():
            return purity.observe(
                graph,
                nodes,
                (first, second, first),
                int(one[0].shape[0]),
                _effects,
                _numbers,
                _dtype,
            )
    except NotRunError as failure:
        if sample is not None:
            shapes = (np.shape(value) for _, value in leaves(sample))
            raise purity.sample_refused(failure, shapes, "a Keras model") from failure
        reason = " ".join(str(failure.problem).split())[:120]
        return Observed(shapes=None, reason=f"'{failure.path}' takes no random inputs ({reason})")


def _effects(node: Node, values: dict[Any, Any], training: bool) -> str | None:
    """Run one call; returns what it did beside computing its outputs."""
    layer = node.call.operation
    variables = layer.variables if isinstance(layer, keras.Layer) else []
    # Attention takes the masks off what it reads, which is read again in the other phase.
    masked = [(values[slot], getattr(values[slot], "_keras_mask", None)) for slot in node.reads]
    with keras.StatelessScope(collect_losses=True) as scope:
        # Inside a scope, TensorFlow and torch read the variables themselves.
        run(node.call, values, training if takes_training(layer) else None)
    for tensor, mask in masked:
        if mask is not None:
            tensor._keras_mask = mask
    moved = [v for v in variables if id(v) in scope.state_mapping]
    if moved and training:
        return f"it changes its variable '{moved[0].name}' in every training step"
    return "it adds to the loss in every step" if scope.losses and training else None


def _dtype(tensor: Any) -> str:
    return str(keras.backend.standardize_dtype(tensor.dtype))


def _numbers(tensor: Any) -> Array | None:
    if not hasattr(tensor, "shape") or getattr(tensor, "dtype", None) is None:
        return None
    dtype = _dtype(tensor)
    if dtype == "string":
        return None
    wide = tensor if dtype == "float64" else keras.ops.cast(tensor, "float32")
    return np.asarray(keras.ops.convert_to_numpy(wide))


def _given(calls: Calls, sample: Any) -> list[Array]:
    """The arrays of a sample, one for each input of the model.

    Raises:
        ModelError: It is something else.
    """
    try:
        rows = [np.asarray(keras.ops.convert_to_numpy(x)) for x in keras.tree.flatten(sample)]
    except Exception:  # of an object's own methods, or of the backend
        rows = []
    words = any(_dtype(calls.tensors[slot]) == "string" for slot in calls.inputs)
    kinds = "biufVSUO" if words else "biufV"
    if len(rows) != len(calls.inputs) or not all(r.ndim and r.dtype.kind in kinds for r in rows):
        raise ModelError(
            "sample must be a batch of inputs as the model takes them: for each of its "
            f"{len(calls.inputs)} inputs an array with a first axis of samples. "
            f"Received: sample={shown(sample)}"
        )
    return rows


def _batches(graph: Calls, rows: list[Array] | None) -> tuple[list[Any], list[Any]]:
    """Two batches of tensors; the first sample of one is the last of the other.

    Raises:
        ModelError: No such batches can be made for these inputs.
    """
    tensors = [graph.tensors[slot] for slot in graph.inputs]
    fixed = {int(t.shape[0]) for t in tensors if len(t.shape) and t.shape[0] is not None}
    count = min(fixed, default=2)
    if rows is None:
        rng = np.random.default_rng(0)
        rows = [_random_rows(tensor, 2 * count, rng) for tensor in tensors]
    elif any(len(row) < count + 1 for row in rows):
        raise ModelError(f"the sample has fewer than {count + 1} rows")
    first = [row[:count] for row in rows]
    second = [row[purity.others(len(row), count)] for row in rows]
    dtypes = [tensor.dtype for tensor in tensors]
    return tuple(  # type: ignore[return-value]
        [keras.ops.convert_to_tensor(x, dtype=d) for x, d in zip(batch, dtypes, strict=True)]
        for batch in (first, second)
    )


def _random_rows(tensor: Any, count: int, rng: np.random.Generator) -> Array:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype == "string" or tensor.sparse:
        raise ModelError(f"no random inputs of dtype {dtype} can be made")
    shape = (count, *(_UNKNOWN_SIZE if size is None else size for size in tensor.shape[1:]))
    if dtype == "bool" or "int" in dtype:
        return rng.integers(0, 2, shape)
    return rng.normal(size=shape).astype(np.float32)
