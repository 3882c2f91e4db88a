"""``fit``: train a compiled model file through the feature cache and write the result."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from frostline.cli.options import (
    BackendOption,
    BatchSizeOption,
    ClassesOption,
    DataArgument,
    ForceOption,
    ImageSizeOption,
    ModelArgument,
    OutputOption,
    PerClassOption,
    PreprocessOption,
    SeedOption,
    Split,
    SplitOption,
    boundary,
    read_as,
)
from frostline.cli.starting import start
from frostline.types import ModelError


class Storage(StrEnum):
    """Dtype in which features are stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Make ``fit`` a command."""
    app.command()(fit)


def fit(
    model: ModelArgument,
    data: DataArgument,
    output: OutputOption,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Step size; else the compiled one.")
    ] = None,
    validation_split: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Last share of the data, to validate.")
    ] = 0.0,
    engine: Annotated[str, typer.Option(help="What runs the frozen part.")] = "auto",
    dtype: Annotated[Storage, typer.Option(help="How features are stored.")] = Storage.float32,
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache folder; else FROSTLINE_CACHE_DIR or the user's own."),
    ] = None,
    max_gb: Annotated[float | None, typer.Option(help="Largest size of the cache.")] = None,
    thaw_later: Annotated[
        str | None,
        typer.Option(
            help="Layer (path, name, index, or share) from which the next run will train: its "
            "features are kept on the way."
        ),
    ] = None,
    classes: ClassesOption = None,
    per_class: PerClassOption = None,
    image_size: ImageSizeOption = None,
    preprocess: PreprocessOption = None,
    split: SplitOption = Split.train,
    batch_size: BatchSizeOption = 32,
    seed: SeedOption = 0,
    force: ForceOption = False,
    backend: BackendOption = None,
) -> int:
    """Train a compiled model; its frozen part runs over the data only once."""
    start(backend)

    options = read_as(data, classes, per_class, image_size, preprocess, split, seed)
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "validation_split": validation_split,
        "engine": engine,
        "dtype": dtype.value,
        "cache": cache,
        "max_gb": max_gb,
        "thaw_later": None if thaw_later is None else boundary(thaw_later),
    }
    return _run(model, options, settings, learning_rate=learning_rate, seed=seed,
                output=output, force=force)  # fmt: skip


def _run(
    source: str,
    options: Any,
    settings: dict[str, Any],
    *,
    learning_rate: float | None,
    seed: int,
    output: Path,
    force: bool,
) -> int:
    from frostline.adapters.keras.cached_fit import seed_everything
    from frostline.cli import models
    from frostline.verbs import fit as training

    model = models.load(source)
    models.check_output(output, source, force=force)
    if not getattr(model, "compiled", False):
        raise ModelError(
            f"{source} is not compiled: save it after model.compile(optimizer, loss, ...)"
        )
    if learning_rate is not None:
        model.optimizer.learning_rate = learning_rate
    x, y = models.read_data(options, model)
    seed_everything(seed)
    history = training.fit(model, x, y, verbose="auto", **settings)
    models.save(model, output, force=force)
    last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in history.history.items())
    typer.echo(f"{output}: {len(x)} samples, {len(history.epoch)} epoch(s): {last}")
    return 0
