"""``frostline diagnose``: a model and its data in, a report out, and with ``--fix`` a model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frostline.cli.options import (
    DataOptions,
    LossOption,
    ModelOptions,
    OutputOptions,
    ReportOptions,
    RuleOptions,
    Split,
    command,
    names,
)
from frostline.types import Array, DataError, ModelError, OutputError

if TYPE_CHECKING:
    from frostline.types.measured import Remedy


@command
def diagnose(
    model: ModelOptions,
    data: DataOptions,
    which: RuleOptions,
    report: ReportOptions,
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
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Apply the best remedy; -o is then the model file to write."),
    ] = False,
) -> int:
    """Find out whether BN makes training and inference differ, where, why, and what helps."""
    from frostline.cli import best_remedy, model_files, reports
    from frostline.cli.samples import read_samples
    from frostline.verbs import diagnose as verbs

    target = _model_target(report, model.model) if fix else None
    if not fix:
        reports.check_output(report.output, force=report.force)
    chosen = which.chosen()
    log = None if history is None else _history(history)
    loaded = model_files.open_model(model)
    if fix and model_files.is_state(loaded):
        raise ModelError(
            "--fix writes a Keras model; of a torch module: frostline recalibrate, or the line of "
            f"the remedy in your code. Received: {model.model}"
        )
    x, y = read_samples(data, loaded, loss=loss)
    found = verbs.diagnose(
        loaded,
        (x, y),
        validation=None if validation is None else _held_out(validation, data, loaded, x, loss),
        reference=None if reference is None else model_files.load_reference(reference, loaded),
        history=log,
        loss=model_files.loss_of(loss, loaded),
        max_samples=max_samples,
        batch_size=batch_size,
        seed=data.seed,
        **chosen,
    )
    words = {"MODEL": _model_as_typed(model), "DATA": _data_as_typed(data)}
    found = replace(found, remedies=tuple(_filled(remedy, words) for remedy in found.remedies))
    if target is None:
        return reports.show(found, report, model.model)
    reports.show(found, replace(report, output=None), model.model)
    samples = best_remedy.Samples(
        x=x, y=y, loss=loss, batch_size=batch_size, max_samples=max_samples, seed=data.seed
    )
    plain = report.format == "text"
    code = best_remedy.apply(loaded, found, samples, target=target, plain=plain)
    return 0 if report.exit_zero else code


def _model_target(report: ReportOptions, source: str) -> OutputOptions:
    """Return the model file that ``--fix`` writes."""
    from frostline.cli import model_files

    if report.output is None:
        raise OutputError("--fix writes a repaired model: name its file with -o OUT.keras")
    target = OutputOptions(output=report.output, force=report.force)
    model_files.check_output(target, source)
    return target


def _filled(remedy: Remedy, words: Mapping[str, str]) -> Remedy:
    """Return a remedy whose command names the model and the data that were diagnosed."""
    if remedy.shell is None:
        return remedy
    shell = " ".join(words.get(word, word) for word in remedy.shell.split(" "))
    return replace(remedy, shell=shell)


def _model_as_typed(model: ModelOptions) -> str:
    state = "" if model.state is None else f" --state {shlex.quote(model.state)}"
    return shlex.quote(model.model) + state


def _data_as_typed(data: DataOptions) -> str:
    """Return DATA with the options that it was read with, as words of a shell."""
    words = [data.data]
    if classes := names(data.classes):
        words += ["--classes", ",".join(classes)]
    for name in ("per_class", "image_size", "preprocess"):
        value = getattr(data, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if data.split is not Split.train:
        words += ["--split", data.split.value]
    if data.seed:
        words += ["--seed", str(data.seed)]
    return shlex.join(words)


def _held_out(
    source: str, data: DataOptions, model: Any, x: Array, loss: str | None
) -> tuple[Array, Array]:
    """Read the validation data as the data were read; of the same source, the test part."""
    import numpy as np

    from frostline.cli.samples import read_samples

    split = data.split
    if source == data.data and split is Split.train:
        split = Split.test
    held_out = read_samples(replace(data, data=source, split=split), model, loss=loss)
    if held_out[0].shape == x.shape and np.array_equal(held_out[0], x):
        raise DataError(
            f"the validation data are the same samples as the data. Received: --validation {source}"
        )
    return held_out


def _history(path: Path) -> Any:
    """Return what a JSON file holds, or the path of a CSV log."""
    from frostline.data.reading import require_file

    require_file(path)
    if path.suffix != ".json":
        return path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error})") from None
