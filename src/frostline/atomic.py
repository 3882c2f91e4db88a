"""Change a model wholly or not at all: what interrupts a verb takes all of it back first.

Verbs run inside :func:`atomically` or ``verbs/whole.py``. What puts back is a list of small steps,
each of which sets something to what it was and can be repeated: :class:`Attributes` for objects,
:func:`surroundings` for the process, and what an adapter adds for its framework. Ctrl-C waits for
the end of a way back.
"""

from __future__ import annotations

import functools
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, _GeneratorContextManager, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def atomically(back: Callable[[], None], edit: Callable[[], T]) -> T:
    """Run an edit; if anything at all interrupts it, put the model back before that goes on.

    Args:
        back: Puts the model back as it was before the edit; can be repeated.
        edit: Changes the model and returns what the user gets, its text included.
    """
    turned = modes()
    made = Guard(back, surroundings()).over(edit)
    turned()  # an error that the edit took may have hit the exit of a block
    return made


class Guard:
    """What is put back if something is interrupted from now on.

    First come the blocks that were entered since, anyone's and those of :func:`taken_back`: an
    exception at the very call of a block's exit leaves it without one.

    Args:
        backs: Put the model and the process back, one after the other; can be repeated.
    """

    def __init__(self, *backs: Callable[[], None]) -> None:
        self._backs = backs
        self._entered, self._handled = len(_OPEN.blocks), sys.exc_info()[1]

    def over(self, edit: Callable[[], T]) -> T:
        """Run an edit; if anything at all interrupts it, put everything back first."""
        try:
            return edit()
        except BaseException:
            try:
                self.undo()
            except BaseException:
                self.undo()  # the first one may not have reached its first line
                raise
            raise

    def undo(self) -> None:
        """Put everything back; can be repeated."""
        blocks = _OPEN.blocks[self._entered :]
        left = _never_left(sys.exc_info()[1], self._handled)
        undone(*left, *(block.back for block in reversed(blocks)), *self._backs)
        for block in blocks:
            block.left = True  # when its frame is freed, the model may be another one
        del _OPEN.blocks[self._entered :]


#: Where a block of contextlib is entered or left.
_BORDERS = tuple(
    method.__code__
    for method in (
        _GeneratorContextManager.__enter__,
        _GeneratorContextManager.__exit__,
        ExitStack.__exit__,
    )
)


def _never_left(
    error: BaseException | None, handled: BaseException | None
) -> list[Callable[[], None]]:
    """What leaves blocks of ``contextlib`` that an exception hit at their enter or exit itself.

    They wait in the frames of its traceback. Freed with these, they would put back what they
    know when everything else has long been put back.

    Args:
        error: The exception that is on its way, and those that it came in the place of.
        handled: The last one that is no longer ours.
    """
    found: list[Callable[[], None]] = []
    while error is not None and error is not handled:
        trace, inner = error.__traceback__, list[Callable[[], None]]()
        while trace is not None:
            frame, trace = trace.tb_frame, trace.tb_next
            if frame.f_code in _BORDERS:
                inner.insert(0, _leaving(frame.f_locals["self"]))
        found, error = inner + found, error.__context__
    return found


def _leaving(block: Any) -> Callable[[], None]:
    def leave() -> None:
        with suppress(Exception):  # as where Python frees it
            (block if isinstance(block, ExitStack) else block.gen).close()

    return leave


@dataclass(eq=False)
class _Block:
    """A block, what its exit puts back, and whether that was done."""

    back: Callable[[], Any]
    left: bool = False


