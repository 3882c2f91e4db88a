"""The frozen part of a model as the feature cache sees it: who it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from frostline.adapters import full_precision, is_native
from frostline.types import Array, ModelError


def identity(prefix: Any) -> str:
    """Return the hash of a prefix: what it computes, weights and stored statistics included.

    Args:
        prefix: A built Keras model, a torch module, or anything with an ``identity`` of its own.

    Raises:
        ModelError: Neither.
    """
    if is_callable_prefix(prefix):
        return str(prefix.identity)
    if is_native(prefix):
        from frostline.adapters.torch.prefix import identity as of_torch

        return of_torch(prefix)
    _require_keras(prefix)
    from frostline.adapters.keras.prefix import identity as of_keras

    return of_keras(prefix)


def native(prefix: Any) -> Callable[[Any], list[Array]]:
    """Return what runs a prefix on its own framework: a batch of inputs -> arrays."""
    if is_native(prefix):
        from frostline.adapters.torch.prefix import native as of_torch

        return of_torch(prefix)
    from frostline.adapters.keras.native import native as of_keras

    return of_keras(prefix)


def reference(prefix: Any) -> Callable[[Any], list[Array]]:
    """As :func:`native`, but for a few samples, to compare with: in full float32 precision.

    Nothing is compiled for them. An NVIDIA card rounds the factors of a convolution to 10 bits
    where a framework lets it (TF32), which alone makes a difference of 1e-3.
    """
    if is_native(prefix):
        run = native(prefix)
    else:
        from frostline.adapters.keras.native import uncompiled

        run = uncompiled(prefix)

    def precise(batch: Any) -> list[Array]:
        with full_precision(prefix):
            return run(batch)

    return precise


def to_onnx(prefix: Any, batch: Any) -> bytes:
    """Serialize a prefix as an ONNX model; ``batch`` is a batch of its inputs."""
    if is_native(prefix):
        from frostline.adapters.torch.prefix import to_onnx as of_torch

        return of_torch(prefix, batch)
    from frostline.adapters.keras.onnx.writer import to_onnx as of_keras

    return of_keras(prefix)


def takes_any_number(prefix: Any) -> bool:
    """Whether a prefix is known to take any number of samples at once: Keras models say so."""
    inputs = () if is_native(prefix) else getattr(prefix, "inputs", None) or ()
    return bool(inputs) and all(tensor.shape[0] is None for tensor in inputs)


def accelerator(prefix: Any) -> str:
    """What a prefix runs on where that is not the processor, such as ``"gpu"``; else empty."""
    if is_native(prefix):
        from frostline.adapters.torch.prefix import device as of_torch

        found = of_torch(prefix)
    else:
        from frostline.adapters.keras.native import device as of_keras

        found = of_keras(prefix)
    return "" if found == "cpu" else found


def readable(prefix: Any, data: Any, batch_size: int) -> Any:
    """Data as the cache reads them: torch's data sets in the order of their samples."""
    if not is_native(prefix):
        return data
    from frostline.adapters.torch.cached_data import in_order

    return in_order(data, batch_size)


def handed_out(prefix: Any, cache: Any, labels: Sequence[Any]) -> Any:
    """What the user gets: the cache, or for a torch module a data set of features and labels.

    Args:
        prefix: As for :func:`identity`.
        cache: The features.
        labels: Those of each batch.
    """
    if not is_native(prefix):
        return cache
    from frostline.adapters.torch.cached_data import FeatureDataset, joined

    return FeatureDataset(cache, joined(labels))


def is_callable_prefix(prefix: Any) -> bool:
    """Whether a prefix is a function with an ``identity`` of its own, which runs as it is."""
    return isinstance(getattr(prefix, "identity", None), str)


def augmenter(augment: Any) -> Callable[[Any, int], Any]:
    """Return ``(x, seed) -> x`` on numpy batches, for a function or for a Keras layer."""
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(augment, getattr(keras, "Layer", ())):
        from frostline.adapters.keras.prefix import seeded

        return seeded(augment)
    chosen: Callable[[Any, int], Any] = augment
    return chosen


def _require_keras(prefix: Any) -> None:
    keras = sys.modules.get("keras")
    if keras is None or not isinstance(prefix, getattr(keras, "Model", ())):
        raise ModelError(
            "a prefix is a Keras model or a torch module, for example fl.split(model).prefix, or a "
            "callable with an `identity` that changes whenever what it computes does. Received: "
            f"{type(prefix).__name__}"
        )
