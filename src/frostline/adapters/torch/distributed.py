"""Several processes of ``torch.distributed`` as one; see :mod:`frostline.adapters.together`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed

from frostline.adapters.together import ALONE, Together
from frostline.adapters.torch.graph import unwrapped
from frostline.adapters.torch.keeping import is_statistic
from frostline.types import ModelError

#: Classes that hold only a part of a parameter on each rank, by name: they may be missing in torch.
_SHARDED = ("FSDPModule", "FullyShardedDataParallel")


class ProcessGroup(Together):
    """The ranks of a process group.

    Words travel as bytes, so that float64 arrives bit for bit on every backend, those without
    float64 included.

    Args:
        group: A process group; ``None``: the default one.
    """

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self._group = group
        backend = str(distributed.get_backend(group))
        self._device = torch.device("cpu")
        if "nccl" in backend and "gloo" not in backend:
            self._device = torch.device("cuda", torch.cuda.current_device())

    def _gather(self, word: bytes) -> list[bytes]:
        mine = torch.from_numpy(np.frombuffer(word, np.uint8).copy()).to(self._device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(all_of_them, mine, group=self._group)
        return [gathered.cpu().numpy().tobytes() for gathered in all_of_them]

    def _leaf(self, value: Any) -> tuple[Any, str]:
        if not isinstance(value, torch.Tensor):
            return super()._leaf(value)
        if value.layout != torch.strided or value.is_nested or value.dtype == torch.bfloat16:
            return None, ""
        return value.detach().cpu().numpy(), "torch"

    def _restored(self, array: Any, kind: str) -> Any:
        return torch.from_numpy(array) if kind == "torch" else array


def together(process_group: Any = None) -> Together:
    """The processes that measure together.

    Args:
        process_group: ``None``: all of the default group where one is initialised, else this
            process alone. ``False``: this process alone.

    Raises:
        ModelError: A group is asked for and there is none, or this process is not in it.
    """
    ready = distributed.is_available() and distributed.is_initialized()
    if process_group is False or (process_group is None and not ready):
        return ALONE
    if not ready:
        raise ModelError(
            "there is no process group: call torch.distributed.init_process_group first, or leave "
            f"process_group out. Received: process_group={process_group!r}"
        )
    try:
        rank = distributed.get_rank(process_group)
    except Exception as error:
        raise ModelError(
            "process_group must be a group of torch.distributed.new_group, None for the default "
            f"one, or False for this process alone. Received: {process_group!r}"
        ) from error
    if rank < 0:
        raise ModelError(
            "this process is not in the group that it was given. "
            f"Received: rank {distributed.get_rank()}, process_group={process_group!r}"
        )
    return ALONE if distributed.get_world_size(process_group) == 1 else ProcessGroup(process_group)


def require_same_model(ranks: Together, model: Any, chosen: Sequence[str]) -> None:
    """Raise unless all ranks hold one model, up to the statistics that are measured.

    Args:
        ranks: Processes that measure together.
        model: A torch module.
        chosen: Dotted names of the sites whose statistics may differ.

    Raises:
        ModelError: Names, shapes or values differ, with the first name; or it is sharded.
    """
    if ranks.size == 1:
        return
    ranks.require_alike(sites=list(chosen))
    root = unwrapped(model)
    for name, module in root.named_modules():
        if any(kind.__name__ in _SHARDED for kind in type(module).__mro__):
            raise ModelError(
                f"'{name or type(root).__name__}' is sharded over the ranks (FSDP), so no rank can "
                "run batches that the others do not have: load the full state_dict into a plain "
                "module and recalibrate that. Received: a module wrapped by FSDP"
            )
    free = tuple(f"{name}." for name in chosen if name)
    state = root.state_dict()
    if any(type(value).__name__ == "DTensor" for value in state.values()):
        raise ModelError("parameters are sharded over the ranks (DTensor): gather them first")
    known = [
        [
            name,
            list(value.shape),
            _digest(value) if value.is_floating_point() and _must_agree(name, free) else "",
        ]
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    ]
    mine = {name: rest for name, *rest in known}
    for rank, other in enumerate(ranks.values(known)):
        theirs = {name: rest for name, *rest in other}
        odd = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if odd:
            shapes = [
                layout[odd[0]][0] if odd[0] in layout else "missing" for layout in (mine, theirs)
            ]
            what = "has other values" if shapes[0] == shapes[1] else f"is {shapes[1]}"
            raise ModelError(
                f"the ranks hold different models: '{odd[0]}' {what} on rank {rank} ({len(odd)} "
                f"such). Load one state_dict on all of them first. Received: {shapes[0]} on rank "
                f"{ranks.rank}"
            )


def _must_agree(name: str, free: tuple[str, ...]) -> bool:
    last = name.rpartition(".")[2]
    return not (is_statistic(last) and (name == last or name.startswith(free)))


def _digest(value: Any) -> str:
    plain = value.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy()).hexdigest()[:16]
