"""Run a torch module on numpy batches and leave it exactly as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from frostline.adapters.torch.calls import answered, as_meant
from frostline.adapters.torch.graph import is_site, modes_kept, set_mode, site_modules, unwrapped
from frostline.data.batches import map_leaves
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


def tensors(structure: Any, model: Any) -> Any:
    """Arrays -> tensors where the model is; floats in the dtype that the model computes in."""
    device, dtype = device_of(model), floating_dtype(model)

    def tensor(leaf: Any) -> Any:
        made = torch.as_tensor(np.ascontiguousarray(leaf), device=device)
        return made.to(dtype) if made.is_floating_point() else made

    return map_leaves(tensor, structure)


@contextmanager
def full_precision() -> Iterator[None]:
    """Let no product of float32 numbers be rounded to TF32."""
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
    try:
        for switch, name, _, exact in switches:
            setattr(switch, name, exact)
        yield
    finally:
        for switch, name, before, _ in switches:
            setattr(switch, name, before)


def called(root: Any, x: Any) -> Any:
    """Call the module: a mapping by keyword, a tuple or list by position, else one argument."""
    if isinstance(x, Mapping):
        return root(**x)
    return root(*x) if isinstance(x, (tuple, list)) else root(x)


def arrays(structure: Any) -> Any:
    """Tensors -> arrays, float32 at least; a structure that numpy has no word for as it is."""
    if isinstance(structure, torch.Tensor):
        found = structure.detach()
        if found.is_floating_point() and found.dtype != torch.float64:
            found = found.float()
        return found.cpu().numpy()
    if isinstance(structure, Mapping):
        return {key: arrays(value) for key, value in structure.items() if value is not None}
    if isinstance(structure, (tuple, list)):
        return tuple(arrays(value) for value in structure)
    raise DataError(
        "the model must return a tensor, or a mapping or sequence of tensors. "
        f"Received: {type(structure).__name__}"
    )


def set_phase(root: Any, *, training: bool) -> None:
    """Put a module into a phase as its user does.

    A BN site that is in training mode inside of a model in evaluation mode stays in it at
    inference: the model as it is now does that, too.
    """
    left = [] if root.training else [m for m in root.modules() if is_site(m) and m.training]
    set_mode(root, training=training)
    for module in left:
        module.training = True


@contextmanager
def untouched(model: Any, *, number: int = 0) -> Iterator[Any]:
    """Yield the root module; modes, flags, buffers and random state are put back on any exit.

    Args:
        model: Any torch module; wrappers are taken off.
        number: Seed of all that is random inside.
    """
    root = unwrapped(model)
    buffers = [(buffer, buffer.detach().clone()) for buffer in root.buffers() if _built(buffer)]
    with modes_kept(root), torch.random.fork_rng():
        torch.manual_seed(number)
        try:
            yield root
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    # Not when nothing moved: autograd counts writes to what it has saved.
                    if not _same(buffer, value):
                        buffer.copy_(value)


def _same(a: Any, b: Any) -> bool:
    return bool(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()))


def _built(tensor: Any) -> bool:
    return not isinstance(tensor, nn.parameter.UninitializedTensorMixin)


def run(model: Any, x: Any, *, training: bool, number: int = 0) -> Any:
    """Outputs of one batch in a phase, tensors; the model is left as it was found."""
    inputs = tensors(x, model)
    with untouched(model, number=number) as root, torch.no_grad():
        set_phase(root, training=training)
        with answered(root, site_modules(root), as_meant):
            return called(root, inputs)


#: Endings of class names of modules that act in training only.
_NOISE = {
    "dropout": ("dropout", "dropout1d", "dropout2d", "dropout3d", "droppath", "stochasticdepth"),
    "noise": ("rrelu", "gaussiannoise"),
    "augmentation": ("randomerasing", "randomapply", "randomcrop", "randomhorizontalflip"),
}


def noise_layers(model: Any) -> dict[str, str]:
    """Path -> kind of every module that acts in training only and is no BN."""
    found: dict[str, str] = {}
    for name, module in unwrapped(model).named_modules():
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


def state(model: Any) -> dict[str, Array]:
    """Every parameter and buffer as an array, by name with slashes."""
    return {
        name.replace(".", "/"): arrays(tensor)
        for name, tensor in unwrapped(model).state_dict().items()
        if isinstance(tensor, torch.Tensor) and _built(tensor)
    }
