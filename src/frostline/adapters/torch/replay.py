"""Know a frozen part without a graph: record what its modules return, and answer with that.

``torch.fx`` cannot follow most models of Hugging Face, detectors, or code that looks at values.
Their frozen part is still a set of modules that return the same for a sample in every step. One run
records what each of the largest such calls returns. Then groups of them answer with placeholders of
NaN: where outputs and buffers stay the same, nothing needs these calls; what is left is the
*frontier*. The model's own code runs as it is, with the calls of the frontier answered by rows that
were stored, and the rest of the frozen part skipped.

That a call is pure is seen by behaviour: it returns the same rows with the samples in another
order and one of them left out, with another seed, and with all that trains changed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from frostline.adapters.torch.calls import replaced_forward
from frostline.adapters.torch.forward_pass import noise_layers, untouched
from frostline.adapters.torch.graph import is_frozen_kind, is_site, keeps_unknown_statistics
from frostline.adapters.torch.keeping import mean_of
from frostline.adapters.torch.locked import is_locked
from frostline.adapters.torch.random import seeded
from frostline.adapters.torch.samples import flat
from frostline.adapters.torch.state_kept import is_plain, plain
from frostline.atomic import taken_back
from frostline.types import FrostlineError, ModelError
from frostline.types.reasons import first_line

#: A module by its name, and which of its calls in one pass.
Key = tuple[str, int]

#: How often calls that turn out not to be pure are taken apart.
_ROUNDS = 24


@dataclass(frozen=True, kw_only=True)
class Form:
    """What one call returns: its structure, and per leaf a tensor of rows or a constant.

    Attributes:
        spec: The structure.
        leaves: ``(shape of one row, dtype, device)`` or ``None`` for a constant, per leaf.
        constants: Position -> value of the leaves that are the same for every sample.
    """

    spec: Any
    leaves: tuple[tuple[Any, ...] | None, ...]
    constants: Mapping[int, Any]

    def filled(self, rows: Sequence[Any]) -> Any:
        """The structure with these tensors of rows in it."""
        given = iter(rows)
        return pytree.tree_unflatten(
            [self.constants[i] if leaf is None else next(given)
             for i, leaf in enumerate(self.leaves)], self.spec,
        )  # fmt: skip

    def placeholder(self, count: int, *, dense: bool) -> Any:
        """The structure for ``count`` samples without numbers: NaN, or zeros of integers.

        All rows are one number in memory, unless they must be ``dense`` to be written to.
        """
        rows = [_blank((count, *leaf[0]), *leaf[1:]) for leaf in self.leaves if leaf]
        return self.filled([row.contiguous() if dense else row for row in rows])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which calls of a model answer from what was recorded.

    Attributes:
        frontier: Calls that answer with rows, in the order of execution.
        placed: Calls that answer with placeholders -> whether something writes to these.
        excluded: Calls of frozen modules that run as they are.
        forms: What each call returns.
        still: Name -> module of all that may be answered.
    """

    frontier: tuple[Key, ...]
    placed: Mapping[Key, bool]
    excluded: frozenset[Key]
    forms: Mapping[Key, Form]
    still: Mapping[str, Any]


