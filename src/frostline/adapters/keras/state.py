"""Take a Keras model's state and put it back, bit for bit, keeping every object.

State is more than weights: optimizer slots, metric states, random seeds, `trainable` flags,
momenta, what ``compile`` attached, and under torch the modules' training flags, the buffers that
Keras does not know, and the global generator that its unseeded dropout draws from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras

from frostline.adapters.keras.arrays import copied
from frostline.adapters.keras.graph import is_site, walk, wrapped_module
from frostline.adapters.keras.random import generators
from frostline.atomic import Attributes, restored, taken_back, undone
from frostline.graph.addresses import Place
from frostline.layers.undo import remembered
from frostline.types import Array, ModelError

#: What `compile` and the first `fit`, `evaluate` or `predict` attach to a model.
_COMPILED = (
    "optimizer",
    "loss",
    "loss_weights",
    "compiled",
    "_jit_compile",
    "_run_eagerly",
    "steps_per_execution",
    "stop_training",
    "stop_evaluating",
    "stop_predicting",
    "train_function",
    "test_function",
    "predict_function",
    "_compile_loss",
    "_compile_metrics",
    "_compile_config",
    "_loss_tracker",
    "_jax_state",
    "_jax_state_synced",
)
#: Those of them that build themselves from the first batch.
_GROWING = ("optimizer", "_compile_loss", "_compile_metrics")


#: Where a Keras model on torch keeps its variables as a module's parameters; Keras makes this
#: anew when it first evaluates or trains.
_REGISTERED = "_torch_params"


@dataclass(frozen=True)
class Snapshot:
    """What :func:`restore` needs; values are copies, everything else are the objects themselves."""

    values: list[tuple[Any, Array]]
    variable_flags: list[tuple[Any, bool]]
    layer_flags: list[tuple[Any, bool]]
    momenta: list[tuple[Any, float]]
    policies: list[tuple[Any, Any]]
    compiled: list[tuple[Any, dict[str, Any]]]
    shells: list[Attributes]
    parameters: list[tuple[Any, Any]]
    buffers: list[tuple[Any, Any]]
    modes: list[tuple[Any, bool]]
    generators: Any


def models_in(model: Any, places: Iterable[Place] | None = None) -> list[Any]:
    """``model`` and every model nested in it, or at these places."""
    found = walk(model) if places is None else places
    return [model, *(place.layer for place in found if isinstance(place.layer, keras.Model))]


def variables_of(model: Any) -> list[Any]:
    """Every variable: weights, seeds, metrics, optimizer slots; of nested models as well."""
    found: dict[int, Any] = {}
    for inner in models_in(model):
        optimizer = getattr(inner, "optimizer", None)
        slots = [] if optimizer is None else optimizer.variables
        unmet = _unmet_metric_variables(inner)
        for variable in [*inner.variables, *inner.metrics_variables, *slots, *unmet]:
            found.setdefault(id(variable), variable)
    return list(found.values())


def _unmet_metric_variables(model: Any) -> list[Any]:
    """Variables of metric objects that the model was compiled with but has not used yet."""
    compiled = getattr(model, "_compile_metrics", None)
    if compiled is None or compiled.built:
        return []
    given = keras.tree.flatten([compiled._user_metrics, compiled._user_weighted_metrics])
    return [v for m in given if isinstance(m, keras.metrics.Metric) for v in m.variables]


def _registered(model: Any) -> Any:
    """Its variables as parameters of a torch module; ``None`` on other backends."""
    return getattr(model, "_modules", {}).get(_REGISTERED)


def _growing(models: Iterable[Any]) -> list[Any]:
    """Objects below ``compile`` that attach variables to themselves when they meet a batch."""
    found: list[Any] = []
    for inner in models:
        found += [x for name in _GROWING if (x := getattr(inner, name, None)) is not None]
    wrappers = [getattr(optimizer, "inner_optimizer", None) for optimizer in found]
    return [*found, *(wrapped for wrapped in wrappers if wrapped is not None)]


def snapshot(model: Any, *, classes: bool = False) -> Snapshot:
    """Copy the state of ``model``; with ``classes`` all that :func:`.edit.convert` changes too."""
    if any(map(_lost, model.variables)):
        raise ModelError(
            "weights of the model hold no value: Keras on JAX gives them away while it trains, and "
            "a training that is interrupted does not give them back. Load or set the weights "
            "first. Received: arrays that were deleted"
        )
    # Keras itself loses the averages of `use_ema=True` that way; a look can do without them.
    variables = [variable for variable in variables_of(model) if not _lost(variable)]
    layers = [model, *(place.layer for place in walk(model))]
    wrapped = [module for layer in layers if (module := wrapped_module(layer)) is not None]
    torch = sys.modules.get("torch") if keras.backend.backend() == "torch" else None
    modules = (
        [] if torch is None else [*model.modules(), *(m for w in wrapped for m in w.modules())]
    )
    return Snapshot(
        values=[(v, copied(v)) for v in variables],
        variable_flags=[(v, v.trainable) for v in variables],
        layer_flags=[(layer, bool(layer.trainable)) for layer in layers],
        momenta=[(layer, layer.momentum) for layer in layers if is_site(layer)],
        policies=[(layer, layer.policy) for layer in layers if _has_policy(layer)],
        compiled=[
            (m, {k: m.__dict__[k] for k in _COMPILED if k in m.__dict__}) for m in models_in(model)
        ],
        shells=[
            Attributes.of(shell)
            for shell in (
                *_growing(models_in(model)),
                *([*filter(is_site, layers), *models_in(model)] if classes else ()),
            )
        ],
        parameters=[(m, known) for m in models_in(model) if (known := _registered(m)) is not None],
        buffers=[(b, b.detach().clone()) for w in wrapped for b in w.buffers()],
        modes=[(module, module.training) for module in modules],
        generators=None if torch is None else _generators(torch),
    )


def restore(state: Snapshot) -> None:
    """Put everything back where it was; values that did not change are not touched."""
    for layer, policy in state.policies:
        if layer.policy != policy:
            layer.policy = policy
    for variable, value in state.values:
        if _lost(variable):  # before flags: a live switch copies gamma and beta
            variable.assign(value)
    for layer, flag in state.layer_flags:
        if bool(layer.trainable) != flag:
            layer.trainable = flag
    for layer, flag in state.layer_flags:  # a container's setter flips what it contains
        if bool(layer.trainable) != flag:
            layer.trainable = flag
    for variable, flag in state.variable_flags:
        if variable.trainable != flag:
            variable.trainable = flag
    for layer, momentum in state.momenta:
        if layer.momentum != momentum:
            layer.momentum = momentum
    for model, attributes in state.compiled:
        for name, value in attributes.items():
            if model.__dict__.get(name) is not value:
                setattr(model, name, value)
        for name in set(_COMPILED) & set(model.__dict__) - set(attributes):
            del model.__dict__[name]
    for shell in state.shells:
        shell.restore()
    for model, known in state.parameters:
        now = _registered(model)
        if now is not known and dict(now or {}).keys() == dict(known).keys():
            model._modules[_REGISTERED] = known
    for variable, value in state.values:
        if keras.ops.convert_to_numpy(variable).tobytes() != value.tobytes():
            variable.assign(value)
    for buffer, value in state.buffers:
        buffer.copy_(value)
    for module, mode in state.modes:
        module.training = mode
    if state.generators is not None:
        _set_generators(sys.modules["torch"], state.generators)


@contextmanager
def preserved(model: Any) -> Iterator[None]:
    """Restore the whole state of ``model`` on any exit."""
    with taken_back(partial(restore, snapshot(model))):
        yield


@contextmanager
def values_never_lost(model: Any) -> Iterator[None]:
    """If an exception leaves a variable without a value, put the model back as it was before.

    On JAX Keras gives the values of a model away to the step that runs, and a step that is
    interrupted does not return them.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    state = snapshot(model)

    def found_again() -> None:
        if any(map(_lost, variables_of(model))):
            restore(state)

    try:
        yield
    except BaseException:
        undone(found_again)
        raise


