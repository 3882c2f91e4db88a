"""A torch prefix: its identity, its plain forward pass, and its graph for inference engines."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from frostline import environment
from frostline.adapters.computation import Identity, Reader, UnreadableError, identity_of
from frostline.adapters.dropout_rate import KEPT_RATES
from frostline.adapters.torch import forward_pass as torch_pass
from frostline.adapters.torch.cached_data import (
    FeatureDataset,
    in_order as readable,  # noqa: F401 - a part of this role
    joined,
)
from frostline.adapters.torch.columns import columns  # noqa: F401 - a part of this role
from frostline.adapters.torch.copying import copied_for_inference
from frostline.adapters.torch.forward_pass import called, tensors
from frostline.adapters.torch.graph import unwrapped
from frostline.adapters.torch.locked import EXACT, OF_THE_LOCK, is_locked
from frostline.adapters.torch.network import attribute, phase
from frostline.adapters.torch.replayed_parts import ReplayedPrefix
from frostline.adapters.torch.samples import ROWS
from frostline.adapters.torch.state_kept import OF_EVERY_MODULE, plain
from frostline.data.arrays import Table
from frostline.types import Array, BackendError, ModelError
from frostline.types.reasons import first_line

#: What torch's own BN modules have beside what they compute at inference.
_BESIDE_IN_BN = frozenset({"momentum", "track_running_stats", "num_batches_tracked"})
#: No part of what a module computes; hooks of the forward pass are read apart.
_NOT_READ = OF_EVERY_MODULE | {"_compiled_call_impl", KEPT_RATES}
_OPSET = 17
#: Features come as a data set of samples with their labels.
HANDS_OUT_LABELS = True


def identity(module: Any) -> Identity:
    """Hash of all that decides what a module computes at inference.

    Classes with their code, attributes of any kind, hooks, replaced methods, weights, statistics.

    Args:
        module: Any torch module; wrappers are taken off.
    """
    hooks = [
        getattr(nn.modules.module, f"_global_forward_{name}") for name in ("hooks", "pre_hooks")
    ]
    return identity_of([unwrapped(module), *(list(known.values()) for known in hooks)], leaf)


#: Of any module: the same.
layer_identity = identity


def leaf(value: Any, reader: Reader) -> list[Any] | None:
    """Read a value of torch's; see :class:`frostline.adapters.computation.Reader`."""
    if isinstance(value, torch.Tensor):
        kind = type(value)
        own = [] if kind in _TENSORS else [reader.read(kind)]
        return [*_tensor(value), *own, *reader.items(vars(value))]
    if isinstance(value, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise UnreadableError("a TorchScript program")
    if isinstance(value, torch.ScriptObject):  # weights of a quantized layer, packed
        try:
            state = value.__getstate__()
        except (RuntimeError, AttributeError):
            raise UnreadableError("an object that torch keeps in C++") from None
        return ["script object", str(value._type()), reader.read(state)]
    if isinstance(value, ReplayedPrefix):
        return _replayed(value, reader)
    if isinstance(value, nn.Module):
        return _module(value, reader)
    if isinstance(value, torch.Generator):
        return ["generator", value.get_state().numpy().tobytes()]
    if isinstance(value, _NAMED):
        return [type(value).__name__, str(value)]
    return None


_TENSORS = (torch.Tensor, nn.Parameter, getattr(nn, "Buffer", None))
_NAMED = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)


def _tensor(tensor: Any) -> list[Any]:
    head = f"{tuple(tensor.shape)}|{tensor.dtype}"
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.device.type == "meta":
        raise UnreadableError("a tensor without values")
    try:
        dense = tensor.detach().resolve_conj().resolve_neg()
        flat = [part.cpu().contiguous().reshape(-1) for part in plain(dense)]
        contents = [part.view(torch.uint8).numpy().data for part in flat]
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UnreadableError(f"a tensor of type {tensor.dtype} ({first_line(error)})") from None
    return ["tensor", head, *contents]


