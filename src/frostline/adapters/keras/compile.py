"""A pure pass of a Keras model, and its derivative, compiled by the backend that Keras runs on.

A *pass* is ``f(mapping, traced, blend, *rest)``: it reads the variables in ``mapping`` from there.
With ``then=`` it returns ``then(answer)``, formed before the model's layers are their own again.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import keras
from keras import ops

from frostline.atomic import taken_back

Pass = Callable[..., Any]


def compiled(
    forward: Pass, variables: list[Any], states: list[Any], *, slope: bool, eager: bool
) -> Pass:
    """Return ``f(seeds, blend, *rest)``, compiled on TensorFlow and JAX.

    Args:
        forward: The pass; returns anything, or with ``slope`` losses of shape ``(n,)``.
        variables: All variables that it may read.
        states: Those of them whose values are ``seeds``.
        slope: Return ``(losses, d mean(losses) / d blend)``.
        eager: Do not compile.
    """
    make = {"jax": _on_jax, "tensorflow": _on_tensorflow, "torch": _on_torch}
    return make[keras.backend.backend()](forward, variables, states, slope, eager)


def _on_jax(
    forward: Pass, variables: list[Any], states: list[Any], slope: bool, eager: bool
) -> Pass:
    import jax

    new: list[bool] = []  # filled by a call that traces, and so compiles

    def run(values: Any, seeds: Any, blend: Any, *rest: Any) -> Any:
        new.append(True)
        # Variables are arguments: what is read inside is their present value, not a constant.
        mapping = [*zip(variables, values, strict=True), *zip(states, seeds, strict=True)]
        answer = functools.partial(forward, mapping, not eager)
        if not slope:
            return answer(blend, *rest)

        def mean(weights: Any) -> tuple[Any, Any]:
            losses = answer(weights, *rest)
            return ops.mean(losses), losses

        (_, losses), gradient = jax.value_and_grad(mean, has_aux=True)(blend)
        return losses, gradient

    function: Callable[..., Any] = run if eager else jax.jit(run)

    def call(*arguments: Any) -> Any:
        new.clear()
        found = function([v.value for v in variables], *arguments)
        if new and not eager:
            return_memory()
        return found

    return call


def return_memory() -> None:
    """Give back what a compiler has freed, several times the model, and glibc would keep."""
    with suppress(OSError, AttributeError, TypeError):  # elsewhere than on Linux
        ctypes.CDLL(None).malloc_trim(0)


def _on_tensorflow(
    forward: Callable[..., Any],
    variables: list[Any],  # noqa: ARG001 - a graph reads them when it runs
    states: list[Any],
    slope: bool,
    eager: bool,
) -> Callable[..., Any]:
    import tensorflow as tf

    def run(seeds: Any, blend: Any, *rest: Any) -> Any:
        answer = functools.partial(forward, list(zip(states, seeds, strict=True)), not eager)
        if not slope:
            with inlined_functions():
                return answer(blend, *rest)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(blend)
            with inlined_functions():
                losses = answer(blend, *rest)
            mean = tf.reduce_mean(losses)
        zero = tf.UnconnectedGradients.ZERO
        return losses, tape.gradient(mean, blend, unconnected_gradients=zero)

    return run if eager else _one_trace_for_all_batch_sizes(tf.function(run, autograph=False))


def _one_trace_for_all_batch_sizes(function: Any) -> Callable[..., Any]:
    """``f(seeds, blend, statistics, *batch)`` whose trace leaves the number of samples open.

    A model whose code must know that number gets a trace per batch size.
    """
    # More than one trace is then the plan, not the accident that TensorFlow warns of.
    vars(function)["_omit_frequent_tracing_warning"] = True
    known: dict[str, Any] = {}
    by_shapes: dict[Any, Any] = {}  # found without making the specs anew

    def call(*arguments: Any) -> Any:
        shapes = _shapes(arguments)
        if shapes not in by_shapes:
            by_shapes[shapes] = traced(_open_specs(*arguments))
        return by_shapes[shapes](*arguments)

    def traced(specs: Any) -> Any:
        key = str(specs)
        if key not in known:
            try:
                known[key] = function.get_concrete_function(*specs)
            except Exception:  # code of the user's own may raise anything, and then raises it again
                known[key] = function
        return known[key]

    return call


def _shapes(arguments: Any) -> Any:
    """Structure, shapes and types of tensors; equal where one trace answers."""
    leaves = keras.tree.flatten(arguments)
    kinds = tuple(None if leaf is None else (*leaf.shape, leaf.dtype) for leaf in leaves)
    return kinds, str(keras.tree.map_structure(lambda _: 0, arguments))


def _open_specs(*arguments: Any) -> Any:
    """What ``arguments`` look like with any number of samples in x, labels and weights.

    Labels of another number keep all sizes fixed: the trace then fails, and says what does not fit.
    """
    import tensorflow as tf

    *others, x, y, weight = arguments
    samples = keras.tree.flatten(x)[0].shape[:1]

    def fixed(leaf: Any) -> Any:
        return None if leaf is None else tf.TensorSpec(leaf.shape, leaf.dtype)

    labels = keras.tree.flatten((y, weight))
    if any(leaf is not None and leaf.shape[:1] not in (samples, ()) for leaf in labels):
        return keras.tree.map_structure(fixed, arguments)

    def any_number(leaf: Any) -> Any:
        if leaf is None or leaf.shape[:1] != samples:
            return fixed(leaf)
        return tf.TensorSpec((None, *leaf.shape[1:]), leaf.dtype)

    return (
        *keras.tree.map_structure(fixed, others),
        *keras.tree.map_structure(any_number, (x, y, weight)),
    )


@contextmanager
def inlined_functions() -> Iterator[None]:
    """TensorFlow: make a ``tf.function`` inside the model part of the pass.

    It would otherwise answer from a trace of its own that knows nothing of λ, or keep one made
    here, which holds tensors of the pass and breaks the model for everybody else.
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    inside = object()
    with taken_back(functools.partial(_EAGER.end, inside)):
        _EAGER.begin(inside)
        yield


