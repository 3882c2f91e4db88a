"""The Keras view: what the rest of Frostline may ask of a Keras model, on any backend.

Forward passes run inside ``keras.StatelessScope``, which catches every assignment, so a
training-mode pass updates nothing. They are compiled once per phase, set of `trainable` flags and
batch shape on TensorFlow and JAX, and run eagerly on torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import keras
import numpy as np

from frostline.models import keras_edit, keras_fold, keras_graph, keras_split, keras_state
from frostline.types import Boundary, DataError, Policy, Site


class KerasView:
    """A Keras model seen in numpy and dataclasses; see :class:`frostline.models.ModelView`."""

    framework = "keras"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.backend: str = keras.backend.backend()
        self._steps: dict[Any, Callable[..., Any]] = {}

    def sites(self) -> tuple[Site, ...]:
        """Every BN layer, in execution order where the graph is known."""
        return keras_graph.sites(self.model)

    def boundary(self, reference: Any) -> Boundary:
        """Translate a layer name, path, index, fraction or layer into a boundary."""
        return keras_graph.resolve(self.model, reference)

    def preserved(self) -> AbstractContextManager[None]:
        """Restore every variable, flag, momentum and compile state on any exit, bit for bit."""
        return keras_state.preserved(self.model)

    def forward(self, x: Any, *, training: bool, step: int = 0) -> Any:
        """Return the outputs of one batch; no variable of the model changes.

        Args:
            x: Inputs of one batch, in the structure that the model takes.
            training: Phase 1 (dropout on, batch statistics where the layers use them) or phase 0.
            step: Number of the batch: dropout masks are the same in every call for the same step
                and differ between steps.

        Returns:
            Arrays in the structure of the model's outputs, float32.
        """
        outputs, _ = self._run(x, None, None, training, step)
        return outputs

    def score(
        self, x: Any, y: Any, sample_weight: Any = None, *, training: bool, step: int = 0
    ) -> tuple[Any, float | None]:
        """Return outputs and compiled loss of one batch; no variable of the model changes.

        The loss is the compiled one with its additional losses (regularizers), or ``None`` when the
        model is not compiled with a loss. Arguments are those of :meth:`forward`.

        Raises:
            DataError: The compiled loss does not take these labels.
        """
        outputs, loss = self._run(x, y, sample_weight, training, step)
        return outputs, None if loss is None else float(loss)

    def objective(self) -> tuple[str | None, bool | None]:
        """Return the snake-case name of the compiled loss and its ``from_logits``."""
        loss = self.model.loss if getattr(self.model, "compiled", False) else None
        if loss is None or isinstance(loss, (dict, list, tuple)):
            return None, None
        if isinstance(loss, str):
            return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", loss).lower(), None
        name = getattr(loss, "__name__", None) or type(loss).__name__
        snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        return snake, getattr(loss, "_fn_kwargs", {}).get("from_logits")

    def evaluate(self, batches: Iterable[tuple[Any, ...]]) -> Mapping[str, float]:
        """Run the model's own ``evaluate``; metric states come back untouched.

        Args:
            batches: ``(x, y)`` or ``(x, y, sample_weight)`` tuples.

        Returns:
            Metric name -> value with ``loss``; empty when the model is not compiled.
        """
        if not getattr(self.model, "compiled", False):
            return {}
        collected = list(batches)
        with keras_state.preserved(self.model), _readable_labels(self.model, _labels(collected)):
            logs = self.model.evaluate(_Collected(collected), verbose=0, return_dict=True)
        return {name: float(value) for name, value in logs.items()}

    def compiled(self) -> bool:
        """Whether the model is compiled for training."""
        return bool(getattr(self.model, "compiled", False))

    def set_frozen(
        self, boundary: Boundary, *, before: bool, frozen: bool, params: bool, statistics: bool
    ) -> tuple[keras_edit.Counts, Callable[[], None]]:
        """Freeze or thaw one side of a boundary; returns what changed and how to take it back."""
        flags = keras_edit.flags(self.model)
        counts = keras_edit.set_frozen(
            self.model,
            boundary,
            before=before,
            frozen=frozen,
            params=params,
            statistics=statistics,
        )
        return counts, lambda: keras_edit.set_flags(flags)

    def convert(self, *, version: str | None, policy: Policy | None, debias: bool | None) -> int:
        """Turn stock BN layers into ours, in place; returns how many BN layers there are."""
        return keras_edit.convert(self.model, version=version, policy=policy, debias=debias)

    def restore(self) -> int:
        """Turn our BN layers back into stock ones, in place; returns how many."""
        return keras_edit.to_stock(self.model)

    def fold(self) -> keras_fold.Folded:
        """Fold every BN layer at its stored statistics; the outcome is a new model."""
        return keras_fold.fold(self.model)

    def split(self, at: Any = None, *, sample: Any = None) -> keras_split.Parts:
        """Cut the model into its frozen prefix and the rest, which share its layers."""
        return keras_split.split(self.model, at, sample=sample)

    # --- the step -----------------------------------------------------------------------------

    def _run(self, x: Any, y: Any, weight: Any, training: bool, step: int) -> tuple[Any, Any]:
        model = self.model
        x, y, weight = (_tensors(part) for part in (x, y, weight))
        self._build(x)
        with_loss = y is not None and getattr(model, "compiled", False) and model.loss is not None
        # What a compiled step holds as a constant; a step for other constants is another step.
        flags = tuple(
            (bool(place.layer.trainable), getattr(place.layer, "policy", None))
            for place in keras_graph.walk(model)
        )
        objective = getattr(model, "_compile_loss", None) if with_loss else None
        key = (training, objective, weight is not None, flags)
        if key not in self._steps:
            self._steps[key] = _compiled(model, training, with_loss)
        with _fixed_randomness(model, step), _readable_labels(model, y):
            if with_loss:
                self._build_loss(x, y)
            outputs, loss = self._steps[key](x, y, weight, _seeds(model, step))
        convert = keras.tree.map_structure(_float32, outputs)
        return convert, None if loss is None else keras.ops.convert_to_numpy(loss)

    def _build(self, x: Any) -> None:
        if not self.model.built:
            with keras_state.preserved(self.model):
                self.model(x, training=False)

    def _build_loss(self, x: Any, y: Any) -> None:
        """Let a compiled loss that has met no data yet create its trackers, outside any trace."""
        loss = getattr(self.model, "_compile_loss", None)
        if loss is not None and not loss.built:
            with keras.StatelessScope():
                outputs = self.model(x, training=False)
            loss.build(y, outputs)


class _Collected(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches in memory, in order: `evaluate` weights them by their size."""

    def __init__(self, batches: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.batches[index]


def _compiled(model: Any, training: bool, with_loss: bool) -> Callable[..., Any]:
    """Return ``f(x, y, sample_weight, seeds) -> (outputs, loss)`` for the present flags."""
    states = [variable for variable, _ in _seed_states(model)]

    def step(mapping: list[tuple[Any, Any]], x: Any, y: Any, weight: Any) -> tuple[Any, Any]:
        if with_loss:
            # Keras takes the weights that regularizers act on from the scope, never from the
            # variable; and a scope forgets what `add_loss` and activity regularizers add unless
            # it is told to collect.
            mapped = {id(variable) for variable, _ in mapping}
            mapping = [
                *mapping,
                *((v, v.value) for v in model.trainable_weights if id(v) not in mapped),
            ]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=with_loss):
            outputs = model(x, training=training)
            if not with_loss:
                return outputs, None
            loss = model.compute_loss(
                x=x, y=y, y_pred=outputs, sample_weight=weight, training=training
            )
            return outputs, loss

    backend = keras.backend.backend()
    if backend == "jax":
        return _compiled_jax(model, states, step)
    if backend == "tensorflow":
        import tensorflow as tf

        def run(x: Any, y: Any, weight: Any, seeds: list[Any]) -> Any:
            return step(list(zip(states, seeds, strict=True)), x, y, weight)

        compiled: Callable[..., Any] = tf.function(run, reduce_retracing=True)
        return compiled

    def run_eagerly(x: Any, y: Any, weight: Any, seeds: list[Any]) -> tuple[Any, Any]:
        with sys.modules["torch"].no_grad() if backend == "torch" else _nothing():
            outcome: tuple[Any, Any] = step(list(zip(states, seeds, strict=True)), x, y, weight)
            return outcome

    return run_eagerly


