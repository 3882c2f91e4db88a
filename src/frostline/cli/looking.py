"""Commands that look at a model and change nothing: their options, and where they are done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.modules import is_module
from frostline.cli.options import (
    BackendOption,
    BatchSizeOption,
    ClassesOption,
    DataArgument,
    ExitZeroOption,
    ForceOption,
    Format,
    FormatOption,
    IgnoreOption,
    ImageSizeOption,
    LossOption,
    ModelArgument,
    PerClassOption,
    PreprocessOption,
    ReportFormat,
    ReportFormatOption,
    ReportOption,
    SeedOption,
    SelectOption,
    Split,
    SplitOption,
    StateOption,
    names,
    read_as,
)
from frostline.cli.starting import start


def register(app: typer.Typer) -> None:
    """Make these functions commands, in this order."""
    for command in (sites, phases, lint, diagnose, rule):
        app.command()(command)


def sites(
    model: ModelArgument,
    format: FormatOption = Format.text,
    backend: BackendOption = None,
    state: StateOption = None,
) -> int:
    """List the BN layers of a model and where its frozen prefix ends."""
    start(backend, keras=not is_module(model, state))
    from frostline.cli import models

    return models.show_sites(model, as_json=format is Format.json, state=state)


def phases(
    model: ModelArgument,
    data: DataArgument,
    classes: ClassesOption = None,
    per_class: PerClassOption = None,
    image_size: ImageSizeOption = None,
    preprocess: PreprocessOption = None,
    split: SplitOption = Split.train,
    batch_size: BatchSizeOption = 32,
    loss: LossOption = None,
    seed: SeedOption = 0,
    format: FormatOption = Format.text,
    backend: BackendOption = None,
    state: StateOption = None,
) -> int:
    """Compare training mode and inference on the same data; exit code 1 when there is a gap."""
    start(backend, keras=not is_module(model, state))
    from frostline.cli import models

    options = read_as(data, classes, per_class, image_size, preprocess, split, seed)
    return models.show_phases(
        model,
        options,
        batch_size=batch_size,
        as_json=format is Format.json,
        state=state,
        loss=loss,
    )


def lint(
    model: ModelArgument,
    select: SelectOption = None,
    ignore: IgnoreOption = None,
    format: ReportFormatOption = ReportFormat.text,
    output: ReportOption = None,
    force: ForceOption = False,
    exit_zero: ExitZeroOption = False,
    backend: BackendOption = None,
    state: StateOption = None,
) -> int:
    """Check BN configuration and stored numbers; needs no data. Exit code 1 on findings."""
    start(backend, keras=not is_module(model, state))
    from frostline.cli import lint as command

    return command.run(
        model,
        select=names(select),
        ignore=names(ignore),
        format=format.value,
        output=output,
        force=force,
        exit_zero=exit_zero,
        state=state,
    )


def diagnose(
    model: ModelArgument,
    data: DataArgument,
    validation: Annotated[
        str | None, typer.Option(metavar="DATA", help="Data that the model was not trained on.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model to compare with.")
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="Log of the training run, .csv or .json.")
    ] = None,
    loss: LossOption = None,
    max_samples: Annotated[int, typer.Option(min=2, help="At most so many, at random.")] = 1024,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples per batch, best as in training.")
    ] = 32,
    seed: SeedOption = 0,
    classes: ClassesOption = None,
    per_class: PerClassOption = None,
    image_size: ImageSizeOption = None,
    preprocess: PreprocessOption = None,
    split: SplitOption = Split.train,
    select: SelectOption = None,
    ignore: IgnoreOption = None,
    format: ReportFormatOption = ReportFormat.text,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Apply the best remedy; -o is then the model file to write."),
    ] = False,
    output: ReportOption = None,
    force: ForceOption = False,
    exit_zero: ExitZeroOption = False,
    backend: BackendOption = None,
    state: StateOption = None,
) -> int:
    """Find out whether BN makes training and inference differ, where, why, and what helps."""
    start(backend, keras=not is_module(model, state))
    from frostline.cli import diagnose as command

    options = read_as(data, classes, per_class, image_size, preprocess, split, seed)
    return command.run(
        model,
        options,
        validation=validation,
        reference=reference,
        history=history,
        loss=loss,
        max_samples=max_samples,
        batch_size=batch_size,
        select=names(select),
        ignore=names(ignore),
        format=format.value,
        output=output,
        force=force,
        exit_zero=exit_zero,
        fix=fix,
        state=state,
    )


def rule(
    reference: Annotated[
        str | None, typer.Argument(metavar="RULE", help="A code or a name; all when left out.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All documentation.")] = False,
    format: FormatOption = Format.text,
) -> int:
    """Explain a rule, or list all of them. Needs no backend."""
    from frostline.cli import lint as command

    return command.show_rules(reference, every=every, format=format.value)
