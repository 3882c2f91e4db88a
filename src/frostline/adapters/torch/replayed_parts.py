"""The two parts of a model that ``torch.fx`` cannot follow, both as runs of the model itself.

The prefix runs the model until the last call of the frontier has returned. The suffix runs it with
these calls answered, the rest of the frozen part skipped, and inputs that nothing else needs
replaced by placeholders.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from frostline.adapters.protocol import SplitModel
from frostline.adapters.torch.forward_pass import untouched
from frostline.adapters.torch.graph import layers, modes_kept, unwrapped, walk
from frostline.adapters.torch.network import phase
from frostline.adapters.torch.replay import (
    Call,
    Form,
    Key,
    Plan,
    flattened,
    is_record,
    is_samples,
    planned,
    replayed,
    row_count,
    same,
    still_modules,
    taken,
    watched,
)  # fmt: skip
from frostline.adapters.torch.samples import arguments, flat
from frostline.types import Crossing, FrostlineError, ModelError
from frostline.types.reasons import first_line

_NOTE = (
    "torch.fx cannot follow the model: the parts are runs of the model itself, for inputs of the "
    "shape of the sample; they cannot be saved"
)


_KEPT = (
    "labels in a list or a dataclass are those of the sample in every call of the suffix, so do "
    "not train by a loss that the model computes of them: fl.cached hands it the batch's own"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arguments of a model as in a sample.

    Attributes:
        form: Their structure.
        crossing: Positions of the leaves that the suffix needs.
        reaching: Leaves of a few samples for which the model calls all of the frontier, whatever
            is beside them: as many steps as the longest sequence of a batch, for example.
    """

    form: Form
    crossing: tuple[int, ...]
    reaching: tuple[Any, ...] = ()

    def filled(self, rows: Sequence[Any], count: int) -> Any:
        """The arguments with these rows, and placeholders for the others."""
        given = iter(rows)
        several = pytree.tree_structure([None] * len(self.form.leaves))
        leaves = dataclasses.replace(self.form, spec=several).placeholder(count, dense=True)
        for place in self.crossing:
            leaves[place] = next(given)
        return pytree.tree_unflatten(leaves, self.form.spec)

    def count(self, leaves: Sequence[Any]) -> int:
        """How many samples there are; 0 where no leaf is a tensor of rows."""
        return next((len(x) for x, row in zip(leaves, self.form.leaves, strict=True) if row), 0)

    def taken(self, leaves: Sequence[Any], part: slice) -> list[Any]:
        """The leaves of some samples, in memory of their own."""
        pairs = zip(leaves, self.form.leaves, strict=True)
        return [x[part].clone() if row else x for x, row in pairs]

    def with_reaching(self, leaves: Sequence[Any]) -> list[Any] | None:
        """The leaves with those of :attr:`reaching` behind them; ``None``: they do not fit."""
        whole = any(is_samples(x) or is_record(x) for x in leaves)  # have samples of their own
        if whole or not self.reaching:
            return None
        found = list(leaves)
        for place, (row, other) in enumerate(zip(self.form.leaves, self.reaching, strict=True)):
            if row and found[place].shape[1:] != row[0]:
                return None
            if row:
                found[place] = torch.cat([found[place], other.to(found[place].device)])
        return found


class _Done(Exception):  # noqa: N818 - no error: all that was asked for is there
    pass


class _Part(nn.Module):  # type: ignore[misc]
    """A part of a model; parameters and buffers are the model's, by its names."""

    _plan: Plan
    _inputs: Inputs

    def __init__(self, root: Any, plan: Plan, inputs: Inputs) -> None:
        super().__init__()
        for name in ("_modules", "_parameters", "_buffers"):
            self.__dict__[name] = getattr(root, name)
        self.__dict__["_whole"] = (root,)
        # Not by assignment: the model may have modules of these names.
        self.__dict__ |= {"_plan": plan, "_inputs": inputs}

    @property
    def layers(self) -> Any:
        """Its modules; the model's own module of this name, if any."""
        return self._modules.get("layers") or self.called_modules()

    def called_modules(self) -> tuple[Any, ...]:
        """The modules of this part."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """Set the mode of this part alone: its modules are the model's."""
        self.training = mode
        return self

    @property
    def _root(self) -> Any:
        """The model that this is a part of."""
        return self.__dict__["_whole"][0]

    def __deepcopy__(self, memo: Any) -> Any:
        made = type(self)(copy.deepcopy(self._root, memo), self._plan, self._inputs)
        still = {name: made._root.get_submodule(name) for name in self._plan.still}
        made.__dict__["_plan"] = dataclasses.replace(self._plan, still=still)
        return made


