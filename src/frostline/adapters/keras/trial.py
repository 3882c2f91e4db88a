"""Train a Keras model for a moment, and take all of it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from frostline.adapters.keras import state as keras_state
from frostline.adapters.keras.forward_pass import Collected, readable_labels
from frostline.adapters.keras.optimizer import retarget
from frostline.adapters.keras.overridden import overridden
from frostline.adapters.keras.site_handle import replaced, site_handles, stored_call
from frostline.atomic import taken_back
from frostline.types import ModelError


@contextmanager
def trial(
    model: Any, batches: Iterable[tuple[Any, ...]], *, policy: str = "inference", epochs: int = 1
) -> Iterator[None]:
    """Train with frozen sites locked to their stored statistics; undo everything on exit.

    The training is the model's own: its ``train_step``, optimizer (which goes on from where it is)
    and loss, in the order of the batches, with the present ``trainable`` flags in force as after
    ``compile``. Inside the context flags, policies and steps are those of before.

    Args:
        model: A compiled Keras model.
        batches: ``(x, y)`` or ``(x, y, sample_weight)`` tuples.
        policy: What frozen sites do in training: ``"inference"``, whatever they do now.
        epochs: Passes over the batches.

    Raises:
        ModelError: The model is not compiled, nothing of it trains, another policy, or its training
            fails.
        DataError: The loss does not take these labels.
    """
    if policy != "inference":
        raise ModelError(f"only policy='inference' can be tried. Received: policy={policy!r}")
    if not getattr(model, "compiled", False):
        raise ModelError(f"model '{model.name}' is not compiled, so it cannot be trained on trial")
    if not model.trainable_variables:
        raise ModelError(f"nothing of model '{model.name}' trains: a trial would change nothing")
    collected = Collected(batches)
    history = vars(model).get("history")
    with keras_state.preserved(model), overridden([(model, "history", history)]):
        _train(model, collected, epochs)
        yield


def _train(model: Any, collected: Collected, epochs: int) -> None:
    locked = [(site, stored_call) for site in site_handles(model).values() if not site.trainable]
    with fresh_step(model), replaced(locked), readable_labels(model, collected.labels):
        retarget(model)
        if keras.backend.backend() == "tensorflow":
            model.jit_compile = False  # XLA compiles for longer than a few steps take without it
        model.fit(collected, epochs=epochs, shuffle=False, verbose=0)


@contextmanager
def fresh_step(model: Any) -> Iterator[None]:
    """Let ``fit`` trace its step anew: what has been traced holds other flags and policies."""
    function, step = model.train_function, model.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    def back() -> None:
        model.train_function = function

    with taken_back(back):
        model.train_function = None
        # Use a new closure: to JAX's jit cache two bound methods of one object are one function,
        # and it would reuse the old trace.
        with overridden([(model, "train_step", train_step)]):
            yield
