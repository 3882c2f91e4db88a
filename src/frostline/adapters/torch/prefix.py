"""A torch prefix: its identity, its plain forward pass, and its graph for inference engines."""

from __future__ import annotations

import copy
import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from frostline.adapters.bytecode import code_of
from frostline.adapters.torch import forward_pass as torch_pass
from frostline.adapters.torch.cached_data import FeatureDataset, in_order as readable, joined
from frostline.adapters.torch.fold import fold
from frostline.adapters.torch.forward_pass import called, tensors
from frostline.adapters.torch.graph import unwrapped
from frostline.adapters.torch.locked import unlocked_class
from frostline.adapters.torch.network import phase
from frostline.types import Array, BackendError, ModelError
from frostline.types.reasons import first_line

_PLAIN = (str, bytes, int, float, complex, bool, type(None))
#: What a BN module has beside what it computes at inference.
_BESIDE = frozenset({"training", "momentum", "track_running_stats", "num_batches_tracked"})
_OPSET = 17
#: Features come as a data set of samples with their labels.
HANDS_OUT_LABELS = True


def identity(module: Any) -> str:
    """Hash of what a module computes at inference: code, configuration, weights and statistics.

    Args:
        module: Any torch module; wrappers are taken off.
    """
    root = unwrapped(module)
    digest = hashlib.sha256(b"torch")
    if isinstance(root, fx.GraphModule):
        digest.update(root.code.encode())
    for name, each in root.named_modules():
        digest.update(repr((name, _described(each))).encode())
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if name.rpartition(".")[2] in _BESIDE:
            continue
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _described(module: Any) -> tuple[Any, ...]:
    """Class of a module, its plain settings, and its code where it is not torch's own."""
    kind: Any = unlocked_class(type(module))
    if isinstance(module, fx.GraphModule):
        return ("graph",)
    settings = {
        key: value
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and key not in _BESIDE and _is_plain(value)
    }
    return kind.__module__, kind.__qualname__, settings, code_of(kind, "torch")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (*_PLAIN, torch.dtype))


def device(module: Any) -> str:
    """Kind of device that holds the module's weights, such as ``"cpu"`` or ``"cuda"``."""
    held = (*unwrapped(module).parameters(), *unwrapped(module).buffers())
    return str(held[0].device.type) if held else "cpu"


def native(module: Any) -> Callable[[Any], list[Array]]:
    """Return ``f(batch) -> arrays``: the module itself, at inference, without autograd.

    Images travel with the channels last in memory, which convolutions on a CPU prefer. Weights are
    read at every call; modes are put back.
    """
    root = unwrapped(module)
    parts = list(root.modules())

    def run(batch: Any) -> list[Array]:
        with phase(parts, None), torch.inference_mode():
            outputs = called(root, _channels_last(tensors(batch, root)))
        return [_array(leaf) for leaf in _leaves(outputs)]

    return run


#: For a few samples too: nothing is compiled.
uncompiled = native


def full_precision(module: Any) -> AbstractContextManager[None]:
    """Let no product of float32 numbers be rounded to TF32; nothing changes on a processor."""
    return nullcontext() if device(module) == "cpu" else torch_pass.full_precision()


def takes_any_number(module: Any) -> bool:  # noqa: ARG001 - no module says so
    """Not known of a torch module."""
    return False


def handed_out(cache: Any, labels: Sequence[Any]) -> Any:
    """A data set of features and labels."""
    return FeatureDataset(cache, joined(labels))


def _channels_last(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        image = value.ndim == 4 and value.is_floating_point()
        return value.contiguous(memory_format=torch.channels_last) if image else value
    if isinstance(value, Mapping):
        return {key: _channels_last(item) for key, item in value.items()}
    return type(value)(_channels_last(item) for item in value)


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
    """Serialize a module at inference as an ONNX model; BN layers are folded, in float64.

    Args:
        module: A module on the CPU; its weights are copied.
        batch: A batch of inputs, an array or a sequence of arrays; its first axis stays open.

    Raises:
        ModelError: Inputs by name, or what torch cannot export.
        BackendError: The package ``onnx`` is not installed.
    """
    if isinstance(batch, Mapping):
        raise ModelError("inputs that are given by name cannot be exported. Received: a mapping")
    twin = _folded(unwrapped(module))
    inputs = tensors(batch, twin)
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    names = [f"input_{number}" for number in range(len(arguments))]
    stream = io.BytesIO()
    with torch.no_grad(), phase(list(twin.modules()), None):
        outputs = _leaves(called(twin, inputs))
    results = [f"output_{number}" for number in range(len(outputs))]
    try:
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
        raise BackendError("writing an ONNX graph needs onnx: pip install frostline[onnx]") from (
            problem
        )
    except Exception as problem:  # torch's own have no public root
        reason = first_line(problem)
        raise ModelError(f"torch cannot export it: {reason}") from problem
    return stream.getvalue()


def _folded(root: Any) -> Any:
    """A copy with its BN layers folded; where one has to stay, with all as they are.

    A convolution of a user's own class is not folded; engines do so, as they see what it computes.
    """
    try:
        done = fold(root)
    except ModelError:
        return copy.deepcopy(root).eval()
    return copy.deepcopy(root).eval() if done.replaced or done.notes else done.model.eval()


__all__ = [
    "HANDS_OUT_LABELS",
    "device",
    "full_precision",
    "handed_out",
    "identity",
    "native",
    "readable",
    "takes_any_number",
    "to_onnx",
    "uncompiled",
]
