"""Population moments of what the BN sites of a Keras model see, on TensorFlow, JAX and torch.

The moments of a batch are formed where the tensor is, in float32, as sums of deviations from a
value near the mean over chunks of at most :data:`CHUNK` values; the chunks are added up in float64
on the host. That costs one pass over the tensor, moves little, and keeps channels whose mean is far
larger than their standard deviation.

Every forward pass runs in a ``StatelessScope``: whatever a layer assigns is thrown away.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from frostline.adapters.keras.calls import filled, graph_of, record
from frostline.adapters.keras.compile import compiled
from frostline.adapters.keras.forward_pass import called, tensors
from frostline.adapters.keras.graph import is_site, walk
from frostline.adapters.keras.overridden import overridden
from frostline.adapters.keras.pipeline import prepared
from frostline.adapters.keras.recurrent import looping, step_by_step
from frostline.adapters.keras.watch import STATISTICS
from frostline.adapters.protocol import Population, Source
from frostline.adapters.staged import in_stages, with_batch_statistics
from frostline.adapters.together import ALONE, Together
from frostline.data.batch import Batch
from frostline.graph.schedule import Program, closed, schedule
from frostline.numerics.stats import Moments
from frostline.types import Array, DataError, ModelError, as_float64
from frostline.types.reasons import first_line

#: Values added up in float32 before float64 takes over. Random rounding of 256 terms stays below
#: 1e-6 of their sum and averages out over the chunks.
CHUNK = 256

#: Values in one sample from which on a batch of them does not fit into a processor's cache.
LARGE_SAMPLE = 1 << 15

#: Batch moments of the sites, one entry per use of the layer.
Seen = Mapping[str, Sequence[Moments]]
StageFunction = Callable[[Sequence[Array]], tuple[tuple[Array, ...], Seen]]


class MomentRecorder:
    """Measures and stores the statistics of chosen sites of one model.

    Args:
        model: A built Keras model.
        paths: Paths of Keras BN layers, as in ``frostline.sites``.
        ranks: Processes that measure together.

    Raises:
        ModelError: A path is not a built Keras BN layer.
    """

    def __init__(self, model: Any, paths: Sequence[str], ranks: Together = ALONE) -> None:
        self.model, self._ranks = model, ranks
        layers = {place.path: place.layer for place in walk(model)}
        self._sites = [layer for layer in layers.values() if is_site(layer)]
        self.layers = {path: _require_site(path, layers.get(path)) for path in paths}
        self._structure: Any = None
        self._programs: tuple[Program, ...] | None = None
        self._kept: dict[Any, Callable[..., Any]] = {}
        self._recorded = record(model, self._chosen())
        self._loops = looping(model)

    def _chosen(self) -> dict[int, str]:
        return {id(layer): path for path, layer in self.layers.items()}

    @property
    def has_graph(self) -> bool:
        """Whether activations can be carried from site to site; else the data are read again."""
        return self._recorded is not None

    def start(self, x: Any) -> tuple[Array, ...]:
        """The arrays that the first stage takes, from one batch of model inputs.

        Raises:
            DataError: The inputs do not fit the model.
        """
        x = prepared(self.model, x)[0]
        if not self.has_graph:
            self._structure = x
            return tuple(keras.tree.flatten(x))
        graph: Any = graph_of(self.model)
        try:
            arrays = tuple(_to_numpy(leaf) for leaf in graph._standardize_inputs(x))
        except (ValueError, TypeError) as error:
            raise DataError(f"The data do not fit the model's inputs: {error}") from error
        for array, tensor in zip(arrays, graph.inputs, strict=False):
            wanted, given = tuple(tensor.shape), array.shape
            if len(wanted) != len(given) or any(
                side is not None and side != found
                for side, found in zip(wanted[1:], given[1:], strict=True)
            ):
                raise DataError(
                    f"The data do not fit the model's inputs: '{tensor.name}' has shape {wanted}. "
                    f"Received: shape {given}"
                )
        return arrays

    def programs(self, inputs: int) -> tuple[Program, ...]:
        """The stages in order; ``inputs`` is the number of arrays in a batch of model inputs."""
        if self._programs is None:
            steps = (
                self._recorded
                if self._recorded is not None
                else closed(self._call_model, self._chosen(), inputs)
            )
            first, *others = schedule(steps)
            # An input that no site depends on is handed over all the same.
            self._programs = (replace(first, takes=tuple(range(inputs))), *others)
        return self._programs

    def _call_model(self, leaves: Sequence[Any]) -> Any:
        packed = keras.tree.pack_sequence_as(self._structure, list(leaves))
        return called(self.model, packed, False)

    def stage(self, program: Program) -> StageFunction:
        """Compile one stage: what it takes -> (what the next takes, moments of its sites)."""

        def run(values: Sequence[Any]) -> tuple[list[Any], dict[str, list[Any]]]:
            table = dict(zip(program.takes, values, strict=True))
            sums: dict[str, list[Any]] = {path: [] for path in program.paths}
            hidden = {
                path
                for step, _, look in program.steps
                if look and not step.open
                for path in step.sites
                if path in sums
            }
            for step, runs, look in program.steps:
                args, kwargs = filled((step.args, dict(step.kwargs)), table)
                if look and step.open:
                    (path,) = step.sites
                    x, mask = _bn_arguments(self.layers[path], args, kwargs)
                    sums[path].append(_sums(x, self.layers[path].axis, mask))
                if runs:
                    watched = {} if step.open else {path: self.layers[path] for path in hidden}
                    with _watching(watched, sums, normalise=False):
                        outputs = step.operation(*args, **kwargs)
                    table |= zip(step.writes, keras.tree.flatten(outputs), strict=False)
            return [table[slot] for slot in program.gives], sums

        compiled_stage = self._compiled(("stage", id(program)), run, self._variables(program))

        def stage(values: Sequence[Any]) -> tuple[tuple[Any, ...], Seen]:
            try:
                outputs, sums = compiled_stage(values)
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"the model does not take these data: {first_line(error)} "
                    f"Received: arrays of shapes {[tuple(np.shape(value)) for value in values]}"
                ) from error
            return tuple(_held(output) for output in outputs), _moments(sums)

        return stage

    def batch(self) -> Callable[[Any], Seen]:
        """Compile one pass with batch statistics at all chosen sites: a batch -> their moments."""

        def run(values: Sequence[Any]) -> dict[str, list[Any]]:
            sums: dict[str, list[Any]] = {path: [] for path in self.layers}
            with _watching(self.layers, sums, normalise=True):
                self._call_model(values)
            return sums

        compiled_batch = self._compiled(("batch",), run, self.model.variables)

        def run_batch(batch: Batch) -> Seen:
            self._structure = prepared(self.model, batch.x)[0]
            return _moments(compiled_batch(keras.tree.flatten(self._structure)))

        return run_batch

    def sequential(self, source: Source, paths: Sequence[str], memory_limit: int) -> Population:
        """Population moments of some sites, stored on the way."""
        return in_stages(self, source, paths, memory_limit, self._ranks)

    def batchwise(self, source: Source, paths: Sequence[str]) -> Population:
        """Population moments of some sites from one pass with batch statistics."""
        return with_batch_statistics(self.batch(), source, paths, self._ranks)

    def _variables(self, program: Program) -> list[Any]:
        if not self.has_graph:
            return list(self.model.variables)
        layers = [step.operation for step, _, _ in program.steps]
        found = {
            id(variable): variable
            for layer in layers
            if isinstance(layer, keras.Layer)
            for variable in layer.variables
        }
        return list(found.values())

    def _compiled(
        self, kind: tuple[Any, ...], function: Callable[[Any], Any], variables: list[Any]
    ) -> Callable[..., Any]:
        """Compile, or hand out what was compiled for the same variables and flags before."""
        eager = bool(getattr(self.model, "run_eagerly", False))
        # Gamma and beta of our layers, and which of them a trace reads, go by `trainable`.
        flags = tuple(bool(layer.trainable) for layer in self._sites)
        key = (*kind, eager, flags, tuple(map(id, variables)))
        if key not in self._kept:
            self._kept[key] = self._newly_compiled(function, variables, eager)
        return self._kept[key]

    def _newly_compiled(
        self, function: Callable[[Any], Any], variables: list[Any], eager: bool
    ) -> Callable[..., Any]:
        def forward(mapping: Any, _traced: bool, _blend: Any, values: Any, *_: None) -> Any:
            scope = keras.StatelessScope(state_mapping=mapping, collect_losses=True)
            with scope, step_by_step(self._loops):
                return function(values)

        run = compiled(forward, variables, [], slope=False, eager=eager)
        unused = ops.zeros(())  # a stage has no λ, and making a zero costs as much as a small call
        return lambda values: run([], unused, tensors(list(values)), None, None)

    # --- what is stored -----------------------------------------------------------------------

    def stored(self, path: str) -> tuple[Array, Array]:
        """Stored mean and variance of a site, float64, shape ``(channels,)`` each."""
        layer = self.layers[path]
        return (
            as_float64(_to_numpy(layer.moving_mean.value)),
            as_float64(_to_numpy(layer.moving_variance.value)),
        )

    def epsilon(self, path: str) -> float:
        """What the site adds to the variance."""
        return float(self.layers[path].epsilon)

    def store(self, path: str, mean: Array, variance: Array) -> None:
        """Store population statistics in every variable that holds a copy of them.

        Batch renormalisation keeps standard deviations of its own, from which the next training
        step would restore the old variance; a debiased average would start from nothing.

        Args:
            path: The site.
            mean: Shape ``(channels,)``, float64.
            variance: Biased, shape ``(channels,)``, float64.
        """
        layer = self.layers[path]
        _assign(layer.moving_mean, mean)
        _assign(layer.moving_variance, variance)
        if getattr(layer, "renorm", False):
            stddev = np.sqrt(variance + layer.epsilon)
            _assign(layer.moving_stddev, stddev)
            _assign(layer.renorm_mean, mean)
            _assign(layer.renorm_stddev, stddev)
        if hasattr(layer, "continue_average"):
            layer.continue_average()

    def snapshot(self) -> Callable[[], None]:
        """Remember every variable of the chosen sites; returns what puts them back, bit for bit."""
        before = [
            (variable, np.array(_to_numpy(variable.value)))
            for layer in self.layers.values()
            for variable in (*_statistics(layer), *_debias_state(layer))
        ]

        def restore() -> None:
            for variable, value in before:
                _assign(variable, value)

        return restore


def _statistics(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in STATISTICS if getattr(layer, name, None) is not None]


def _debias_state(layer: Any) -> list[Any]:
    """Variables of our layer's debiased average; none of gamma and beta, which may train on."""
    state = getattr(layer, "_state", None)
    if state is None or state.unseen is None:
        return []
    return [state.biased_mean, state.biased_variance, state.unseen]