@dataclass
class _Watch:
    """One pass under watch."""

    counts: Counter[str] = field(default_factory=Counter)
    inside: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a frozen module that no other such call is around."""

    key: Key
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    watch: _Watch

    def whole(self) -> Any:
        """Run the module; calls inside of it are its own affair."""
        self.watch.inside = True
        try:
            return self.opened()
        finally:
            self.watch.inside = False

    def opened(self) -> Any:
        """Run the module; calls inside of it are watched in its place."""
        return self.forward(*self.args, **self.kwargs)


def watched(still: Mapping[str, Any], answer: Callable[[Call], Any], run: Callable[[], Any]) -> Any:
    """Run ``run``; the outermost calls of the modules in ``still`` return what ``answer`` does."""
    watch = _Watch()

    def patched(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if watch.inside:
                return forward(*args, **kwargs)
            key = (name, watch.counts[name])
            watch.counts[name] += 1
            return answer(Call(key=key, forward=forward, args=args, kwargs=kwargs, watch=watch))

        return called

    with replaced_forward({m: patched(name, m.forward) for name, m in still.items()}):
        return run()


# --- which modules are frozen ---------------------------------------------------------------------


def still_modules(root: Any) -> dict[str, Any]:
    """Name -> module of what is frozen by its flags, in the modes that hold now."""
    noise = {name.replace("/", ".") for name in noise_layers(root)}
    moving = {
        name
        for name, module in root.named_modules()
        if _moves(module) or (module.training and (name in noise or _drops(module)))
    }
    hooked = {name for name, module in root.named_modules() if _hooks(module)}

    def within(names: set[str], name: str) -> bool:
        return any(other.startswith(f"{name}.") for other in names)

    return {
        name: module
        for name, module in root.named_modules()
        if name
        and name not in moving
        and not within(moving, name)
        and not within(hooked, name)  # who watches inside wants to see numbers
        and not any(p.requires_grad for p in module.parameters())
        and not isinstance(module, torch.jit.ScriptModule)
        and type(module).forward is not nn.Module.forward
    }


def _moves(module: Any) -> bool:
    """Whether a training step changes what it keeps, or it reads the whole batch."""
    if is_site(module):
        fixed = is_locked(module) or is_frozen_kind(module)
        stored = mean_of(module) is not None
        return not fixed and (module.training or not stored)
    return bool(module.training and keeps_unknown_statistics(module))


def _drops(module: Any) -> bool:
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout) and module.num_layers > 1
    return isinstance(module, nn.MultiheadAttention) and bool(module.dropout)


def _hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


# --- samples of a batch ---------------------------------------------------------------------------


def row_count(arguments: Any) -> int:
    """Samples in the arguments of a call.

    Raises:
        ModelError: They hold neither a tensor nor a list of samples, or a tensor without rows that
            could be taken one by one.
    """
    found = _count(arguments)
    if found is None:
        raise ModelError(
            "the arguments hold no tensor with a first axis of samples and no list of samples (a "
            "graph has neither), so there are no rows to store. Freeze the model and train it as "
            f"it is, which computes the same. Received: {_kinds(arguments)}"
        )
    return found


def _count(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        if value.is_nested or value.layout != torch.strided:
            raise ModelError(
                "the samples of a nested or sparse tensor cannot be stored row by row. Give the "
                "model padded tensors, or train without the cache. "
                f"Received: a {'nested ' * value.is_nested}tensor of layout {value.layout}"
            )
        return len(value) if value.ndim else None
    if isinstance(value, np.ndarray):
        return len(value) if value.ndim else None
    if is_samples(value):
        return len(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if is_record(value):
        value = list(fields_of(value).values())
    if isinstance(value, (list, tuple)):
        counts = [_count(item) for item in value]  # all of them: one that is nested is refused
        return next((count for count in counts if count is not None), None)
    return None


def _kinds(arguments: Any) -> str:
    """Classes of the arguments of a call."""
    args, kwargs = arguments
    return ", ".join(type(value).__name__ for value in (*args, *kwargs.values())) or "no argument"


def is_record(value: Any) -> bool:
    """Whether it is a dataclass with fields for a batch, as tensors are in some."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping))


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that its constructor takes."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}


def is_samples(value: Any) -> bool:
    """Whether a list holds one entry per sample: images, or mappings of what is in them."""
    return isinstance(value, list) and bool(value) and all(
        (isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim == 3)
        or isinstance(item, Mapping)
        for item in value
    )  # fmt: skip


def flattened(arguments: Any) -> tuple[list[Any], Any]:
    """What arguments hold, a list of samples as one, and their structure.

    Raises:
        ModelError: As :func:`row_count`.
    """
    count = row_count(arguments)
    leaves, spec = pytree.tree_flatten(
        arguments, is_leaf=lambda value: is_samples(value) and len(value) == count
    )
    return leaves, spec


def taken(value: Any, index: Any, count: int) -> Any:
    """The samples ``index`` of arguments."""

    def rows(_: str, value: Any) -> Any:
        if isinstance(value, list):
            return [value[i] for i in index]
        if isinstance(value, np.ndarray):
            return value[np.asarray(index)]
        return value[torch.as_tensor(index, device=value.device)]

    return mapped(value, count, rows, lambda _, value: value)