def _module(module: Any, reader: Reader) -> list[Any]:
    """Everything that determines what a module computes at inference, children included."""
    kind: Any = type(module)
    own = kind.__module__.startswith("torch.nn.modules.") and issubclass(kind, _NormBase)
    skipped = _BESIDE_IN_BN if own else frozenset()
    skipped = skipped | OF_THE_LOCK if is_locked(module) else skipped
    parts: list[Any] = ["module"]
    if isinstance(module, fx.GraphModule):
        parts += _graph(module, reader)
        attributes = {name: vars(module)[name] for name in ("forward",) if name in vars(module)}
    else:
        parts.append(reader.read(kind))
        attributes = {n: v for n, v in vars(module).items() if n not in _NOT_READ}
    parts += reader.items(attributes, skipped)
    for held in (module._parameters, module._buffers):
        parts += reader.items(held, skipped)
    for kind_of_hook in ("_forward_pre_hooks", "_forward_hooks"):
        with_kwargs = getattr(module, f"{kind_of_hook}_with_kwargs")
        for number, hook in getattr(module, kind_of_hook).items():
            parts += [kind_of_hook, str(number in with_kwargs), reader.read(hook)]
    # A graph names its children, and their order changes when it is pickled; others iterate.
    graph = isinstance(module, fx.GraphModule)
    for name in sorted(module._modules) if graph else module._modules:
        parts += [name, reader.read(module._modules[name])]
    return parts


def _replayed(prefix: Any, reader: Reader) -> list[Any]:
    """What a prefix that is a run of the model reads: all code, and what is frozen."""
    root, plan = prefix._root, prefix._plan
    own = {name: value for name, value in vars(root).items() if name not in _NOT_READ}
    names = sorted({name for name, _ in plan.forms})
    frozen = [part for name in names for part in (name, reader.read(plan.still[name]))]
    kinds = [reader.read(type(module)) for module in root.modules()]
    return ["replayed", repr(plan.frontier), *kinds, *reader.items(own, frozenset()), *frozen]


def _graph(module: Any, reader: Reader) -> list[Any]:
    """Code of a graph, and the functions and constants that it names."""
    parts: list[Any] = [module.code]
    for node in module.graph.nodes:
        if node.op == "call_function":
            parts.append(reader.read(node.target))
        elif node.op == "get_attr":
            parts.append(reader.read(attribute(module, node.target)))
        arguments = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        parts += reader.each(
            argument for argument in arguments if not isinstance(argument, fx.Node)
        )
    return parts


@contextmanager
def exactly() -> Iterator[None]:
    """Pickle parts of a model as what they are, for a process that has Frostline."""
    token = EXACT.set(True)
    try:
        yield
    finally:
        EXACT.reset(token)


def device(module: Any) -> str:
    """Kind of device that holds the module's weights, such as ``"cpu"`` or ``"cuda"``."""
    held = (*unwrapped(module).parameters(), *unwrapped(module).buffers())
    return str(held[0].device.type) if held else "cpu"


def placed(module: Any) -> Any:
    """The module on the GPU that this process was given, if any; a worker's own copy, in place."""
    return module.to("cuda") if torch.cuda.is_available() else module


def native(module: Any) -> Callable[[Any], list[Array]]:
    """Return ``f(batch) -> arrays``: the module itself, at inference, without autograd.

    Images travel with the channels last in memory, which convolutions on a CPU prefer. Weights are
    read at every call; modes are put back.
    """
    root = unwrapped(module)
    parts = list(root.modules())

    def run(batch: Any) -> list[Array]:
        with phase(parts, None), torch.inference_mode():
            outputs = called(root, _channels_last(_arguments(batch, root)))
        return [_array(leaf) for leaf in _leaves(outputs)]

    return run


def _arguments(batch: Any, root: Any) -> Any:
    """A batch where the module is, as :func:`called` takes it: what is one argument in a tuple."""
    given = tensors(batch, root)
    one = isinstance(root, ReplayedPrefix) and isinstance(given, Mapping) and not root.named
    return (given,) if one or not isinstance(given, (Mapping, tuple, list)) else given


#: For a few samples too: nothing is compiled.
uncompiled = native


