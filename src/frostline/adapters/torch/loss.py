"""Losses of a torch model: of each sample where that is what a loss means, else of the batch.

torch losses are callables ``(outputs, targets)`` that average over the batch. Paired comparisons
need one number per sample, but only where their mean or sum is what the callable itself gives: a
loss of the whole batch (contrastive, correlation, Dice) is never computed on one sample.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from frostline.types import DataError, ModelError
from frostline.types.names import snake_case
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


def as_callable(loss: Any) -> Loss:
    """Turn what a user calls a loss into a callable ``(outputs, targets)``; see :func:`judged`.

    Args:
        loss: A torch loss module or function, any callable ``(outputs, targets)`` that gives one
            number per batch or one per sample, or a name: ``"cross_entropy"``, ``"mse"``, ... (a
            name takes logits as well as probabilities).

    Raises:
        ModelError: No loss, or an unknown name.
    """
    if isinstance(loss, dict) and loss.keys() == {"class_name", "config"}:
        loss = snake_case(
            loss["class_name"]
        )  # the form in which a loss is inferred for any framework
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
    return loss  # type: ignore[no-any-return]


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """Losses of one batch, tensors.

    Attributes:
        losses: One per unit.
        unit: ``"sample"`` or ``"batch"``.
        parts: Name -> losses of each of several named ones, which add up to ``losses``.
        metrics: Name -> one number, or one per sample.
    """

    losses: Any
    unit: Literal["sample", "batch"]
    parts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


def read_losses(result: Any) -> Judged:
    """What a step, a model or a loss returns, as losses.

    Args:
        result: One number, one per sample, a mapping of named losses (added up; one that is called
            ``loss`` is the loss, and the others are metrics), or ``(loss, metrics)``.

    Raises:
        DataError: Something else.
    """
    metrics: Mapping[str, Any] = {}
    if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], Mapping):
        result, metrics = result
    parts: dict[str, Any] = {}
    if isinstance(result, Mapping):
        named = {str(key): value for key, value in result.items() if _is_number(value)}
        if "loss" in named:
            result = named.pop("loss")
            metrics = {**named, **metrics}
        elif named:
            parts = {name: torch.as_tensor(value) for name, value in named.items()}
            result = functools.reduce(torch.add, parts.values())
    if not _is_number(result):
        raise DataError(
            "a loss is one number per batch, one per sample, a mapping of such losses, or (loss, "
            f"metrics). Received: {type(result).__name__}"
        )
    losses = torch.as_tensor(result)
    return Judged(
        losses=_flat(losses) if losses.ndim else losses.reshape(1),
        unit="sample" if losses.ndim else "batch",
        parts={name: _flat(part) if part.ndim else part.reshape(1) for name, part in parts.items()},
        metrics={str(name): value for name, value in metrics.items() if _is_number(value)},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, float, int, np.number, np.ndarray))


def judged(loss: Loss, outputs: Any, targets: Any, sliced: bool | None) -> tuple[Judged, bool]:
    """Losses of one batch, one per sample where that is what the loss means.

    Args:
        loss: From :func:`as_callable`.
        outputs: Of the model.
        targets: Labels, as tensors; ``None``: there are none.
        sliced: A loss that gives one number is the mean or sum of those of single samples;
            ``None``: not known yet.

    Returns:
        The losses, and whether such a loss was taken sample by sample.

    Raises:
        DataError: The loss does not take these, or is no longer the mean of what it was before.
    """
    targets = _with_long(targets)
    try:
        found = read_losses(loss(outputs, targets))
        if found.unit == "sample" and _count(outputs) not in (None, len(found.losses)):
            found = replace(found, losses=found.losses.mean().reshape(1), unit="batch")
        if found.unit == "sample" or sliced is False or found.parts:
            return found, False
        values = _unreduced(loss, outputs, targets, found.losses[0])
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(
            f"the loss does not take these outputs and labels: {first_line(problem)} Received: "
            f"outputs {_shape(outputs)}, labels {_shape(targets)}"
        ) from problem
    if values is None and sliced and (_count(outputs) or 0) > 1:
        raise DataError(
            "the losses of single samples do not average or add up to the loss of this batch, as "
            "they did before; pass a loss that gives one number per sample, or step=. Received: a "
            f"batch with the loss {float(found.losses[0]):.6g}"
        )
    if values is None:
        return found, False
    return Judged(losses=values, unit="sample", metrics=found.metrics), True


def _with_long(targets: Any) -> Any:
    """Integers as torch's losses want them for classes."""
    if isinstance(targets, torch.Tensor):
        plain = targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
        return targets if plain else targets.long()
    if isinstance(targets, Mapping):
        return {key: _with_long(value) for key, value in targets.items()}
    if type(targets) in (list, tuple):
        return type(targets)(map(_with_long, targets))
    return targets


