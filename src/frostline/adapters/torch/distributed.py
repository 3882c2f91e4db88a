"""Several processes of ``torch.distributed`` as one; see :mod:`frostline.adapters.together`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.utils import _pytree as pytree

from frostline.adapters.together import ALONE, Together
from frostline.adapters.torch.graph import unwrapped
from frostline.adapters.torch.keeping import is_statistic
from frostline.adapters.torch.state_kept import plain
from frostline.atomic import undone
from frostline.types import FrostlineError, ModelError
from frostline.types.reasons import first_line

#: Tables of a module that hold hooks of FSDP2.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class ProcessGroup(Together):
    """The ranks of a process group.

    Words travel as bytes, so that float64 arrives bit for bit on every backend, those without
    float64 included.

    Args:
        group: A process group; ``None``: the default one.
        model: What they measure; FSDP2 may have sharded it.
    """

    def __init__(self, group: Any = None, model: Any = None) -> None:
        super().__init__()
        self._model = model
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

    @contextmanager
    def collective(self, verb: str, **options: Any) -> Iterator[None]:
        """As of :class:`Together`, with the parameters of a sharded model whole on every rank."""
        with super().collective(verb, **options), ExitStack() as stack:
            try:
                stack.enter_context(gathered(self._model))
            except RuntimeError as error:  # torch has no class of its own for a lost peer
                self._over = True
                raise FrostlineError(
                    f"rank {self.rank} of {self.size} could not gather the parameters of the model "
                    f"({first_line(error)}). It is as it was"
                ) from error
            yield

    def _leaf(self, value: Any) -> tuple[Any, str]:
        if not isinstance(value, torch.Tensor):
            return super()._leaf(value)
        if value.layout != torch.strided or value.is_nested or value.dtype == torch.bfloat16:
            return None, ""
        return value.detach().cpu().numpy(), "torch"

    def _restored(self, array: Any, kind: str) -> Any:
        return torch.from_numpy(array) if kind == "torch" else array


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Make a module that FSDP2 has sharded a plain one for a block: each rank has all parameters.

    Its forward pass then needs no other rank, so shares of the data may differ in length. For the
    block the hooks and classes of FSDP2 are taken off; casts of its ``MixedPrecisionPolicy`` stay.
    What is written to parameters inside is lost; buffers are not sharded.
    """
    modules = list(unwrapped(model).modules())
    sharded = [module for module in modules if _is_sharded(module)]
    if not sharded:
        yield
        return
    copies = _copies(modules, sharded)
    kinds = [(module, type(module)) for module in sharded]
    tables = [(table, dict(table)) for each in modules for table in _tables(each)]
    casts: list[Any] = []

    def back() -> None:
        for cast in casts:
            cast.remove()
        for module, kind in kinds:
            module.__class__ = kind
        for table, content in tables:
            table.clear()
            table.update(content)

    try:
        for table, content in tables:
            for key, held in content.items():
                if _is_of_fsdp(held):
                    del table[key]
        for module, whole in zip(modules, copies, strict=True):
            module._parameters.update(whole)
        for module, kind in kinds:
            casts += _casts(module)
            if kind.__bases__[0].__name__ == "FSDPModule":
                module.__class__ = kind.__bases__[-1]
        yield
    finally:
        undone(back)


def _copies(modules: Sequence[Any], sharded: Sequence[Any]) -> list[dict[str, Any]]:
    """Of each module the sharded parameters by name, whole; those of FSDP2 cannot be lent.

    It frees their memory, which fails once numpy has seen it.
    """
    if torch.cuda.is_available():  # an optimizer may be at work on the parameters still
        torch.cuda.synchronize()
    made: dict[Any, Any] = {}
    found = []
    try:
        for module in sharded:
            module.reshard()  # what is whole, as behind a call, may be older than the shards
        tables = [each._parameters.items() for each in modules]
        names = [[name for name, value in table if _is_dtensor(value)] for table in tables]
        for module in sharded:
            module.unshard()
        for module, here in zip(modules, names, strict=True):
            whole = {name: module._parameters[name] for name in here}
            for value in whole.values():
                if value not in made:
                    copied = value.detach().clone()
                    made[value] = nn.Parameter(copied, requires_grad=value.requires_grad)
            found.append({name: made[value] for name, value in whole.items()})
    finally:
        for module in sharded:
            module.reshard()
    return found


