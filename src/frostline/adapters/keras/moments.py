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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from frostline.adapters.keras.calls import filled, graph_of, record
from frostline.adapters.keras.compile import compiled, return_memory
from frostline.adapters.keras.forward_pass import called, tensors
from frostline.adapters.keras.graph import is_site, walk
from frostline.adapters.keras.overridden import overridden
from frostline.adapters.keras.pipeline import prepared
from frostline.adapters.keras.recurrent import looping, step_by_step
from frostline.adapters.keras.statistics import chunk_sums, of_batch, rows_of
from frostline.adapters.keras.watch import STATISTICS
from frostline.adapters.protocol import Population, Source
from frostline.adapters.staged import in_stages, with_batch_statistics
from frostline.adapters.together import ALONE, Together
from frostline.data.batch import Batch
from frostline.graph.schedule import Program, closed, schedule
from frostline.numerics.stats import Moments
from frostline.types import Array, DataError, ModelError, as_float64
from frostline.types.reasons import first_line

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
        self._programs: dict[frozenset[str], tuple[Program, ...]] = {}
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

    def programs(self, inputs: int, paths: Collection[str]) -> tuple[Program, ...]:
        """The stages in order; ``inputs`` is the number of arrays in a batch of model inputs.

        XLA compiles each of them longer than it runs: on JAX those of all sites serve any of them.
        """
        chosen = frozenset(self.layers if keras.backend.backend() == "jax" else paths)
        if chosen not in self._programs:
            steps = (
                self._recorded
                if self._recorded is not None
                else closed(self._call_model, self._chosen(), inputs)
            )
            measured = [
                replace(step, sites=tuple(path for path in step.sites if path in chosen))
                for step in steps
            ]
            first, *others = schedule(measured)
            # An input that no site depends on is handed over all the same.
            self._programs[chosen] = (replace(first, takes=tuple(range(inputs))), *others)
        return self._programs[chosen]

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
                    sums[path].append(chunk_sums(x, self.layers[path].axis, mask))
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
        try:
            return in_stages(self, source, paths, memory_limit, self._ranks)
        finally:
            return_memory()  # what waited between stages, which the next compiler adds to

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
            entry = chunk_sums(x, layer.axis, mask)
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
    offset, variance = of_batch(*entry)
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


def _can_share(layer: Any, x: Any) -> bool:
    """Whether sums and outputs of a layer can come from one tensor, as those of torch can."""
    if keras.backend.backend() != "torch" or x.requires_grad:
        return False
    return bool(layer.axis % x.ndim == x.ndim - 1 and x.is_contiguous() and x.numel())


def _summed_and_normalised(layer: Any, x: Any) -> tuple[tuple[Any, Any, Any, Any], Any]:
    """On torch: :func:`chunk_sums` and :func:`_normalised`; both begin with the deviations."""
    import torch

    from frostline.adapters.torch.calls import pieces

    rows, shift = rows_of(x)
    deviations, sums = torch.empty_like(rows), []
    parts = pieces(deviations)
    memory = torch.empty_like(parts[0])
    for given, part in zip(pieces(rows), parts, strict=True):
        torch.sub(given, shift, out=part)
        sums.append((part.sum(1), torch.square(part, out=memory[: len(part)]).sum(1)))
    first, second = (torch.cat(each) for each in zip(*sums, strict=True))
    entry = ops.convert_to_tensor(rows.shape[0] * rows.shape[1], "int32"), shift, first, second
    offset, variance = of_batch(*entry)
    scale = torch.rsqrt(variance + layer.epsilon)
    if layer.gamma is not None:
        scale = scale * ops.cast(layer.gamma, shift.dtype)
    rest = -offset * scale
    if layer.beta is not None:
        rest = rest + ops.cast(layer.beta, shift.dtype)
    outputs = torch.addcmul(rest, deviations, scale, out=deviations).reshape(x.shape)
    return entry, ops.cast(outputs, layer.compute_dtype)


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
