"""Labels and inputs checked once, before the model sees them: a framework says it late, or not.

On JAX a label beyond the classes gives a loss of 0 and no error; torch raises inside a kernel. What
the model says of its shapes and its loss is enough to tell first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from frostline.types import Array, DataError

_SPARSE = "sparse_categorical_crossentropy"
#: Losses that compare each output with a target of its own: their shapes must be the same. Keras
#: would spread a smaller target over the outputs.
_ELEMENTWISE = frozenset(
    {"categorical_crossentropy", "categorical_focal_crossentropy", "categorical_hinge",
     "binary_crossentropy", "binary_focal_crossentropy", "mean_squared_error", "mse",
     "mean_absolute_error", "mae", "mean_squared_logarithmic_error", "huber", "huber_loss",
     "log_cosh", "hinge", "squared_hinge", "poisson", "kl_divergence", "cosine_similarity"}
)  # fmt: skip


def plain_numbers(values: Array, what: str) -> Array:
    """Return an array in a dtype that every framework has.

    Raises:
        DataError: Whole numbers beyond 2^63.
    """
    if values.dtype.kind != "u" or values.dtype.itemsize == 1:
        return values
    if values.size and int(values.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{what} has numbers beyond 2^63. Received: {values.max()}")
    return values.astype(np.int64)


def check_inputs(x: Array, model: Any, shown: str) -> None:
    """Refuse inputs of another shape than the model takes, where it has one input and says so.

    Raises:
        DataError: The shapes differ.
    """
    takes = _shape(model, "input_shape")
    if takes is not None and not _fits(x.shape, takes):
        raise DataError(
            f"{shown}: a sample of x has shape {x.shape[1:]}, and the model takes {_text(takes)}"
        )


def checked(y: Array, model: Any, loss: str | None, shown: str) -> Array:
    """Return targets after checking that the loss can be computed with them.

    Raises:
        DataError: NaN or infinite ones, another shape than the outputs, or classes that the model
            does not have.
    """
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        count = int(np.sum(~np.isfinite(y)))
        raise DataError(f"{shown}: {count} of {y.size} labels in y are NaN or infinite")
    gives = _shape(model, "output_shape")
    name = _loss_name(model, loss)
    if gives is None:
        return y
    if name == _SPARSE:
        return _classes(y, gives, getattr(model.loss, "ignore_class", None), shown)
    if name in _ELEMENTWISE and not any(
        _fits(shape, gives) for shape in (y.shape, (*y.shape, 1), _without_last(y.shape))
    ):
        raise DataError(
            f"{shown}: for {name} a label in y must have the shape of an output, {_text(gives)}. "
            f"Received: {y.shape[1:]}"
        )
    return y


def of_labels(labels: Array, model: Any, loss: str | None) -> Array:
    """Return class indices as the model's loss wants them: as they are, one-hot, or one column.

    Raises:
        DataError: More classes than the model has.
    """
    width = (_shape(model, "output_shape") or (None,))[-1]
    if width == 1:
        return labels.reshape(-1, 1).astype(np.float32)
    name = _loss_name(model, loss)
    if name in ("categorical_crossentropy", _SPARSE) and isinstance(width, int):
        if labels.max(initial=0) >= width:
            raise DataError(
                f"the data has {labels.max() + 1} classes, the model {width}; choose some with "
                "--classes"
            )
        if name != _SPARSE:
            return np.eye(width, dtype=np.float32)[labels]
    return labels.astype(np.int32)


def _classes(y: Array, gives: tuple[int | None, ...], ignored: Any, shown: str) -> Array:
    width = gives[-1]
    if not any(_fits(shape, gives[:-1]) for shape in (y.shape, _without_last(y.shape))):
        hint = ""
        if y.ndim == len(gives) and y.shape[-1] == width:
            hint = ", as y.argmax(-1) gives it"
        raise DataError(
            f"{shown}: for {_SPARSE} a label in y is the number of a class{hint}. "
            f"Received: y of shape {y.shape}"
        )
    whole = y if y.dtype.kind in "iub" else np.rint(y)
    if not np.array_equal(whole, y):
        raise DataError(f"{shown}: classes in y are whole numbers. Received: {y[whole != y][0]:g}")
    known = whole if ignored is None else whole[whole != ignored]
    if known.size and isinstance(width, int) and not 0 <= known.min() <= known.max() < width:
        raise DataError(
            f"{shown}: the model has {width} classes, so a label in y is 0 to {width - 1}. "
            f"Received: {known.min():g} to {known.max():g}"
        )
    return whole.astype(np.int64) if y.dtype.kind in "fb" else y


def _loss_name(model: Any, loss: str | None) -> str:
    given = getattr(model, "loss", None) if loss is None else loss
    if isinstance(given, str):
        return given
    return str(getattr(given, "name", None) or getattr(given, "__name__", ""))


def _shape(model: Any, name: str) -> tuple[int | None, ...] | None:
    """A shape that the model states, with the batch first; ``None`` for several, or none."""
    try:
        shape = getattr(model, name, None)
    except Exception:  # Keras raises where a layer has never been called
        return None
    if not isinstance(shape, tuple) or not shape:
        return None
    return shape if all(size is None or isinstance(size, int) for size in shape) else None


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want is None or size == want for size, want in zip(shape[1:], wanted[1:], strict=True)
    )


def _without_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else ()


def _text(shape: tuple[int | None, ...]) -> str:
    inner = ", ".join("any" if size is None else str(size) for size in shape[1:])
    return f"({inner},)" if len(shape) == 2 else f"({inner})"