class _EagerFunctions:
    """TensorFlow's switch, which all threads share: the first block turns it, the last one back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: set[object] = set()
        self._before = False

    def begin(self, block: object) -> None:
        import tensorflow as tf

        with self._lock:
            if not self._blocks:
                self._before = tf.config.functions_run_eagerly()
            self._blocks.add(block)
            tf.config.run_functions_eagerly(True)

    def end(self, block: object) -> None:
        """End a block, if it has begun; can be repeated."""
        import tensorflow as tf

        with self._lock:
            if self._blocks == {block}:
                tf.config.run_functions_eagerly(self._before)
            self._blocks.discard(block)


_EAGER = _EagerFunctions()


def _on_torch(
    forward: Callable[..., Any],
    variables: list[Any],
    states: list[Any],
    slope: bool,
    eager: bool,  # noqa: ARG001 - it always is
) -> Callable[..., Any]:
    import torch

    def run(seeds: Any, blend: Any, *rest: Any) -> Any:
        # Detached: the graph then holds what depends on the blend, not what weights depend on.
        mapping = [
            *((variable, variable.value.detach()) for variable in variables),
            *zip(states, seeds, strict=True),
        ]
        if not slope:
            with torch.no_grad():
                return forward(mapping, False, blend, *rest)
        with torch.enable_grad():
            blend = blend.detach().requires_grad_(True)
            return forward(mapping, False, blend, *rest, then=functools.partial(slopes, blend))

    def slopes(blend: Any, losses: Any) -> tuple[Any, Any]:
        mean = torch.mean(losses)
        if not mean.requires_grad:  # no site on the way to the loss
            return losses, torch.zeros_like(blend)
        # Run backward on this thread: rematerialised layers read thread-local scopes.
        with torch.autograd.set_multithreading_enabled(False):
            (gradient,) = torch.autograd.grad(mean, blend, allow_unused=True)
        return losses.detach(), torch.zeros_like(blend) if gradient is None else gradient

    return run


@contextmanager
def without_gradients() -> Iterator[None]:
    """Torch: keep no graph of what runs inside."""
    if keras.backend.backend() != "torch":
        yield
        return
    with sys.modules["torch"].no_grad():
        yield