class ReplayedPrefix(_Part):
    """The frozen part: the model's inputs -> the frontier, one tensor or a tuple of them."""

    def called_modules(self) -> tuple[Any, ...]:
        """The modules that are run for the frontier, or skipped behind it."""
        return tuple(
            self._plan.still[name] for name in dict.fromkeys(k for k, _ in self._plan.forms)
        )

    @property
    def named(self) -> bool:
        """Whether it takes its inputs by name."""
        spec = self._inputs.form.spec
        return bool(pytree.tree_unflatten([None] * spec.num_leaves, spec)[1])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model at inference up to the frontier; modes are put back."""
        plan, (given, spec) = self._plan, flattened((args, kwargs))
        if spec != self._inputs.form.spec:
            raise ModelError(
                "the prefix takes what the sample of fl.split held, in the same way. "
                f"Received: {len(args)} arguments by position, {sorted(kwargs)} by name"
            )
        inputs = self._inputs
        found = self.reached(given)
        if found is None:  # rows of the frontier are those of single samples, whatever is beside
            more = inputs.with_reaching(given)
            both = None if more is None else self.reached(more)
            if both is None:
                shapes = ", ".join(str(tuple(x.shape)) for x in given if hasattr(x, "shape"))
                raise ModelError(
                    "the model calls fewer of its frozen modules for these inputs than for the "
                    "sample of fl.split. Give it inputs of the shapes of that sample, or split it "
                    f"with these as sample=. Received: inputs of shape {shapes}"
                )
            beside = inputs.count(inputs.reaching)
            found = {key: [x[:-beside] for x in made] for key, made in both.items()}
        rows = [given[place] for place in inputs.crossing]
        rows += [x for key in plan.frontier for x in found[key]]
        return rows[0] if len(rows) == 1 else tuple(rows)

    def reached(self, leaves: Sequence[Any]) -> dict[Key, list[Any]] | None:
        """What the frontier returns for these inputs; ``None``: the model does not call all."""
        plan = self._plan
        args, kwargs = pytree.tree_unflatten(list(leaves), self._inputs.form.spec)
        found: dict[Key, list[Any]] = {}

        def answer(call: Call) -> Any:
            if call.key not in plan.forms:
                return call.opened()
            made = call.whole()
            if call.key in plan.frontier:
                leaves = zip(pytree.tree_leaves(made), plan.forms[call.key].leaves, strict=True)
                found[call.key] = [x.clone() for x, leaf in leaves if leaf]
                if len(found) == len(plan.frontier):
                    raise _Done
            return made

        with phase(list(self._root.modules()), None):
            try:
                watched(plan.still, answer, lambda: self._root(*args, **kwargs))
            except _Done:
                return found
        return None


class ReplayedSuffix(_Part):
    """The rest: frontier -> the model's outputs. ``train()`` and ``eval()`` are the model's own."""

    def called_modules(self) -> tuple[Any, ...]:
        """The modules without children that may run behind the frontier."""
        frozen = {id(m) for module in self._plan.still.values() for m in module.modules()}
        leaves = [m for m in self._root.modules() if not any(True for _ in m.children())]
        return tuple(module for module in leaves if id(module) not in frozen)

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the whole model."""
        self.training = mode
        self._root.train(mode)
        return self

    def forward(self, *features: Any) -> Any:
        """Run the model with its frozen part answered."""
        count, own = len(features[0]), len(self._inputs.crossing)
        args, kwargs = self._inputs.filled(features[:own], count)
        call = lambda: self._root(*args, **kwargs)  # noqa: E731
        strict = bool(self._root.training)  # the plan is of training
        rows = list(features[own:])
        return replayed(self._plan, self._plan.forms, rows, count, call, strict=strict)


