"""The user's own training loop with the frozen part of the model answered from a cache.

Around the body of each step the model has another ``forward``: the first time it meets a sample it
runs as always, and what the frontier returned is noted; from then on the frozen modules are
skipped. A sample is known by its bytes as the model gets them, so order, workers, and what the loop
does to a batch before the model sees it do not matter.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from frostline.adapters.computation import identity_of
from frostline.adapters.torch import replay
from frostline.adapters.torch.cached_data import require_indices, seeded
from frostline.adapters.torch.calls import forwards
from frostline.adapters.torch.exported import as_modules
from frostline.adapters.torch.forward_pass import untouched
from frostline.adapters.torch.graph import require_registered, unwrapped
from frostline.adapters.torch.prefix import leaf as read_leaf
from frostline.adapters.torch.replay import Call, Form, Key, Plan
from frostline.adapters.torch.replayed_parts import Inputs, ReplayedPrefix
from frostline.adapters.torch.samples import flat
from frostline.adapters.torch.script import entrances
from frostline.atomic import Guard, to_its_end
from frostline.types import ModelError

#: Batches that are answered from the cache and computed as well, to compare.
_CHECKED = 2
#: So many of their samples are, and of the batch on which the frozen part is checked.
_SAMPLES = 4
_DIGEST = 16
#: Seconds of frozen passes to come from which on exporting the frozen part to an engine pays.
_EXPORT_PAYS_S = 10.0
#: An epoch of new samples from a loader that had brought samples before weighs as much as so many
#: from loaders that had not.
_AGAIN = 4
#: Begins the identity of a frozen part whose rows are kept in memory only.
_PRIVATE = "private "


class Memory:
    """Rows of one frozen part; it holds no module.

    Attributes:
        identity: Of the frozen part: its modules, their weights, and the calls of the frontier.
        rows: Digest of a sample -> its tensors.
        unsaved: Those that the store does not have.
        sought: Digests that the store was asked for.
        forms: Shapes of a batch -> what each call returned for it.
        checked: How many batches were computed as well.
        plain: Samples of batches that take another way through the frozen part.
        idle: Grows with every epoch in a row that brought new samples only.
        readers: Loaders (by id) that have brought samples.
        broken: Why the rows are no longer used.
        engine: Computes rows in the place of the model; ``None``: there is none.
        error: How far the engine is from what the model computes.
        seconds: What a sample of the first batch took; ``None`` once an engine was sought.
    """

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.rows: dict[bytes, tuple[Any, ...]] = {}
        self.forms: dict[str, Mapping[Key, Form]] = {}
        self.unsaved: dict[bytes, tuple[Any, ...]] = {}
        self.sought: set[bytes] = set()
        self.plain: set[bytes] = set()
        self.readers: set[int] = set()
        self.checked = self.idle = 0
        self.broken = ""
        self.engine: Any = None
        self.error = 0.0
        self.seconds: float | None = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(x.nbytes for row in self.rows.values() for x in row)


#: Model -> identity of its frozen part -> rows; gone with the model.
_MEMORIES: weakref.WeakKeyDictionary[Any, dict[str, Memory]] = weakref.WeakKeyDictionary()
#: Model -> its flags -> what answers; a plan holds modules of the model, but not the model.
_PLANS: weakref.WeakKeyDictionary[Any, dict[Any, Plan]] = weakref.WeakKeyDictionary()
#: Model -> whether whole batches are checked, since a few samples would not do.
_WHOLE: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
#: Model -> loader -> how often it was gone through.
_EPOCHS: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()


class Cached:
    """The batches of a loader; while one is at hand, the model's frozen part is cached.

    Args:
        model: A torch module; wrappers are taken off.
        loader: Any iterable of batches.
        store: Keeps rows beyond this process: ``find(identity, digests)`` returns the position in
            ``digests`` of those that it has, and arrays of their rows; ``save(identity, digests,
            arrays)`` takes new ones.
        views: How many seeds of a random augmentation take turns.
        engine: What computes the frozen part: ``"native"`` is the model itself.
        accelerate: ``(prefix, batch, samples, engine, precision)`` -> what computes a batch of the
            prefix faster, on arrays, with its error; or ``None``.
        precision: What computes it: ``"float32"`` is the model's own.
        bound: How far rows may be from the model's own, as a share of the largest; ``None``: as far
            as rounding takes them.
    """

    def __init__(
        self,
        model: Any,
        loader: Any,
        store: Any = None,
        views: int = 1,
        engine: str = "native",
        accelerate: Any = None,
        precision: str = "float32",
        bound: float | None = None,
    ) -> None:
        self.engine, self.accelerate = engine, accelerate
        self.precision, self.bound = precision, bound
        whole = unwrapped(model)
        require_registered(whole)
        self.root = as_modules(whole)
        #: What a loop may call in the place of the root -> what then runs the root.
        self.doors = entrances(whole) if self.root is whole else {whole: self._by_root}
        self.views = views
        if views > 1:
            require_indices(loader, views)
        self.loader = loader
        self.store = store
        self.memories = _MEMORIES.setdefault(self.root, {})
        self.known: dict[Any, tuple[Plan, Memory]] = {}
        self.answered = 0  # samples whose frozen part was skipped
        self.private = ""  # what keeps rows out of the store
        self.passed = False  # a call whose inputs require gradients ran as it is
        still = replay.still_modules(self.root)
        if not any(True for module in still.values() for _ in module.parameters()):
            raise ModelError(
                "no module of the model is frozen, so there is nothing to cache. Freeze first: "
                f"fl.freeze(model, until=...). Received: {type(self.root).__name__}"
            )

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def precision_error(self) -> float:
        """How far the first batch is from what the model computes, as a share of the largest."""
        return max((memory.error for memory in self.memories.values()), default=0.0)

    def __iter__(self) -> Iterator[Any]:
        self.known = {}  # weights are read anew in every epoch
        epochs = _EPOCHS.setdefault(self.root, {})
        epoch = epochs[id(self.loader)] = epochs.get(id(self.loader), -1) + 1
        batches = self.loader if self.views == 1 else seeded(self.loader, epoch % self.views)
        before, answered = {k: len(m.rows) for k, m in self.memories.items()}, self.answered
        entrance, inside = _Entrance(self), False
        try:
            for batch in batches:
                if isinstance(vars(self.root).get("forward"), _Entrance):
                    inside = True  # another loader's batch is at hand: its entrance answers for two
                    yield batch
                else:
                    yield from _lent(batch, {self.root: entrance, **self.doors})
        finally:
            self.save()
        if inside:
            return
        idle = answered == self.answered
        for identity, memory in self.memories.items():
            grown = before.get(identity, 0) < len(memory.rows)
            if grown and before.get(identity, 0):
                # Another loader brings samples of its own, once: validation data, for example.
                memory.idle += _AGAIN if id(self.loader) in memory.readers else 1
            if grown:
                memory.readers.add(id(self.loader))
            memory.idle *= idle
        if any(memory.idle >= _AGAIN * self.views for memory in self.memories.values()):
            self._give_up(
                "no sample came a second time, so nothing can be answered: is there a random "
                "augmentation in the loader? fl.cached(..., views=8) draws one of eight for each",
            )

    def _by_root(self, *args: Any, **kwargs: Any) -> Any:
        return self.root(*args, **kwargs)

    def save(self) -> None:
        """Hand rows that are new to the store."""
        if self.store is not None:
            for identity, memory in self.memories.items():
                new, memory.unsaved = memory.unsaved, {}
                if new and not memory.broken and not identity.startswith(_PRIVATE):
                    columns = [torch.stack(rows) for rows in zip(*new.values(), strict=True)]
                    self.store.save(identity, list(new), [_array(column) for column in columns])

    def call(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """What the model returns for a call."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in flat((args, kwargs))):
            if not self.passed:
                self.passed = True
                warnings.warn(
                    "fl.cached runs the model as it is where its inputs require gradients: these "
                    "go through the frozen part, and stored rows pass none on. A loop in which all "
                    "calls are such gains nothing: train it without fl.cached",
                    stacklevel=3,
                )
            return forward(*args, **kwargs)
        found = self._plan(forward, args, kwargs)
        if found is None or found[1].broken:
            return forward(*args, **kwargs)
        plan, memory = found
        digests, shapes = digested(args, kwargs)
        if not memory.plain.isdisjoint(digests):
            return forward(*args, **kwargs)
        if self.store is not None and not memory.identity.startswith(_PRIVATE):
            self._from_store(memory, digests, [x for key in plan.frontier
                                               for x in plan.forms[key].leaves if x])  # fmt: skip
        rows = [memory.rows.get(digest) for digest in digests]
        if shapes in memory.forms and any(row is None for row in rows):
            rows = self._by_engine(plan, memory, args, kwargs, digests) or rows
        if shapes not in memory.forms or any(row is None for row in rows):
            return self._recorded(plan, memory, forward, args, kwargs, digests, shapes)
        forms = memory.forms[shapes]
        tensors = _stacked(rows, plan, forms)
        if memory.checked < _CHECKED:
            memory.checked += 1
            if not self._same(plan, forward, args, kwargs, shapes, tensors):
                return forward(*args, **kwargs)
        self.answered += len(digests)
        return replay.replayed(plan, forms, tensors, len(digests), lambda: forward(*args, **kwargs))

    def _plan(self, forward: Any, args: Any, kwargs: Any) -> tuple[Plan, Memory] | None:
        """The plan for the state that the model is in; ``None``: this call is not answered."""
        flags = _flags(self.root)
        state = flags, _versions(self.root)
        if state in self.known:
            return self.known[state]
        plans = _PLANS.setdefault(self.root, {})
        if flags not in plans:
            if replay.row_count((args, kwargs)) < 2:
                return None
            plans[flags] = self._checked(forward, args, kwargs)
        plan = plans[flags]
        answered = sorted({name for name, _ in plan.forms})
        parts = [answered, [plan.still[name] for name in answered], repr((plan.frontier, flags[2]))]
        found = identity_of(parts, read_leaf)
        identity = found.text
        if found.private:  # part of it cannot be read: tell by its numbers, in this process alone
            if self.store is not None and not self.private:
                warnings.warn(
                    "fl.cached keeps the features in memory only, path= has no effect: the frozen "
                    f"part holds {found.private}, which cannot be told from another in a later run",
                    stacklevel=3,
                )
            self.private = found.private
            parts[1] = [dict(module.state_dict(keep_vars=True)) for module in parts[1]]
            identity = _PRIVATE + identity_of(parts, read_leaf).text
        if self.engine != "native":  # its rows differ by rounding
            identity = f"{identity} {self.engine}"
        if self.precision != "float32":
            identity = f"{identity} {self.precision}"
        memory = self.memories.setdefault(identity, Memory(identity))
        self.known[state] = (plan, memory)
        return self.known[state]

    def _recorded(
        self, plan: Plan, memory: Memory, forward: Any, args: Any, kwargs: Any,
        digests: list[bytes], shapes: str,
    ) -> Any:  # fmt: skip
        """Run the model as it is and note what the frontier returns."""
        began = time.perf_counter()
        others: set[Key] = set()
        forms, tensors, made = _noted(plan, len(digests), lambda: forward(*args, **kwargs), others)
        if others:  # a branch per domain: these run as they are
            memory.plain.update(digests)
            return made
        if forms is None:
            if _WHOLE.get(self.root):
                self._give_up("a frozen module returned something else than one row per sample")
            else:  # what looked like rows of a few samples is none
                self._with_whole_batches(forward, args, kwargs, digests, shapes)
            return made
        memory.forms[shapes] = forms
        if memory.seconds is not None:
            memory.seconds = (time.perf_counter() - began) / len(digests)
        if self.precision != "float32":  # its samples are the engine's when they come again
            return made
        for number, digest in enumerate(digests):
            if digest not in memory.rows:
                row = tuple(tensor[number] for tensor in tensors)
                memory.rows[digest] = memory.unsaved[digest] = row
        return made

    def _by_engine(
        self, plan: Plan, memory: Memory, args: Any, kwargs: Any, digests: list[bytes]
    ) -> list[Any] | None:
        """Rows of a batch, computed by an engine where there is one that pays."""
        if memory.seconds is not None:
            seconds, memory.seconds = memory.seconds, None
            memory.engine = self._engine(plan, args, kwargs, seconds)
            memory.error = 0.0 if memory.engine is None else memory.engine.error
        if memory.engine is None:
            return None
        columns = [
            torch.from_numpy(array) for array in memory.engine.run([_array(x) for x in args])
        ]
        for number, digest in enumerate(digests):
            if digest not in memory.rows:
                row = tuple(column[number].clone() for column in columns)
                memory.rows[digest] = memory.unsaved[digest] = row
        return [memory.rows[digest] for digest in digests]

    def _engine(self, plan: Plan, args: Any, kwargs: Any, seconds: float) -> Any:
        """What computes the frozen part faster than the model, from float32 tensors on the CPU."""
        leaves = [x for form in plan.forms.values() for x in form.leaves if x]
        plain = all(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args)
        single = all(leaf[1] == torch.float32 and leaf[2].type == "cpu" for leaf in leaves)
        exact = self.precision == "float32"
        if self.accelerate is None or kwargs or not plain or not single or any(_casting()):
            if not exact:
                raise ModelError(
                    "fl.cached computes the frozen part in bfloat16 for a model that is called "
                    "with float32 tensors by position, on the processor, without autocast. Leave "
                    f"precision= out. Received: precision={self.precision!r}"
                )
            return None
        count = len(args[0])
        samples = len(self.loader) * count if hasattr(self.loader, "__len__") else None
        if exact and self.engine == "auto" and (samples or 0) * seconds < _EXPORT_PAYS_S:
            return None
        given, spec = pytree.tree_flatten((args, kwargs))
        shapes = tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in given)
        inputs = Inputs(form=Form(spec=spec, leaves=shapes, constants={}), crossing=())
        prefix = ReplayedPrefix(self.root, plan, inputs)
        with untouched(self.root):
            return self.accelerate(
                prefix, [_array(x) for x in args], samples, self.engine, self.precision
            )

    def _from_store(self, memory: Memory, digests: list[bytes], leaves: list[Any]) -> None:
        """Take rows that an earlier run has stored."""
        wanted = [digest for digest in digests if digest not in memory.rows.keys() | memory.sought]
        memory.sought.update(wanted)
        places, arrays = self.store.find(memory.identity, wanted) if wanted else ([], [])
        columns = [torch.from_numpy(array).view(leaf[1]) for array, leaf in zip(
            arrays, leaves, strict=bool(places))]  # fmt: skip
        for number, place in enumerate(places):
            memory.rows[wanted[place]] = tuple(column[number] for column in columns)

    def _checked(self, forward: Any, args: Any, kwargs: Any) -> Plan:
        """The plan, found with a few samples of the batch if the model takes so few."""
        few = self._few(args, kwargs, digested(args, kwargs)[1])
        if few is not None:
            try:
                return replay.planned(self.root, forward, *few[0])
            except Exception:  # whatever the model's own code says to another size
                _WHOLE[self.root] = True
        return replay.planned(self.root, forward, args, kwargs)

    def _few(self, args: Any, kwargs: Any, shapes: str) -> tuple[Any, list[int]] | None:
        """Some samples of a batch and their numbers; ``None``: all are to be taken.

        Samples that alone are padded to another size are not what they are in the batch.
        """
        count = replay.row_count((args, kwargs))
        if count < 2 * _SAMPLES or _WHOLE.get(self.root):
            return None
        # From all parts of the batch, both ends included.
        chosen = [round(number * (count - 1) / (_SAMPLES - 1)) for number in range(_SAMPLES)]
        taken = replay.taken((args, kwargs), chosen, count)
        return (taken, chosen) if digested(*taken)[1] == shapes else None

    def _with_whole_batches(
        self, forward: Any, args: Any, kwargs: Any, digests: list[bytes], shapes: str
    ) -> None:
        """Begin anew with a plan that is found on a whole batch, and note what it returns."""
        _WHOLE[self.root] = True
        _PLANS.pop(self.root, None)
        self.known = {}
        found = self._plan(forward, args, kwargs)
        if found is not None:
            with untouched(self.root), torch.no_grad():
                self._recorded(*found, forward, args, kwargs, digests, shapes)

    def _same(
        self, plan: Plan, forward: Any, args: Any, kwargs: Any, shapes: str, tensors: list[Any]
    ) -> bool:
        """Whether stored rows are what the frozen part computes now, of a few samples alone."""

        def compared(given: Any, wanted: list[Any]) -> bool:
            with untouched(self.root), torch.no_grad():
                _, fresh, _ = _noted(plan, len(wanted[0]), lambda: forward(*given[0], **given[1]))
            return replay.same([x.cpu() for x in wanted], fresh, share=self.bound)

        few = self._few(args, kwargs, shapes)
        try:
            alike = few is not None and compared(few[0], [x[few[1]] for x in tensors])
        except Exception:  # as above
            few = None
        if alike if few is not None else compared((args, kwargs), tensors):
            return True
        self._give_up("the frozen part computes something else for a sample in another batch")
        return False

    def _give_up(self, why: str) -> None:
        """Run the model as it is from here on."""
        self.known = {}
        for memory in self.memories.values():
            memory.broken = why
            memory.rows, memory.unsaved = {}, {}
        warnings.warn(f"fl.cached goes on without the cache: {why}", stacklevel=3)


