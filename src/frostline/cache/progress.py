"""Say how far a build is, how fast it goes and how long it will take: on standard error only."""

from __future__ import annotations

import sys
import time
from typing import Any

from frostline.report.escaping import printable

#: Seconds between two lines where there is no terminal to draw on.
_QUIET_SECONDS = 10.0
_DRAW_SECONDS = 0.2
#: Back to the start of the line, and empty it.
_CLEAR = "\r\x1b[K"


class Progress:
    """One line that moves on a terminal; elsewhere a plain line now and then.

    What a terminal would obey, in the name of a folder for example, is shown escaped.

    Args:
        title: What is going on.
        total: Samples to come; ``None`` when not known.
        verbose: ``0`` is silent; ``1`` draws on a terminal; ``2`` writes plain lines; ``"auto"``
            chooses between the two.
    """

    def __init__(self, title: str, total: int | None, verbose: Any = "auto") -> None:
        self.title = title
        self.total = total
        self.silent = verbose in (0, False)
        self.draws = verbose != 2 and sys.stderr.isatty()
        self.done = 0
        self.computed = 0
        self.began = time.monotonic()
        self._told = self.began
        self._open = False

    def say(self, text: str) -> None:
        """Write one line, unless silent."""
        if not self.silent:
            self._write(f"{_CLEAR if self._open else ''}{printable(text)}\n")
            self._open = False

    def advance(self, samples: int, computed: int) -> None:
        """Count samples that are done, and those of them that had to be computed."""
        self.done += samples
        self.computed += computed
        now = time.monotonic()
        if self.silent or now - self._told < (_DRAW_SECONDS if self.draws else _QUIET_SECONDS):
            return
        self._told = now
        if self.draws:
            self._write(f"{_CLEAR}{printable(self.line())}")
            self._open = True
        else:
            self._write(f"{printable(self.line())}\n")

    def finish(self) -> None:
        """Write the last line."""
        if not self.silent:
            seconds = time.monotonic() - self.began
            self.say(
                f"{self.title}: {self.done} samples, {self.computed} computed, "
                f"{self.done - self.computed} already there, {seconds:.1f} s"
            )

    def line(self) -> str:
        """Return the state in words: done, rate, time left."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = self.done / seconds
        of = "" if self.total is None else f"/{self.total}"
        left = ""
        if self.total is not None and rate > 0:
            left = f", {_duration(max(0, self.total - self.done) / rate)} left"
        return f"{self.title}: {self.done}{of} samples, {rate:.1f}/s{left}"

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def in_bytes(count: float) -> str:
    """A number of bytes to read, in powers of 1000.

    Example:
        >>> in_bytes(102_760_448)
        '103 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # what is printed has three digits
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
