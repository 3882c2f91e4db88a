"""Hold chosen weights still inside a compiled training step, and let go of them later.

An optimizer and a compiled step are made for one list of variables. Here the list has all that will
ever train, and a *hold*, one bool per held weight among the optimizer's own variables, decides in
every step which of them keep their bits. What the optimizer keeps for a held weight stays at its
start: it receives a zero gradient and no weight decay that lasts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from frostline.adapters.keras.optimizer import strategy_scope
from frostline.types import ModelError

log = logging.getLogger("frostline")


class WeightHold:
    """A hold around one model's optimizer; installed when made, until :meth:`remove`.

    Args:
        model: A compiled model whose optimizer is built for every weight that will ever train. Its
            training step must be made anew afterwards, for the hold to be in it.
        held: Weights to hold until :meth:`open`.

    Raises:
        ModelError: The optimizer is several optimizers in one.
    """

    def __init__(self, model: Any, held: Sequence[Any]) -> None:
        outer = model.optimizer
        if hasattr(outer, "optimizers"):
            raise ModelError(
                "weights cannot be held under a MultiOptimizer; compile the model with one "
                f"optimizer. Received: {type(outer).__name__}"
            )
        self.optimizer = getattr(outer, "inner_optimizer", outer)  # loss scaling wraps another
        self.index = {id(variable): number for number, variable in enumerate(held)}
        self.is_open = np.zeros(max(len(held), 1), dtype=bool)
        with strategy_scope(model):
            self.flags = self.optimizer.add_variable(
                shape=(max(len(held), 1),),
                initializer="zeros",
                dtype="bool",
                aggregation="only_first_replica",
                name="hold",
            )
        # The file of a model in the middle of `fit` must fit an optimizer without a hold.
        self._replaced = {
            "apply": self._applying(self.optimizer.apply),
            "save_own_variables": self._save,
            "load_own_variables": self._load,
            "finalize_variable_values": self._finalize,
        }
        vars(self.optimizer).update(self._replaced)

    def open(self, variables: Iterable[Any]) -> None:
        """Let weights train from the next step on."""
        for variable in variables:
            self.is_open[self.index[id(variable)]] = True
        self.flags.assign(self.is_open)

    def remove(self) -> None:
        """Give the optimizer its own methods and variables back; make a new one of it afterwards.

        TensorFlow's checkpoints refuse an object whose list of variables has shrunk.
        """
        for name in self._replaced:
            vars(self.optimizer).pop(name, None)
        own = self.optimizer._variables
        for number, variable in enumerate(own):
            if variable is self.flags:
                del own[number]
                break

    def _applying(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def apply(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
            every = (
                self.optimizer._trainable_variables
                if trainable_variables is None
                else list(trainable_variables)
            )
            flags = _value(self.flags)
            held = [
                (variable, flags[self.index[id(variable)]], _copy(variable))
                for variable in every
                if id(variable) in self.index
            ]
            opened = {id(variable): flag for variable, flag, _ in held}
            passed = [
                _passed(gradient, opened.get(id(variable)))
                for gradient, variable in zip(grads, every, strict=True)
            ]
            original(passed, trainable_variables)
            # Weight decay, momentum left from before, FTRL: a zero gradient need not mean no move.
            for variable, flag, before in held:
                variable.assign(ops.where(flag, _value(variable), before))

        return apply

    def _save(self, store: Any) -> None:
        for number, variable in enumerate(self._saved()):
            store[str(number)] = ops.convert_to_numpy(variable)

    def _load(self, store: Any) -> None:
        saved = self._saved()
        if len(store.keys()) != len(saved):
            log.warning(
                "the optimizer's state is left as it is: it has %d variables, the file %d",
                len(saved),
                len(store.keys()),
            )
            return
        for number, variable in enumerate(saved):
            variable.assign(store[str(number)])

    def _finalize(self, var_list: Sequence[Any]) -> None:
        """Averaged weights for what trains; Keras wants averages for all that it knows or none."""
        if not self.optimizer.use_ema:
            return
        trains = {id(variable) for variable in var_list}
        for number, variable in enumerate(self.optimizer._trainable_variables):
            average = self.optimizer._model_variables_moving_average[number]
            shut = id(variable) in self.index and not self.is_open[self.index[id(variable)]]
            if average is not None and id(variable) in trains and not shut:
                variable.assign(average)

    def _saved(self) -> list[Any]:
        return [variable for variable in self.optimizer.variables if variable is not self.flags]


def _passed(gradient: Any, flag: Any) -> Any:
    # The gradient of an embedding is a list of rows; what it does to a held weight is undone.
    if flag is None or gradient is None or type(gradient).__name__ == "IndexedSlices":
        return gradient
    return ops.where(flag, gradient, ops.zeros_like(gradient))


def _value(variable: Any) -> Any:
    value = variable.value
    return value.read_value() if hasattr(value, "read_value") else value


def _copy(variable: Any) -> Any:
    """The present value; torch would change a tensor that is only referred to."""
    value = _value(variable)
    if keras.backend.backend() == "torch":
        return sys.modules["torch"].clone(value.detach())
    return value
