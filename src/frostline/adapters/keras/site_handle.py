"""What a pass needs of one BN layer: its stored statistics, and calls of it that obey the pass.

A port stands for a layer whose forward function is replaced while a pass runs. There is one for
Keras layers and one for BN modules inside a ``TorchModuleWrapper``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import keras
from keras import ops

from frostline.adapters.keras import graph as keras_graph
from frostline.layers import BatchNormalization
from frostline.numerics.blend import mixed
from frostline.types import ModelError

#: Calls that do nothing but normalise; of any other, the layer's own call is run.
_KNOWN_CALLS = (keras.layers.BatchNormalization.call, BatchNormalization.call)

#: The forward function that a pass puts in the place of a layer's own, which is its first argument.
Replacement = Callable[..., Any]


class Use(Protocol):
    """One call of a layer, taken apart."""

    @property
    def x(self) -> Any:
        """The input, float32 at least."""
        ...

    def batch(self) -> tuple[Any, Any]:
        """Mean and biased variance of the input, shape ``(channels,)`` each."""
        ...

    def count(self) -> Any:
        """Values per channel."""
        ...

    def normalised(self, mean: Any, variance: Any) -> Any:
        """What the layer gives in inference with these statistics."""
        ...

    def locked(self) -> Any:
        """What the layer gives in inference, whatever phase the model runs in."""
        ...

    def textbook(self, mean: Any, variance: Any) -> Any | None:
        """The formula with these statistics; ``None`` where :meth:`normalised` is just that."""
        ...

    def scale_and_offset(self) -> tuple[Any, Any] | None:
        """Gamma and beta, each ``None`` where there is none.

        ``None`` instead of both: the layer does something else than the formula, or masks values.
        """
        ...


class Port(Protocol):
    """One BN layer; ``name`` is the attribute of ``owner`` that holds its forward function."""

    owner: Any
    name: str

    @property
    def epsilon(self) -> float:
        """Added to the variance."""
        ...

    @property
    def trainable(self) -> bool:
        """Whether the layer's flag is set, or that of the wrapper around the module."""
        ...

    @property
    def axis(self) -> int:
        """The channel axis."""
        ...

    def stored(self) -> tuple[Any, Any] | None:
        """Stored mean and variance at this moment of the pass; ``None``: it has none."""
        ...

    def use(self, own: Callable[..., Any], args: Any, kwargs: Any) -> Use:
        """Take a call of the layer apart; ``own`` is its own forward function."""
        ...


def ports(model: Any) -> dict[str, Port]:
    """Path -> port of every BN layer, those without stored statistics too."""
    found: dict[str, Port] = {}
    for place in keras_graph.walk(model):
        if keras_graph.is_site(place.layer):
            found[place.path] = KerasPort(place.layer)
            continue
        for path, module in keras_graph.torch_norms(place):
            found[path] = TorchPort(module, place.layer)
    return found


@contextmanager
def replaced(functions: Iterable[tuple[Port, Replacement]]) -> Iterator[None]:
    """Give each layer another forward function; take it away on any exit.

    Args:
        functions: (port, function) pairs; called as ``function(port, own, *args, **kwargs)``.
    """
    chosen = list(functions)
    before = [(port, vars(port.owner).get(port.name)) for port, _ in chosen]
    try:
        for port, function in chosen:
            own = getattr(port.owner, port.name)
            vars(port.owner)[port.name] = functools.partial(function, port, own)
        yield
    finally:
        for port, own in before:
            vars(port.owner).pop(port.name, None)
            if own is not None:
                vars(port.owner)[port.name] = own


