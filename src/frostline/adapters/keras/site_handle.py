"""What a pass needs of one BN layer: its stored statistics, and calls of it that obey the pass.

A handle stands for a layer whose forward function is replaced while a pass runs. There is one kind
for Keras layers and one for BN modules inside a ``TorchModuleWrapper``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import keras
from keras import ops

from frostline.adapters.keras import graph as keras_graph
from frostline.adapters.keras.overridden import overridden
from frostline.adapters.keras.statistics import batch_statistics, reduced
from frostline.layers import BatchNormalization
from frostline.numerics.blend import mixed
from frostline.types import ModelError

#: Calls that do nothing but normalise; of any other, the layer's own call is run.
_KNOWN_CALLS = (keras.layers.BatchNormalization.call, BatchNormalization.call)

#: The forward function that a pass puts in the place of a layer's own, which is its first argument.
Replacement = Callable[..., Any]


class SiteHandle:
    """One BN layer.

    Attributes:
        owner: The Keras layer or torch module.
        name: The attribute of ``owner`` that holds its forward function.
    """

    owner: Any
    name: str

    @property
    def epsilon(self) -> float:
        """Added to the variance."""
        raise NotImplementedError

    @property
    def axis(self) -> int:
        """The channel axis."""
        raise NotImplementedError

    @property
    def trainable(self) -> bool:
        """Whether the layer's flag is set, or that of the wrapper around the module."""
        raise NotImplementedError

    def stored(self) -> tuple[Any, Any] | None:
        """Stored mean and variance at this moment of the pass; ``None``: it has none."""
        raise NotImplementedError

    def call(self, original_call: Callable[..., Any], args: Any, kwargs: Any) -> SiteCall:
        """Take a call of the layer apart; ``original_call`` is its own forward function."""
        raise NotImplementedError


class SiteCall:
    """One call of a layer, taken apart.

    Attributes:
        handle: The layer.
        x: The input, float32 at least: half precision overflows in the variance.
        dtype: Dtype of the output.
        mask: Which values count; ``None``: all of them.
        follows_formula: Whether the layer does nothing but normalise.
    """

    mask: Any = None
    follows_formula = True

    def __init__(self, handle: SiteHandle, inputs: Any, dtype: Any) -> None:
        self.handle, self.dtype = handle, dtype
        dtype_in = keras.backend.standardize_dtype(inputs.dtype)
        self.x = ops.cast(inputs, keras.backend.result_type(dtype_in, "float32"))

    def batch(self) -> Any:
        """Mean and biased variance of the input, shape ``(2, channels)``."""
        return batch_statistics(self.x, self.handle.axis)

    def count(self) -> Any:
        """Values per channel."""
        sizes, axes = ops.shape(self.x), reduced(self.x, self.handle.axis)
        whole = reduce(lambda one, other: one * other, (sizes[axis] for axis in axes))
        return ops.convert_to_tensor(whole, "int32")  # a tensor where a trace leaves a size open

    def parameters(self) -> tuple[Any, Any]:
        """Gamma and beta, each ``None`` where there is none."""
        raise NotImplementedError

    def normalised(self, statistics: Any) -> Any:
        """What the layer gives in inference with this mean and variance, ``(2, channels)``."""
        return self.formula(statistics)

    def formula(self, statistics: Any) -> Any:
        """What a layer that does nothing but normalise gives with these statistics."""
        x = self.x
        mean, variance = ops.unstack(statistics, num=2)
        gamma, beta = (None if p is None else ops.cast(p, x.dtype) for p in self.parameters())
        outputs = ops.batch_normalization(
            x=x,
            mean=mean,
            variance=variance,
            axis=self.handle.axis,
            offset=beta,
            scale=gamma,
            epsilon=self.handle.epsilon,
        )
        return ops.cast(outputs, self.dtype)

    def inference_output(self) -> Any:
        """What the layer gives in inference, whatever phase the model runs in."""
        stored = self.handle.stored()
        if stored is None:  # then it always uses those of the batch
            return self.normalised(self.batch())
        return self.normalised(ops.stack([ops.cast(value, self.x.dtype) for value in stored]))


def site_handles(model: Any) -> dict[str, SiteHandle]:
    """Path -> handle of every BN layer, those without stored statistics too."""
    found: dict[str, SiteHandle] = {}
    for place in keras_graph.walk(model):
        if keras_graph.is_site(place.layer):
            found[place.path] = _KerasHandle(place.layer)
            continue
        for path, module in keras_graph.torch_norms(place):
            found[path] = _TorchHandle(module, place.layer)
    return found


@contextmanager
def replaced(functions: Iterable[tuple[SiteHandle, Replacement]]) -> Iterator[None]:
    """Give each layer another forward function; take it away on any exit.

    Args:
        functions: (handle, function) pairs; a function is called as
            ``function(handle, original_call, *args, **kwargs)``.
    """
    with overridden(
        (handle.owner, handle.name, partial(function, handle, getattr(handle.owner, handle.name)))
        for handle, function in functions
    ):
        yield


