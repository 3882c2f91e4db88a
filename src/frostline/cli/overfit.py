"""``frostline experiment overfit``: run it with progress, then print table, sentences, files."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli import options

if TYPE_CHECKING:
    from frostline.experiments.overfit import OverfitResult


class Solver(StrEnum):
    """Optimizers of the experiments."""

    sgd = "sgd"
    rmsprop = "rmsprop"
    adam = "adam"


@options.command
def overfit(
    shared: options.ExperimentOptions,
    data: Annotated[str, typer.Option(help=options.DATA_HELP)] = "digits",
    per_class: Annotated[int, typer.Option(min=1, help="Images per class.")] = 100,
    image_size: options.ImageSize = 128,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="Rows to run: update batch inference inference+debias "
            "inference+recalibrate none-frozen all-bn-frozen. All when not given.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 10,
    optimizer: Annotated[Solver, typer.Option(help="Optimizer.")] = Solver.sgd,
    learning_rate: Annotated[
        float | None, typer.Option(help="Step size; sgd 0.01, rmsprop and adam 0.0001.")
    ] = None,
    diagnosed: Annotated[
        bool,
        typer.Option("--diagnose", help="Also diagnose each trained network; reports go along."),
    ] = False,
) -> int:
    """Fine-tune on a few images under every BN policy, then look at the same images (§2.4)."""
    from frostline.cli import model_files

    model_files.start(shared.backend)
    from frostline.cli.progress import Display
    from frostline.experiments import overfit as experiment, records

    settings = experiment.OverfitSettings(
        **shared.settings(),
        data=data,
        per_class=per_class,
        image_size=image_size,
        rows=options.names(rows) or tuple(experiment.ROWS),
        epochs=epochs,
        optimizer=optimizer.value,
        learning_rate=learning_rate,
    )
    folder = shared.output or records.default_folder(settings)
    with Display() as display:
        result = experiment.run_overfit(
            settings, output=folder, force=shared.force, diagnosed=diagnosed, progress=display
        )
    if result.rows:
        show(result)
    if result.interrupted:
        raise KeyboardInterrupt
    return 0


def show(result: OverfitResult) -> None:
    """Print the essay's table, one sentence per row, and where the files are."""
    from frostline.experiments import overfit as experiment
    from frostline.report import phases, text

    out = text.console()
    out.print(phases.comparison_table(result.tables))
    for row in result.rows:
        out.print(f"\n{row.row.name}: {row.row.meaning}", style="bold", markup=False)
        out.print(experiment.describe(row), markup=False)
        if row.report is not None:
            out.print(row.report.verdict, markup=False)
    if result.files:
        out.print("\nwritten: " + ", ".join(str(path) for path in result.files), markup=False,
                  soft_wrap=True)  # fmt: skip
