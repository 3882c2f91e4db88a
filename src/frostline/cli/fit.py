"""``frostline fit``: train a compiled model file through the feature cache."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from frostline.cli.options import (
    BackendOption,
    BatchSizeOption,
    CacheOption,
    DataOptions,
    ModelArgument,
    OutputOptions,
    Precision,
    PrecisionOption,
    boundary,
    command,
)
from frostline.types import ModelError


class Storage(StrEnum):
    """Dtype in which features are stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@command
def fit(
    model: ModelArgument,
    data: DataOptions,
    target: OutputOptions,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Step size; else the compiled one.")
    ] = None,
    validation_split: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Last share of the data, to validate.")
    ] = 0.0,
    engine: Annotated[str, typer.Option(help="What runs the frozen part.")] = "auto",
    precision: PrecisionOption = Precision.float32,
    dtype: Annotated[Storage, typer.Option(help="How features are stored.")] = Storage.float32,
    cache: CacheOption = None,
    max_gb: Annotated[
        float | None, typer.Option(min=0.0, help="Largest size of the cache.")
    ] = None,
    thaw_later: Annotated[
        str | None,
        typer.Option(
            help="Layer (path, name, index, or share) from which the next run will train: its "
            "features are kept on the way."
        ),
    ] = None,
    batch_size: BatchSizeOption = 32,
    backend: BackendOption = None,
) -> int:
    """Train a compiled model; its frozen part runs over the data only once."""
    from frostline.cli import model_files
    from frostline.cli.samples import read_samples
    from frostline.cli.terminal import echo, shown_only
    from frostline.engines import NAMES

    if engine not in ("auto", *NAMES):
        raise ModelError(f"--engine is one of auto, {', '.join(NAMES)}. Received: {engine}")
    model_files.start(backend)
    import numpy as np

    from frostline.adapters import adapter_of
    from frostline.verbs import fit as training

    loaded = model_files.load(model)
    model_files.check_output(target, model)
    if not getattr(loaded, "compiled", False):
        raise ModelError(
            f"{model} is not compiled: save it after model.compile(optimizer, loss, ...)"
        )
    if learning_rate is not None:
        loaded.optimizer.learning_rate = learning_rate
    x, y = read_samples(data, loaded)
    trainer = adapter_of(loaded).train
    if trainer is not None:  # otherwise fit says why not
        trainer.seed_everything(data.seed)
    with shown_only():
        history = training.fit(
            loaded,
            x,
            y,
            verbose="auto" if sys.stdout.isatty() else 2,
            epochs=epochs,
            batch_size=batch_size,
            validation_split=validation_split,
            engine=engine,
            precision=precision.value,
            dtype=dtype.value,
            cache=cache,
            max_gb=max_gb,
            thaw_later=None if thaw_later is None else boundary(thaw_later),
        )
    if not all(np.isfinite(weight).all() for weight in loaded.get_weights()):
        raise ModelError(
            f"the training ended in weights that are NaN or infinite; {target.output} is not "
            "written. A smaller --learning-rate may help; look for NaN in the data first"
        )
    model_files.save(loaded, target)
    last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in history.history.items())
    echo(f"{target.output}: {len(x)} samples, {len(history.epoch)} epoch(s): {last}")
    if "precision_error" in history.params:
        error = history.params["precision_error"]
        echo(f"the frozen part was computed in {precision.value}, {error:.1e} from float32")
    return 0