def _unreduced(loss: Any, outputs: Any, targets: Any, reduced: Any) -> Any | None:
    """One loss per sample with the mean or sum ``reduced``; ``None``: one of the whole batch.

    A sum over the batch grows with it, and so is taken apart: the mean over the samples is that of
    what each of them adds.
    """
    count = _count(outputs)
    if not count:
        return None
    alone: Any = None
    if isinstance(loss, nn.Module) and getattr(loss, "reduction", None) in ("mean", "sum"):
        alone = copy.copy(loss)
        alone.reduction = "none"
    elif inspect.isfunction(loss) and "reduction" in inspect.signature(loss).parameters:
        alone = functools.partial(loss, reduction="none")
    if alone is not None:
        values = alone(outputs, targets)
        if isinstance(values, torch.Tensor) and values.ndim and values.shape[0] == count:
            values = _flat(values)
            torchs = (getattr(loss, "__module__", None) or "").startswith("torch.nn")
            if not torchs:
                return _checked(values, reduced)
            # Class weights and ignored labels make the mean another one than that over the samples.
            added = getattr(loss, "reduction", None) == "sum"
            return _scaled(values, reduced / count if added else reduced)
    if _count(targets) not in (None, count):
        return None
    parts = []
    for index in range(count):
        rows = slice(index, index + 1)
        try:
            part = loss(_rows(outputs, rows), _rows(targets, rows))
        except Exception:  # one sample is no batch for it
            return None
        if not isinstance(part, torch.Tensor) or part.numel() != 1:
            return None
        parts.append(part.reshape(()))
    return _checked(torch.stack(parts), reduced)


def _scaled(values: Any, reduced: Any) -> Any:
    mean = values.mean()
    known = bool(torch.isfinite(reduced)) and bool(mean != 0)
    return values * (reduced / mean).detach() if known else values


def _checked(values: Any, reduced: Any) -> Any | None:
    """The values, if their mean or sum is the loss of the batch."""
    values = values.reshape(-1)
    mean, wanted = float(values.detach().double().mean()), float(reduced.detach())
    alike = any(
        math.isclose(total, wanted, rel_tol=1e-4, abs_tol=1e-7)
        for total in (mean, mean * len(values))
    )
    return values if alike or (not math.isfinite(wanted) and not math.isfinite(mean)) else None


def _count(structure: Any) -> int | None:
    """First dimension that all tensors of a structure share."""
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in _tensors(structure)}
    return next(iter(sizes)) if len(sizes) == 1 else None


def _tensors(structure: Any) -> list[Any]:
    if isinstance(structure, torch.Tensor):
        return [structure]
    if isinstance(structure, Mapping):
        structure = list(structure.values())
    if isinstance(structure, (list, tuple)):
        return [leaf for item in structure for leaf in _tensors(item)]
    return []


def _rows(structure: Any, rows: slice) -> Any:
    if isinstance(structure, torch.Tensor):
        return structure[rows]
    if isinstance(structure, Mapping):
        twin = copy.copy(structure)
        for key, value in structure.items():
            twin[key] = _rows(value, rows)  # type: ignore[index]
        return twin
    if isinstance(structure, (list, tuple)):
        items = [_rows(item, rows) for item in structure]
        return type(structure)(*items) if hasattr(structure, "_fields") else type(structure)(items)
    return structure


def _flat(values: Any) -> Any:
    return values if values.ndim == 1 else values.reshape(values.shape[0], -1).mean(1)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