def all_that_edits_touch(model: Any) -> Callable[[], None]:
    """Remember classes, attributes, flags, the sites' weights and the process around the model.

    Returns:
        What puts it all back, and can be repeated. Kernels are not copied: no edit writes to them.
    """
    places = walk(model)
    models = models_in(model, places)
    owners = {id(owner): owner for owner in [*models, *(place.layer for place in places)]}
    shells = _growing(models)
    back = remembered([*owners.values(), *shells], _written_by_edits(models, places))
    flags = [(v, v.trainable, getattr(v, "regularizer", None)) for v in model.variables]
    wrapped = [w for place in places if (w := wrapped_module(place.layer)) is not None]
    modules = [Attributes.of(module) for w in wrapped for module in w.modules()]
    parts = [(p, p.requires_grad, p.grad) for w in wrapped for p in w.parameters()]
    buffers = [(b, b.detach().clone()) for w in wrapped for b in w.buffers()]
    around = surroundings(model, places)

    def undo() -> None:
        around()
        back()
        for variable, flag, regularizer in flags:
            if variable.trainable != flag:
                variable.trainable = flag
            if getattr(variable, "regularizer", None) is not regularizer:
                variable.regularizer = regularizer
        restored(modules)
        for parameter, flag, gradient in parts:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for buffer, value in buffers:
            buffer.detach().copy_(value)

    return undo