def split(model: Any, at: Any, sample: Any) -> SplitModel:
    """Cut ``model`` by record and replay.

    Args:
        model: A torch module.
        at: Cut before this module; ``None``: where the frozen part ends.
        sample: A batch of its inputs, at least two samples.

    Raises:
        ModelError: Nothing or everything is frozen, or the frozen part is not pure.
    """
    root = unwrapped(model)
    placed, named = arguments(root, sample)
    with modes_kept(root):
        if not root.training:
            root.train()
        if at is None and not any(p.requires_grad for p in root.parameters()):
            raise ModelError(
                "everything is frozen: nothing is left to train behind the prefix. Thaw the head, "
                "for example fl.unfreeze(model, -1), or say where to cut (at=...). "
                f"Received: {type(root).__name__}"
            )
        still = still_modules(root)
        if at is not None:
            still = _before(model, still, at)
        try:
            plan = planned(root, root.forward, placed, named, still)
        except FrostlineError:
            raise
        except Exception as problem:  # whatever the model's own code raises on the sample
            raise ModelError(
                f"the model fails on the sample in training mode ({first_line(problem)}). Pass "
                "sample=, one batch as forward takes it in training: a tuple of its arguments, or "
                f"a mapping by name. Received: sample of {type(sample).__name__}"
            ) from problem
        inputs = _inputs(root, plan, placed, named)
        inputs = _reaching(ReplayedPrefix(root, plan, inputs), inputs, placed, named)
    prefix, suffix = ReplayedPrefix(root, plan, inputs), ReplayedSuffix(root, plan, inputs)
    prefix.training, suffix.training = False, root.training
    features = _checked(root, prefix, suffix, placed, named)
    count = row_count((placed, named))
    _checked(root, prefix, suffix, *taken((placed, named), [*range(count)][::-1], count))
    return SplitModel(
        prefix=prefix,
        suffix=suffix,
        frontier=_crossings(plan, inputs, features, named),
        notes=(_NOTE, *_held(inputs)),
    )


def _held(inputs: Inputs) -> list[str]:
    """What a suffix takes from the sample in every step."""
    held = [x for x in inputs.form.constants.values() if is_record(x) or is_samples(x)]
    if not any(is_record(x) or isinstance(x[0], Mapping) for x in held):
        return []
    return [_KEPT]


def _before(model: Any, still: Mapping[str, Any], at: Any) -> dict[str, Any]:
    """What is frozen before a boundary.

    Raises:
        ModelError: A module before it trains.
    """
    path = layers(model).resolve(at).path
    places = walk(model)
    order = next((place.order for place in places if place.path == path), len(places) + 1)
    first = [place for place in places if place.order < order]
    for place in first:
        own = list(place.module.parameters(recurse=False))
        if any(p.requires_grad for p in own):
            raise ModelError(
                f"'{place.path}' comes before '{path}' and trains, so it cannot be computed once. "
                f"Freeze it: fl.freeze(model, until={path!r}). Received: at={at!r}"
            )
    names = {place.path.replace("/", ".") for place in first}
    inner = "" if path is None else path.replace("/", ".")
    return {n: m for n, m in still.items() if n in names and not inner.startswith(f"{n}.")}


