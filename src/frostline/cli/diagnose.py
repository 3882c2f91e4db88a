"""``diagnose``: a model and its data in, a report out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from frostline import rules
from frostline.cli import fixing, models, modules, showing
from frostline.cli.options import DataOptions
from frostline.types import Array, DataError, ModelError
from frostline.types.measured import Remedy


def run(
    source: str,
    options: DataOptions,
    *,
    validation: str | None = None,
    reference: str | None = None,
    history: Path | None = None,
    loss: str | None = None,
    max_samples: int = 1024,
    batch_size: int = 32,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    format: showing.Form = "text",
    output: Path | None = None,
    force: bool = False,
    exit_zero: bool = False,
    fix: bool = False,
    state: str | None = None,
) -> int:
    """Diagnose a model on data; 1 when there is a gap with a cause, an error or a warning.

    Args:
        source: MODEL, as typed.
        options: How DATA is read; its seed is also that of the draw and of the intervals.
        validation: DATA that the model was not trained on, read in the same way. The same source
            again means its test part.
        reference: MODEL to compare with.
        history: The training run: a CSV log, or a JSON file with a list of numbers per metric.
        loss: Name of a loss; ``None`` for the compiled one. ``module:function`` for torch.
        max_samples: At most so many samples are drawn.
        batch_size: Samples per batch.
        select: Rules to apply; empty for the default set.
        ignore: Rules to leave out.
        format: How to print.
        output: Also write the report to this ``.html``, ``.json`` or ``.txt`` file.
        force: Overwrite it.
        exit_zero: Return 0 whatever is found.
        fix: Apply the best remedy; ``output`` is the repaired model's file then, and the code is 0
            when it was repaired.
        state: File with the ``state_dict`` of a torch module.
    """
    fixed = fixing.check_output(output, source, force=force) if fix else None
    showing.check_output(None if fix else output, force=force)
    rules.select(select or None, ignore or None)
    run_log = None if history is None else _history(history)
    from frostline.verbs.diagnose import diagnose

    model = models.load(source, state)
    if fix and modules.is_state(model):
        raise ModelError(
            "--fix writes a Keras model; of a torch module: frostline recalibrate, or the line of "
            f"the remedy in your code. Received: {source}"
        )
    x, y = models.read_data(options, model)
    report = diagnose(
        model,
        (x, y),
        validation=None if validation is None else _held_out(validation, options, model, x),
        reference=None if reference is None else _reference(reference, model),
        history=run_log,
        loss=modules.loss(loss, model),
        max_samples=max_samples,
        batch_size=batch_size,
        seed=options.seed,
        select=select or None,
        ignore=ignore or None,
    )
    name = shlex.quote(source) + ("" if state is None else f" --state {shlex.quote(state)}")
    words = {"MODEL": name, "DATA": _as_typed(options)}
    report = replace(report, remedies=tuple(_filled(each, words) for each in report.remedies))
    if fixed is None:
        return showing.show(report, format=format, output=output, exit_zero=exit_zero)
    showing.show(report, format=format, output=None, exit_zero=exit_zero)
    samples = fixing.Samples(
        x=x, y=y, loss=loss, batch_size=batch_size, max_samples=max_samples, seed=options.seed
    )
    plain = format == "text"
    code = fixing.apply(model, report, samples, output=fixed, force=force, plain=plain)
    return 0 if exit_zero else code


def _reference(source: str, model: Any) -> Any:
    """Return a model to compare with; for a torch module, a file with a state will do."""
    known = modules.reference(source) if modules.is_state(model) else None
    return models.load(source) if known is None else known


def _filled(remedy: Remedy, words: Mapping[str, str]) -> Remedy:
    """Return a remedy whose command names the model and the data that were diagnosed."""
    if remedy.shell is None:
        return remedy
    shell = " ".join(words.get(word, word) for word in remedy.shell.split(" "))
    return replace(remedy, shell=shell)


def _as_typed(options: DataOptions) -> str:
    """Return DATA with the options that it was read with, as words of a shell."""
    words = [options.source]
    if options.classes:
        words += ["--classes", ",".join(options.classes)]
    for name in ("per_class", "image_size", "preprocess"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.split != "train":
        words += ["--split", options.split]
    if options.seed:
        words += ["--seed", str(options.seed)]
    return shlex.join(words)


def _held_out(source: str, options: DataOptions, model: Any, x: Array) -> tuple[Array, Array]:
    split = options.split
    if source == options.source and split == "train":
        split = "test"
    held_out = models.read_data(replace(options, source=source, split=split), model)
    if held_out[0].shape == x.shape and np.array_equal(held_out[0], x):
        raise DataError(
            f"the validation data are the same samples as the data. Received: --validation {source}"
        )
    return held_out


def _history(path: Path) -> Any:
    """Return what a JSON file holds, or the path of a CSV log."""
    if path.suffix != ".json":
        if not path.is_file():
            raise DataError(f"no such file: {path}")
        return path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error})") from None
