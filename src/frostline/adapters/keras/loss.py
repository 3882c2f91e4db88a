"""The loss of a Keras model sample by sample.

``compile`` keeps only what it needs to form one number per batch. Paired comparisons of samples,
and intervals over them, need one number per sample, formed by the very same loss objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops
from keras.src.backend.common.masking import get_keras_mask
from keras.src.trainers.compile_utils import CompileLoss

from frostline.types import DataError, FrostlineError, ModelError
from frostline.types.reasons import first_line

#: Reductions that divide a masked loss by the number of elements that are not masked.
_MEANS = ("sum_over_batch_size", "mean")


class PerSampleLoss(CompileLoss):  # type: ignore[misc]
    """What ``compile`` makes of a loss, before it is averaged over the batch.

    A sample with several elements (time steps, pixels) has the mean over them; several outputs are
    added with their ``loss_weights``. With the default reduction and any sample weights the mean
    over the samples is the compiled loss, without the additional losses of layers and regularizers.

    Args:
        model: A Keras model; it is not changed, not even by a loss that has met no data yet.
        loss: Whatever ``compile`` takes, or the configuration of one loss, a dict of ``class_name``
            and ``config``; ``None`` for the compiled loss.

    Raises:
        ModelError: No loss is given and none is compiled.
    """

    _flat_losses: Any

    def __init__(self, model: Any, loss: Any = None) -> None:
        weights = None
        if loss is None:
            compiled = getattr(model, "_compile_loss", None)
            if compiled is None:
                raise ModelError(
                    f"model '{model.name}' is not compiled with a loss; pass loss=, for example "
                    "'sparse_categorical_crossentropy'. Received: loss=None"
                )
            loss, weights = compiled._user_loss, compiled._user_loss_weights
        elif isinstance(loss, dict) and loss.keys() == {"class_name", "config"}:
            loss = keras.losses.get(loss)
        super().__init__(loss, weights, output_names=getattr(model, "output_names", None))

    def build(self, y_true: Any, y_pred: Any) -> None:
        """Resolve names to losses for this structure of labels and outputs; outside any trace."""
        super().build(y_true, y_pred)
        self._flat_losses = [
            each._replace(loss=_Unreduced(each.loss, each.name)) for each in self._flat_losses
        ]

    @property
    def metrics(self) -> list[None]:
        """No running means of the single losses."""
        return [None] * len(self._flat_losses or ())

    def call(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Losses of one batch, shape ``(n,)``.

        Raises:
            DataError: Labels or weights that do not fit the outputs.
            ModelError: A loss that gives one number per batch.
        """
        with _readable(y_true, y_pred):
            losses = super().call(y_true, y_pred, sample_weight)
            if losses is None:
                raise ValueError("no output of the model has a loss.")
            return losses


class _Unreduced:
    """One loss of one output: ``(y_true, y_pred, sample_weight)`` -> shape ``(n,)``."""

    def __init__(self, loss: Any, name: str) -> None:
        # Not copy.copy(), which saves and loads a Keras object, and so fails for a lambda.
        self.loss = object.__new__(type(loss))
        self.loss.__dict__.update(loss.__dict__)
        self.loss.reduction = None
        self.mean = loss.reduction in _MEANS
        self.name = name

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        values = self.loss(y_true, y_pred, sample_weight)
        samples = keras.tree.flatten(y_pred)[0].shape[0]  # None: a trace leaves it open
        if len(values.shape) == 0 or values.shape[0] != samples:
            raise ModelError(
                f"loss '{self.name}' gives one number per batch; one per sample is needed: reduce "
                f"over the last axis only. Received: shape {tuple(values.shape)} for {samples} "
                "samples"
            )
        mask = get_keras_mask(y_pred)
        if mask is not None and self.mean:
            inside = ops.sum(ops.cast(mask, values.dtype))
            values = values * (ops.cast(ops.size(mask), values.dtype) / ops.maximum(inside, 1.0))
        rows = ops.shape(values)[0] if samples is None else samples
        return ops.mean(ops.reshape(values, (rows, -1)), axis=-1)


@contextmanager
def _readable(y: Any, outputs: Any) -> Iterator[None]:
    """Turn a loss's complaint about the labels into one line."""
    try:
        yield
    except FrostlineError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError) as problem:
        # Torch's word for shapes that do not fit is a RuntimeError, as are many other things.
        if isinstance(problem, RuntimeError) and "must match" not in str(problem):
            raise
        raise DataError(
            f"the loss does not take these labels: {first_line(problem)} "
            f"Received: label shapes {_shapes(y)} for outputs of shapes {_shapes(outputs)}"
        ) from problem


def _shapes(structure: Any) -> Any:
    return keras.tree.map_structure(lambda leaf: tuple(leaf.shape), structure)