def _inputs(root: Any, plan: Plan, args: Any, kwargs: Any) -> Inputs:
    """Which of the model's inputs the rest of it needs beside the frontier."""
    leaves, spec = flattened((args, kwargs))
    count = row_count((args, kwargs))
    rows = [isinstance(x, torch.Tensor) and x.ndim > 0 and len(x) == count for x in leaves]
    form = Form(
        spec=spec,
        leaves=tuple((tuple(x.shape[1:]), x.dtype, x.device) if row else None
                     for x, row in zip(leaves, rows, strict=True)),
        constants={i: x for i, (x, row) in enumerate(zip(leaves, rows, strict=True)) if not row},
    )  # fmt: skip
    features: list[Any] = []

    def record(call: Call) -> Any:
        if call.key not in plan.forms:
            return call.opened()
        made = call.whole()
        if call.key in plan.frontier:
            pairs = zip(pytree.tree_leaves(made), plan.forms[call.key].leaves, strict=True)
            features.extend(x.detach().clone() for x, leaf in pairs if leaf)
        return made

    def outcome(call: Callable[[], Any]) -> list[Any] | None:
        with torch.no_grad(), untouched(root):
            try:
                made = call()
            except Exception:  # the model's own code misses what is not there
                return None
            made = (made, [b.clone() for b in root.buffers()])
        return flat(made)

    whole = outcome(lambda: watched(plan.still, record, lambda: root.forward(*args, **kwargs)))
    needed = [i for i, row in enumerate(rows) if row]
    for place in list(needed):
        fewer = [i for i in needed if i != place]
        # Zeros in place of zeros would show nothing.
        blank = leaves[place].is_floating_point() or bool(leaves[place].any())
        inputs = Inputs(form=form, crossing=tuple(fewer))
        less = inputs.filled([leaves[i] for i in fewer], count)

        def call(less: Any = less) -> Any:
            given = [x.clone() for x in features]
            return replayed(
                plan, plan.forms, given, count, lambda: root.forward(*less[0], **less[1])
            )

        if blank and same(outcome(call), whole):
            needed = fewer
    return Inputs(form=form, crossing=tuple(needed))


def _reaching(prefix: ReplayedPrefix, inputs: Inputs, args: Any, kwargs: Any) -> Inputs:
    """Note a few samples for which the model calls all: a half, and a half of it, and so on."""

    def calls_all(leaves: list[Any]) -> bool:
        try:
            return prefix.reached(inputs.taken(leaves, slice(None))) is not None
        except Exception:  # the model's own code, of so few samples
            return False

    def few(leaves: list[Any]) -> list[Any]:
        count = inputs.count(leaves)
        parts = [slice(count // 2), slice(count // 2, None)] if count > 1 else []
        half = next(filter(calls_all, (inputs.taken(leaves, part) for part in parts)), None)
        return leaves if half is None else few(half)

    with torch.no_grad(), untouched(prefix._root):
        own = inputs.taken(flattened((args, kwargs))[0], slice(None))
        return dataclasses.replace(inputs, reaching=tuple(few(own)))


def _checked(root: Any, prefix: Any, suffix: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Compare ``suffix(prefix(x))`` with the model itself at inference; the features."""
    with untouched(root), torch.no_grad(), phase(list(root.modules()), None):
        try:
            whole = root(*args, **kwargs)
        except Exception as problem:  # the model's own code, which the sample suits in training
            raise ModelError(
                f"the model fails on the sample at inference ({first_line(problem)}). Pass "
                "sample=, one batch that forward takes in both phases. Where it fails since a "
                "part is frozen, freeze another part, or train without a split. "
                f"Received: {type(root).__name__}"
            ) from problem
        features = prefix(*args, **kwargs)
        features = features if isinstance(features, tuple) else (features,)
        cut = suffix(*[x.clone() for x in features])
    if not same(flat(whole), flat(cut)):
        raise ModelError(
            "the two parts together do not compute what the model computes at inference. Cut "
            f"elsewhere (at=...). Received: {type(root).__name__}"
        )
    return features


def _crossings(
    plan: Plan, inputs: Inputs, features: Sequence[Any], named: Mapping[str, Any]
) -> tuple[Crossing, ...]:
    keys = [key for key in plan.frontier for leaf in plan.forms[key].leaves if leaf]
    paths = [str(list(named)[place]) if named else f"input {place}" for place in inputs.crossing]
    paths += [name.replace(".", "/") for name, _ in keys]
    own = len(inputs.crossing)
    return tuple(
        Crossing(
            path=path,
            shape=tuple(x.shape[1:]),
            dtype=str(x.dtype).removeprefix("torch."),
            bytes_per_sample=math.prod(x.shape[1:]) * x.element_size(),
            computed=number >= own,
        )
        for number, (path, x) in enumerate(zip(paths, features, strict=True))
    )