def mapped(
    value: Any,
    count: int,
    rows: Callable[[str, Any], Any],
    other: Callable[[str, Any], Any],
    name: str = "",
) -> Any:
    """The structure of arguments with other parts.

    Args:
        value: Arguments of a call.
        count: Samples in them.
        rows: ``(name, part)`` -> part, for a tensor or a list that has an entry per sample.
        other: The same for what belongs to all of them.
        name: Of the value.
    """
    inner = functools.partial(mapped, count=count, rows=rows, other=other)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return (rows if value.ndim > 0 and len(value) == count else other)(name, value)
    if is_samples(value) and len(value) == count:
        return rows(name, value)
    if isinstance(value, Mapping):
        return {key: inner(item, name=f"{name}[{key!r}]") for key, item in value.items()}
    if is_record(value):
        kind = type(value).__qualname__
        parts = fields_of(value).items()
        return dataclasses.replace(
            value, **{key: inner(part, name=f"{name}.{kind}.{key}") for key, part in parts}
        )
    if isinstance(value, (list, tuple)):
        items = [inner(item, name=f"{name}[{i}]") for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return other(name, value)


# --- the plan -------------------------------------------------------------------------------------


def planned(
    root: Any, forward: Callable[..., Any], args: Any, kwargs: Any, still: Any = None
) -> Plan:
    """Find the frontier by behaviour; the model is left as it was found.

    Args:
        root: The module.
        forward: Its own ``forward``.
        args: Positional arguments of a call.
        kwargs: Named arguments.
        still: Name -> module of what may be answered; ``None``: all that is frozen.

    Raises:
        ModelError: Nothing is frozen, or what is frozen cannot be told from the rest.
    """
    still = still_modules(root) if still is None else still
    count = row_count((args, kwargs))
    if not any(True for module in still.values() for _ in module.parameters()):
        raise ModelError(
            "no module of the model is frozen. Freeze the part that is to be computed once: "
            f"fl.freeze(model, until=...). Received: {type(root).__name__}"
        )
    if count < 2:
        raise ModelError("the check needs a batch of at least two samples. Received: one sample")
    trial = _Trial(root, forward, still, count)
    with torch.enable_grad(), untouched(root):
        records, forms = trial.pure(args, kwargs)
    if not any(True for name, _ in forms for _ in still[name].parameters()):
        raise ModelError(
            "no frozen module returns the same for a sample in every step: it stands behind what "
            "trains, or what it returns depends on the batch or on chance. Freeze from the "
            f"beginning: fl.freeze(model, until=...). Received: {type(root).__name__}"
        )
    with torch.no_grad():
        placed = trial.not_needed(records, forms, args, kwargs)
    return Plan(
        frontier=tuple(key for key in forms if key not in placed),
        placed=placed,
        excluded=frozenset(trial.excluded),
        forms=forms,
        still=still,
    )


class _Trial:
    """Runs of a model on one batch."""

    def __init__(self, root: Any, forward: Any, still: Mapping[str, Any], count: int) -> None:
        self.root, self.forward, self.still, self.count = root, forward, still, count
        self.excluded: set[Key] = set()
        self.checkpoints = False
        # Backwards, and the last sample again in place of the first: another batch.
        self.order = [*range(count - 1, 0, -1), count - 1]

    def pure(self, args: Any, kwargs: Any) -> tuple[dict[Key, list[Any]], dict[Key, Form]]:
        """What each pure call returned, with its form; impure ones are excluded."""
        index = self.order
        other_args, other_kwargs = taken((args, kwargs), index, self.count)
        for _ in range(_ROUNDS):
            first, specs = self._recorded(args, kwargs, 0)
            if self.checkpoints and (again := self._run_again(args, kwargs)):
                self.excluded |= again
                continue
            known = len(self.excluded)  # what this pass excluded it has opened already
            try:
                with perturbed(self.root):
                    second, _ = self._recorded(other_args, other_kwargs, 1)
            except FrostlineError:
                raise
            except Exception as problem:  # the first pass has shown that the model runs
                raise ModelError(
                    "the model takes its batch and not the same samples in another order "
                    f"({first_line(problem)}): offsets or indices among its inputs tie them "
                    "together, so there are no rows to store. Train without the cache. "
                    f"Received: {type(self.root).__name__}"
                ) from problem
            forms = {}
            for key, leaves in first.items():
                form = self._form(leaves, second.get(key), specs[key])
                if form is None:
                    self.excluded.add(key)
                else:
                    forms[key] = form
            if len(self.excluded) == known and first.keys() == second.keys():
                return first, forms
        raise ModelError(
            "what the frozen modules return depends on more than the sample: the order of the "
            f"batch, a random draw, or what trains. Received: {type(self.root).__name__}"
        )

    def _recorded(
        self, args: Any, kwargs: Any, seed: int
    ) -> tuple[dict[Key, list[Any]], dict[Key, Any]]:
        found: dict[Key, list[Any]] = {}
        specs: dict[Key, Any] = {}

        def answer(call: Call) -> Any:
            inputs = pytree.tree_leaves((call.args, call.kwargs))
            if any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
                self.excluded.add(call.key)
            if call.key in self.excluded:
                return call.opened()
            self.checkpoints = self.checkpoints or _checkpoint() is not None
            made = call.whole()
            leaves, specs[call.key] = pytree.tree_flatten(made)
            found[call.key] = [
                x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves
            ]
            return made

        seeded(seed)
        watched(self.still, answer, lambda: self.forward(*args, **kwargs))
        return found, specs

    def _run_again(self, args: Any, kwargs: Any) -> set[Key]:
        """Calls in a checkpointed block that trains, which backward runs again without answers.

        What comes into such a block must be true numbers: so nothing in it is answered, unless the
        first call that is answered lies in it, and what comes in is the model's own.
        """
        places: dict[Key, Any] = {}
        training: set[Any] = set()

        def answer(call: Call) -> Any:
            if call.key in self.excluded:
                return call.opened()
            places[call.key] = _checkpoint()
            return call.whole()

        with ExitStack() as hooks:
            for module in self.root.modules():
                trains = any(p.requires_grad for p in module.parameters(recurse=False))
                if trains and not isinstance(module, torch.jit.ScriptModule):
                    note = module.register_forward_pre_hook(lambda *_: training.add(_checkpoint()))
                    hooks.callback(note.remove)
            watched(self.still, answer, lambda: self.forward(*args, **kwargs))
        first = next(iter(places.values()), None)
        training -= {None, first}
        return {key for key, block in places.items() if block in training}

    def _form(self, one: list[Any], other: list[Any] | None, spec: Any) -> Form | None:
        """The form of a call; ``None``: it is not a function of single samples."""
        if other is None or len(one) != len(other):
            return None
        leaves: list[tuple[Any, ...] | None] = []
        constants: dict[int, Any] = {}
        for position, (a, b) in enumerate(zip(one, other, strict=True)):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                if not (is_plain(a) and is_plain(b)):
                    return None
                if a.shape == b.shape and a.ndim and len(a) == self.count:
                    if not _close(a[self.order], b):
                        return None
                    leaves.append((tuple(a.shape[1:]), a.dtype, a.device))
                    continue
                if a.shape != b.shape or not torch.equal(a, b):
                    return None
            elif not isinstance(a, (int, float, str, bool, type(None))) or a != b:
                return None
            leaves.append(None)
            constants[position] = a
        if not any(leaves):
            return None
        return Form(spec=spec, leaves=tuple(leaves), constants=constants)

    def not_needed(
        self, records: Mapping[Key, list[Any]], forms: Mapping[Key, Form], args: Any, kwargs: Any
    ) -> dict[Key, bool]:
        """The calls whose absence changes neither outputs nor buffers; see ``Plan.placed``."""
        rows = {
            key: form.filled([r for r, leaf in zip(records[key], form.leaves, strict=True) if leaf])
            for key, form in forms.items()
        }

        def outcome(blank: Mapping[Key, bool]) -> list[Any] | None:
            def answer(call: Call) -> Any:
                if call.key in blank:
                    return forms[call.key].placeholder(self.count, dense=blank[call.key])
                if call.key in rows:  # in-place steps behind it must not reach the record
                    return pytree.tree_map(_cloned, rows[call.key])
                return call.opened()

            with untouched(self.root):
                try:
                    made = watched(self.still, answer, lambda: self.forward(*args, **kwargs))
                except Exception:  # whatever the model's own code says to what is not there
                    return None
                buffers = [b.detach().clone() for b in self.root.buffers()]
            return flat(made) + buffers

        with untouched(self.root):
            made = self.forward(*args, **kwargs)
            buffers = [b.detach().clone() for b in self.root.buffers()]
        plain = flat(made) + buffers
        if not same(outcome({}), plain):
            raise ModelError(
                "with its frozen modules answered by what they returned the model computes "
                "something else, so they cannot be cached: train without the cache. "
                f"Received: {type(self.root).__name__}"
            )
        placed: dict[Key, bool] = {}

        def search(keys: list[Key]) -> None:
            # An in-place step fails on rows that share memory, so single calls are tried twice.
            for dense in (False, True)[: 2 if len(keys) == 1 else 1]:
                if same(outcome({**placed, **dict.fromkeys(keys, dense)}), plain):
                    placed.update(dict.fromkeys(keys, dense))
                    return
            if len(keys) > 1:
                middle = len(keys) // 2
                search(keys[:middle])
                search(keys[middle:])

        # A hook on a module wants to see what it returns.
        if keys := [key for key in forms if not _hooks(self.still[key[0]])]:
            search(keys)
        return placed


def _checkpoint() -> Any:
    """The call of ``torch.utils.checkpoint`` that is running; ``None``: there is none."""
    known = sys.modules.get("torch.utils.checkpoint")
    file = getattr(known, "__file__", None)
    frame = None if file is None else sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "checkpoint" and code.co_filename == file:
            return frame
        frame = frame.f_back
    return None


def replayed(
    plan: Plan,
    forms: Mapping[Key, Form],
    tensors: list[Any],
    count: int,
    call: Any,
    *,
    strict: bool = True,
) -> Any:
    """Run a model whose frontier answers with rows.

    Args:
        plan: What answers.
        forms: What each call returns.
        tensors: The rows of the frontier.
        count: Samples.
        call: Calls the model.
        strict: A call that the plan does not know is an error; else it is run, as a head of which
            a part works at inference only needs it, unless it reads placeholders.

    Raises:
        ModelError: The model takes another way through its frozen modules than before.
    """
    given = iter(tensors)
    rows = {
        key: forms[key].filled([next(given) for leaf in forms[key].leaves if leaf])
        for key in plan.frontier
    }

    def answer(call: Call) -> Any:
        if call.key in rows:
            return rows[call.key]
        if call.key in plan.placed and call.key in forms:
            return forms[call.key].placeholder(count, dense=plan.placed[call.key])
        new = not strict and call.key not in plan.forms
        if call.key in plan.excluded or (new and not _has_nan((call.args, call.kwargs))):
            return call.opened()
        raise ModelError(
            f"'{call.key[0]}' is called for this batch and was not for the first one: which frozen "
            "modules run depends on the batch, so they cannot be cached. Train without the cache, "
            f"or thaw that module. Received: call {call.key[1] + 1} of {call.key[0]!r}"
        )

    return watched(plan.still, answer, call)


@contextmanager
def perturbed(root: Any) -> Iterator[None]:
    """Replace all that trains by other numbers for a while; the parameters are not written to."""
    made: dict[int, Any] = {}
    before = [
        (module._parameters, name, parameter)
        for module in root.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]

    def back() -> None:
        for held, name, parameter in before:
            held[name] = parameter

    with taken_back(back):
        for held, name, parameter in before:
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach() * 1.25 + 0.01)
            held[name] = made[id(parameter)]
        yield


