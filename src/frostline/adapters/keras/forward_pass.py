"""One pass of a Keras model as it is, in either phase, compiled where the backend compiles.

It runs inside ``keras.StatelessScope``, which catches every assignment: nothing is updated.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras import graph as keras_graph, state as keras_state
from frostline.adapters.keras.calls import takes_training
from frostline.adapters.keras.compile import compiled, inlined_functions, without_gradients
from frostline.adapters.keras.overridden import overridden
from frostline.adapters.keras.pipeline import own
from frostline.adapters.keras.random import seed_states
from frostline.types import DataError, FrostlineError
from frostline.types.reasons import first_line


def compiled_pass(model: Any, training: bool, with_loss: bool) -> Callable[..., Any]:
    """Return ``f(x, y, sample_weight, seeds) -> (outputs, loss)`` for the present flags."""
    states = [variable for variable, _ in seed_states(model)]

    def step(
        mapping: Any, _traced: bool, _blend: Any, x: Any, y: Any, weight: Any
    ) -> tuple[Any, Any]:
        if with_loss:
            # Keras takes the weights that regularizers act on from the scope, never from the
            # variable; and a scope forgets what `add_loss` and activity regularizers add unless
            # it is told to collect.
            mapped = {id(variable) for variable, _ in mapping}
            mapping = [
                *mapping,
                *((v, v.value) for v in model.trainable_weights if id(v) not in mapped),
            ]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=with_loss):
            outputs = called(model, x, training)
            if not with_loss:
                return outputs, None
            return outputs, own_loss(model, x, y, outputs, weight, training)

    variables = keras_state.variables_of(model)
    run = compiled(step, variables, states, slope=False, eager=False)
    return lambda x, y, weight, seeds: run(seeds, keras.ops.zeros(()), x, y, weight)


def own_loss(model: Any, x: Any, y: Any, outputs: Any, weight: Any, training: bool) -> Any:
    """What the model's ``compute_loss`` gives; one that does not take the phase is not told it.

    Keras gives the rest by position, a ``train_step`` of the user's own mostly by name.
    """
    taken = inspect.signature(model.compute_loss).parameters.values()
    if any(place.kind is place.VAR_KEYWORD for place in taken):
        return model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weight, training=training)
    return model._compute_loss(x, y, outputs, weight, training)


def called(model: Any, x: Any, training: bool) -> Any:
    """Call the model as its own ``fit`` and ``evaluate`` do.

    Keras' trainer tells the phase to a ``call`` that takes it, and to no other: the layers inside
    then run as at inference in both, or as they are told by hand. A loop of the user's own may tell
    it all the same, so that a model which Keras does not train is told.
    """
    keras_trains = getattr(model, "compiled", False) and not own(model, "train_step")
    if keras_trains and not takes_training(model):
        return model(x)
    return model(x, training=training)


def inference(model: Any, x: Any) -> Any:
    """Inference outputs of one batch, not compiled; nothing is traced inside the model either."""
    with keras.StatelessScope(), without_gradients(), inlined_functions():
        return called(model, x, False)


class Collected(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches in memory, in order: Keras weights them by their size.

    Args:
        batches: ``(x, y)`` or ``(x, y, sample_weight)`` tuples.

    Attributes:
        labels: Those of the first batch; ``None`` without.
    """

    def __init__(self, batches: Iterable[tuple[Any, ...]]) -> None:
        super().__init__()
        self.batches = list(batches)
        first = self.batches[0] if self.batches else ()
        self.labels = first[1] if len(first) > 1 else None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.batches[index]


@contextmanager
def readable_labels(model: Any, y: Any) -> Iterator[None]:
    """Turn a loss's complaint about the labels into one line."""
    with explained(
        lambda error: (
            f"model '{model.name}' cannot be run on these inputs and labels: {first_line(error)} "
            f"Received: label shapes {shapes_of(y)}"
        )
    ):
        yield


@contextmanager
def explained(text: Callable[[Exception], str]) -> Iterator[None]:
    """Turn what a loss raises on labels of another form into a :class:`DataError` with a text."""
    try:
        yield
    except FrostlineError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        # Torch's word for shapes that do not fit is a RuntimeError, as are many other things.
        if isinstance(error, RuntimeError) and "must match" not in str(error):
            raise
        raise DataError(text(error)) from error


def shapes_of(structure: Any) -> Any:
    """Shapes in the place of arrays or tensors."""
    return keras.tree.map_structure(
        lambda leaf: "none" if leaf is None else tuple(np.shape(leaf)), structure
    )


def tensors(structure: Any) -> Any:
    """Every array as a tensor; ``None``, text and objects stay."""

    def tensor(leaf: Any) -> Any:
        kind = getattr(getattr(leaf, "dtype", None), "kind", None)
        text = isinstance(leaf, (str, bytes)) or kind in ("O", "S", "U")
        known = hasattr(leaf, "shape") or isinstance(leaf, (bool, int, float, complex))
        return keras.ops.convert_to_tensor(leaf) if known and not text else leaf

    return keras.tree.map_structure(tensor, structure)


def float32(tensor: Any) -> Any:
    """An array of single precision."""
    return keras.ops.convert_to_numpy(tensor).astype(np.float32)


@contextmanager
def forced_phase(model: Any, training: bool) -> Iterator[None]:
    """Every layer that takes ``training`` gets this one, whatever it is called with."""
    layers = {id(layer): layer for layer in (model, *(p.layer for p in keras_graph.walk(model)))}
    with overridden(
        (layer, "call", functools.partial(_in_phase, call, training))
        for layer in layers.values()
        if (call := getattr(layer, "call", None)) is not None
        and "training" in inspect.signature(call).parameters
    ):
        yield


def _in_phase(call: Callable[..., Any], training: bool, /, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(call).bind(*args, **kwargs)
    bound.arguments["training"] = training
    return call(*bound.args, **bound.kwargs)
