"""Run a torch module on numpy batches and leave it exactly as it was found."""

from __future__ import annotations

import copy
import dataclasses
import dis
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from frostline.adapters.torch.asking import call
from frostline.adapters.torch.calls import SWITCHED, answered, as_meant
from frostline.adapters.torch.graph import (
    is_site,
    modes_kept,
    require_built,
    require_there,
    set_mode,
    site_modules,
    unwrapped,
    without_values,
)
from frostline.adapters.torch.random import forked, seeded
from frostline.adapters.torch.state_kept import gradients_kept, same_values, state_kept
from frostline.atomic import taken_back
from frostline.data.arrays import Table
from frostline.data.batch import Batch
from frostline.types import Array, DataError


def device_of(model: Any) -> Any:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    return next((t.device for t in _tensors_of(model)), torch.device("cpu"))


def _tensors_of(model: Any) -> Iterator[Any]:
    root = unwrapped(model)
    yield from root.parameters()
    yield from root.buffers()


def floating_dtype(model: Any) -> Any:
    """Dtype of the model's first floating point parameter or buffer."""
    found = (tensor.dtype for tensor in _tensors_of(model) if tensor.is_floating_point())
    return next(found, torch.float32)


def mover(model: Any) -> Callable[[Any], Any]:
    """What puts a batch where the model is; see :func:`moved`."""
    return functools.partial(moved, device=device_of(model), dtype=floating_dtype(model))


def tensors(structure: Any, model: Any) -> Any:
    """Arrays -> tensors where the model is; floats in the dtype that the model computes in."""
    return mover(model)(structure)


def moved(value: Any, device: Any, dtype: Any) -> Any:
    """The same structure with a copy of every tensor on the device; arrays become tensors.

    Floating arrays take the dtype that the model computes in; tensors keep theirs. Copies, for a
    model or a loss may write into what it is given, and the next pass needs the same samples.
    """
    again = functools.partial(moved, device=device, dtype=dtype)
    if isinstance(value, Table):
        return again(value.restored(value))
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind == "O":  # a list of samples
            return [again(item) for item in value.tolist()]
        if value.dtype.kind not in "biufc":
            return value
        made = torch.tensor(np.ascontiguousarray(value), device=device)
        return made.to(dtype) if made.is_floating_point() else made
    if isinstance(value, torch.Tensor):
        given = value.detach()
        made = given.clone() if given.device == device else given.to(device)
        return made.requires_grad_() if value.requires_grad else made
    if isinstance(value, Mapping):
        named = {key: again(item) for key, item in value.items()}
        return named if type(value) is dict else _with_items(value, named, device)
    if isinstance(value, (list, tuple)) and not _moves_itself(value):
        items = [again(item) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: again(getattr(value, name)) for name in names})
    if not _moves_itself(value):
        return value
    return (value.clone() if callable(getattr(value, "clone", None)) else value).to(device)


def _with_items(value: Any, items: Mapping[Any, Any], device: Any) -> Any:
    """A mapping of whatever class with other items: a BatchEncoding has attributes."""
    kept = all(
        items[key].device == item.device
        for key, item in value.items()
        if isinstance(item, torch.Tensor)
    )
    if not kept:
        return value.to(device) if _moves_itself(value) else items
    try:
        made = copy.copy(value)
        for key, item in items.items():
            made[key] = item
    except Exception:  # one that cannot be written to
        return value
    return made


def _moves_itself(value: Any) -> bool:
    """Whether it is no tensor, but has ``to``: a graph, a PackedSequence, a BatchEncoding."""
    return callable(getattr(value, "to", None))