def _written_by_edits(models: Iterable[Any], places: Iterable[Place]) -> list[Any]:
    found = {id(v): v for p in places if is_site(p.layer) for v in p.layer.variables}
    for inner in models:
        for variable in inner.metrics_variables:
            found.setdefault(id(variable), variable)
    return list(found.values())


def surroundings(model: Any, places: Iterable[Place] | None = None) -> Callable[[], None]:
    """Remember :func:`modes` and the random generators."""
    around, drawn = modes(), generators(model, places=places)

    def back() -> None:
        around()
        drawn()

    return back


def modes() -> Callable[[], None]:
    """Remember Keras' scopes, and the modes of TensorFlow, JAX and torch if they are there."""
    tracker = vars(keras.src.backend.common.global_state.GLOBAL_STATE_TRACKER)
    kept = {name: value for name, value in tracker.items() if _is_mode(name)}
    stacks = [(value, list(value)) for value in kept.values() if isinstance(value, list)]
    eager, traced, of_torch = _eager_functions(), _current_trace(), None
    if "torch" in sys.modules:
        from frostline.adapters.torch.surroundings import modes as of_torch_modes

        of_torch = of_torch_modes()

    def back() -> None:
        tracker.update(kept)
        for name in [name for name in tracker if _is_mode(name) and name not in kept]:
            del tracker[name]
        for stack, content in stacks:
            stack[:] = content
        if of_torch is not None:
            of_torch()
        eager()
        traced()

    return back


def _is_mode(name: str) -> bool:
    """Whether blocks of Keras set a global value and set it back; others count, or are settings."""
    return "scope" in name or name in _MODES


#: Where its name does not say so. Layers that are made with ``tracking_on`` off own no weights.
_MODES = frozenset([
    "tracking_on", "current_call_ctx", "torch_device", "safe_mode_saving",
    "shared_objects/id_to_obj_map", "shared_objects/id_to_config_map",
])  # fmt: skip


def _current_trace() -> Callable[[], None]:
    """JAX: what its operations go to; an exception at the exit of a trace leaves it current."""
    context = getattr(sys.modules.get("jax._src.core"), "trace_ctx", None)
    if context is None:  # no JAX, or one from before 0.4.36
        return lambda: None
    trace = context.trace

    def back() -> None:
        if context.trace is not trace:
            context.set_trace(trace)

    return back


def _eager_functions() -> Callable[[], None]:
    """Remember whether TensorFlow runs its functions eagerly."""
    if keras.backend.backend() != "tensorflow":
        return lambda: None
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()

    def back() -> None:
        if tf.config.functions_run_eagerly() != before:
            tf.config.run_functions_eagerly(before)

    return back


def _has_policy(layer: Any) -> bool:
    return is_site(layer) and hasattr(layer, "policy")


def _lost(variable: Any) -> bool:
    """Whether the variable holds no value: on JAX, Keras takes it away while steps are running."""
    if keras.backend.backend() != "jax":
        return False
    value = variable._value
    return value is None or (hasattr(value, "is_deleted") and bool(value.is_deleted()))


def _generators(torch: Any) -> tuple[Any, list[Any]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda


def _set_generators(torch: Any, state: tuple[Any, list[Any]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
