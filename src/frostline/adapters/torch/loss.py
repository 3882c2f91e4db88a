"""The loss of a torch model sample by sample.

torch losses are callables ``(outputs, targets)`` that average over the batch. Paired comparisons of
samples need one number per sample, whose mean is what the callable itself gives.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from frostline.types import DataError, ModelError
from frostline.types.reasons import first_line

Loss = Callable[[Any, Any], Any]

_CLASSES = (
    "cross_entropy",
    "categorical_crossentropy",
    "sparse_categorical_crossentropy",
    "binary_crossentropy",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
)
_NUMBERS: dict[str, Loss] = {
    "mse": functional.mse_loss,
    "mse_loss": functional.mse_loss,
    "mean_squared_error": functional.mse_loss,
    "mae": functional.l1_loss,
    "l1_loss": functional.l1_loss,
    "mean_absolute_error": functional.l1_loss,
    "huber": functional.huber_loss,
    "smooth_l1_loss": functional.smooth_l1_loss,
    "bce_with_logits": functional.binary_cross_entropy_with_logits,
}


def name_of(loss: Any) -> str | None:
    """Snake-case name of a loss, as far as it has one."""
    if loss is None or isinstance(loss, str):
        return loss
    name: str = getattr(loss, "__name__", None) or type(loss).__name__
    return _snake(name)


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")


def per_sample(loss: Any) -> Loss:
    """Turn a loss into ``(outputs, targets) -> losses of shape (n,)``.

    Args:
        loss: A torch loss module or function, any callable ``(outputs, targets)`` that gives one
            number per batch or one per sample, or a name: ``"cross_entropy"``, ``"mse"``, ... (a
            name takes logits as well as probabilities).

    Raises:
        ModelError: No loss, or an unknown name.
    """
    if isinstance(loss, dict) and loss.keys() == {"class_name", "config"}:
        loss = _snake(loss["class_name"])  # the form in which a loss is inferred for any framework
    if isinstance(loss, str):
        if loss in _NUMBERS:
            return functools.partial(_numbers, _NUMBERS[loss])
        if loss in _CLASSES:
            return _classes
        known = ", ".join([*_CLASSES, *_NUMBERS])
        raise ModelError(f"no loss has this name; there are {known}. Received: loss={loss!r}")
    if not callable(loss):
        raise ModelError(
            "a torch module has no compiled loss: pass loss=, a callable (outputs, targets) such "
            f"as torch.nn.CrossEntropyLoss(). Received: loss={loss!r}"
        )
    return functools.partial(_called, loss)


def _classes(outputs: Any, targets: Any) -> Any:
    """Cross-entropy of logits or probabilities; one column means sigmoid."""
    outputs = outputs.float()
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        outputs, targets = outputs.reshape(-1), targets.reshape(-1).to(outputs.dtype)
        if bool(((outputs >= 0) & (outputs <= 1)).all()):
            return functional.binary_cross_entropy(outputs, targets, reduction="none")
        return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    total = outputs.sum(1)
    share = bool((outputs >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3)
    logits = outputs.clamp_min(1e-7).log() if share else outputs
    return _flat(functional.cross_entropy(logits, _labels(targets), reduction="none"))


def _labels(targets: Any) -> Any:
    """Class indices in the shape and dtype that torch wants; soft labels as they are."""
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    return targets if targets.is_floating_point() and targets.ndim > 1 else targets.long()


def _numbers(function: Any, outputs: Any, targets: Any) -> Any:
    targets = targets.to(outputs.dtype).reshape(outputs.shape)
    return _flat(function(outputs, targets, reduction="none"))


def _called(loss: Any, outputs: Any, targets: Any) -> Any:
    if not (targets.is_floating_point() or targets.dtype == torch.bool):
        targets = targets.long()  # the only integers that torch's losses take for classes
    try:
        reduced = loss(outputs, targets)
        if reduced.ndim and reduced.shape[0] == targets.shape[0]:
            return _flat(reduced)
        values = _unreduced(loss, outputs, targets)
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        raise DataError(
            f"the loss does not take these outputs and labels: {first_line(problem)} "
            f"Received: outputs {_shape(outputs)}, labels {_shape(targets)}"
        ) from problem
    # Class weights and ignored labels make the mean another one than that over the samples.
    mean = values.mean()
    known = bool(torch.isfinite(reduced)) and bool(mean != 0)
    return values * (reduced / mean).detach() if known and reduced.ndim == 0 else values


def _unreduced(loss: Any, outputs: Any, targets: Any) -> Any:
    if isinstance(loss, torch.nn.Module) and getattr(loss, "reduction", None) in ("mean", "sum"):
        alone = copy.copy(loss)
        alone.reduction = "none"
        return _flat(alone(outputs, targets))
    with_choice = inspect.isfunction(loss) and "reduction" in inspect.signature(loss).parameters
    if with_choice:
        return _flat(loss(outputs, targets, reduction="none"))
    count = targets.shape[0]
    return torch.stack([loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(count)])


def _flat(values: Any) -> Any:
    return values if values.ndim == 1 else values.reshape(values.shape[0], -1).mean(1)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