def precisions() -> list[tuple[Any, str, Any, Any]]:
    """The switches for TF32: object, name, present value, value that rounds nothing."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    # Since 2.9 each kind of operation has a word for it. Where a user has set one of those the
    # older switch raises an error; where not, it is kept readable for code inside the block.
    try:
        switches: list[tuple[Any, str, Any, Any]] = [(cudnn, "allow_tf32", cudnn.allow_tf32, False)]
    except RuntimeError:
        kinds = (cudnn.conv, cudnn.rnn)
        switches = [(kind, "fp32_precision", kind.fp32_precision, "ieee") for kind in kinds]
    if hasattr(products, "fp32_precision"):
        switches.append((products, "fp32_precision", products.fp32_precision, "ieee"))
    else:
        switches.append((products, "allow_tf32", products.allow_tf32, False))
    return switches


@contextmanager
def full_precision() -> Iterator[None]:
    """Let no product of float32 numbers be rounded to TF32."""
    switches = precisions()

    def back() -> None:
        for switch, name, before, _ in switches:
            setattr(switch, name, before)

    with taken_back(back):
        for switch, name, _, exact in switches:
            setattr(switch, name, exact)
        yield


def called(root: Any, x: Any) -> Any:
    """Call the module: a mapping by keyword, a tuple or list by position, else one argument."""
    if isinstance(x, Mapping):
        return root(**x)
    return root(*x) if isinstance(x, (tuple, list)) else root(x)


def arrays(structure: Any) -> Any:
    """Tensors -> arrays, float32 at least.

    Of a structure single numbers, such as a loss beside the outputs, and what holds no tensor are
    left out.
    """
    if structure is None:
        return None
    found = arrays_in(structure)
    if found is None:
        raise DataError(
            "the model must return a tensor, or a structure that holds tensors. "
            f"Received: {type(structure).__name__}"
        )
    return found


def arrays_in(structure: Any) -> Any:
    """As :func:`arrays`; ``None`` for a structure without arrays."""
    if isinstance(structure, torch.Tensor):
        found = structure.detach()
        if hasattr(found, "full_tensor"):  # sharded by FSDP2: every rank asks for all of it
            found = found.full_tensor()
        if found.layout is not torch.strided:
            found = found.to_dense()
        if found.device.type == "meta":
            raise without_values(f"a tensor of shape {tuple(found.shape)}")
        if found.is_floating_point() and found.dtype != torch.float64:
            found = found.float()
        return found.cpu().numpy()
    if isinstance(structure, (bool, int, float, np.number, np.ndarray)):
        return np.asarray(structure)
    if dataclasses.is_dataclass(structure) and not isinstance(structure, (type, Mapping)):
        fields = dataclasses.fields(structure)
        structure = {field.name: getattr(structure, field.name) for field in fields}
    if isinstance(structure, Mapping):
        items = {key: arrays_in(value) for key, value in structure.items()}
        return {key: value for key, value in items.items() if _many(value)} or None
    if isinstance(structure, (tuple, list)):
        values = [arrays_in(value) for value in structure]
        return tuple(value for value in values if _many(value)) or None
    return None


def _many(found: Any) -> bool:
    return found is not None and (not isinstance(found, np.ndarray) or found.ndim > 0)


def set_phase(root: Any, *, training: bool) -> None:
    """Put a module into a phase as its user does.

    A BN site that is in training mode inside of a model in evaluation mode stays in it at
    inference: the model as it is now does that, too.
    """
    left = [] if root.training else [m for m in root.modules() if is_site(m) and m.training]
    set_mode(root, training=training)
    for module in left:
        module.training = True


def set_inference(
    root: Any, sites: Mapping[str, Any], *, trains: bool = False, dropout: bool = False
) -> None:
    """Put a module into a mode in which no site uses its batch by itself.

    Args:
        root: The module.
        sites: Its sites.
        trains: Training mode, for a model whose losses exist there only.
        dropout: All but the sites acts as in training.
    """
    set_mode(root, training=trains or dropout)
    for module in sites.values():
        module.training = False
    if trains and not dropout:
        for path in _random_modules(root):
            root.get_submodule(path.replace("/", ".")).eval()


@contextmanager
def untouched(model: Any, *, number: int = 0) -> Iterator[Any]:
    """Yield the root module; all but its parameters' values is put back on any exit.

    That is modes, flags, gradients, what modules keep beside parameters, and random state.

    Args:
        model: Any torch module; wrappers are taken off.
        number: Seed of all that is random inside.

    Raises:
        ModelError: A lazy module that has seen no data: the first pass would build it; or a BN
            layer that this pass made.
    """
    root = unwrapped(model)
    require_built(root)
    known = dict(root.named_modules())
    kept, gradients = state_kept([*known.values()]), gradients_kept(root)
    with modes_kept(root), forked(), taken_back(gradients), taken_back(kept):
        seeded(number)
        yield root
        require_there(root, known)


@contextmanager
def frozen_parameters_kept(model: Any) -> Iterator[None]:
    """Put the values of parameters that need no gradient back on exit.

    A momentum encoder (MoCo, BYOL) moves its own while it is called.
    """
    kept = [
        (tensor, tensor.data, tensor.data.clone())
        for tensor in unwrapped(model).parameters()
        if not tensor.requires_grad
    ]

    def back() -> None:
        for tensor, data, value in kept:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            if not same_values(data, value):
                data.copy_(value)

    with taken_back(back):
        yield


def run(model: Any, x: Any, *, training: bool, number: int = 0) -> Any:
    """Outputs of one batch in a phase, tensors; the model is left as it was found.

    Args:
        model: A torch module.
        x: Its inputs, or a :class:`~frostline.data.batch.Batch`.
        training: The phase.
        number: Seed of all that is random inside.
    """
    batch = x if isinstance(x, Batch) else Batch(x)
    with untouched(model, number=number) as root, torch.no_grad():
        set_phase(root, training=training)
        with answered(site_modules(root), as_meant):
            return call(root, batch, mover(model), targets=training)


#: Endings of class names of modules that act in training only.
_NOISE = {
    "dropout": ("dropout", "dropout1d", "dropout2d", "dropout3d", "droppath", "stochasticdepth"),
    "noise": ("rrelu", "gaussiannoise"),
    "augmentation": ("randomerasing", "randomapply", "randomcrop", "randomhorizontalflip"),
}


def noise_layers(model: Any) -> dict[str, str]:
    """Path -> kind of every module inside that acts in training only and is no BN."""
    root = unwrapped(model)
    kinds: dict[str, Any] = {n.replace(".", "/"): type(m) for n, m in root.named_modules() if n}
    calling = {
        path: "dropout"
        for path, kind in kinds.items()
        if _calls_dropout(kind) and not _no_rate(root.get_submodule(path.replace("/", ".")))
    }
    return {**calling, **_random_modules(root)}


def _random_modules(root: Any) -> dict[str, str]:
    """Those whose class says so by its name."""
    found: dict[str, str] = {}
    for name, module in root.named_modules():
        kind = type(module).__name__.lower()
        silent = getattr(module, "p", getattr(module, "drop_prob", None)) == 0
        if is_site(module) or silent:
            continue
        for noise, names in _NOISE.items():
            random = kind.startswith("random") and noise == "augmentation"
            if random or kind.endswith(names):
                found[name.replace(".", "/")] = noise
                break
    return found


@functools.cache
def _calls_dropout(kind: Any) -> bool:
    """Whether the code of a class's ``forward`` names dropout of ``torch.nn.functional``."""
    if issubclass(kind, torch.jit.ScriptModule):
        return False
    code = getattr(kind.forward, "__code__", None)
    if code is None or kind.__module__.startswith("torch.nn.modules."):
        return False
    known, before = kind.forward.__globals__, None
    for step in dis.get_instructions(code):
        value = known.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and before is not None:
            value = getattr(before, str(step.argval), None)
        if any(value is function for function in SWITCHED):
            return True
        before = value if any(value is module for module in (torch, nn, nn.functional)) else None
    return False


def _no_rate(module: Any) -> bool:
    """Whether all that a module keeps as rates of dropout is 0."""
    rates = [
        value
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    return bool(rates) and not any(rates)


def state(model: Any) -> dict[str, Array]:
    """Every parameter and buffer as an array, by name with slashes."""
    return {
        name.replace(".", "/"): arrays(tensor)
        for name, tensor in unwrapped(model).state_dict().items()
        if isinstance(tensor, torch.Tensor)
        and not isinstance(tensor, nn.parameter.UninitializedTensorMixin)
    }
