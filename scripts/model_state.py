"""What a change of a model, or of the process around it, would show in: everything, bit for bit."""

from __future__ import annotations

import functools
import random
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

#: Attributes in which Keras notes calls and the shapes it met; no result depends on them.
_NOTES = frozenset([
    "_inbound_nodes", "_outbound_nodes", "_parent_path", "_call_has_context_arg",
    "_call_context_args", "_called", "_backend_type", "_build_shapes_dict", "_losses",
])  # fmt: skip

#: Of :func:`surroundings`: what training draws from.
DRAWN = ("random", "numpy.random", "torch generator", "keras generator")

_ABSENT = object()


def model_state(model: Any, optimizer: Any = None) -> dict[str, Any]:
    """Every class, attribute, object and number of a model, by a name that a person understands."""
    if "keras" in sys.modules and isinstance(model, sys.modules["keras"].Model):
        return _keras_state(model)
    return _torch_state(model, optimizer)


def _torch_state(model: Any, optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}: class"] = type(module)
        for attribute, value in vars(module).items():
            found[f"{name}.{attribute}"] = _described(value)
    if optimizer is not None:
        found["optimizer"] = _described(optimizer.state_dict())
    return found


def _keras_state(model: Any) -> dict[str, Any]:
    from frostline.adapters.keras.graph import walk
    from frostline.adapters.keras.state import variables_of

    found: dict[str, Any] = {}
    for path, layer in [("model", model), *((p.path, p.layer) for p in walk(model))]:
        found[f"{path}: class"] = type(layer)
        found[f"{path}: config"] = repr(layer.get_config())
        found[f"{path}: trains"] = [id(v) for v in layer.trainable_variables]
        for attribute, value in vars(layer).items():
            if attribute not in _NOTES:
                found[f"{path}.{attribute}"] = _described(value, depth=2)
    for number, variable in enumerate(variables_of(model)):
        found[f"variable {number} {variable.path}"] = (
            *(id(variable), bool(variable.trainable), id(getattr(variable, "regularizer", None))),
            _bytes_of(variable),
        )
    return found


def _bytes_of(variable: Any) -> bytes:
    if getattr(variable, "_value", None) is None:  # as JAX leaves them when a step is interrupted
        return b"lost"
    try:
        found: bytes = sys.modules["keras"].ops.convert_to_numpy(variable).tobytes()
    except RuntimeError:  # given away
        return b"lost"
    return found


def _described(value: Any, depth: int = 4) -> Any:
    """Numbers by value, containers by content, everything else by which object it is."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        gradient = value.grad if value.is_leaf else None
        bits = value.detach().cpu().contiguous().numpy().tobytes()
        own = None if gradient is None else (id(gradient), gradient.numpy().tobytes())
        return id(value), value.requires_grad, bits, own
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return repr(value)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, types.MethodType):  # a new object at each look
        return id(value.__func__), id(value.__self__)
    if isinstance(value, functools.partial):
        return id(value.func), [id(each) for each in value.args]
    if depth and isinstance(value, Mapping):
        return [(repr(key), _described(each, depth - 1)) for key, each in value.items()]
    if depth and isinstance(value, (list, tuple)):
        return [_described(each, depth - 1) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return id(value)


def surroundings() -> dict[str, Any]:
    """The state of the process: generators, precision, modes, threads, filters, handlers."""
    found: dict[str, Any] = {
        "random": random.getstate(),
        "numpy.random": _drawn_by_numpy(),
        "numpy errors": np.geterr(),
        "warnings": [repr(each) for each in warnings.filters],
        "showwarning": warnings.showwarning,
        "handlers": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
        "recursion": sys.getrecursionlimit(),
        **dict.fromkeys(_threads(), True),
    }
    if (torch := sys.modules.get("torch")) is not None:
        found |= _torch_surroundings(torch)
    if (keras := sys.modules.get("keras")) is not None:
        found |= _keras_surroundings(keras)
    if (jax := sys.modules.get("jax")) is not None:
        found["jax"] = (bool(jax.config.jax_enable_x64), jax._src.core.trace_state_clean())
    return found


def _drawn_by_numpy() -> Any:
    drawn: Any = np.random.get_state()  # noqa: NPY002 - the user's own
    return drawn[1].tobytes(), drawn[2:]


def _threads() -> list[str]:
    """Threads that the process waits for at its end, by name and by what they run."""
    return [
        f"thread {thread.name} in {getattr(getattr(thread, '_target', None), '__module__', '?')}"
        for thread in threading.enumerate()
        if not thread.daemon
    ]


def _torch_surroundings(torch: Any) -> dict[str, Any]:
    return {
        "torch gradients": torch.is_grad_enabled(),
        "torch inference": torch.is_inference_mode_enabled(),
        "torch dtype": torch.get_default_dtype(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "torch threads": torch.get_num_threads(),
        "torch modes": (
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        ),
        "torch functions": torch._C._is_torch_function_enabled(),
        "torch fx": _tracing(torch),
        "torch hooks": [
            sorted(hooks)
            for name, hooks in vars(torch.nn.modules.module).items()
            if name.startswith("_global_") and isinstance(hooks, dict)
        ],
        "torch autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "torch precision": (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.mkldnn.enabled,
            torch.backends.mkldnn.deterministic,
        ),
    }


def _tracing(torch: Any) -> Any:
    fx = sys.modules.get("torch.fx._symbolic_trace")
    patched = {} if fx is None else fx._wrapped_fns_to_patch
    return (
        [id(vars(torch.nn.Module)[name]) for name in ("__call__", "__getattr__")],
        fx is not None and (fx._is_fx_tracing_flag, fx.CURRENT_PATCHER is not None),
        [id(frame.get(name)) for (_, name), frame in patched.items()],
    )


def _keras_surroundings(keras: Any) -> dict[str, Any]:
    from keras.src.backend.common import global_state

    kept = vars(global_state.GLOBAL_STATE_TRACKER)
    scopes = {
        name: value
        for name, value in kept.items()
        if name.endswith(("scope", "scopes", "scope_stack", "context")) and value not in (None, [])
    }
    shared = global_state.get_global_attribute("global_seed_generator")
    generator = None if shared is None else keras.ops.convert_to_numpy(shared.state).tobytes()
    return {
        "keras floatx": keras.config.floatx(),
        "keras policy": keras.config.dtype_policy().name,
        "keras format": keras.config.image_data_format(),
        "keras scopes": {name: _described(value) for name, value in scopes.items()},
        "keras generator": generator,
        "keras tracebacks": keras.config.is_traceback_filtering_enabled(),
    }


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what differs, or came, or went."""
    names: Iterable[str] = sorted(before.keys() | after.keys())
    pairs = ((name, before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in names)
    return [name for name, a, b in pairs if type(a) is not type(b) or a != b]


def reset() -> None:
    """Put the process into a state in which the next trial means something."""
    if (torch := sys.modules.get("torch")) is not None:
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
    if (keras := sys.modules.get("keras")) is not None:
        tracker = vars(keras.src.backend.common.global_state.GLOBAL_STATE_TRACKER)
        for name in [name for name in tracker if "scope" in name]:
            del tracker[name]