def blended_call(
    blend: Any,
    stored: tuple[Any, Any],
    seen: list[Any] | None,
    port: Port,
    own: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The layer's output for these inputs, normalised with blended statistics."""
    use = port.use(own, args, kwargs)
    batch = use.batch()
    if seen is not None:
        seen.append((use.count(), *batch))
    return use.normalised(*mixed_statistics(ops.cast(blend, use.x.dtype), stored, batch))


def given_call(
    given: tuple[Any, Any], port: Port, own: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The layer's output with these statistics: that of λ = 0, for which nobody needs the batch."""
    use = port.use(own, args, kwargs)
    return use.normalised(*(ops.cast(each, use.x.dtype) for each in given))


def stored_call(port: Port, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The layer's output in inference, whatever phase the model runs in."""
    return port.use(own, args, kwargs).locked()


def mixed_statistics(
    blend: Any, stored: tuple[Any, Any], batch: tuple[Any, Any]
) -> tuple[Any, Any]:
    """Mean and variance at λ = ``blend``."""
    mean, variance = (
        mixed(blend, ops.cast(old, new.dtype), new, ops)
        for old, new in zip(stored, batch, strict=True)
    )
    return mean, variance


# --- Keras layers -----------------------------------------------------------------------------


class KerasPort:
    """A Keras BN layer: stock, ours, or a subclass of either."""

    name = "call"

    def __init__(self, layer: Any) -> None:
        self.owner = layer

    @property
    def epsilon(self) -> float:
        """Added to the variance."""
        return float(self.owner.epsilon)

    @property
    def axis(self) -> int:
        """The channel axis."""
        return int(self.owner.axis)

    @property
    def trainable(self) -> bool:
        """Whether the layer's flag is set."""
        return bool(self.owner.trainable)

    def stored(self) -> tuple[Any, Any] | None:
        """Variables with the stored mean and variance."""
        layer = self.owner
        return None if layer.moving_mean is None else (layer.moving_mean, layer.moving_variance)

    def use(self, own: Callable[..., Any], args: Any, kwargs: Any) -> KerasUse:
        """Take a call apart."""
        return KerasUse(self.owner, own, args, kwargs)


class KerasUse:
    """One call of a Keras BN layer."""

    def __init__(self, layer: Any, own: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.layer, self.own = layer, own
        inputs, self.mask, self.bound = _arguments(layer, own, args, kwargs)
        # Half precision overflows in the variance: compute in float32 at least, as the layer does.
        self.x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))

    def batch(self) -> tuple[Any, Any]:
        """Mean and biased variance of what is not masked."""
        layer, shape = self.layer, self.layer.moving_mean.shape
        if self.mask is None:
            return batch_statistics(self.x, layer.axis)
        mean, variance = keras.layers.BatchNormalization._moments(layer, self.x, self.mask)
        return ops.reshape(mean, shape), ops.reshape(variance, shape)

    def count(self) -> Any:
        """Values per channel that are not masked."""
        axis, x = self.layer.axis, self.x
        if self.mask is None:
            return _values(x, axis)
        if axis % len(x.shape) != len(x.shape) - 1:
            raise ModelError(
                "the moments of a masked BN layer can be recorded only with the channels on the "
                f"last axis. Received: axis={axis} at layer '{self.layer.name}'"
            )
        return ops.sum(ops.cast(ops.broadcast_to(self.mask, ops.shape(x)[:-1]), "int32"))

    def normalised(self, mean: Any, variance: Any) -> Any:
        """What the layer gives in inference with these statistics."""
        if getattr(self.own, "__func__", None) not in _KNOWN_CALLS:
            return self._own_call(mean, variance)
        return self._formula(mean, variance)

    def textbook(self, mean: Any, variance: Any) -> Any | None:
        """The formula, for a ``call`` that Frostline does not know."""
        if getattr(self.own, "__func__", None) in _KNOWN_CALLS:
            return None
        return self._formula(mean, variance)

    def scale_and_offset(self) -> tuple[Any, Any] | None:
        """Gamma and beta of a ``call`` that Frostline knows, on an input without a mask."""
        if self.mask is not None or getattr(self.own, "__func__", None) not in _KNOWN_CALLS:
            return None
        return self.layer.gamma, self.layer.beta

    def _formula(self, mean: Any, variance: Any) -> Any:
        layer, x = self.layer, self.x
        outputs = ops.batch_normalization(
            x=x,
            mean=mean,
            variance=variance,
            axis=layer.axis,
            offset=None if layer.beta is None else ops.cast(layer.beta, x.dtype),
            scale=None if layer.gamma is None else ops.cast(layer.gamma, x.dtype),
            epsilon=layer.epsilon,
        )
        return ops.cast(outputs, layer.compute_dtype)

    def locked(self) -> Any:
        """What the layer gives in inference, even if its ``call`` insists on training mode."""
        layer = self.layer
        if getattr(self.own, "__func__", None) in _KNOWN_CALLS:
            return self.own(*self.bound.args, **self.bound.kwargs)
        dtype = self.x.dtype
        return self._own_call(
            ops.cast(layer.moving_mean, dtype), ops.cast(layer.moving_variance, dtype)
        )

    def _own_call(self, mean: Any, variance: Any) -> Any:
        """Run a ``call`` that Frostline does not know, on other statistics than its own."""
        layer, bound = self.layer, self.bound
        statistics = (layer.moving_mean, layer.moving_variance)
        stored = [ops.convert_to_tensor(variable) for variable in statistics]
        before = vars(layer).get("_moments")
        try:
            for variable, value in zip(statistics, (mean, variance), strict=True):
                variable.assign(value)  # seen in the StatelessScope around the pass only
            # For a `call` that insists on training mode.
            vars(layer)["_moments"] = lambda *_, **__: (mean, variance)
            return self.own(*bound.args, **bound.kwargs)
        finally:
            vars(layer).pop("_moments", None)
            if before is not None:
                vars(layer)["_moments"] = before
            for variable, value in zip(statistics, stored, strict=True):
                variable.assign(value)


# --- torch modules ----------------------------------------------------------------------------


class TorchPort:
    """A BN module inside a ``TorchModuleWrapper``; its variance is unbiased, as torch stores it."""

    name = "forward"
    axis = 1

    def __init__(self, module: Any, wrapper: Any) -> None:
        self.owner = module
        self.wrapper = wrapper

    @property
    def epsilon(self) -> float:
        """Added to the variance."""
        return float(self.owner.eps)

    @property
    def trainable(self) -> bool:
        """Whether the wrapper's flag is set."""
        return bool(self.wrapper.trainable)

    def stored(self) -> tuple[Any, Any] | None:
        """Tensors with the stored mean and variance."""
        module = self.owner
        return None if module.running_mean is None else (module.running_mean, module.running_var)

    def use(self, own: Callable[..., Any], args: Any, kwargs: Any) -> TorchUse:
        """Take a call apart."""
        return TorchUse(self.owner, own, args, kwargs)


class TorchUse:
    """One call of a torch BN module."""

    def __init__(self, module: Any, own: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.module, self.own = module, own
        bound = inspect.signature(own).bind(*args, **kwargs)
        self.inputs = next(iter(bound.arguments.values()))
        self.x = ops.cast(self.inputs, keras.backend.result_type(str(self.inputs.dtype), "float32"))

    def batch(self) -> tuple[Any, Any]:
        """Mean and biased variance."""
        return batch_statistics(self.x, 1)

    def count(self) -> Any:
        """Values per channel."""
        return _values(self.x, 1)

    def normalised(self, mean: Any, variance: Any) -> Any:
        """What the module gives in eval mode with these statistics."""
        module, x = self.module, self.x
        outputs = ops.batch_normalization(
            x=x,
            mean=mean,
            variance=variance,
            axis=1,
            offset=None if module.bias is None else ops.cast(module.bias, x.dtype),
            scale=None if module.weight is None else ops.cast(module.weight, x.dtype),
            epsilon=module.eps,
        )
        return outputs.to(self.inputs.dtype)

    def textbook(self, mean: Any, variance: Any) -> None:  # noqa: ARG002
        """A torch module is asked by the formula anyway."""
        return

    def scale_and_offset(self) -> tuple[Any, Any] | None:
        """Weight and bias."""
        return self.module.weight, self.module.bias

    def locked(self) -> Any:
        """What the module gives in eval mode; one without statistics always uses the batch's."""
        module = self.module
        if module.running_mean is None:
            return self.normalised(*self.batch())
        return self.normalised(
            ops.cast(module.running_mean, self.x.dtype), ops.cast(module.running_var, self.x.dtype)
        )


# --- statistics -------------------------------------------------------------------------------


def batch_statistics(x: Any, axis: int) -> tuple[Any, Any]:
    """Mean and biased variance per channel, shape ``(channels,)`` each, in two passes."""
    axes = reduced(x, axis)
    # Around a value near the mean: neither E[x²] − E[x]² nor a float32 sum of large values is right
    # where the mean is far larger than the standard deviation.
    shift = ops.stop_gradient(ops.mean(x[:1], axis=axes, keepdims=True))
    deviations = x - shift
    offset = ops.mean(deviations, axis=axes, keepdims=True)
    if keras.backend.backend() == "torch" and not deviations.requires_grad:
        # In the deviations' own memory: two more tensors of that size cost more than the sums.
        squares = deviations.sub_(offset).square_()
    else:
        squares = ops.square(deviations - offset)
    variance = ops.mean(squares, axis=axes)
    return ops.reshape(shift + offset, (-1,)), variance


def reduced(x: Any, axis: int) -> list[int]:
    """All axes but that of the channels."""
    rank = len(x.shape)
    return [each for each in range(rank) if each != axis % rank]


def _values(x: Any, axis: int) -> Any:
    sizes = ops.shape(x)  # tensors where a trace leaves a size open
    whole = functools.reduce(lambda one, other: one * other, (sizes[a] for a in reduced(x, axis)))
    return ops.convert_to_tensor(whole, "int32")


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
