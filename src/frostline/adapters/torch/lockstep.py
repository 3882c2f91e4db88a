"""The forward passes of many batches side by side: at each site they meet, then all go on.

Every batch runs its pass in its own thread; one thread runs at a time. At a site that is to
be measured a pass waits; when all wait, their moments are merged and all that wait at that site go
on with the new statistics. So one pass gives the population statistics of every site, each with all
earlier ones at their new values, and needs no graph.

What waits at a site is the live part of a batch. Where that does not fit, the newest passes are
given up and made again from the beginning for each site that they come to.

Passes side by side must not see each other. Each has a copy of the modules, but what a program
keeps elsewhere (the activations that a hook puts into a dictionary) they share. So the first batch
runs once more at the end, alone; where it then sees other inputs, every batch is made by itself.

Of small batches a pass is all Python. Consecutive ones of one shape go through in a single pass,
where the first two have shown that this is the same to every sample; see :mod:`stacked`.
"""

from __future__ import annotations

import contextvars
import functools
import graphlib
import itertools
import math
import queue
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from frostline.adapters.protocol import Population, Source
from frostline.adapters.spool import WINDOW, KeptBatches, Workspace
from frostline.adapters.staged import MAX_PASSES, TOLERANCE, Damped, shift, unsettled
from frostline.adapters.together import ALONE, Together
from frostline.adapters.torch.asking import call
from frostline.adapters.torch.calls import Call, Calls, Ended, SampleMoments, answerable
from frostline.adapters.torch.forward_pass import mover, set_inference, untouched
from frostline.adapters.torch.graph import require_there
from frostline.adapters.torch.keeping import mean_of, variance_of
from frostline.adapters.torch.stacked import LOOKED_AT, independent, may_stack, stacks
from frostline.atomic import taken_back
from frostline.data.arrays import leaves
from frostline.data.batch import Batch
from frostline.numerics.stats import Moments
from frostline.types import DataError, ModelError

#: Most threads of all passes together, those that torch starts for each included.
MOST_THREADS = 512

#: How far what a batch sees may move when none runs beside it, in standard deviations: rounding.
ALIKE = 1e-3

#: What a result says where it moves further.
APART = (
    "forward passes side by side disturb each other, since the program keeps something of a batch "
    "outside of the model; each batch ran by itself, up to every site anew"
)

#: What the moments of a call may be.
KINDS = (Moments, SampleMoments)


