"""What our layer has beside the stock weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keras import ops, regularizers


@dataclass(frozen=True)
class State:
    """Variables beside the stock four.

    They are in ``variables``, so every backend carries them as state, but not in ``weights`` and
    not saved, so checkpoints stay those of the stock layer.
    """

    flag: Any  # () bool: is the layer trainable?
    decay: Any  # (2,): decay and 1 - decay, each rounded once as in the stock layer
    held_gamma: Any | None
    held_beta: Any | None
    biased_mean: Any  # zero-debias: average that starts from 0; None without debias
    biased_variance: Any
    unseen: Any  # (): share of the start value still in it, decay**t
    ramp: Any | None = None  # (2,): steps of a ramp done and in all; None without a ramp

    def variables(self) -> list[Any]:
        """Return those that exist."""
        every = (
            self.flag,
            self.decay,
            self.held_gamma,
            self.held_beta,
            self.biased_mean,
            self.biased_variance,
            self.unseen,
            self.ramp,
        )
        return [variable for variable in every if variable is not None]


class WhileTrainable(regularizers.Regularizer):  # type: ignore[misc]
    """A regularizer that counts only while its layer is trainable, as in a stock frozen layer.

    Args:
        live: Whether the layer is trainable: a bool, or a tensor inside a step that is traced.
        regularizer: Weight -> penalty.
    """

    def __init__(self, live: Callable[[], Any], regularizer: Callable[[Any], Any]) -> None:
        self.live = live
        self.regularizer = regularizer

    def __call__(self, value: Any) -> Any:
        """Return the penalty of a weight, 0 while the layer is frozen."""
        live = self.live()
        if live is True:
            return self.regularizer(value)
        if live is False:
            return ops.zeros((), dtype=value.dtype)
        penalty = self.regularizer(value)
        return ops.where(live, penalty, ops.zeros_like(penalty))