def _lent(batch: Any, changes: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield a batch once, while modules have another ``forward``.

    The loop that is given it may drop it, and nobody hears of an exception while it is dropped. A
    block could lose its exit then.
    """
    back = forwards(changes)
    try:
        try:
            for module, forward in changes.items():
                vars(module)["forward"] = forward
            yield batch
        finally:
            to_its_end(back)
    finally:
        to_its_end(back)  # the first one may have been interrupted at its call


class _Entrance:
    """The ``forward`` of a model while a batch is at hand; a copy of the model gets its own."""

    def __init__(self, cached: Cached) -> None:
        self.cached = cached
        root = cached.root
        own = vars(root).get("forward")
        self.plain = own if own is not None else functools.partial(type(root).forward, root)
        self.inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.inside:
            return self.plain(*args, **kwargs)
        call = functools.partial(self.cached.call, self.plain, args, kwargs)
        back = functools.partial(torch._C._set_grad_enabled, torch.is_grad_enabled())
        self.inside = True
        over = Guard(back).over
        if "torch._dynamo" in sys.modules:  # a compiled model would compile what the cache does
            over = torch.compiler.disable(over)
        try:
            return over(call)
        finally:
            self.inside = False

    def __reduce__(self) -> Any:
        """Copied or pickled with the model it is the plain ``forward``."""
        return functools.partial, (self.plain,)


def _noted(
    plan: Plan, count: int, call: Any, others: set[Key] | None = None
) -> tuple[dict[Key, Form] | None, list[Any], Any]:
    """Run ``call``; the form of each answered call, the frontier's tensors on the CPU, outputs.

    ``others`` takes the calls that the plan does not know.
    """
    forms: dict[Key, Form] = {}
    found: dict[Key, list[Any]] = {}
    complete = True

    def answer(call: Call) -> Any:
        nonlocal complete
        if call.key not in plan.forms:
            if others is not None and call.key not in plan.excluded:
                others.add(call.key)
            return call.opened()
        made = call.whole()
        leaves, spec = pytree.tree_flatten(made)
        places = [None if leaf is None else (tuple(x.shape[1:]), x.dtype, x.device)
                  for x, leaf in zip(leaves, plan.forms[call.key].leaves, strict=True)]  # fmt: skip
        rows = [x for x, leaf in zip(leaves, places, strict=True) if leaf]
        if any(len(x) != count for x in rows):
            complete = False
            return made
        constants = {i: leaves[i] for i, leaf in enumerate(places) if leaf is None}
        forms[call.key] = Form(spec=spec, leaves=tuple(places), constants=constants)
        if call.key in plan.frontier:
            found[call.key] = [x.detach().to("cpu", copy=True) for x in rows]
        return made

    made = replay.watched(plan.still, answer, call)
    if not complete or found.keys() != set(plan.frontier):
        return None, [], made
    return forms, [x for key in plan.frontier for x in found[key]], made


def _stacked(rows: list[Any], plan: Plan, forms: Mapping[Key, Form]) -> list[Any]:
    devices = [leaf[2] for key in plan.frontier for leaf in forms[key].leaves if leaf]
    return [
        torch.stack(column).to(device)
        for column, device in zip(zip(*rows, strict=True), devices, strict=True)
    ]


def _array(tensor: Any) -> Any:
    """As numpy; what it has no number for as bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _casting() -> tuple[Any, ...]:
    """Whether and to what autocast rounds now."""
    return tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in ("cpu", "cuda")
    )


