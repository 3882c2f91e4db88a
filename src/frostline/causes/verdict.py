"""The verdict: one sentence with the number that decides it, made of what the causes say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from frostline.numerics.stats import paired_bootstrap
from frostline.types import Finding, Site
from frostline.types.codes import CauseCode
from frostline.types.measured import Cause, Interval, Measurement, Probe, Remedy

#: Evidence of a gap that is no cause: what batch statistics cost, and inference does without.
SCATTER = "batch_scatter"

#: With fewer samples than this the verdict adds how uncertain the gap is.
FEW = 64


def with_unknown(
    sentence: str, unknown: Mapping[str, str], called: Mapping[str, str] | None = None
) -> str:
    """A verdict that does not acquit BN where something keeps statistics in a way of its own.

    Args:
        sentence: The verdict without it.
        unknown: See :class:`frostline.types.facts.ModelFacts`.
        called: Path of what hands the statistics of no site, or of several at once, to a function
            of BN -> what it does; a step can avoid that.
    """
    unknown = {**(called or {}), **unknown}
    if not unknown:
        return sentence
    path, kind = next(iter(unknown.items()))
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    sentence = sentence.replace(": BN cannot be the cause", " of a kind that is known")
    sentence = sentence.removeprefix("not BN: ").removeprefix("probably not BN: ")
    return (
        f"{sentence}; '{path}' ({kind}){more} keeps running statistics in a way of its own, "
        "which cannot be looked into: BN is not ruled out"
        + ("; pass step= in which each network runs as a module, by itself" if called else "")
    )


def of_rules(sites: Sequence[Site], findings: Sequence[Finding], applied: Sequence[str]) -> str:
    """Verdict of a report without data: how much was found, and what comes first."""
    if not sites:
        return "no BatchNormalization layer: BN cannot be the cause"
    layers, checked = _count(len(sites), "BN layer"), _count(len(applied), "rule")
    if not findings:
        return f"{layers}, {checked}: nothing found"
    severities = [finding.severity for finding in findings]
    errors, warnings, notes = (
        severities.count(severity) for severity in ("error", "warning", "info")
    )
    if not errors and not warnings:
        return f"{layers}, {checked}: nothing wrong; {_count(notes, 'note')}"
    text = [
        _count(number, word)
        for number, word in ((errors, "error"), (warnings, "warning"), (notes, "note"))
        if number
    ]
    hit = len({path for finding in findings for path in finding.sites})
    first = f"{findings[0].code} {findings[0].name}"
    return f"{', '.join(text)} at {hit} of {layers}; first: {first}"


def of_measurement(
    measured: Measurement, causes: Sequence[Cause], remedies: Sequence[Remedy], sites: int
) -> str:
    """Verdict of a diagnosis: whether it is BN, the first cause, the others, and the best remedy.

    Args:
        measured: The measurement.
        causes: The most important first.
        remedies: The best first.
        sites: Number of BN layers in the model.
    """
    named = [cause for cause in causes if cause.code != CauseCode.NONE]
    if not named:
        return _nothing(measured, sites, causes[0] if causes else None)
    first = named[0]
    # Where BN is one of several causes it is named first, and so is what is not BN.
    kinds = {cause.is_bn for cause in named if cause.share is None or cause.share > 0}
    head = "BN" if first.is_bn else "BN too" if True in kinds else "not BN"
    rest = "" if True in kinds else _left_to_bn(measured, named)
    if rest:
        head = "in part"
    if first.certainty == "may":
        head = {"BN": "probably BN", "not BN": "probably not BN"}.get(head, head)
    parts = [f"{head}: {first.code}{_share(first)}, {first.message}"]
    if len(named) > 1:
        others = ", ".join(f"{cause.code}{_share(cause)}" for cause in named[1:4])
        parts.append(f"also {others}")
    parts += [rest] if rest else []
    best = next((remedy for remedy in remedies if remedy.recommended), None)
    if best is not None:
        parts.append(f"{best.name}: {_effect(best)}")
    elif remedies:
        parts.append("no remedy that was tried helps for sure")
    if first.code != CauseCode.POISONED:  # which tells
        parts += _left_out(measured)
    parts += _moved(measured)
    gap = measured.gaps.get("total")
    few = measured.samples < FEW
    if few and gap is not None and _is_known(gap.loss) and not _is_nothing(gap.loss):
        interval = f"{gap.loss.low:+.3g} to {gap.loss.high:+.3g}"
        if np.isinf(gap.loss.low):
            interval = f"{gap.loss.estimate:+.3g}, and one batch gives no interval"
        text = f"{measured.samples} samples tell little: the gap in loss is {interval}"
        parts.append(text if measured.samples > 1 else "1 sample tells nothing of a gap")
    return "; ".join(parts)


def _left_to_bn(measured: Measurement, causes: Sequence[Cause]) -> str:
    """What batch statistics do where most of the gap is theirs and no cause explains it."""
    total, own = measured.gaps.get("total"), measured.gaps.get("bn")
    shares = [cause.share for cause in causes if cause.share is not None]
    if total is None or own is None or not shares or not own.loss.excludes_zero:
        return ""
    if sum(shares) > 1 / 2 or abs(own.loss.estimate) < abs(total.loss.estimate) / 2:
        return ""
    return (
        f"{own.loss.estimate:+.3g} of {total.loss.estimate:+.3g} in loss comes with the statistics "
        "of each batch, and no cause of that was found: BN is not ruled out"
    )


def _nothing(measured: Measurement, sites: int, none: Cause | None) -> str:
    """Verdict without a cause: how far training mode and inference are apart."""
    gap = measured.gaps.get("total")
    if gap is None or not _is_known(gap.loss):
        left_out = "".join(f": {text}" for text in _left_out(measured))
        return f"no verdict: training mode and inference could not be compared{left_out}"
    loss, count = gap.loss, f"{measured.samples} samples"
    if none is not None and (none.certainty == "may" or SCATTER in none.evidence):
        text = none.message
    elif _is_nothing(loss):
        text = f"training mode and inference give the same losses on {count}"
    else:
        interval = f"{100 * loss.level:.0f}% interval {loss.low:+.3g} to {loss.high:+.3g}, {count}"
        text = f"training mode and inference differ by {loss.estimate:+.3g} in loss ({interval})"
        text += ": too little to matter" if loss.excludes_zero else ": it may be chance"
    text = "; ".join([text, *_left_out(measured), *_moved(measured)])
    if not sites:
        return f"not BN: the model has no BatchNormalization layer; {text}"
    return f"no cause found: {text}"


def _left_out(measured: Measurement) -> list[str]:
    """Samples that the numbers of the report leave out."""
    held = [note for note in measured.notes if "NaN or infinite inputs" in note]
    inference = measured.probes.get("inference")
    if inference is None or not inference.broken:
        return held
    text = f"{inference.broken} of {_count(measured.samples, 'sample')} come out as NaN or infinite"
    return [f"{text} ({held[0]})" if held else text]


def _moved(measured: Measurement) -> list[str]:
    """What moves state of its own at inference, so that one answer depends on those before it."""
    if not measured.moved_at_inference:
        return []
    path, kind = next(iter(measured.moved_at_inference.items()))
    others = len(measured.moved_at_inference) - 1
    more = f" and {others} more move" if others else " moves"
    text = f"'{path}' ({kind}){more} state of its own at inference, so that outputs depend on the "
    return [f"{text}batch and on those before it"]


def _is_nothing(interval: Interval) -> bool:
    """Whether the losses are the same, sample by sample."""
    return interval.low == interval.high == 0


def _is_known(interval: Interval) -> bool:
    """Whether the interval is a number."""
    return interval.low == interval.low


def _share(cause: Cause) -> str:
    return "" if cause.share is None else f" ({cause.share:.0%} of the gap)"


def _effect(remedy: Remedy) -> str:
    """Metric before and after."""
    name = "accuracy" if "accuracy" in remedy.before and "accuracy" in remedy.after else "loss"
    if name == "accuracy" and f"{remedy.before[name]:.3g}" == f"{remedy.after[name]:.3g}":
        name = "loss"  # the reason why it is recommended
    if name not in remedy.before or name not in remedy.after:
        return "measured effect in the table of remedies"
    return f"{name} {remedy.before[name]:.3g} → {remedy.after[name]:.3g}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def first(probes: Mapping[str, Probe], *, seed: int = 0) -> str:
    """What the first three passes say, in one line, while the rest is measured.

    Args:
        probes: ``inference``, ``training`` and, where there is BN, ``batch``.
        seed: Of the interval.
    """
    inference, training = probes["inference"], probes["training"]
    sound = np.isfinite(inference.losses) & np.isfinite(training.losses)
    if not sound.any():
        return "first look: no loss is finite"
    gap = paired_bootstrap(training.losses[sound], inference.losses[sound], seed=seed)
    shown = (
        f"first look: loss {inference.loss:.4g} at inference, {training.loss:.4g} in training mode"
    )
    if np.isinf(gap.low):
        return f"{shown}: a gap of {gap.estimate:+.3g}; one batch gives no interval"
    if not gap.excludes_zero:
        return f"{shown}: no certain gap ({gap.low:+.3g} to {gap.high:+.3g})"
    text = f"{shown}: a gap of {gap.estimate:+.3g} ({gap.low:+.3g} to {gap.high:+.3g})"
    if "batch" in probes:
        text += f"; {probes['batch'].loss - inference.loss:+.3g} with batch statistics everywhere"
    return text