def _is_sharded(module: Any) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _is_dtensor(value: Any) -> bool:
    return type(value).__name__ == "DTensor"


def _tables(module: Any) -> list[dict[Any, Any]]:
    return [getattr(module, name) for name in ("_parameters", *_HOOKS)]


def _is_of_fsdp(held: Any) -> bool:
    """Whether it is a hook of FSDP2."""
    if isinstance(held, torch.Tensor):
        return False
    inner = getattr(held, "hook", held)  # torch wraps some
    return ".fsdp" in (getattr(getattr(inner, "func", inner), "__module__", "") or "")


def _casts(module: Any) -> list[Any]:
    """Let a module cast its inputs and outputs as FSDP2's policy says; handles of the hooks."""
    policy = module._get_fsdp_state()._mp_policy
    handles = []
    if policy.cast_forward_inputs and policy.param_dtype:
        hook: Any = functools.partial(_cast_inputs, policy.param_dtype)
        handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
    if policy.output_dtype:
        hook = functools.partial(_cast_outputs, policy.output_dtype)
        handles.append(module.register_forward_hook(hook))
    return handles


def _cast_inputs(dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return _cast(dtype, args), _cast(dtype, kwargs)


def _cast_outputs(dtype: torch.dtype, _: nn.Module, __: Any, outputs: Any) -> Any:
    return _cast(dtype, outputs)


def _cast(dtype: torch.dtype, values: Any) -> Any:
    def one(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return pytree.tree_map(one, values)


def together(model: Any, process_group: Any = None) -> Together:
    """The processes that measure together.

    Args:
        model: What they measure.
        process_group: ``None``: all of the default group where one is initialised, else this
            process alone. ``False``: this process alone.

    Raises:
        ModelError: A group is asked for and there is none, or this process is not in it; or FSDP2
            has sharded the model over more processes than these.
    """
    ready = distributed.is_available() and distributed.is_initialized()
    if process_group is False or (process_group is None and not ready):
        if ready:
            _require_shards(model, {distributed.get_rank()}, process_group)
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
    _require_shards(model, set(distributed.get_process_group_ranks(process_group)), process_group)
    sharded = any(map(_is_sharded, unwrapped(model).modules()))  # over one process, too
    alone = distributed.get_world_size(process_group) == 1 and not sharded
    return ALONE if alone else ProcessGroup(process_group, model)


def _require_shards(model: Any, ranks: set[int], process_group: Any) -> None:
    """Raise unless these ranks hold all shards: a forward pass would wait for the others."""
    root = unwrapped(model)
    if not any(map(_is_sharded, root.modules())):
        return
    meshes = [p.device_mesh.mesh.flatten().tolist() for p in root.parameters() if _is_dtensor(p)]
    holding = {rank for mesh in meshes for rank in mesh}
    if not holding <= ranks:
        raise ModelError(
            f"fully_shard has spread the model over the ranks {sorted(holding)}, so all of them "
            "must make this call together: leave process_group out, or pass a group that has them "
            f"all. Received: process_group={process_group!r}"
        )


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
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ModelError(
                f"'{name or type(root).__name__}' is sharded over the ranks by the first FSDP, so "
                "no rank can run batches that the others do not have: use fully_shard (FSDP2), or "
                "load the full state_dict into a plain module and recalibrate that. "
                "Received: a FullyShardedDataParallel"
            )
    free = tuple(f"{name}." for name in chosen if name)
    state = root.state_dict()
    if any(_is_dtensor(value) for value in state.values()):
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
    digest = hashlib.sha256()
    for part in plain(value.detach()):
        digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
