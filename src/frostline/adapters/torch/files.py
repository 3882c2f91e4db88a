"""Read a torch module from a function and a file with its state, and write a state, or nothing.

A file is never unpickled: a state is read with ``weights_only=True``, a program as
:mod:`frostline.adapters.torch.program_file` says.
"""

from __future__ import annotations

import importlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.adapters.torch.graph import unwrapped
from frostline.adapters.torch.program import ScriptFile
from frostline.adapters.torch.program_file import read_exported, read_script
from frostline.data import files
from frostline.data.import_string import built
from frostline.data.reading import require_file, require_sound_zip
from frostline.types import ModelError, OutputError
from frostline.types.reasons import first_line

#: Files with a state.
STATES = (".pt", ".pth")

_HOW = "pass module:function --state FILE, with a function that returns the module"


def load_model(source: str, state: str | None = None) -> Any:
    """Load a torch module, or a program that has been exported.

    Args:
        source: ``module:function``, a function without arguments that returns an ``nn.Module``; or
            the path of a ``.pt2`` file of ``torch.export`` or of a TorchScript file.
        state: Path of a file with the module's ``state_dict``, as ``torch.save`` writes it.

    Returns:
        The module, or the program.

    Raises:
        ModelError: No such file or function; not a module; a state that does not fit; a pickled
            module, which is not read.
    """
    path = Path(source)
    if path.exists() or ":" not in source:
        if state is not None:
            raise ModelError(f"--state goes with module:function. Received: {source}")
        return _program(path)
    model = built(source)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source}: not a torch.nn.Module. Received: {type(model).__name__}")
    if state is not None:
        _fill(model, Path(state))
    return model


def read_state_file(path: Path) -> Mapping[str, Any]:
    """The tensors of a file by name.

    Raises:
        ModelError: No such file, or no state in it.
    """
    require_file(path, kind=ModelError)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if _is_script(path):
        raise ModelError(f"{path}: a TorchScript program, not a state_dict; it is a MODEL itself")
    from frostline.adapters.torch.reference import read_state

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            require_sound_zip(archive, str(path), kind=ModelError)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(_why_not(path, error)) from None
    return read_state(found)


def save_state(model: Any, path: Path, *, overwrite: bool = False) -> None:
    """Write the ``state_dict`` under a temporary name in its folder and rename it.

    Args:
        model: A torch module.
        path: Target, ``.pt`` or ``.pth``.
        overwrite: Replace a file that is there.

    Raises:
        OutputError: The file exists, or cannot be written; nothing is left behind.
    """
    if path.suffix not in STATES:
        raise OutputError(f"a state_dict is written as .pt or .pth. Received: {path}")
    write_state(model.state_dict(), path, overwrite=overwrite)


def state_of(model: Any) -> Mapping[str, Any]:
    """The ``state_dict`` of a module, wrappers taken off."""
    state: Mapping[str, Any] = unwrapped(model).state_dict()
    return state


def write_state(state: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Write tensors by name as ``.safetensors`` or, with any other ending, as ``torch.save`` does.

    Raises:
        OutputError: The file exists, or cannot be written; nothing is left behind.
        ModelError: ``.safetensors`` without the package.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already")
    tensors = {name: value.detach().cpu() for name, value in state.items()}
    content = None
    if path.suffix == ".safetensors":
        tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
        content = _safetensors(path).save(tensors)
    with files.replacing(path) as stream:
        try:
            stream.write(content) if content is not None else torch.save(tensors, stream)
        except RuntimeError as error:  # its writer's word for a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OutputError(f"cannot write {path}: {first_line(error)}") from error


def _safetensors(path: Path) -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise ModelError(
            f"{path}: .safetensors files need the package safetensors: pip install safetensors"
        ) from None


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    library = _safetensors(path)
    try:
        state: Mapping[str, Any] = library.load_file(path)
    except Exception as error:
        raise ModelError(f"cannot read a state_dict from {path} ({first_line(error)})") from None
    return state


def _fill(model: Any, path: Path) -> None:
    state = read_state_file(path)
    try:
        try:
            missing, unexpected = _load(model, state)
        except RuntimeError:  # of one part: torch's own words name all that does not fit
            missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"{path} does not fit the module: {lines[-1][:200]}") from None
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ModelError(f"{path} does not fit the module: {'; '.join(problems)}")


def _load(module: nn.Module, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """``module.load_state_dict(state, strict=False)`` in time that grows with the names.

    Torch looks through all names that a module is given once for each of its children. The names of
    a module that only holds others are told apart once.
    """
    if not _only_holds(module):
        missing, unexpected = module.load_state_dict(state, strict=False)
        return missing, unexpected
    children = {name: child for name, child in module._modules.items() if child is not None}
    parts: dict[str, dict[str, Any]] = {name: {} for name in children}
    missing, unexpected = list[str](), list[str]()
    for name, value in state.items():
        child, _, inner = name.partition(".")
        if child in parts:
            parts[child][inner] = value
        else:
            unexpected.append(name)
    for child, part in parts.items():
        for names, inside in zip((missing, unexpected), _load(children[child], part), strict=True):
            names += [f"{child}.{inner}" if inner else child for inner in inside]
    return missing, unexpected


def _only_holds(module: nn.Module) -> bool:
    """Whether all that a state does to a module happens in its children."""
    return (
        all(
            getattr(type(module), name) is getattr(nn.Module, name)
            for name in ("load_state_dict", "_load_from_state_dict", "set_extra_state")
        )
        and not vars(module).keys() & {"load_state_dict", "_load_from_state_dict"}
        and not (module._parameters or module._buffers)
        and not (module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)
    )


def _program(path: Path) -> Any:
    if path.is_dir() or not os.path.lexists(path):
        what = f"{path} is a folder" if path.is_dir() else f"no such model file: {path}"
        raise ModelError(f"{what}. MODEL is module:function, a .pt2 or a TorchScript file")
    require_file(path, kind=ModelError)
    if path.suffix == ".pt2":
        return read_exported(path)
    if _is_script(path):
        return ScriptFile(read_script(path))
    read_state_file(path)  # raises with the reason where that is no state either
    raise ModelError(f"{path} holds a state_dict, which is no network: {_HOW}")


def _is_script(path: Path) -> bool:
    """Whether it is a TorchScript archive: those have code beside their tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(
            "/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist()
        )


def _why_not(path: Path, error: Exception) -> str:
    if "Unsupported global" in str(error) or "weights_only" in str(error).lower():
        return (
            f"{path} holds a pickled Python object, which can run any code when it is read, so it "
            f"is not; save model.state_dict() where you trust it, and {_HOW}"
        )
    return f"cannot read a state_dict from {path} ({first_line(error)})"
