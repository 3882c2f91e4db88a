"""``frostline compare``: the rest of a model under every treatment of BN, from one cache."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from frostline.cli.options import (
    BatchSizeOption,
    CacheOption,
    DataOptions,
    ForceOption,
    Format,
    FormatOption,
    LossOption,
    ModelOptions,
    boundary,
    command,
    names,
)
from frostline.types import DataError, ModelError
from frostline.types.comparison import Comparison


class Metric(StrEnum):
    """What decides."""

    accuracy = "accuracy"
    loss = "loss"


@command
def compare(
    model: ModelOptions,
    data: DataOptions,
    validation: Annotated[
        str | None,
        typer.Option(help="DATA to validate with; else the last share of DATA is held back."),
    ] = None,
    validation_split: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="That share; without --validation.")
    ] = 0.25,
    until: Annotated[
        str | None,
        typer.Option(help="Freeze everything before this layer first (path, name, index, share)."),
    ] = None,
    treatments: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="Treatments: all-bn-frozen statistics-frozen thawed debiased recalibrated ramp "
            "momentum-by-steps. All when not given.",
        ),
    ] = None,
    boundaries: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER...", help="Layers to train from instead, earlier or later."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 3,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Trainings per treatment; else 3 from a cache, or 1."),
    ] = None,
    metric: Annotated[Metric | None, typer.Option(help="What decides.")] = None,
    loss: LossOption = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="For a torch module: module:function that makes an optimizer from a list of "
            "parameters, or the name of a class in torch.optim."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Step size; else that of the optimizer.")
    ] = None,
    engine: Annotated[str, typer.Option(help="What runs the frozen part.")] = "auto",
    cache: CacheOption = None,
    stop_early: Annotated[
        bool, typer.Option("--stop-early/--no-stop-early", help="Give up what cannot win.")
    ] = True,
    batch_size: BatchSizeOption = 32,
    format: FormatOption = Format.text,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Also write it: .html, .json, .txt, .png or .svg."),
    ] = None,
    force: ForceOption = False,
) -> int:
    """Train the rest of a model under every treatment of BN, from one cache; say which is best."""
    from frostline.cli import model_files
    from frostline.cli.samples import read_samples
    from frostline.data import files
    from frostline.report.comparison import ENDINGS

    if output is not None:
        files.check_output(output, ENDINGS, "a comparison", force=force)
    loaded = model_files.open_model(model)
    model_files.sites_of(loaded)
    from frostline.adapters import adapter_of
    from frostline.verbs.compare import compare as measure
    from frostline.verbs.edit import freeze

    if until is not None:
        freeze(loaded, until=boundary(until))
    x, y = read_samples(data, loaded, loss=loss)
    if validation is None:
        first = round(len(x) * (1 - validation_split))
        if not 0 < first < len(x):
            raise DataError(
                f"{data.data} has {len(x)} samples, too few to hold some back. "
                f"Received: --validation-split {validation_split}"
            )
        x, y, held = x[:first], y[:first], (x[first:], y[first:])
    else:
        held = read_samples(replace(data, data=validation), loaded, loss=loss)
    ways: dict[str, Any] = {}
    if adapter_of(loaded).train is None:
        ways = {
            "loss": model_files.loss_of(loss, loaded) or "cross_entropy",
            "optimizer": _factory(optimizer, learning_rate),
        }
    elif loss is not None or optimizer is not None:
        raise ModelError(
            "a Keras model trains with what it was compiled with: leave --loss and --optimizer out"
        )
    elif learning_rate is not None and getattr(loaded, "compiled", False):
        loaded.optimizer.learning_rate = learning_rate
    found = measure(
        loaded,
        (x, y),
        validation=held,
        treatments=names(treatments) or None,
        boundaries=[boundary(name) for name in names(boundaries)],
        epochs=epochs,
        batch_size=batch_size,
        seeds=seeds,
        seed=data.seed,
        metric=None if metric is None else metric.value,
        cache=cache,
        engine=engine,
        stop_early=stop_early,
        **ways,
    )
    _show(found, format, output)
    return 0


def _factory(name: str | None, rate: float | None) -> Any:
    """What makes the optimizer of a torch module."""
    if name is None:
        raise ModelError(
            "a torch module has no optimizer of its own: pass --optimizer, for example "
            "--optimizer SGD --learning-rate 0.001"
        )
    from frostline.data.import_string import named

    make = named(name if ":" in name else f"torch.optim:{name}")
    return make if rate is None else lambda parameters: make(parameters, lr=rate)


def _show(found: Comparison, form: Format, output: Path | None) -> None:
    from frostline.cli.terminal import echo
    from frostline.report import comparison, text

    if output is not None:
        found.save(output)
    if form is Format.json:
        typer.echo(found.to_json(), nl=False)
        return
    out = text.console()
    if out.is_terminal:
        out.print(comparison.table(found), crop=False)
    else:
        typer.echo(comparison.as_text(found), nl=False)
    if output is not None:
        echo(f"written: {output}", err=True)