class _Pass:
    """The forward pass of one batch.

    Attributes:
        number: The batch's number; of several in one, the first.
        count: Batches that it holds.
        kept: Reads its batch again, where the data cannot be.
        site: Where it waits; ``None``: it has come to its end.
        moments: What it saw there.
        uses: Site -> how often this run has used it, in order of first use.
        recorded: Site -> how many uses have entered the moments.
        size: Bytes that wait.
        running: It has a thread; else it has ended, or was given up and must be made again.
        dropped: Something in it is not finite.
        seen: What it saw at each use of each site.
    """

    def __init__(
        self,
        number: int,
        kept: Callable[[], Batch] | None,
        *,
        alone: bool = False,
        count: int = 1,
    ) -> None:
        self.number, self.kept, self._alone, self.count = number, kept, alone, count
        self.seen: dict[tuple[str, int], Moments] = {}
        self.site: str | None = None
        self.moments: Moments | None = None
        self.uses: dict[str, int] = {}
        self.recorded: dict[str, int] = {}
        self.size = 0
        self.running = self.dropped = False
        self._ending = False
        self._problem: BaseException | None = None
        self._made: list[weakref.ref[Any]] = []

    def start(self, run: Callable[[], Any]) -> None:
        """Run in a new thread up to the first site to wait at; alone, run and end there."""
        if self._alone:
            self.site, self.uses = None, {}
            with suppress(Ended):
                run()
            return
        # Of C, so that Ctrl-C while one waits is a KeyboardInterrupt: between the lines of a
        # threading.Semaphore it becomes "release unlocked lock".
        self._go, self._back = queue.SimpleQueue[None](), queue.SimpleQueue[None]()
        self._ending, self.site, self.uses = False, None, {}
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._body, run), daemon=True)
        self.running = True  # from here on there is something to end: an exception may come in
        self._thread.start()  # here as well, when the thread is there
        self.go_on()

    def _body(self, run: Callable[[], Any]) -> None:
        self._go.get()
        try:
            if not self._ending:
                run()
        except Ended:
            pass
        except BaseException as problem:  # raised again in the thread that waits for this one
            self._problem = problem
        finally:
            if not self._ending:
                self.site = self.moments = None
            self.running = False
            self._back.put(None)

    def wait(self, site: str, moments: Moments) -> None:
        """Called in the pass: wait until someone lets it go on."""
        self.site, self.moments = site, moments
        if self._alone:
            raise Ended
        self._back.put(None)
        self._go.get()
        if self._ending:
            raise Ended

    def go_on(self) -> None:
        """Let it run to the next site to wait at, or to its end."""
        self._go.put(None)
        self._back.get()
        if self._problem is not None:
            raise self._problem

    def end(self) -> None:
        """Give it up; it remembers where it waited and what it saw there. Can be repeated."""
        if self.running:
            self._ending = True
            self._go.put(None)
            with suppress(RuntimeError):  # not started yet: it will end at once
                self._thread.join()
            self.running = False
        self._made.clear()

    def note(self, made: Any) -> None:
        """Remember a tensor that the pass has made, as long as it lives."""
        if type(made) is torch.Tensor:
            self._made.append(weakref.ref(made))
            return
        for item in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(item, torch.Tensor):
                self._made.append(weakref.ref(item))

    def weigh(self, known: frozenset[int]) -> None:
        """Set ``size`` to the bytes of its living tensors that are not the model's own."""
        alive = [tensor for reference in self._made if (tensor := reference()) is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        sizes = dict(_storage(tensor) for tensor in alive) if self.running else {}
        self.size = sum(size for pointer, size in sizes.items() if pointer not in known)


def _storage(tensor: Any) -> tuple[int, int]:
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # sparse tensors and the like have none
        return id(tensor), tensor.numel() * tensor.element_size()


def population(
    model: Any,
    sites: Mapping[str, Any],
    chosen: Sequence[str],
    source: Source,
    *,
    memory_limit: int,
    ranks: Together = ALONE,
    step: Any = None,
    trains: bool = False,
) -> Population:
    """Population moments of sites, each with all earlier ones at their new values.

    A site that one pass uses several times is answered with what the round before found, until that
    does not move any more. The model is not changed.

    Args:
        model: A torch module.
        sites: Path -> module of all its sites.
        chosen: Paths of those to measure; all others normalise with what they store.
        source: The batches.
        memory_limit: Bytes that may wait.
        ranks: Processes with batches of their own; all end with the same moments.
        step: The user's ``step(model, batch)``, which runs the module instead of a call.
        trains: It does so in training mode only.
    """
    order, learned = list(chosen), False
    fixed: dict[str, Moments] = {}
    looped: set[str] = set()
    notes: tuple[str, ...] = ()
    reads = turn = 0
    damped = Damped()
    apart = checked = False
    stack = None if step is None and ranks.size == 1 else 1
    while True:
        with untouched(model) as root:
            set_inference(root, sites, trains=trains)
            run = _Round(
                root, sites, order, fixed, looped, source, memory_limit, ranks, step, apart, stack
            )
            try:
                run.all()
            except ModelError:
                if run.stack in (None, 1):
                    raise
                stack = 1  # as where a model holds a state for so many samples and no more
                continue
            mixed = not checked and any(ranks.values(run.mixed()))
        if run.lost_several():  # one of these batches, nobody knows which
            stack = 1
            continue
        reads, turn, checked, stack = reads + run.reads, turn + 1, True, run.stack
        if mixed:  # nothing that this round found holds
            source.require_again("running each batch by itself, as this program needs,")
            apart, stack, turn = True, 1, 0
            notes = (APART,)
            continue
        if run.late and not learned:
            order, learned = run.learned_order(), True
            if order:
                continue
        looped |= run.reused | run.late
        found = {path: run.moments[path] for path in chosen if path in looped & run.moments.keys()}
        moved = {path: _shift(fixed.get(path), found[path], sites[path]) for path in found}
        if turn == MAX_PASSES and max(moved.values(), default=0) > TOLERANCE:
            notes = (*notes, unsettled(moved))
            break
        if all(distance <= TOLERANCE for distance in moved.values()):
            break
        fixed = {path: _step(damped, path, fixed.get(path), new) for path, new in found.items()}
    return Population(
        moments={path: run.moments[path] for path in chosen if path in run.moments},
        batches=ranks.total(sum(own.count for own in run.passes if not own.dropped)),
        skipped=run.skipped,
        passes=reads,
        stages=tuple((path,) for path in run.closed),
        notes=notes,
    )


def _shift(old: Moments | None, new: Moments, site: Any) -> float:
    if old is None:
        return math.inf
    pairs = [(moments.mean, moments.variance) for moments in (old, new)]
    return shift(pairs[0], pairs[1], float(getattr(site, "eps", 1e-5)))


def _step(damped: Damped, path: str, old: Moments | None, new: Moments) -> Moments:
    """What the next round goes on with."""
    if old is None:
        return new
    mean, variance = damped.statistics(path, (old.mean, old.variance), new)
    return Moments(new.count, mean, variance * new.count)


class _Round:
    """All batches from the first site to the last; see :func:`population`.

    Attributes:
        moments: Path -> merged moments.
        closed: Path -> the statistics that passes go on with, in order.
        reused: Sites that some pass used more than once.
        late: Sites that a pass came to when they were closed without it.
        skipped: Batch number -> what in it is not finite.
        reads: Times that the batches were read.
        stack: How many small batches go through in one; ``None``: nobody has looked.
    """

    def __init__(
        self,
        root: Any,
        sites: Mapping[str, Any],
        order: Sequence[str],
        fixed: Mapping[str, Moments],
        looped: set[str],
        source: Source,
        memory_limit: int,
        ranks: Together,
        step: Any,
        apart: bool,
        stack: int | None,
    ) -> None:
        self.ranks, self.step, self.apart, self.stack = ranks, step, apart, stack
        self.root, self.sites, self.looped, self.source = root, sites, looped, source
        self.rank = {path: index for index, path in enumerate(order)}
        self.limit = memory_limit
        self.most = max(8, MOST_THREADS // torch.get_num_threads())
        self.moments: dict[str, Moments] = {}
        self._new: dict[str, Moments] = {}  # of this process, in no merge yet
        self.closed = {path: self._tensors(path, moments) for path, moments in fixed.items()}
        self.reused: set[str] = set()
        self.late: set[str] = set()
        self.skipped: dict[int, str] = {}
        self.reads = 0
        self._opened: Iterator[tuple[int, Batch]] | None = None
        self.passes: list[_Pass] = []
        self._waits = 0  # bytes
        self.first: Batch | None = None
        self._here = threading.local()
        self._move = mover(root)
        self._default = torch.get_default_device()
        kinds = {"cpu", *(tensor.device.type for tensor in root.parameters())}
        self._casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted(kinds & {"cpu", "cuda", "xpu"})
        ]
        self._known = frozenset(
            _storage(tensor)[0] for tensor in itertools.chain(root.parameters(), root.buffers())
        )

    def all(self) -> None:
        """Start every batch, then close site after site."""
        once = False
        try:
            self._require_again()
        except DataError:
            once = True
        if once or self.apart:
            self.stack = 1
        if self.stack is None:
            self._look()
        with Workspace(WINDOW) as workspace, answerable(self.sites, self._answer):
            kept = KeptBatches(workspace)
            with taken_back(self._end):
                for number, count, batch in self._read():
                    again = kept.keep(batch) if once else None
                    own = _Pass(number, again, alone=self.apart, count=count)
                    if not self.passes:
                        self.first = batch
                    self.passes.append(own)
                    self._start(own, batch)
                while (site := self._next()) is not None:
                    self._close(site)
                self._settle()

    def _end(self) -> None:
        """End the threads of all passes; can be repeated."""
        for forward in self.passes:
            forward.end()

    def mixed(self) -> bool:
        """Whether the first batch sees something else when no other runs beside it."""
        if self.apart or len(self.passes) < 2 or self.first is None or self.passes[0].dropped:
            return False
        own, alone = self.passes[0], _Pass(0, None, alone=True)
        drawn = torch.get_rng_state()
        with answerable(self.sites, self._answer_again):
            alone.start(functools.partial(self._forward, alone, self.first, self._answer_again))
        if not torch.equal(drawn, torch.get_rng_state()):  # it never sees the same twice
            return False
        return alone.seen.keys() != own.seen.keys() or any(
            _shift(own.seen[use], moments, self.sites[use[0]]) > ALIKE
            for use, moments in alone.seen.items()
        )

    def _next(self) -> str | None:
        """The first site that a pass of any process waits at; ``None``: all are at their end."""
        mine = [self.rank[forward.site] for forward in self.passes if forward.site is not None]
        first = self.ranks.union([min(mine)] if mine else [])
        return list(self.rank)[min(first)] if first else None

    def _settle(self) -> None:
        """Merge what passes saw at sites that were closed, and tell the other processes."""
        new, self.reused, self.late = (
            set(self.ranks.union(sorted(paths))) for paths in (self._new, self.reused, self.late)
        )
        for path in sorted(new, key=self.rank.__getitem__):
            self._merge(path)

    def _require_again(self) -> None:
        self.source.require_again("measuring more than fits in memory")

    def _read(self) -> Iterator[tuple[int, int, Batch]]:
        """Number of a batch, or of the first of several in one, how many, and the batch."""
        self.reads += 1
        stream, self._opened = self._opened or self.source.read(), None
        yield from stacks(stream, self.stack or 1)

    def _look(self) -> None:
        """Open the data, and see whether their first batches may go through in one pass."""
        stream = self.source.read()
        first = list(itertools.islice(stream, LOOKED_AT))
        self._opened = itertools.chain(first, stream)

        def statistics(call: Call) -> tuple[Any, Any]:
            return self._tensors(str(call.path), call.moments())

        batches = [batch for _, batch in first]
        self.stack = 1
        if may_stack(self.root, batches):
            chosen, run = self.rank, self._one_by_one
            self.stack = independent(self.root, chosen, batches, run, statistics, self.limit)

    @contextmanager
    def _one_by_one(self, answer: Callable[[Call], Any]) -> Iterator[Callable[..., None]]:
        """Passes that run one after the other, in this thread or in one of their own."""
        with answerable(self.sites, answer):
            twin = replica(self.root)

            def run(batch: Batch, *, apart: bool = False) -> None:
                own = _Pass(0, None, alone=not apart)
                with taken_back(own.end):
                    own.start(functools.partial(self._forward, own, batch, answer, twin))

            yield run

    def lost_several(self) -> bool:
        """Whether something is not finite in a pass of several batches."""
        return any(own.dropped and own.count > 1 for own in self.passes)

    def _start(self, own: _Pass, batch: Batch) -> None:
        own.start(functools.partial(self._forward, own, batch, self._answer))
        self._make_room(own)

    def _forward(
        self, own: _Pass, batch: Batch, answer: Callable[[Call], Any], twin: Any = None
    ) -> None:
        """What the thread of a pass runs, with a replica of its own unless it is given one."""
        self._here.own = own
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for cast in self._casts:  # which a new thread does not inherit
                stack.enter_context(torch.autocast(*cast, cache_enabled=False))
            if self._default.type != "cpu":
                stack.enter_context(self._default)
            if self.step is None:
                batch = replace(batch, x=self._move(batch.x))
                for _, leaf in leaves(batch.x):
                    own.note(leaf)
            quiet = bool(self.root.training)  # for its losses alone: inference drops nothing
            stack.enter_context(Calls(self.sites, answer, made=own.note, quiet=quiet))
            twin = replica(self.root) if twin is None else twin
            known = dict(twin.named_modules())
            call(twin, batch, self._move, step=self.step)
            require_there(twin, known)

    def _make_room(self, latest: _Pass) -> None:
        """Give up the newest passes while more waits than may."""
        before = latest.size
        latest.weigh(self._known)
        self._waits += latest.size - before
        if self._waits <= self.limit and len(self.passes) <= self.most:
            return
        running = [forward for forward in self.passes if forward.running]
        total = sum(forward.size for forward in self.passes)
        while len(running) > 1 and (total > self.limit or len(running) > self.most):
            newest = running.pop()
            total -= newest.size
            newest.end()
            newest.weigh(self._known)
            total += newest.size
        self._waits = total

    def _close(self, site: str) -> None:
        """Merge what all that wait at a site saw there, and let them go on."""
        there = [forward for forward in self.passes if forward.site == site]
        for own in there:
            own.recorded[site] = 1
            if own.moments is not None:
                self._add(site, own.moments)
        self._merge(site)
        self.closed[site] = self._tensors(site, self.moments[site])
        lost: dict[int, _Pass] = {}
        for own in there:
            if own.running:
                own.go_on()
                self._make_room(own)
            else:
                lost[own.number] = own
        for number, batch in self._again(lost):
            self._start(lost.pop(number), batch)
            if not lost:
                break

    def _again(self, lost: Mapping[int, _Pass]) -> Iterator[tuple[int, Batch]]:
        """The batches of passes that were given up."""
        kept = [(number, own.kept) for number, own in lost.items() if own.kept is not None]
        if kept or not lost:
            for number, read in kept:
                yield number, read()
            return
        for number, _, batch in self._read():
            if number in lost:
                yield number, batch

    def _add(self, path: str, moments: Moments) -> None:
        known = self._new.get(path)
        self._new[path] = moments if known is None else known.merge(moments)

    def _merge(self, path: str) -> None:
        """Add what all processes have seen anew at a site; all of them call this together."""
        new, known = self.ranks.merged(self._new.pop(path, None), KINDS), self.moments.get(path)
        if new is not None:
            self.moments[path] = new if known is None else known.merge(new)

    def _fits(self, path: str, moments: Moments) -> bool:
        """Whether it is finite, also in the dtype that the site stores."""
        largest = torch.finfo(variance_of(self.sites[path]).dtype).max
        worst = float(moments.variance.max(initial=0.0))  # NaN where one is
        return worst <= largest and math.isfinite(float(np.abs(moments.mean).max(initial=0.0)))

    def _tensors(self, path: str, moments: Moments) -> tuple[Any, Any]:
        """As the site will store them, so that inference sees the very same."""
        own = mean_of(self.sites[path]), variance_of(self.sites[path])
        pair = zip((moments.mean, moments.variance), own, strict=True)
        mean, variance = (torch.as_tensor(new).to(old) for new, old in pair)
        return mean, variance

    def _answer(self, call: Call) -> Any:
        path, own = call.path, self._here.own
        if path not in self.rank or not call.x.numel():
            return call.run()
        use = own.uses[path] = own.uses.get(path, 0) + 1
        if use > 1:
            self.reused.add(path)
        if use > own.recorded.get(path, 0):
            moments = call.moments()
            if own is self.passes[0]:
                own.seen[path, use] = moments
            if not self._fits(path, moments):
                own.dropped = True
                self.skipped[own.number] = f"the input of '{path}' is not finite"
                raise Ended
            if path not in self.closed and path not in self.looped:
                own.wait(path, moments)
            else:
                if use == 1 and path not in self.looped:
                    self.late.add(path)
                own.recorded[path] = use
                self._add(path, moments)
                if path not in self.closed:  # new in this round, so that nothing is known of it
                    self.closed[path] = self._tensors(path, moments)
        return call.with_statistics(*self.closed[path])

    def _answer_again(self, call: Call) -> Any:
        """Note what a pass sees, which gets the statistics that all passes got."""
        path, own = call.path, self._here.own
        if path not in self.closed or not call.x.numel():
            return call.run()
        use = own.uses[path] = own.uses.get(path, 0) + 1
        own.seen[path, use] = call.moments()
        return call.with_statistics(*self.closed[path])

    def learned_order(self) -> list[str]:
        """An order in which every pass used the sites; empty: there is none."""
        before: dict[str, list[str]] = {path: [] for path in self.rank}
        pairs = dict.fromkeys(p for own in self.passes for p in itertools.pairwise(own.uses))
        for earlier, later in self.ranks.union(list(pairs)):
            before[later].append(earlier)
        try:
            return list(graphlib.TopologicalSorter(before).static_order())
        except graphlib.CycleError:
            return []


def _without_finalizer(kind: type[Any]) -> type[Any]:
    """The class, or where it has a ``__del__`` one of its kind that does without it.

    What ``__del__`` releases, hooks for example, belongs to the object that was copied.
    """
    if not hasattr(kind, "__del__"):
        return kind
    members = {"__del__": lambda _: None, "__module__": kind.__module__}
    return types.new_class(kind.__name__, (kind,), {}, lambda space: space.update(members))


#: Most of what a module holds; nobody exchanges a part of these.
_AS_THEY_ARE = {type(None), bool, int, float, str, torch.Tensor, nn.Parameter}
_TABLES = {dict, OrderedDict}


def replica(root: Any) -> Any:
    """A module with the same parameters and buffers, but with attributes of its own.

    A ``forward`` may keep activations on ``self``, or exchange parameters of a layer for the time
    of a call, as ``torch.func.functional_call`` does, and passes side by side must not mix them.
    """
    holders = {
        id(owner)
        for module in root.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
        if (owner := getattr(hook, "__self__", None)) is not None
    }
    made: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if type(value) in _AS_THEY_ARE:
            return value
        if id(value) in made:
            return made[id(value)]
        if isinstance(value, torch.jit.ScriptModule):
            return value
        if isinstance(value, nn.Module) or id(value) in holders:
            twin: Any = object.__new__(_without_finalizer(type(value)))
            made[id(value)] = twin
            own = vars(twin)
            for name, item in vars(value).items():
                kind = type(item)
                if kind in _AS_THEY_ARE:
                    own[name] = item
                elif kind in _TABLES and not item:  # as most of a module's tables of hooks are
                    own[name] = item if "state_dict" in name else kind()
                else:
                    own[name] = copied(item)
            return twin
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, copied(value.__self__))
        if type(value) is functools.partial:
            return functools.partial(
                copied(value.func), *map(copied, value.args), **copied(value.keywords)
            )
        if type(value) in _TABLES:
            return type(value)((key, copied(item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(map(copied, value))
        return value

    return copied(root)
