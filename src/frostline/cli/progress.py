"""Progress of the experiments on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from frostline.report import text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar, TaskID

    from frostline.experiments.overfit import Epoch, Row, RowResult


class Display:
    """Progress on standard error: a bar on a terminal, one plain line per epoch elsewhere."""

    def __init__(self) -> None:
        self._out = text.console(stderr=True)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._label = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pause()

    def pause(self) -> None:
        """End the live bar, if one is shown, so that something else can be printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def started(self, row: Row, number: int, total: int) -> None:
        """Open a bar, or say which row begins."""
        self.begin(row.name, row.meaning, number, total)

    def begin(self, name: str, meaning: str, number: int, total: int) -> None:
        """Open a bar for row ``number`` of ``total``, or print a line."""
        self._label = f"[{number}/{total}] {name}"
        if not self._out.is_terminal:
            self._out.print(f"{self._label}: {meaning}", markup=False, soft_wrap=True)
            return
        if self._bar is None:
            self._bar = _bar(self._out)
            self._bar.start()
        self._task = self._bar.add_task(self._label.replace("[", r"\["), total=None, state="")

    def epoch(self, epoch: Epoch, total: int) -> None:
        """Show one epoch's numbers."""
        state = (
            f"epoch {epoch.number}/{total}  train {epoch.train_accuracy:.3f}  "
            f"phase 1 {epoch.phase1_accuracy:.3f}  phase 0 {epoch.phase0_accuracy:.3f}"
        )
        self.advance(epoch.number, total, state, epoch.seconds)

    def advance(self, number: int, total: int, state: str, seconds: float) -> None:
        """Move the bar to epoch ``number``, or print a line."""
        if self._bar is None or self._task is None:
            self._out.print(f"{self._label}: {state}  {seconds:.1f} s", markup=False,
                            soft_wrap=True)  # fmt: skip
        else:
            self._bar.update(self._task, total=total, completed=number, state=state)

    def finished(self, result: RowResult) -> None:
        """Nothing more to show: the table comes at the end."""


def _bar(out: Console) -> Bar:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    words, state = TextColumn("{task.description}"), TextColumn("{task.fields[state]}")
    return Progress(words, BarColumn(bar_width=20), state, TimeElapsedColumn(), console=out)