def _blank(shape: Any, dtype: Any, device: Any) -> Any:
    value = math.nan if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), value, dtype=dtype, device=device).expand(shape)


def _has_nan(arguments: Any) -> bool:
    """Whether a call reads NaN, as placeholders are."""
    return any(
        bool(part.isnan().any())
        for x in pytree.tree_leaves(arguments)
        if isinstance(x, torch.Tensor)
        for part in plain(x)
    )


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _close(one: Any, other: Any, share: float | None = None) -> bool:
    if not (is_plain(one) and is_plain(other)):
        same_layout = one.layout == other.layout
        return same_layout and same([*plain(one)], [*plain(other)], share=share)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.itemsize == 1 or not (one.is_floating_point() or one.is_complex()):
        return bool(torch.equal(one, other))
    bound = share or {torch.float64: 1e-10, torch.float32: 1e-4}.get(one.dtype, 2e-2)
    finite = one[torch.isfinite(one)].double() if not one.is_complex() else one.abs().double()
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(one, other, rtol=0.0, atol=bound * scale, equal_nan=True))


def same(one: list[Any] | None, other: list[Any] | None, *, share: float | None = None) -> bool:
    """Whether two lists of tensors agree up to rounding, or up to a share of the largest value."""
    if one is None or other is None or len(one) != len(other):
        return False
    return all(_close(a, b, share) for a, b in zip(one, other, strict=True))