def lower(module: Any) -> Callable[[Any], list[Array]]:
    """As :func:`native`, with what torch's autocast rounds in bfloat16; outputs are float32.

    Raises:
        ModelError: The module is not in float32.
        BackendError: Its device has no bfloat16.
    """
    kind, dtype = device(module), torch_pass.floating_dtype(unwrapped(module))
    if dtype != torch.float32:
        raise ModelError(f"bfloat16 is for a model in float32. Received: a model in {dtype}")
    require_bfloat16(kind)
    return in_bfloat16(native(module), kind)


def require_bfloat16(kind: str) -> None:
    """Refuse a kind of device that computes bfloat16 no faster than float32, or not at all.

    Raises:
        BackendError: It is one.
    """
    able = environment.has_bfloat16() if kind == "cpu" else (
        kind == "cuda" and torch.cuda.is_bf16_supported()
    )  # fmt: skip
    if not able:
        raise BackendError(f"bfloat16 is not what this device ({kind}) computes in")


def in_bfloat16(run: Callable[[Any], list[Array]], kind: str) -> Callable[[Any], list[Array]]:
    """``run`` under torch's autocast."""

    def rounded(batch: Any) -> list[Array]:
        with torch.autocast(kind, dtype=torch.bfloat16):
            made = run(batch)
        return [y.astype(np.float32) if y.dtype.name == "bfloat16" else y for y in made]

    return rounded


def full_precision(module: Any) -> AbstractContextManager[None]:
    """Let no product of float32 numbers be rounded to TF32; nothing changes on a processor."""
    return nullcontext() if device(module) == "cpu" else torch_pass.full_precision()


def takes_any_number(module: Any) -> None:
    """Not known of a torch module."""


def handed_out(cache: Any, labels: Sequence[Any]) -> Any:
    """A data set of features and labels."""
    return FeatureDataset(cache, joined(labels, len(cache)))


def _channels_last(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        image = value.ndim == 4 and value.is_floating_point()
        return value.contiguous(memory_format=torch.channels_last) if image else value
    if isinstance(value, Mapping):
        return {key: _channels_last(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_channels_last(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return [leaf for item in items for leaf in _leaves(item)]


def _array(tensor: Any) -> Array:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    found: Array = tensor.cpu().contiguous().numpy()
    return found


def to_onnx(module: Any, batch: Any) -> bytes:
    """Serialize a module at inference as an ONNX model; torch folds BN layers on the way.

    Args:
        module: A module on the CPU; its weights are copied.
        batch: A batch of inputs, an array or a sequence of arrays; its first axis stays open.

    Raises:
        ModelError: Inputs by name, or what torch cannot export.
        BackendError: The package ``onnx`` is not installed.
    """
    if isinstance(batch, Table):
        raise ModelError(
            "inputs that are no arrays of one length cannot be exported. Received: such inputs"
        )
    if isinstance(batch, Mapping):
        raise ModelError("inputs that are given by name cannot be exported. Received: a mapping")
    root = unwrapped(module)
    inputs = tensors(batch, root)
    # A few rows: their number stays open, and a trace runs as slowly as the module.
    arguments = tuple(
        argument[:ROWS] for argument in (inputs if isinstance(inputs, (tuple, list)) else (inputs,))
    )
    twin = copied_for_inference(root)
    names = [f"input_{number}" for number in range(len(arguments))]
    stream = io.BytesIO()
    try:  # also a module that takes one number of rows alone
        with torch.no_grad(), phase(list(twin.modules()), None):
            outputs = _leaves(called(twin, arguments))
        results = [f"output_{number}" for number in range(len(outputs))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this way of exporting will go one day
            torch.onnx.export(
                twin,
                arguments,
                stream,
                dynamo=False,
                opset_version=_OPSET,
                input_names=names,
                output_names=results,
                dynamic_axes={name: {0: "n"} for name in [*names, *results]},
            )
    except ImportError as problem:
        raise BackendError('writing an ONNX graph needs onnx: pip install "frostline[onnx]"') from (
            problem
        )
    except Exception as problem:  # torch's own have no public root
        reason = first_line(problem)
        raise ModelError(f"torch cannot export it: {reason}") from problem
    return stream.getvalue()