def _compiled_jax(model: Any, states: list[Any], step: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    seeded = {id(state) for state in states}
    others = [v for v in keras_state.variables_of(model) if id(v) not in seeded]

    def run(values: list[Any], seeds: list[Any], x: Any, y: Any, weight: Any) -> Any:
        # Variables are arguments: what is read inside is their present value, not a constant.
        mapping = [*zip(others, values, strict=True), *zip(states, seeds, strict=True)]
        return step(mapping, x, y, weight)

    compiled: Callable[..., Any] = jax.jit(run)
    return lambda x, y, weight, seeds: compiled([v.value for v in others], seeds, x, y, weight)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _seed_states(model: Any) -> list[tuple[Any, Any]]:
    """(state variable, generator) of every seed generator below the model."""
    layers = [model, *(place.layer for place in keras_graph.walk(model))]
    return [(s.state, s) for layer in layers for s in getattr(layer, "_seed_generators", ())]


def _seeds(model: Any, step: int) -> list[Any]:
    """Seed states for one batch: those of the model, moved on by the batch's number."""
    moved = []
    for state, _ in _seed_states(model):
        value = np.array(keras.ops.convert_to_numpy(state))
        value[..., -1] += np.asarray(step, dtype=value.dtype) * np.asarray(9973, value.dtype)
        moved.append(keras.ops.convert_to_tensor(value, dtype=state.dtype))
    return moved


@contextmanager
def _fixed_randomness(model: Any, step: int) -> Iterator[None]:
    """Torch: draw unseeded dropout from the batch's number, and undo what the pass moved.

    Keras' unseeded dropout uses torch's global generator, and torch modules inside a model update
    buffers that Keras does not know; both are outside any StatelessScope.
    """
    if keras.backend.backend() != "torch":
        yield
        return
    torch = sys.modules["torch"]
    wrapped = [
        module
        for place in keras_graph.walk(model)
        if (module := keras_graph.wrapped_module(place.layer)) is not None
    ]
    buffers = [(b, b.detach().clone()) for w in wrapped for b in w.buffers()]
    modes = [(m, m.training) for w in wrapped for m in w.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(step)
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
            for module, mode in modes:
                module.training = mode


@contextmanager
def _readable_labels(model: Any, y: Any) -> Iterator[None]:
    """Turn a loss's complaint about the labels into one line."""
    try:
        yield
    except (ValueError, TypeError) as problem:
        shapes = keras.tree.map_structure(lambda leaf: tuple(np.shape(leaf)), y)
        first = next(
            (line for line in str(problem).splitlines() if line.strip()), "no reason given"
        )
        raise DataError(
            f"model '{model.name}' cannot be run on these inputs and labels: {first.strip()} "
            f"Received: label shapes {shapes}"
        ) from problem


def _labels(batches: list[tuple[Any, ...]]) -> Any:
    return batches[0][1] if batches and len(batches[0]) > 1 else None


def _tensors(structure: Any) -> Any:
    if structure is None:
        return None
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else keras.ops.convert_to_tensor(leaf), structure
    )


def _float32(tensor: Any) -> Any:
    return keras.ops.convert_to_numpy(tensor).astype(np.float32)
