"""Small batches, several in one forward pass, where that is the same to every sample.

It is where no sample sees another one. One batch shows it: what every normalising call gets in its
own pass is what it gets in a pass of several, in whatever thread, and nothing that the program
computes from its data decides what it runs, is drawn at random, or is kept for the next call. It is
the second of four, since whoever mixes the first or the last of a pass, neighbours, halves or
mirrored places gives that one something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from frostline.adapters.torch.calls import Call, Ended
from frostline.adapters.torch.random import forked
from frostline.adapters.torch.state_kept import state_kept
from frostline.atomic import taken_back
from frostline.data.arrays import leaves
from frostline.data.batch import Batch, joined
from frostline.types import FrostlineError

#: Most bytes of the inputs in one pass, and of the largest tensor that it makes: of more a pass is
#: arithmetic, and stacking gains nothing.
INPUTS, MADE = 1 << 22, 1 << 26

#: Most batches in one pass.
MOST = 64

#: Part of the memory that the largest tensor may take, since several live at a time.
SHARE = 16

#: Batches that go through together in the trial. Of fewer, stacking would gain no more than that
#: takes.
LOOKED_AT = 4

#: The one of them that has a pass of its own.
_OWN = 1

#: How far an input may move, in its standard deviations: rounding of another kernel.
ALIKE = 1e-3

#: Names of what hands values of tensors to Python, which may branch on them.
_READS = frozenset({
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"),
    *("item", "tolist", "numpy", "__array__", "__dlpack__", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"),
})  # fmt: skip


def stacks(stream: Iterable[tuple[int, Batch]], most: int) -> Iterator[tuple[int, int, Batch]]:
    """Consecutive batches of one shape in one, at most so many.

    Yields:
        Number of the first, how many, and the batch.
    """
    numbers: list[int] = []
    parts: list[Batch] = []
    room: float = INPUTS
    for number, batch in stream:
        size = _bytes(batch) if most > 1 else 0
        full = len(parts) == most or size > room
        if parts and (full or _layout(parts[0]) != _layout(batch)):
            yield numbers[0], len(parts), _one(parts)
            numbers, parts, room = [], [], INPUTS
        numbers, parts, room = [*numbers, number], [*parts, batch], room - size
    if parts:
        yield numbers[0], len(parts), _one(parts)


def _one(parts: list[Batch]) -> Batch:
    return parts[0] if len(parts) == 1 else joined(parts)


def _bytes(batch: Batch) -> float:
    """Of its inputs, where it is arrays of one length each."""
    return sum(leaf.nbytes for _, leaf in leaves(batch.x)) if batch.regular else math.inf


def _layout(batch: Batch) -> list[tuple[str, Any, tuple[int, ...]]]:
    """What batches of arrays have in common that differ in nothing but the number of samples."""
    named = leaves((batch.x, batch.y, batch.sample_weight))
    return [(name, leaf.dtype, leaf.shape[1:]) for name, leaf in named]


class _Looks(TorchFunctionMode):  # type: ignore[misc]
    """Notices that values of tensors go to Python, and how large a tensor is made.

    Attributes:
        reads: Whether values went to Python that are not the module's own.
        decides: Whether they did before a normalising call, which they may have led to.
        largest: Bytes of the largest tensor that a pass of one batch makes.
    """

    def __init__(self, own: Iterable[Any]) -> None:
        super().__init__()
        self._own = {id(tensor) for tensor in own}
        self.reads = self.decides = False
        self.largest = 1

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in _READS:
            self.reads |= not args or id(args[0]) not in self._own
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.layout is torch.strided:
            self.largest = max(self.largest, made.numel() * made.element_size())
        return made


def may_stack(root: Any, batches: Sequence[Batch]) -> bool:
    """Whether the first batches are small, of one shape, and enough to be looked at.

    What a TorchScript module decides by nobody sees. An entry of a mapping may be an index into its
    own batch, which is wrong in another one.
    """
    return (
        len(batches) >= LOOKED_AT
        and not batches[0].named
        and sum(map(_bytes, batches)) <= INPUTS
        and all(_layout(batch) == _layout(batches[0]) for batch in batches)
        and not any(isinstance(module, torch.jit.ScriptModule) for module in root.modules())
    )


def independent(
    root: Any,
    chosen: Container[str | None],
    batches: Sequence[Batch],
    entered: Callable[[Callable[[Call], Any]], AbstractContextManager[Callable[..., None]]],
    statistics: Callable[[Call], tuple[Any, Any]],
    memory: int,
) -> int:
    """How many batches may go through in one pass, where each sees what it sees in its own; or 1.

    Args:
        root: A module, in the mode in which it runs.
        chosen: Sites that are measured.
        batches: Those that are tried.
        entered: Gives what runs the module on a batch, its normalising calls answered; with
            ``apart=True`` in a thread of its own.
        statistics: Mean and variance of what a call normalises, as the site stores them.
        memory: Bytes that may wait.
    """
    seen: list[list[tuple[str | None, Any]]] = []
    fixed: list[tuple[Any, Any]] = []

    def answer(call: Call) -> Any:
        """The first pass normalises with its own moments, the other with the same."""
        if call.path not in chosen or not call.x.numel():
            return call.run()
        if looks.reads:
            looks.decides = True
            raise Ended
        if len(seen) == 1:
            with torch._C.DisableTorchFunction():  # these values are no program's
                fixed.append(statistics(call))
        seen[-1].append((call.path, call.x.detach()))
        return call.with_statistics(*fixed[len(seen[-1]) - 1])

    own = _tensors(root)
    looks = _Looks(own)
    drawn, written = torch.get_rng_state(), _versions(own)
    try:
        with taken_back(state_kept([*root.modules()])), forked(), entered(answer) as run, looks:
            for batch in (batches[_OWN], joined(list(batches))):
                seen.append([])
                looks.reads = False  # what was read behind the last call decided nothing
                run(batch, apart=len(seen) == 2)
                if looks.decides:
                    return 1
            alone = torch.equal(drawn, torch.get_rng_state()) and written == _versions(own)
    except FrostlineError:  # to be told where it is no trial
        return 1
    one, all_ = seen
    sizes = [_samples(batch) for batch in batches]
    place = sum(sizes[:_OWN]), sizes[_OWN], sum(sizes)
    pairs = zip(one, all_, strict=True)
    same = len(one) == len(all_) and all(_same(*pair, place) for pair in pairs)
    fit = min(MADE, memory // SHARE) // looks.largest
    return max(1, min(MOST, fit)) if alone and same else 1


def _samples(batch: Batch) -> int:
    return len(leaves(batch.x)[0][1])


def _tensors(root: Any) -> list[Any]:
    """All that a module keeps: parameters, buffers, and plain attributes."""
    holders = (h for m in root.modules() for h in (m._parameters, m._buffers, vars(m)))
    return [v for holder in holders for v in holder.values() if isinstance(v, torch.Tensor)]


def _versions(tensors: Iterable[Any]) -> list[int]:
    """How often each tensor was written to."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _same(one: tuple[Any, Any], all_: tuple[Any, Any], place: tuple[int, int, int]) -> bool:
    """Whether a call of one batch got its rows of what the call of several got.

    Args:
        one: Path and input in the batch's own pass.
        all_: The same in the pass of several.
        place: Samples before the batch, of it, and of all together.
    """
    (path, first), (other, together) = one, all_
    before, count, total = place
    rows, rest = divmod(len(first), count)
    if path != other or rest or together.shape != (rows * total, *first.shape[1:]):
        return False
    own = together[rows * before : rows * (before + count)]
    moved = (own.float() - first.float()).abs().max()
    return bool(moved <= ALIKE * first.float().std(correction=0))  # not where one is NaN