def _flags(root: Any) -> tuple[Any, ...]:
    """What decides which modules are frozen and how they compute."""
    modules = tuple(
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in root.modules()
    )
    return modules, tuple((id(p), p.requires_grad) for p in root.parameters()), _casting()


def _versions(root: Any) -> tuple[Any, ...]:
    """Changes whenever a frozen weight is written to."""
    frozen = tuple(p._version for p in root.parameters() if not p.requires_grad)
    return frozen, tuple(id(b) for b in root.buffers())


def digested(args: Any, kwargs: Any) -> tuple[list[bytes], str]:
    """Digest of each sample in the arguments of a call, and the shapes of the batch.

    Raises:
        ModelError: An argument whose bytes cannot be read.
    """
    count = replay.row_count((args, kwargs))
    shared: list[Any] = []
    columns: list[list[bytes | memoryview]] = []
    _read((args, kwargs), count, shared, columns)
    head = repr(shared).encode()
    hashes = [hashlib.blake2b(head, digest_size=_DIGEST) for _ in range(count)]
    for column in columns:
        for digest, row in zip(hashes, column, strict=True):
            digest.update(row)
    return [digest.digest() for digest in hashes], head.decode()


def _read(value: Any, count: int, shared: list[Any], columns: list[Any]) -> None:
    """Sort what arguments hold into what belongs to one sample and what to all of them."""
    if isinstance(value, torch.Tensor):
        rows = value.ndim > 0 and len(value) == count
        shape = tuple(value.shape[1:] if rows else value.shape)
        shared.append((rows, shape, str(value.dtype)))
        if rows:
            columns.append(_bytes(value, count))
        else:
            shared.append(hashlib.blake2b(_bytes(value, 1)[0]).hexdigest())
    elif replay.is_samples(value) and len(value) == count:
        leaves = [[x for x in pytree.tree_leaves(v) if isinstance(x, torch.Tensor)] for v in value]
        # Padding gives every sample the widest size in the batch.
        shapes = [tuple(x.shape) for x in value if isinstance(x, torch.Tensor)]
        shared.append([max(sizes) for sizes in zip(*shapes, strict=True)])
        columns.append(
            [b"".join(f"{tuple(x.shape)}{x.dtype}".encode() + bytes(_bytes(x, 1)[0]) for x in row)
             for row in leaves]
        )  # fmt: skip
    elif isinstance(value, Mapping):
        shared.append(sorted(map(str, value)))
        for key in sorted(value, key=str):
            _read(value[key], count, shared, columns)
    elif replay.is_record(value):
        shared.append(type(value).__qualname__)
        for item in replay.fields_of(value).values():
            _read(item, count, shared, columns)
    elif isinstance(value, (list, tuple)):
        shared.append(len(value))
        for item in value:
            _read(item, count, shared, columns)
    elif isinstance(value, (int, float, str, type(None), torch.dtype, torch.device)):
        shared.append(repr(value))
    else:
        raise ModelError(
            "the model is called with something whose samples cannot be told apart: pass tensors, "
            "or lists and mappings of them, or train without fl.cached. "
            f"Received: {type(value).__name__}"
        )


def _bytes(tensor: Any, count: int) -> list[memoryview]:
    """The bytes of each row."""
    if not tensor.numel():
        return [memoryview(b"")] * count
    flat = tensor.detach().cpu().contiguous().reshape(count, -1)
    return [row.data for row in flat.view(torch.uint8).numpy()]


def cached(model: Any, loader: Any, **ways: Any) -> Cached:
    """See :func:`frostline.cached` and :class:`Cached`."""
    return Cached(model, loader, **ways)