class _Open(threading.local):
    """Blocks of this thread that were entered and not left, the innermost last."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []


_OPEN = _Open()


def undone(*backs: Callable[[], Any]) -> None:
    """Put things back in the face of an exception that goes on after it.

    They run one after the other, each of them also where the one before it fails.
    """

    def whole(first: int = 0) -> None:
        if first < len(backs):
            try:
                backs[first]()
            finally:
                whole(first + 1)

    try:
        to_its_end(whole)
    except BaseException:
        to_its_end(whole)
        raise


@contextmanager
def taken_back(back: Callable[[], Any]) -> Iterator[None]:
    """Put something back on any exit from a block; once more, if that was interrupted."""
    block = _Block(back)
    try:
        try:
            _OPEN.blocks.append(block)
            yield
        finally:
            if not block.left:
                to_its_end(back)
            block.left = True
    finally:
        if not block.left:
            to_its_end(back)
        if block in _OPEN.blocks:
            _OPEN.blocks.remove(block)


def to_its_end(back: Callable[[], Any]) -> None:
    """Put something back, whatever interrupts it; Ctrl-C waits until it is done."""
    held = _Held()
    try:
        try:
            try:
                try:
                    held.acquire()
                finally:
                    _again_if_interrupted(back)
            finally:
                held.release()
        finally:
            held.release()
    finally:
        held.release()  # two exceptions may have hit the others


def _again_if_interrupted(back: Callable[[], Any]) -> None:
    try:
        back()
    except BaseException:
        try:
            back()
        except BaseException:
            back()
            raise
        raise


class _Held:
    """Holds SIGINT back, in the thread that gets signals."""

    def __init__(self) -> None:
        self._noted = False
        self._before: Any = None

    def acquire(self) -> None:
        """Note a signal from now on."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is not None:
                signal.signal(signal.SIGINT, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._noted = True

    def release(self) -> None:
        """Put the handler back and hand it what was noted; can be repeated."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        noted, self._noted = self._noted, False
        if noted:
            signal.raise_signal(signal.SIGINT)


def surroundings() -> Callable[[], None]:
    """Remember Python's and NumPy's generators, NumPy's errors and the filters of warnings.

    Returns:
        What puts them back; can be repeated.
    """
    drawn, around = generators(), modes()
    filters, shown = warnings.filters, warnings.showwarning
    kept = list(filters)

    def back() -> None:
        drawn()
        around()
        warnings.showwarning = shown
        if filters != kept:
            filters[:] = kept  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]

    return back


def generators() -> Callable[[], None]:
    """Remember Python's and NumPy's random generators.

    Returns:
        What puts them back; can be repeated.
    """
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's own

    def back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002

    return back


def modes() -> Callable[[], None]:
    """Remember what blocks around code turn: NumPy's errors, and which list has the filters.

    Returns:
        What puts them back; can be repeated. A filter that was added stays.
    """
    import numpy as np

    filters, shown, errors = warnings.filters, warnings.showwarning, np.geterr()

    def back() -> None:
        np.seterr(**errors)
        if warnings.filters is not filters:
            warnings.filters, warnings.showwarning = filters, shown
            warnings._filters_mutated()  # type: ignore[attr-defined]

    return back


_KINDS = (list, dict, set)
#: Contents of what is empty; nobody writes to them.
_EMPTY: dict[type, Any] = {kind: kind() for kind in _KINDS}


@dataclass(frozen=True)
class Attributes:
    """An object's class and attributes, and what the containers among them held."""

    owner: Any
    kind: type
    values: dict[str, Any]
    containers: list[Any]
    contents: list[Any]

    @classmethod
    def of(cls, owner: Any) -> Attributes:
        """Read them."""
        values = dict(vars(owner))
        tracker = values.get("_tracker")  # Keras': has a set of ids per kind of object
        held = [*values.values(), *getattr(tracker, "stored_ids", {}).values()]
        containers = [each for each in held if isinstance(each, _KINDS)]
        # Two lists, not one of pairs: a network has a hundred thousand of these, and each pair
        # would be one more object for Python's collector of garbage to look at.
        return cls(owner, type(owner), values, containers, list(map(_plain, containers)))

    def restore(self) -> None:
        """Put them back; every object stays the one it is."""
        if type(self.owner) is not self.kind:
            self.owner.__class__ = self.kind
        held = vars(self.owner)
        held.update(self.values)
        for name in held.keys() - self.values.keys():
            held.pop(name, None)
        for container, content in zip(self.containers, self.contents, strict=True):
            _refill(container, content)


def restored(kept: Sequence[Attributes]) -> None:
    """Put several objects back."""
    for attributes in kept:
        attributes.restore()


def _plain(container: Any) -> Any:
    kind = _kind(container.__class__)
    return kind(container) if container else _EMPTY[kind]  # most of them are


@functools.lru_cache(256)
def _kind(stated: type) -> Any:
    """Of a container's ``__class__``, which for TensorFlow's wrappers is that of the content."""
    return next(kind for kind in _KINDS if issubclass(stated, kind))


def _refill(container: Any, content: Any) -> None:
    """Give a container its content back; untouched if it has it."""
    if _identities(_plain(container)) == _identities(content):
        return
    kind = _kind(container.__class__)
    add = "extend" if kind is list else "update"
    if type(container).__module__.startswith("keras."):
        # Keras' tracked containers would track all of it again: the plain methods do not.
        kind.clear(container)
        getattr(kind, add)(container, content)
    else:
        container.clear()
        getattr(container, add)(content)


def _identities(content: Any) -> Any:
    # Variables compare by value, element by element; what matters here is which they are.
    if isinstance(content, set):
        return content
    if isinstance(content, dict):
        return [(key, id(value)) for key, value in content.items()]
    return [id(value) for value in content]
