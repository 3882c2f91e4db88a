"""Change a model wholly or not at all: what interrupts an edit takes it back first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def atomically(back: Callable[[], None], edit: Callable[[], T]) -> T:
    """Run an edit; if anything at all interrupts it, put the model back before that goes on.

    Args:
        back: Puts the model back as it was before the edit; can be repeated.
        edit: Changes the model and returns what the user gets, its text included.
    """
    try:
        return edit()
    except BaseException:
        to_its_end(back)
        raise


def to_its_end(back: Callable[[], None]) -> None:
    """Put a model back, whatever interrupts it; Ctrl-C waits until it is done."""
    held = _Held()
    try:
        try:
            held.acquire()
            _again_if_interrupted(back)
        finally:
            held.release()
    finally:
        held.release()  # the first one may have been interrupted


def _again_if_interrupted(back: Callable[[], None]) -> None:
    try:
        back()
    except BaseException:
        back()
        raise


class _Held:
    """Holds SIGINT back, in the thread that gets signals."""

    def __init__(self) -> None:
        self._noted = False
        self._before: Any = None

    def acquire(self) -> None:
        """Note a signal from now on."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._noted = True

    def release(self) -> None:
        """Put the handler back and hand it what was noted; can be repeated."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        noted, self._noted = self._noted, False
        if noted:
            signal.raise_signal(signal.SIGINT)
