"""``diagnose --fix``: the best remedy applied, written, and measured anew on what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.cli import model_files
from frostline.cli.options import OutputOptions
from frostline.cli.terminal import echo
from frostline.remedies import group_of, verb_of
from frostline.report import excerpts
from frostline.types import Array, OutputError
from frostline.types.measured import Probe, Remedy
from frostline.types.report import Report

#: Relative difference of two losses that the same numbers give on the same machine.
_ROUNDING = 1e-4


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a diagnosis was made on: with the same settings the same samples are drawn.

    Attributes:
        x: Inputs, shape ``(n, ...)``.
        y: Targets, shape ``(n, ...)``.
        loss: Name of a Keras loss; ``None`` for the compiled one.
        batch_size: Samples per batch.
        max_samples: At most so many are drawn.
        seed: Of the draw.
    """

    x: Array
    y: Array
    loss: str | None
    batch_size: int
    max_samples: int
    seed: int


def apply(
    model: Any, report: Report, samples: Samples, *, target: OutputOptions, plain: bool
) -> int:
    """Apply the best remedy to the model, write it, and print what inference was and is.

    The best one is the first that helps for sure. It is applied when it changes the model as it is
    now; a remedy that acts in training, or on the data, is named instead, and nothing is written.

    Args:
        model: The diagnosed model; it is changed.
        report: Its diagnosis.
        samples: What the diagnosis was made on.
        target: Model file to write.
        plain: Print to stdout; otherwise to stderr, since stdout holds a report for a program.

    Returns:
        0 when the model was repaired, or had nothing to repair; 1 when it could not be.
    """
    output = target.output
    best = excerpts.first_choice(report.remedies)
    if report.clean and best is None:
        echo(f"nothing to fix: {output} is not written", err=not plain)
        return 0
    if best is None:
        tried = ", ".join(remedy.name for remedy in report.remedies if remedy.after)
        sentence = (
            f"none of those measured helps for sure ({tried})" if tried else "there is no remedy"
        )
        return _not_fixed(f"{sentence} for {_causes(report)}", output)
    verb = verb_of(best.fix)
    if verb is None:
        return _not_fixed(_what_to_do(best, report), output)
    from frostline.verbs import edit

    before = inference(model, samples)
    repair = getattr(edit, verb)
    change = repair(model, samples.x, sites=group_of(best), batch_size=samples.batch_size)
    after = inference(model, samples)
    if not (after.loss < before.loss and after.broken <= before.broken) and not (
        after.broken < before.broken
    ):
        # It was tried on the samples alone; all of the data have been stored now.
        return _not_fixed(
            f"{best.name} with all {len(samples.x)} samples leaves {_effect(before, after)}", output
        )
    model_files.save(model, target)
    written = inference(model_files.load(str(output)), samples)
    if abs(written.loss - after.loss) > _ROUNDING * max(abs(after.loss), 1.0):
        raise OutputError(
            f"{output} was written, but does not compute what the repaired model does: loss "
            f"{written.loss:.6g} instead of {after.loss:.6g}"
        )
    echo(f"fixed: {best.name}: {change}", err=not plain)
    echo(f"inference: {_effect(before, written)}, measured on {output}", err=not plain)
    return 0


def inference(model: Any, samples: Samples) -> Probe:
    """The model's own inference on the samples of the diagnosis."""
    from frostline.adapters import adapter_of
    from frostline.measure.setting import make_bench

    seen = adapter_of(model)
    with seen.preserved():
        bench, _, _ = make_bench(
            seen,
            (samples.x, samples.y),
            loss=samples.loss,
            batch_size=samples.batch_size,
            max_samples=samples.max_samples,
            seed=samples.seed,
        )
        return bench.nominal(training=False)


def _not_fixed(reason: str, output: Path) -> int:
    echo(f"not fixed: {reason}. {output} is not written", err=True)
    return 1


def _causes(report: Report) -> str:
    return ", ".join(cause.code for cause in report.causes) or "what was found"


def _what_to_do(best: Remedy, report: Report) -> str:
    """Why the best remedy cannot be applied to a file, what to do, and what else helps now."""
    line = best.shell or best.python
    sentence = f"the best remedy is not one for the model as it is: {best.text}"
    sentence += f" ({line})" if line else ""
    now = next((r for r in report.remedies if r.recommended and verb_of(r.fix) and r.shell), None)
    if now is not None:
        sentence += (
            f". Less, but now: {now.shell} ({_numbers(now.before)} -> {_numbers(now.after)})"
        )
    return sentence


def _effect(before: Probe, after: Probe) -> str:
    return f"{_worded(before)} -> {_worded(after)}"


def _worded(probe: Probe) -> str:
    numbers = {"loss": probe.loss}
    return _numbers(numbers if probe.accuracy is None else {**numbers, "accuracy": probe.accuracy})


def _numbers(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