def _require_site(path: str, layer: Any) -> Any:
    if not isinstance(layer, keras.layers.BatchNormalization):
        raise ModelError(f"'{path}' is not a Keras BN layer of this model. Received: {layer!r}")
    if layer.moving_mean is None:
        raise ModelError(
            f"Layer '{path}' is not built yet, so it has no statistics; call the model on one "
            "batch first. Received: an unbuilt layer"
        )
    return layer


def _bn_arguments(layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Inputs and mask of a call of a BN layer, however they were passed."""
    signature = inspect.signature(type(layer).call)
    bound = signature.bind(layer, *args, **kwargs).arguments
    named = {**bound, **bound.get("kwargs", {})}
    return next(iter(list(bound.values())[1:])), named.get("mask")


@contextmanager
def _watching(
    layers: Mapping[str, Any], sums: dict[str, list[Any]], *, normalise: bool
) -> Iterator[None]:
    """Note the input of each call of the layers; with ``normalise`` use its batch statistics."""

    def watch(path: str, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            x, mask = _bn_arguments(layer, args, kwargs)
            if normalise and mask is None and _can_share(layer, x):
                entry, outputs = _summed_and_normalised(layer, x)
                sums[path].append(entry)
                return outputs
            entry = _sums(x, layer.axis, mask)
            sums[path].append(entry)
            return _normalised(layer, x, entry) if normalise else call(*args, **kwargs)

        return watched

    with overridden(
        (layer, "call", watch(path, layer, layer.call)) for path, layer in layers.items()
    ):
        yield


def _normalised(layer: Any, x: Any, entry: tuple[Any, ...]) -> Any:
    """What the layer gives with the statistics of this batch (blend λ = 1)."""
    shift, dtype = entry[1], entry[1].dtype
    offset, variance = _of_batch(*entry)
    outputs = ops.batch_normalization(
        x=ops.cast(x, dtype),
        mean=shift + offset,
        variance=variance,
        axis=layer.axis,
        offset=None if layer.beta is None else ops.cast(layer.beta, dtype),
        scale=None if layer.gamma is None else ops.cast(layer.gamma, dtype),
        epsilon=layer.epsilon,
    )
    return ops.cast(outputs, layer.compute_dtype)


def _of_batch(count: Any, shift: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """How far the mean is from ``shift``, and the biased variance."""
    rest = ops.maximum(ops.cast(count, shift.dtype), 1)
    offset = ops.sum(first, axis=0) / rest
    return offset, ops.maximum(ops.sum(second, axis=0) / rest - ops.square(offset), 0)


def _can_share(layer: Any, x: Any) -> bool:
    """Whether sums and outputs of a layer can come from one tensor, as those of torch can."""
    if keras.backend.backend() != "torch" or x.requires_grad:
        return False
    return bool(layer.axis % x.ndim == x.ndim - 1 and x.is_contiguous() and x.numel())


def _summed_and_normalised(layer: Any, x: Any) -> tuple[tuple[Any, Any, Any, Any], Any]:
    """On torch: :func:`_sums` and :func:`_normalised`, which both begin with the deviations."""
    import torch

    from frostline.adapters.torch.calls import pieces

    rows, shift = _rows(x)
    deviations, sums = torch.empty_like(rows), []
    parts = pieces(deviations)
    memory = torch.empty_like(parts[0])
    for given, part in zip(pieces(rows), parts, strict=True):
        torch.sub(given, shift, out=part)
        sums.append((part.sum(1), torch.square(part, out=memory[: len(part)]).sum(1)))
    first, second = (torch.cat(each) for each in zip(*sums, strict=True))
    entry = ops.convert_to_tensor(rows.shape[0] * rows.shape[1], "int32"), shift, first, second
    offset, variance = _of_batch(*entry)
    scale = torch.rsqrt(variance + layer.epsilon)
    if layer.gamma is not None:
        scale = scale * ops.cast(layer.gamma, shift.dtype)
    rest = -offset * scale
    if layer.beta is not None:
        rest = rest + ops.cast(layer.beta, shift.dtype)
    outputs = torch.addcmul(rest, deviations, scale, out=deviations).reshape(x.shape)
    return entry, ops.cast(outputs, layer.compute_dtype)


def _rows(x: Any) -> tuple[Any, Any]:
    """``(chunks, values, channels)``, float32 at least, and a value near the mean.

    Any such value will do; the middle column spares a pass over the tensor.
    """
    x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
    size = _chunk(tuple(x.shape[1:-1]))
    rows = ops.reshape(x, (-1, size, x.shape[-1]))
    return rows, ops.mean(rows[:, size // 2], axis=0)


def _sums(x: Any, axis: int, mask: Any) -> tuple[Any, Any, Any, Any]:
    """Count, shift ``(c,)`` and chunk sums of ``x - shift`` and of its square, ``(chunks, c)``."""
    rank = len(x.shape)
    if axis % rank != rank - 1:
        if mask is not None:
            raise ModelError(
                "a masked BN layer can be measured only with the channels on the last axis. "
                f"Received: axis={axis}"
            )
        x = ops.moveaxis(x, axis, -1)
    rows, shift = _rows(x)
    size = rows.shape[1]
    if mask is None:
        count = ops.shape(rows)[0] * size
        first, second = _chunk_sums(rows, shift, _blocks(tuple(x.shape[1:])))
    else:
        inside = ops.broadcast_to(ops.cast(mask, "bool"), ops.shape(x)[:-1])
        inside = ops.reshape(inside, (-1, size, 1))
        count = ops.sum(ops.cast(inside, "int32"))
        total = ops.sum(ops.where(inside, rows, 0), axis=(0, 1))
        shift = total / ops.maximum(ops.cast(count, rows.dtype), 1)
        deviations = ops.where(inside, rows - shift, 0)
        first = ops.sum(deviations, axis=1)
        second = ops.sum(ops.square(deviations), axis=1)
    return ops.convert_to_tensor(count, "int32"), shift, first, second


def _chunk_sums(rows: Any, shift: Any, blocks: int) -> tuple[Any, Any]:
    """Sums of the deviations and of their squares over axis 1, block by block."""
    if keras.backend.backend() == "torch" and not rows.requires_grad:
        from frostline.adapters.torch.calls import deviations as in_one_memory, pieces

        parts = [
            (part.sum(1), part.square_().sum(1)) for part in in_one_memory(pieces(rows), shift)
        ]
        first, second = map(list, zip(*parts, strict=True))
        return ops.concatenate(first), ops.concatenate(second)
    first, second = [], []
    for piece in [rows] if blocks == 1 else _cut(rows, blocks):
        deviations = piece - shift
        first.append(ops.sum(deviations, axis=1))
        second.append(ops.sum(ops.square(deviations), axis=1))
    if blocks == 1:
        return first[0], second[0]
    return ops.concatenate(first), ops.concatenate(second)


def _cut(rows: Any, blocks: int) -> list[Any]:
    """TensorFlow: pieces of nearly the same length along axis 0, however long it is."""
    import tensorflow as tf

    ends = tf.shape(rows)[0] * tf.range(blocks + 1) // blocks
    return list(tf.split(rows, ends[1:] - ends[:-1], num=blocks))


def _blocks(sample: tuple[int | None, ...]) -> int:
    """Into how many pieces a batch is cut, so that its deviations stay in the processor's cache.

    For TensorFlow: XLA fuses the operations, and torch has pieces of its own.
    """
    if keras.backend.backend() != "tensorflow":
        return 1
    values = math.prod(length or 0 for length in sample)  # 0: an unknown size counts as small
    return 8 if values >= LARGE_SAMPLE else 1


def _chunk(spatial: tuple[int | None, ...]) -> int:
    """How many neighbouring values are added up in float32; divides the values per sample."""
    size = 1
    for length in reversed(spatial):
        if length is None:
            break
        if size * length > CHUNK:
            return size * max(n for n in range(1, CHUNK // size + 1) if length % n == 0)
        size *= length
    return size


def _moments(sums: Mapping[str, Sequence[Any]]) -> dict[str, list[Moments]]:
    return {path: [_add_up(*entry) for entry in entries] for path, entries in sums.items()}


def _add_up(count: Any, shift: Any, first: Any, second: Any) -> Moments:
    """Moments from chunk sums: Σ(x−s) and Σ(x−s)², float64; s is so near that nothing cancels."""
    number = int(_to_numpy(count))
    shift = as_float64(_to_numpy(shift))
    if number == 0:
        return Moments(0, np.zeros_like(shift), np.zeros_like(shift))
    total = _to_numpy(first).sum(axis=0, dtype=np.float64)
    squares = _to_numpy(second).sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # `finite` tells, the caller decides
        m2 = np.maximum(squares - np.square(total) / number, 0.0)
        return Moments(number, shift + total / number, m2)


def _held(tensor: Any) -> Any:
    """What the next stage takes, in the host's memory and without a copy where it is there already.

    TensorFlow copies an array that it is given, and numpy one that it takes from TensorFlow; Keras
    on torch copies both ways. Numpy has no bfloat16.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow" and "CPU" in tensor.device:
        return tensor
    if backend == "torch" and tensor.device.type == "cpu" and tensor.dtype.itemsize != 2:
        return tensor.detach()
    return _to_numpy(tensor)


def _to_numpy(tensor: Any) -> Array:
    if keras.backend.backend() == "torch":
        return np.asarray(ops.convert_to_numpy(tensor))
    return np.asarray(tensor)  # a view; Keras would copy


def _assign(variable: Any, value: Array) -> None:
    variable.assign(ops.convert_to_tensor(value, dtype=variable.dtype))
