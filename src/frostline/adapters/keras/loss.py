"""The loss of a Keras model: sample by sample where it is one, else of the whole batch.

``compile`` keeps only what it needs to form one number per batch. Paired comparisons of samples,
and intervals over them, need one number per sample, formed by the very same loss objects. A loss
that gives one number per batch is never asked about a single sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops
from keras.src.backend.common.masking import get_keras_mask
from keras.src.trainers.compile_utils import CompileLoss

from frostline.adapters import OutputDistance
from frostline.adapters.keras.forward_pass import explained, own_loss, shapes_of
from frostline.data.arrays import leaves
from frostline.types import DataError, FrostlineError, ModelError
from frostline.types.reasons import first_line

#: Reductions that divide a masked loss by the number of elements that are not masked.
_MEANS = ("sum_over_batch_size", "mean")


@dataclass(frozen=True, eq=False)
class Judged:
    """Losses of one batch, tensors.

    Attributes:
        losses: Shape ``(n,)``, or ``()`` for a loss of the whole batch.
        parts: Each of several named losses, likewise.
        metrics: Name -> one number, or one per sample.
    """

    losses: Any
    parts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


#: ``(x, y, sample_weight, outputs, training)`` -> losses.
Judge = Callable[[Any, Any, Any, Any, bool], Judged]


def read_losses(result: Any) -> Judged:
    """What a user's step or loss returned.

    Raises:
        ModelError: It is no loss.
    """
    metrics: dict[str, Any] = {}
    loss = result
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        loss, given = result
        metrics = {str(name): _numbers(value, f"metric {name!r}") for name, value in given.items()}
    if not isinstance(loss, Mapping):
        return Judged(_numbers(loss, "the loss"), {}, metrics)
    if not loss:
        raise ModelError("a mapping of losses must hold at least one. Received: an empty mapping")
    parts = {str(name): _numbers(value, f"loss {name!r}") for name, value in loss.items()}
    return Judged(sum(parts.values()), parts, metrics)


def _numbers(value: Any, name: str) -> Any:
    """A tensor of shape ``()`` or ``(n,)``: the mean over all axes but the first."""
    try:
        tensor = ops.convert_to_tensor(value)
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
            tensor = ops.cast(tensor, "float32")
    except Exception as problem:
        raise ModelError(
            "a loss or step must return a loss, one loss per sample, a mapping of losses, or "
            f"(loss, metrics) with a mapping of metrics. Received: {name} of type "
            f"{type(value).__name__}"
        ) from problem
    if len(tensor.shape) < 2:
        return tensor
    return ops.mean(tensor, axis=tuple(range(1, len(tensor.shape))))


def computes_loss(model: Any) -> bool:
    """Whether the class computes its loss itself."""
    return type(model).compute_loss is not keras.Model.compute_loss


def judge_of(model: Any, loss: Any, y: Any, outputs: Any) -> Judge:
    """Find out how a loss takes labels and outputs; outside any trace: it may create variables.

    Args:
        model: A Keras model.
        loss: As for :class:`PerSampleLoss`, any callable ``(y, outputs)`` that takes several
            outputs together, or :class:`frostline.adapters.OutputDistance`; ``None``: that of the
            model's ``compute_loss``.
        y: Labels of one batch.
        outputs: Tensors in the structure of the model's outputs.

    Raises:
        DataError: Labels that do not fit the outputs.
        ModelError: There is no loss.
    """
    if isinstance(loss, OutputDistance):
        return functools.partial(_distance, loss.spread)
    own = computes_loss(model)
    missing = getattr(model, "_compile_loss", None) is None or y is None
    if loss is None and (own or missing):
        return functools.partial(_own_loss, model)
    plain = callable(loss) and not isinstance(loss, (keras.losses.Loss, type))
    if plain and keras.tree.is_nested(outputs) and _takes(loss, y, outputs):
        return functools.partial(_called, loss)
    per_sample = PerSampleLoss(model, loss)
    try:
        per_sample.call(y, outputs)
    except FrostlineError:
        if not plain or not _takes(loss, y, outputs):
            raise
        return functools.partial(_called, loss)

    def judge(_x: Any, y: Any, sample_weight: Any, outputs: Any, _training: bool) -> Judged:
        return Judged(per_sample.call(y, outputs, sample_weight))

    return judge


def _takes(loss: Any, y: Any, outputs: Any) -> bool:
    try:
        read_losses(loss(y, outputs))
    except Exception:  # code of the user's own may raise anything
        return False
    return True


def _called(
    loss: Any, _x: Any, y: Any, sample_weight: Any, outputs: Any, _training: bool
) -> Judged:
    """A callable of the labels and all outputs together."""
    with _readable(y, outputs):
        found = read_losses(loss(y, outputs))
    if sample_weight is None:
        return found
    if not len(found.losses.shape):
        raise DataError(
            "sample weights need a loss per sample, and this one is of the whole batch; leave the "
            "weights out, or pass step=. Received: sample weights"
        )
    weights = ops.cast(ops.reshape(sample_weight, (-1,)), found.losses.dtype)
    return Judged(found.losses * weights, {}, found.metrics)


def _distance(
    spread: tuple[float, ...], _x: Any, y: Any, _weight: Any, outputs: Any, _training: bool
) -> Judged:
    total: Any = 0.0
    for (_, output), (_, goal), unit in zip(leaves(outputs), leaves(y), spread, strict=True):
        squares = ops.square((output - ops.cast(goal, output.dtype)) / unit)
        total = total + ops.mean(ops.reshape(squares, (ops.shape(output)[0], -1)), axis=-1)
    return Judged(total / len(spread))


def _own_loss(
    model: Any, x: Any, y: Any, sample_weight: Any, outputs: Any, training: bool
) -> Judged:
    """What the model's ``compute_loss`` gives, with the losses that layers add: one number."""
    own = computes_loss(model)
    compiled = getattr(model, "_compile_loss", None) is not None
    if own or (compiled and y is not None):
        with _readable(y, outputs):
            loss = own_loss(model, x, y, outputs, sample_weight, training)
        return Judged(_numbers(loss, "the loss"))
    added = list(model.losses)
    if added:
        return Judged(_numbers(sum(added), "the loss"))
    if compiled:
        raise DataError("the compiled loss needs labels: pass (x, y). Received: y=None")
    raise ModelError(
        f"model '{model.name}' is not compiled with a loss; pass loss=, for example "
        "'sparse_categorical_crossentropy', or step=. Received: loss=None"
    )


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
            loss._replace(loss=_Unreduced(loss.loss, loss.name)) for loss in self._flat_losses
        ]

    @property
    def metrics(self) -> list[None]:
        """No running means of the single losses."""
        return [None] * len(self._flat_losses or ())

    def call(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Losses of one batch, shape ``(n,)``; ``()`` where they are of the whole batch.

        Raises:
            DataError: Labels or weights that do not fit the outputs.
        """
        with _readable(y_true, y_pred):
            losses = super().call(y_true, y_pred, sample_weight)
            if losses is None:
                raise ValueError("no output of the model has a loss.")
            return losses


class _Unreduced:
    """One loss of one output: ``(y_true, y_pred, sample_weight)`` -> ``(n,)``, or ``()``."""

    def __init__(self, loss: Any, name: str) -> None:
        # Not copy.copy(), which saves and loads a Keras object, and so fails for a lambda.
        self.loss = object.__new__(type(loss))
        self.loss.__dict__.update(loss.__dict__)
        self.loss.reduction = None
        self.mean = loss.reduction in _MEANS
        self.name = name

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if y_true is None:  # JAX before 0.5 would make NaN of it
            raise ValueError("labels are missing.")
        values = self.loss(y_true, y_pred, sample_weight)
        samples = keras.tree.flatten(y_pred)[0].shape[0]  # None: a trace leaves it open
        if len(values.shape) == 0 or values.shape[0] != samples:
            return ops.mean(values)  # of the whole batch
        mask = get_keras_mask(y_pred)
        if mask is not None and self.mean:
            inside = ops.sum(ops.cast(mask, values.dtype))
            values = values * (ops.cast(ops.size(mask), values.dtype) / ops.maximum(inside, 1.0))
        rows = ops.shape(values)[0] if samples is None else samples
        return ops.mean(ops.reshape(values, (rows, -1)), axis=-1)


def _readable(y: Any, outputs: Any) -> AbstractContextManager[None]:
    """Turn a loss's complaint about the labels into one line."""

    def text(error: Exception) -> str:
        if isinstance(outputs, dict) and not isinstance(y, dict):
            name = next(iter(outputs))
            return (
                "the model returns a mapping, and labels and losses are told by its names: pass "
                f"labels {{{name!r}: y}} and loss={{{name!r}: ...}}, or a loss that is a function "
                f"(labels, outputs). Received: label shapes {shapes_of(y)} for outputs "
                f"{', '.join(map(repr, outputs))}"
            )
        if "interpret loss identifier" in str(error):
            return f"Keras has no such loss: {first_line(error)}"
        return (
            f"the loss does not take these labels: {first_line(error)} Received: label shapes "
            f"{shapes_of(y)} for outputs of shapes {shapes_of(outputs)}"
        )

    return explained(text)
