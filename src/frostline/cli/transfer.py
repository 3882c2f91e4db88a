"""``frostline experiment transfer``: run it with progress, then print table, sentences, files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from frostline.cli.progress import Display
    from frostline.experiments.transfer import Epoch, Row, RowResult, TransferResult


@options.command
def transfer(
    shared: options.ExperimentOptions,
    data: Annotated[str, typer.Option(help=options.DATA_HELP)] = "cifar10",
    train_per_class: Annotated[int, typer.Option(min=1, help="Training images per class.")] = 100,
    test_per_class: Annotated[int, typer.Option(min=1, help="Test images per class.")] = 100,
    image_size: options.ImageSize = 96,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="Rows to run: unpatched patched all-bn-frozen recalibrate ramp. "
            "All when not given.",
        ),
    ] = None,
    head_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the head alone.")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of fine-tuning.")] = 5,
    head_learning_rate: Annotated[float, typer.Option(help="Step size of RMSprop.")] = 1e-3,
    learning_rate: Annotated[float, typer.Option(help="Step size of SGD.")] = 1e-4,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep the rows in the folder and run those that are missing."
        ),
    ] = False,
) -> int:
    """Train a new head, then fine-tune, under every treatment of BN (§2.5).

    Each row is written when it is finished; after an interruption, the same command with --resume
    goes on. Without a download: --data digits --image-size 32 --backbone tiny --weights none.
    """
    from frostline.cli import model_files

    model_files.start(shared.backend)
    from frostline.cli.progress import Display
    from frostline.experiments import records, transfer as experiment

    settings = experiment.TransferSettings(
        **shared.settings(),
        data=data,
        train_per_class=train_per_class,
        test_per_class=test_per_class,
        image_size=image_size,
        rows=options.names(rows) or tuple(experiment.ROWS),
        head_epochs=head_epochs,
        epochs=epochs,
        head_learning_rate=head_learning_rate,
        learning_rate=learning_rate,
    )
    folder = shared.output or records.default_folder(settings, "transfer")
    with Display() as display:
        progress = TransferProgress(display)
        result = experiment.run_transfer(
            settings, output=folder, force=shared.force, resume=resume, progress=progress
        )
    if result.rows:
        show(result)
    if result.interrupted:
        raise KeyboardInterrupt
    return 0


class TransferProgress:
    """Shows rows and epochs on a display."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def started(self, row: Row, number: int, total: int) -> None:
        """Show which row begins."""
        self._display.begin(row.name, row.meaning, number, total)

    def epoch(self, epoch: Epoch, total: int) -> None:
        """Show one epoch's numbers."""
        state = (
            f"epoch {epoch.number}/{total} ({epoch.stage})  train {epoch.train_accuracy:.3f}  "
            f"test {epoch.test_accuracy:.3f}"
        )
        self._display.advance(epoch.number, total, state, epoch.seconds)

    def finished(self, result: RowResult) -> None:
        """Nothing more to show: the table comes at the end."""


def show(result: TransferResult) -> None:
    """Print the table, one sentence per row, and where the files are."""
    from frostline.experiments import transfer as experiment
    from frostline.report import text

    out = text.console()
    out.print(_table(result))
    for row in result.rows:
        out.print(f"\n{row.row.name}: {row.row.meaning}", style="bold", markup=False)
        out.print(experiment.describe(row), markup=False)
    if result.files:
        out.print("\nwritten: " + ", ".join(str(path) for path in result.files), markup=False,
                  soft_wrap=True)  # fmt: skip


def _table(result: TransferResult) -> Table:
    from rich.table import Table

    table = Table(title="test accuracy")
    table.add_column("row")
    for name in ("head", "fine-tuned", "best", "phase 1", "seconds"):
        table.add_column(name, justify="right")
    for row in result.rows:
        accuracies = (
            row.accuracy("head"),
            row.accuracy("fine-tuning"),
            max(epoch.test_accuracy for epoch in row.epochs),
            row.phases["1"].metrics["accuracy"],
        )
        cells = [f"{value:.3f}" for value in accuracies]
        table.add_row(row.row.name, *cells, f"{sum(row.seconds.values()):.0f}")
    return table
