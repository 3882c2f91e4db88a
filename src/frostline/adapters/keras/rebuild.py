"""Build the folded model: copies of a Keras model's layers, called along the same graph.

Every layer is copied once, however often it is used. What goes where was decided in ``keras_fold``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import copied, float64
from frostline.adapters.keras.calls import graph_of, like_input
from frostline.adapters.keras.graph import is_site, walk
from frostline.types import Array, ModelError
from frostline.types.reasons import first_line

L = keras.layers

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _last(kernel: Array, scale: Array) -> Array:
    return kernel * scale


def _transposed(kernel: Array, scale: Array) -> Array:
    return kernel * scale[:, None]  # (..., output channels, input channels)


def _depthwise(kernel: Array, scale: Array) -> Array:
    return kernel * scale.reshape(kernel.shape[-2:])  # (..., channels, multiplier)


#: Linear layer -> its last kernel, and how a factor per output channel meets it. Exactly these
#: classes: a subclass may do more to its kernel than multiply with it.
LINEAR: Mapping[type, tuple[str, Callable[[Array, Array], Array]]] = {
    L.Dense: ("kernel", _last),
    L.Conv1D: ("kernel", _last),
    L.Conv2D: ("kernel", _last),
    L.Conv3D: ("kernel", _last),
    L.Conv1DTranspose: ("kernel", _transposed),
    L.Conv2DTranspose: ("kernel", _transposed),
    L.Conv3DTranspose: ("kernel", _transposed),
    L.DepthwiseConv1D: ("kernel", _depthwise),
    L.DepthwiseConv2D: ("kernel", _depthwise),
    L.SeparableConv1D: ("pointwise_kernel", _last),
    L.SeparableConv2D: ("pointwise_kernel", _last),
}


class Rebuild:
    """Builds the new model: every layer is copied once, however often it is used."""

    def __init__(
        self,
        paths: Mapping[int, str],
        factors: Mapping[int, tuple[Array, Array]],
        absorbing: Mapping[int, Any],
        shapes: Mapping[int, tuple[int | None, ...]],
        masked: bool,
        graphs: Mapping[int, Any],
    ) -> None:
        self.paths = paths
        self.factors = factors
        self.absorbing = absorbing
        self.shapes = shapes
        self.masked = masked
        self.graphs = graphs
        self.copies: dict[int, Any] = {}
        self.originals: dict[int, Any] = {}
        self.absorbed: list[str] = []
        self.replaced: list[str] = []

    def container(self, model: Any) -> Any:
        """Return the new form of a model with a graph; its weights are not written yet."""
        if id(model) not in self.copies:
            build = self._sequential if isinstance(model, keras.Sequential) else self._functional
            self.copies[id(model)] = build(model)
        return self.copies[id(model)]

    def _functional(self, model: Any) -> Any:
        inputs = keras.tree.map_structure(like_input, model._inputs_struct)
        table = dict(zip(map(id, model.inputs), keras.tree.flatten(inputs), strict=True))
        producers: dict[int, Any] = {}
        for node in nodes(model):
            if any(id(tensor) not in table for tensor in node.input_tensors):
                continue
            if id(node.operation) in self.factors:
                source = fed_with(node)
                taken = self._takes(producers.get(id(source)), node.operation)
                tensor = table[id(source)]
                outputs = [tensor if taken else self._affine(node.operation)(tensor)]
            else:
                args, kwargs = keras.tree.map_structure(_own, node.arguments.fill_in(table))
                if (graph := self.graphs.get(id(node.operation))) is not None:
                    given = [table[id(tensor)] for tensor in node.input_tensors]
                    args = (keras.tree.pack_sequence_as(graph._inputs_struct, given),)
                    kwargs = {}
                outputs = keras.tree.flatten(self._operation(node.operation)(*args, **kwargs))
            for old, new in zip(node.outputs, outputs, strict=True):
                table[id(old)] = new
                producers[id(old)] = node.operation
        outputs = keras.tree.map_structure(lambda old: table[id(old)], model._outputs_struct)
        return keras.Model(inputs, outputs, name=model.name)

    def _sequential(self, model: Any) -> Any:
        struct = graph_of(model)._inputs_struct  # type: ignore[union-attr]
        if not isinstance(struct, keras.KerasTensor):
            raise ModelError(
                f"'{self.paths.get(id(model), model.name)}' cannot be folded: a sequential model "
                "with several inputs; write it as a functional model. "
                f"Received: {len(keras.tree.flatten(struct))} inputs"
            )
        kept, before = [like_input(struct)], None
        for layer in model.layers:
            if id(layer) not in self.factors:
                kept.append(self._operation(layer))
            elif not self._takes(before, layer):
                kept.append(self._affine(layer))
            before = layer
        return keras.Sequential(kept, name=model.name)

    def _takes(self, before: Any, site: Any) -> bool:
        """Whether the layer before takes ``site``; if not, a layer of its own will."""
        taken = id(before) in self.absorbing
        (self.absorbed if taken else self.replaced).append(self.paths[id(site)])
        return taken

    def _operation(self, operation: Any) -> Any:
        """The copy of anything but a BN layer that is folded."""
        inner = followed(operation, self.graphs)
        if inner is operation or id(operation) in self.graphs:
            return self.container(inner)
        key = id(operation)
        if key not in self.copies and inner is not None:
            self.copies[key] = L.TimeDistributed(
                self.container(inner), name=operation.name, dtype=operation.dtype_policy
            )
        elif key not in self.copies:
            self.copies[key] = self._copy(operation)
            self.originals[key] = operation
        return self.copies[key]

    def _copy(self, operation: Any) -> Any:
        if type(operation) is L.Lambda:  # its config holds bytecode; the function itself is at hand
            return L.Lambda(
                operation.function,
                output_shape=operation._output_shape,
                mask=operation.mask,
                arguments=operation.arguments,
                name=operation.name,
                dtype=operation.dtype_policy,
            )
        try:
            config = operation.get_config()
            if id(operation) in self.absorbing:
                config["use_bias"] = True
                for entry in config:  # they speak about the kernel before folding, and training
                    if entry.endswith(("_regularizer", "_constraint")):
                        config[entry] = None
            return type(operation).from_config(config)
        except Exception as error:  # a user's class: anything can happen
            raise ModelError(
                f"'{self._path(operation)}' cannot be copied from its configuration "
                f"({first_line(error)}); register a class of your own that is in it, "
                "@keras.saving.register_keras_serializable(), and give it a get_config() that its "
                f"constructor takes. Received: {type(operation).__name__}"
            ) from error

    def _affine(self, site: Any) -> Any:
        """A layer that computes ``s x + t`` along the axis of ``site``, under its name."""
        key = id(site)
        if key in self.copies:
            return self.copies[key]
        shape = self.shapes[key]
        axis, settings = site.axis % len(shape), {"name": site.name, "dtype": site.dtype_policy}
        last = axis == len(shape) - 1
        if self.masked and not last:
            raise ModelError(
                f"'{self.paths[key]}' cannot be folded: no plain layer scales axis {axis} and "
                f"passes a mask on. Received: a BN layer with axis={site.axis} and masks"
            )
        if not last and None in shape[1:]:
            raise ModelError(
                f"'{self.paths[key]}' cannot be folded: no plain layer scales and shifts axis "
                f"{axis} of inputs whose size is not fixed. Received: input shape {shape}"
            )
        if self.masked:
            # The one plain layer that passes masks on; its kernel is a diagonal matrix.
            made: Any = L.Dense(shape[axis], **settings)
        elif last and len(shape) == 4:
            made = L.DepthwiseConv2D(1, data_format="channels_last", **settings)
        else:
            axes = _LETTERS[: len(shape)]
            # Over all axes, if not over the last: Keras on TensorFlow adds a bias of shape (n, 1)
            # along the last axis where that one has length n too.
            bias = axes[axis] if last else axes[1:]
            made = L.EinsumDense(
                f"{axes},{axes[axis]}->{axes}", shape[1:], bias_axes=bias, **settings
            )
        self.copies[key], self.originals[key] = made, site
        return made

    def write_weights(self) -> None:
        """Copy all weights into the new layers, folded ones in float64."""
        for key, original in self.originals.items():
            copy = self.copies[key]
            if key in self.factors:
                scale, shift = self.factors[key]
                kernel = np.diag(scale) if isinstance(copy, L.Dense) else scale
                copy.kernel.assign(kernel.reshape(copy.kernel.shape))
                along = [1] * len(copy.bias.shape)
                along[original.axis % len(self.shapes[key]) - 1 if len(along) > 1 else 0] = -1
                copy.bias.assign(np.broadcast_to(shift.reshape(along), copy.bias.shape).copy())
            elif key in self.absorbing:
                self._write_absorbing(original, copy)
            elif isinstance(original, keras.Layer):
                self._write_copy(original, copy)

    def _write_absorbing(self, original: Any, copy: Any) -> None:
        scale, shift = self.factors[id(self.absorbing[id(original)])]
        name, times = LINEAR[type(original)]
        bias = 0.0 if original.bias is None else float64(original.bias)
        if name != "kernel":
            copy.depthwise_kernel.assign(copied(original.depthwise_kernel))
        getattr(copy, name).assign(times(float64(getattr(original, name)), scale))
        copy.bias.assign(bias * scale + shift)

    def _write_copy(self, original: Any, copy: Any) -> None:
        old, new = original.variables, copy.variables
        if [tuple(v.shape) for v in old] != [tuple(v.shape) for v in new]:
            raise ModelError(
                f"'{self._path(original)}' cannot be copied: made anew from its configuration it "
                f"has other weights. Received: {type(original).__name__} with {len(old)} variables "
                f"and a copy with {len(new)}"
            )
        for source, target in zip(old, new, strict=True):
            target.assign(copied(source))
        for layer in (copy, *(place.layer for place in walk(copy))):
            if hasattr(layer, "finalize_state"):  # Normalization: constants made of its weights
                layer.finalize_state()

    def _path(self, operation: Any) -> str:
        return self.paths.get(id(operation), operation.name)


def _own(value: Any) -> Any:
    """A constant copy of a weight or tensor that a ``call`` left in its graph.

    Shared, training the model would change the folded one; JAX even deletes the old values.
    """
    if isinstance(value, keras.Variable) or keras.ops.is_tensor(value):
        return keras.ops.convert_to_tensor(copied(value), dtype=value.dtype)
    return value


def followed(operation: Any, graphs: Mapping[int, Any]) -> Any:
    """The model with a graph that an operation is or calls for each step; ``None``: neither.

    Args:
        operation: A layer or operation.
        graphs: ``id`` of a layer -> the graph that was made of its ``call``.
    """
    known = id(operation) in graphs or type(operation) is not L.TimeDistributed
    inner = operation if known else operation.layer
    inner = graphs.get(id(inner), inner)
    return inner if graph_of(inner) is not None else None


def factors(site: Any) -> tuple[Array, Array]:
    """Scale and shift of a BN layer at its stored statistics, shape ``(channels,)``, float64."""
    mean, variance = float64(site.moving_mean), float64(site.moving_variance)
    gamma = np.ones_like(mean) if site.gamma is None else float64(site.gamma)
    beta = np.zeros_like(mean) if site.beta is None else float64(site.beta)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + site.epsilon)
        return scale, beta - mean * scale


def takes(layer: Any, site: Any, rank: int) -> bool:
    """Whether ``site`` normalises the output channels of ``layer``, with nothing in between."""
    if type(layer) not in LINEAR or site is None or not is_site(site):
        return False
    channels_first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return (
        layer.activation is keras.activations.linear
        and site.axis % rank == (1 if channels_first else rank - 1)
        and site.compute_dtype == layer.compute_dtype
        and not getattr(layer, "lora_enabled", False)
        and getattr(layer, "quantization_mode", None) is None
    )


def fed_with(node: Any) -> Any:
    """The tensor that a BN layer normalises in one of its calls."""
    return node.arguments.args[0] if node.arguments.args else node.arguments.kwargs["inputs"]


def nodes(graph: Any) -> Iterator[Any]:
    """The calls of a graph in execution order, without its inputs."""
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.operation is not None and not node.is_input:
                yield node