def blended_call(
    blend: Any,
    stored: Any,
    seen: list[Any] | None,
    handle: SiteHandle,
    original_call: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The layer's output for these inputs, normalised with blended statistics.

    Args:
        blend: λ.
        stored: Mean and variance for λ = 0, shape ``(2, channels)``; together with those of the
            batch they take half of the operations, which are what a graph costs to make.
        seen: Takes the count and the batch's statistics; ``None``: nobody wants them.
        handle: The layer.
        original_call: Its own forward function.
        *args: Of the call.
        **kwargs: Of the call.
    """
    call = handle.call(original_call, args, kwargs)
    batch = call.batch()
    if seen is not None:
        seen.append((call.count(), batch))
    dtype = batch.dtype
    return call.normalised(mixed(ops.cast(blend, dtype), ops.cast(stored, dtype), batch, ops))


def given_call(
    given: Any,
    handle: SiteHandle,
    original_call: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The layer's output with these statistics: λ = 0, which does not need those of the batch."""
    call = handle.call(original_call, args, kwargs)
    return call.normalised(ops.cast(given, call.x.dtype))


def stored_call(
    handle: SiteHandle, original_call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The layer's output in inference, whatever phase the model runs in."""
    return handle.call(original_call, args, kwargs).inference_output()


# --- Keras layers -----------------------------------------------------------------------------


class _KerasHandle(SiteHandle):
    """A Keras BN layer: stock, ours, or a subclass of either."""

    name = "call"

    def __init__(self, layer: Any) -> None:
        self.owner = layer

    @property
    def epsilon(self) -> float:
        return float(self.owner.epsilon)

    @property
    def axis(self) -> int:
        return int(self.owner.axis)

    @property
    def trainable(self) -> bool:
        return bool(self.owner.trainable)

    def stored(self) -> tuple[Any, Any] | None:
        layer = self.owner
        return None if layer.moving_mean is None else (layer.moving_mean, layer.moving_variance)

    def call(self, original_call: Callable[..., Any], args: Any, kwargs: Any) -> SiteCall:
        return _KerasCall(self, original_call, args, kwargs)


class _KerasCall(SiteCall):
    def __init__(
        self, handle: _KerasHandle, original_call: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        self.layer, self.original_call = handle.owner, original_call
        inputs, self.mask, self.bound = _arguments(self.layer, original_call, args, kwargs)
        self.follows_formula = getattr(original_call, "__func__", None) in _KNOWN_CALLS
        super().__init__(handle, inputs, self.layer.compute_dtype)

    def batch(self) -> Any:
        if self.mask is None:
            return super().batch()
        layer, shape = self.layer, self.layer.moving_mean.shape
        mean, variance = keras.layers.BatchNormalization._moments(layer, self.x, self.mask)
        return ops.stack([ops.reshape(mean, shape), ops.reshape(variance, shape)])

    def count(self) -> Any:
        if self.mask is None:
            return super().count()
        axis, x = self.layer.axis, self.x
        if axis % len(x.shape) != len(x.shape) - 1:
            raise ModelError(
                "the moments of a masked BN layer can be recorded only with the channels on the "
                f"last axis. Received: axis={axis} at layer '{self.layer.name}'"
            )
        return ops.sum(ops.cast(ops.broadcast_to(self.mask, ops.shape(x)[:-1]), "int32"))

    def parameters(self) -> tuple[Any, Any]:
        return self.layer.gamma, self.layer.beta

    def normalised(self, statistics: Any) -> Any:
        if self.follows_formula:
            return self.formula(statistics)
        return self._call_with(*ops.unstack(statistics, num=2))

    def inference_output(self) -> Any:
        if self.follows_formula:
            return self.original_call(*self.bound.args, **self.bound.kwargs)
        return super().inference_output()

    def _call_with(self, mean: Any, variance: Any) -> Any:
        """Run a ``call`` that Frostline does not know, on other statistics than its own."""
        layer, bound = self.layer, self.bound
        statistics = (layer.moving_mean, layer.moving_variance)
        stored = [ops.convert_to_tensor(variable) for variable in statistics]
        try:
            for variable, value in zip(statistics, (mean, variance), strict=True):
                variable.assign(value)  # seen in the StatelessScope around the pass only
            # For a `call` that insists on training mode.
            with overridden([(layer, "_moments", lambda *_, **__: (mean, variance))]):
                return self.original_call(*bound.args, **bound.kwargs)
        finally:
            for variable, value in zip(statistics, stored, strict=True):
                variable.assign(value)


# --- torch modules ----------------------------------------------------------------------------


class _TorchHandle(SiteHandle):
    """A BN module inside a ``TorchModuleWrapper``; its variance is unbiased, as torch stores it."""

    name, axis = "forward", 1

    def __init__(self, module: Any, wrapper: Any) -> None:
        self.owner, self.wrapper = module, wrapper

    @property
    def epsilon(self) -> float:
        return float(self.owner.eps)

    @property
    def trainable(self) -> bool:
        return bool(self.wrapper.trainable)

    def stored(self) -> tuple[Any, Any] | None:
        module = self.owner
        return None if module.running_mean is None else (module.running_mean, module.running_var)

    def call(self, original_call: Callable[..., Any], args: Any, kwargs: Any) -> SiteCall:
        bound = inspect.signature(original_call).bind(*args, **kwargs)
        inputs = next(iter(bound.arguments.values()))
        return _TorchCall(self, inputs, keras.backend.standardize_dtype(inputs.dtype))


class _TorchCall(SiteCall):
    def parameters(self) -> tuple[Any, Any]:
        return self.handle.owner.weight, self.handle.owner.bias


def _arguments(
    layer: Any, call: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Any, Any, inspect.BoundArguments]:
    """Inputs and mask of a call of a BN layer, and its arguments with ``training`` off."""
    signature = inspect.signature(call)
    bound = signature.bind(*args, **kwargs)
    if "training" in signature.parameters:
        bound.arguments["training"] = False
    elif "training" in bound.kwargs:
        bound.arguments["kwargs"]["training"] = False
    named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    inputs, mask = next(iter(bound.args or bound.kwargs.values())), named.get("mask")
    if mask is not None and len(mask.shape) != len(inputs.shape) - 1:
        raise ValueError(
            f"Layer '{layer.name}': the mask must have one dimension less than the inputs. "
            f"Received: mask.shape={mask.shape}, inputs.shape={inputs.shape}"
        )
    return inputs, mask, bound
