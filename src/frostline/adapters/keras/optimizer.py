"""Optimizers of Keras models: made anew for other variables, with the slots of the common ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras

from frostline.adapters.keras.arrays import to_numpy
from frostline.adapters.keras.graph import optimized_variables
from frostline.adapters.keras.overridden import overridden
from frostline.types import ModelError
from frostline.types.reasons import first_line


def retarget(model: Any, *, always: bool = False) -> None:
    """Let the model's optimizer know exactly the variables that may train now; slots are kept.

    An optimizer that knows others is replaced by one of the same settings, or ``always``.

    Raises:
        ModelError: The optimizer cannot be made anew from its configuration; it stays as it is.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return
    if always or {id(v) for v in model.trainable_variables} != {
        *(optimized_variables(model) or ())
    }:
        try:
            with strategy_scope(model):
                fresh = _rebuilt(optimizer, model.trainable_variables)
        except Exception as error:  # code of a user's own class
            raise ModelError(
                f"the optimizer of model '{model.name}' cannot be made anew from its configuration "
                f"({first_line(error)}); give its class a get_config() that its constructor takes, "
                f"or compile the model afterwards. Received: {type(optimizer).__name__}"
            ) from error
        model.optimizer = fresh


def strategy_scope(model: Any) -> AbstractContextManager[Any]:
    """Where new variables of the model belong: its ``tf.distribute`` strategy, if it has one."""
    strategy = getattr(model, "distribute_strategy", None)
    scope: AbstractContextManager[Any] = nullcontext() if strategy is None else strategy.scope()
    return scope


def _rebuilt(optimizer: Any, variables: list[Any]) -> Any:
    """An optimizer of the same settings for other variables; common ones keep their slots."""
    fresh, probe = (type(optimizer).from_config(optimizer.get_config()) for _ in range(2))
    # Building an optimizer of the same kind over the old list tells what each old slot is.
    known = list(getattr(optimizer, "inner_optimizer", optimizer)._trainable_variables)
    old = dict(zip(_slot_keys(probe, known), optimizer.variables, strict=True))
    new = dict(zip(_slot_keys(fresh, variables), fresh.variables, strict=True))
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(optimizer, name):
            setattr(fresh, name, getattr(optimizer, name))
    for key, variable in new.items():
        if key in old and old[key].shape == variable.shape:
            variable.assign(to_numpy(old[key]))
    return fresh


def _slot_keys(optimizer: Any, variables: list[Any]) -> list[Any]:
    """Build ``optimizer``; returns one key per optimizer variable: what it is and for which weight.

    Slots are matched by the weight object they belong to: names may repeat in nested models.
    """
    owners: dict[int, int] = {}

    def recording(original: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            slot = original(*args, **kwargs)
            owners[id(slot)] = id(kwargs["reference_variable"] if not args else args[0])
            return slot

        return recorded

    # On the new objects alone: their class, which others use, stays as it is.
    name = "add_variable_from_reference"
    with overridden(
        (part, name, recording(getattr(part, name))) for part in _optimizers_in(optimizer)
    ):
        optimizer.build(variables)
    keys: list[Any] = []
    seen: Counter[Any] = Counter()
    owner = 0
    for variable in reversed(optimizer.variables):
        # Counters and scales belong to no weight. Factored slots (Adafactor) are made without a
        # reference, just before the slot of the same weight that has one.
        owner = owners.get(id(variable), owner)
        belongs = owner if len(variable.shape) or id(variable) in owners else variable.name
        seen[belongs] += 1
        keys.append((belongs, seen[belongs]))
    return keys[::-1]


def _optimizers_in(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it wraps."""
    yield optimizer
    for value in list(vars(optimizer).values()):
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, keras.optimizers.Optimizer):
                yield from _optimizers_in(item)
