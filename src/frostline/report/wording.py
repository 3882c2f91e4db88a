"""The words and numbers of a report, the same in every form.

Plain text only: each renderer escapes it for its medium (``escaping.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from frostline.report import escaping, excerpts
from frostline.types import Certainty, Finding, Site, Skipped
from frostline.types.measured import Attribution, Interval
from frostline.types.report import Report

#: Shown in place of a missing number.
MISSING = "–"

#: Severity -> symbol; the word always stands beside it.
SEVERITIES = {"error": "✗", "warning": "!", "info": "i"}

#: Probe -> how the samples were run.
PROBES = {
    "inference": "inference: the model as it is",
    "training": "training mode, nothing updated",
    "training blend": "training mode without dropout",
    "batch": "batch statistics at every site",
    "stored": "stored statistics at every site",
    "dropout": "inference with dropout on",
    "epsilon": "inference with the other epsilon",
    "population": "inference, all sites recalibrated",
    "population unfrozen": "inference, unfrozen sites recalibrated",
    "population frozen": "inference, frozen sites recalibrated",
    "sorted": "batch statistics, batches sorted by class",
    "given": "batches as they come: training mode without dropout",
    "given inference": "batches as they come: inference",
    "validation inference": "validation data: inference",
    "validation batch": "validation data: batch statistics",
    "validation population": "validation data: recalibrated on the training samples",
    "validation recalibrated": "validation data: recalibrated on themselves",
    "validation resized": "validation data: in the size of the training images",
}

#: Gap -> its label.
GAPS = {
    "total": "whole gap: training − inference",
    "bn": "part due to BN",
    "dropout": "part due to dropout",
    "all batch": "batch statistics at every site",
    "lag": "recalibrating unfrozen sites",
    "population": "recalibrating all sites",
    "sorted": "sorting batches by class",
    "given": "batches as they come: training mode − inference",
}

#: Picture -> its heading.
PICTURES = {
    "gaps": "Differences in loss, with 95% intervals",
    "attribution": "Share of the gap by BN layer",
    "groups": "Share of the gap by block",
    "drift": "Stored statistics compared with the data",
    "path": "From stored to batch statistics",
    "sweep": "Batch size",
    "remedies": "Effect of each remedy",
}


def count(number: int, word: str) -> str:
    """Return a number with its noun.

    >>> count(1, "site"), count(3, "site")
    ('1 site', '3 sites')
    """
    return f"{number} {word}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int | None = None) -> str:
    """Return names on one line; those beyond ``most`` as a count.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = names if most is None or len(names) <= most else names[:most]
    more = len(names) - len(shown)
    return ", ".join(map(escaping.printable, shown)) + (f" and {more} more" if more else "")


def sentence(finding: Finding) -> str:
    """Return a finding's message, marked when it is inferred."""
    text = escaping.printable(finding.message)
    return text if finding.certainty == "is" else f"{text} (inferred)"


def alike(group: Sequence[Finding]) -> bool:
    """Whether findings of one rule say the same, so that they are shown once."""
    return len({finding.message for finding in group}) == 1


def by_code(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Group findings by rule, in the order of each rule's first finding."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.code, []).append(finding)
    return list(groups.values())


def by_reason(skipped: Iterable[Skipped]) -> dict[str, list[str]]:
    """Return reason -> codes of the rules skipped for it."""
    reasons: dict[str, list[str]] = {}
    for entry in skipped:
        reasons.setdefault(entry.reason, []).append(entry.code)
    return reasons


def minus(text: str) -> str:
    """Replace the hyphen of a number by a minus sign."""
    return text.replace("-", "−")


def number(value: float | None, *, signed: bool = False, digits: int | None = None) -> str:
    """Return a number with three decimals: more where it is small, none from 1000 on.

    Args:
        value: A number; ``None`` and NaN are shown as missing.
        signed: Show a plus sign too.
        digits: Number of decimals, to match a number beside it.

    >>> number(0.12345), number(-0.0004321, signed=True), number(12345.6), number(None)
    ('0.123', '−0.00043', '12346', '–')
    """
    if value is None or math.isnan(value):
        return MISSING
    size = abs(value)
    sign = "+" if signed else ""
    if math.isinf(value) or size >= 1e6 or 0 < size < 1e-5:
        return minus(f"{value:{sign}.2g}")
    return minus(f"{value:{sign}.{_digits(size) if digits is None else digits}f}")


def fact(value: float | str) -> str:
    """Return a value of evidence; counts have no decimals.

    >>> fact(33), fact(0.4948), fact("batch")
    ('33', '0.495', 'batch')
    """
    if isinstance(value, str):
        return value
    return number(value, digits=0 if float(value).is_integer() else None)


def percent(share: float | None) -> str:
    """Return a share of 1 as percent.

    >>> percent(0.642), percent(0.004), percent(-0.0001), percent(None)
    ('64%', '0.4%', '0%', '–')
    """
    if share is None or not math.isfinite(share):
        return MISSING
    if abs(share) < 0.0005:
        return "0%"
    return minus(f"{share:.1%}" if abs(share) < 0.01 else f"{share:.0%}")


def interval(value: Interval | None) -> str:
    """Return an estimate and its interval, all with the same number of decimals.

    >>> interval(Interval(-0.442, -0.497, -0.003, 0.95))
    '−0.442 (−0.497 to −0.003)'
    >>> interval(Interval(-0.442, -math.inf, math.inf, 0.95))  # of one batch
    '−0.442 (no interval)'
    """
    if value is None:
        return MISSING
    if math.isinf(value.low):
        return f"{number(value.estimate, signed=True)} (no interval)"
    size = max((abs(x) for x in (value.low, value.high) if math.isfinite(x)), default=0.0)
    digits = _digits(size)
    low, middle, high = (
        number(x, signed=True, digits=digits) for x in (value.low, value.estimate, value.high)
    )
    return f"{middle} ({low} to {high})"


def shortened(name: str, most: int) -> str:
    """Return a name of at most ``most`` characters, with an ellipsis in the middle if it is longer.

    >>> shortened("backbone/stage1/unit2/bn", 15)
    'backbon…nit2/bn'
    """
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[head + 1 - most :]}"


def probe(name: str) -> str:
    """Return the label of a probe, by default its name."""
    return PROBES.get(name, name)


def gap(name: str) -> str:
    """Return the label of a gap, by default its name."""
    return GAPS.get(name, name)


def _digits(size: float) -> int:
    if size >= 1000:
        return 0
    return 3 if size >= 0.01 or not size else 1 - math.floor(math.log10(size))


def certainty(value: Certainty) -> str:
    """Return "measured" or "inferred"."""
    return "measured" if value == "is" else "inferred"


def state(site: Site) -> str:
    """Return which parts of a site are frozen."""
    if site.params_frozen and site.stats_frozen:
        return "frozen"
    if site.params_frozen:
        return "γ, β frozen"
    return "statistics frozen" if site.stats_frozen else "trains"


def status(report: Report) -> tuple[str, str, str]:
    """Return symbol, word and kind (``good``, ``bad``) of the report as a whole."""
    if report.clean:
        return "✓", "clean", "good"
    if any(cause.code != "NONE" for cause in report.causes):
        return "✗", "gap", "bad"
    return "!", "findings", "bad"


def summary(report: Report) -> str:
    """Return one sentence for a reader who does not know BN: is there a problem, and how large."""
    measured, found = report.measurement, report.gap
    if measured is None or found is None:
        return _summary_of_findings(report)
    inference, training = (measured.probes.get(name) for name in ("inference", "training"))
    if inference is not None and inference.broken:
        broken = f"{inference.broken} of {count(measured.samples, 'sample')}"
        return f"The model's output is not a number for {broken}."
    if not found.loss.excludes_zero:
        return (
            f"On these {count(measured.samples, 'sample')} the model performs in use as it does in "
            "training mode, within the margin of error."
        )
    worse = found.loss.estimate < 0
    text = f"The model performs {'worse' if worse else 'better'} in use than in training mode"
    if inference is not None and training is not None:
        name, one, other = "loss", number(inference.loss), number(training.loss)
        if inference.accuracy is not None and training.accuracy is not None:
            name, one, other = "accuracy", f"{inference.accuracy:.1%}", f"{training.accuracy:.1%}"
        text += f": {name} {one} instead of {other} on the same {measured.samples} samples"
    return f"{text}."


def _summary_of_findings(report: Report) -> str:
    kinds = [finding.severity for finding in report.findings]
    errors, warnings = kinds.count("error"), kinds.count("warning")
    if not errors + warnings:
        return "No problem was found in the model's BN layers."
    found = f"{count(errors, 'error')} and {count(warnings, 'warning')}"
    return f"The check of the model's BN layers found {found}."


def origin(report: Report) -> list[tuple[str, str]]:
    """Return (name, value) of what the report was made from."""
    facts = dict(report.origin)
    measured = report.measurement
    if measured is not None:
        facts.setdefault("samples", str(measured.samples))
        facts.setdefault("batch size", str(measured.batch_size))
        facts.setdefault("task", measured.task)
    return list(facts.items())


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return (label, number, note) of the few numbers that matter most."""
    measured, gap_found = report.measurement, report.gap
    if measured is None:
        return []
    shown: list[tuple[str, str, str]] = []
    for name, label in (("inference", "inference"), ("training", "training mode")):
        found = measured.probes.get(name)
        if found is not None:
            beside = "" if found.accuracy is None else f"accuracy {number(found.accuracy)}"
            shown.append((f"loss, {label}", number(found.loss), beside))
    if gap_found is not None:
        ends = interval(gap_found.loss).partition("(")[2].rstrip(")")
        sure = "" if gap_found.loss.excludes_zero else ", may be 0"
        estimate = number(gap_found.loss.estimate, signed=True)
        shown.append(("gap in loss", estimate, f"{gap_found.loss.level:.0%}: {ends}{sure}"))
    best = excerpts.first_choice(report.remedies)
    if best is not None and "loss" in best.after:
        shown.append(("loss after the best remedy", number(best.after["loss"]), best.name))
    return shown


def differentiated(found: Attribution) -> str:
    """Return on how many samples the shares were computed, in words."""
    return f"{found.samples} samples" if found.samples else "some of the samples"


def completeness(found: Attribution) -> str:
    """Return how far the shares add up to the gap, and what that allows."""
    where, missing = f"shares computed on {differentiated(found)}", percent(found.residual)
    if found.complete:
        return f"{where}; their sum is within {missing} of the gap"
    return f"{where}; they miss {missing} of the gap: trust their order, not their size"


def _share_reading(found: Attribution) -> str:
    return _SHARE_READING.format(
        nodes=found.nodes, residual=percent(found.residual), samples=differentiated(found)
    )


def unchecked(report: Report) -> list[tuple[str, str]]:
    """Return (what, why) of everything that was not measured, and of rules not applied."""
    rows = [(", ".join(codes), reason) for reason, codes in by_reason(report.skipped).items()]
    if report.measurement is not None:
        rows += list(report.measurement.skipped.items())
        found = report.attribution
        if found is not None and not found.complete:
            missing = percent(found.residual)
            rows.append(
                ("shares", f"they miss {missing} of the gap with {found.nodes} quadrature nodes")
            )
    return rows


def readings(report: Report) -> list[tuple[str, str]]:
    """Return (name, explanation) of each quantity that the report shows."""
    measured, found = report.measurement, report.attribution
    rows: list[tuple[str, str]] = []
    if measured is not None:
        rows += [("gap", _GAP_READING.format(n=measured.samples)), ("interval", _INTERVAL_READING)]
    if found is not None:
        rows += [("λ", _BLEND_READING), ("share", _share_reading(found))]
    if measured is not None and measured.sites:
        rows += [("shift", _SHIFT_READING), ("variance ratio", _RATIO_READING)]
    if report.causes:
        rows.append(("measured, inferred", _CERTAINTY_READING))
    if report.remedies:
        rows.append(("remedy", _REMEDY_READING))
    if report.findings:
        rows.append(("finding", _FINDING_READING))
    return rows


_GAP_READING = (
    "Loss in training mode minus loss at inference, on the same {n} samples, with nothing updated. "
    "A negative gap means that the model looks better in training than it is in use. A model that "
    "computes the same in both modes has a gap of 0."
)
_INTERVAL_READING = (
    "Paired bootstrap over the samples. If the interval contains 0, the sign of the difference is "
    "unknown and nothing is concluded from it. More samples give narrower intervals."
)
_BLEND_READING = (
    "Mixes the statistics that a BN layer normalises with: mean = (1 − λ)·stored + λ·batch, and "
    "the same for the variance. λ = 0 is inference, λ = 1 is training with batch statistics."
)
_SHARE_READING = (
    "∫ ∂loss/∂λᵢ dλ from inference to training, as a fraction of the gap (Gauss–Legendre "
    "quadrature with {nodes} nodes, on {samples}). The shares miss {residual} of their gap; up to "
    "5% is accepted. A negative share means that the layer works against the gap. “Switched alone” "
    "moves one layer to stored statistics and leaves the others in training mode; these effects "
    "do not add up."
)
_SHIFT_READING = (
    "|mean of the data − stored mean| / √(stored variance + ε) per channel, in standard deviations "
    "of the stored statistics. 0 means that they match. The small histogram counts channels by "
    "shift, on a log scale from 0.01 to 10 that is the same in every row."
)
_RATIO_READING = (
    "(variance of the data + ε) / (stored variance + ε) per channel. At 1 they match. Below 1 the "
    "layer's output is too small at inference, above 1 too large."
)
_CERTAINTY_READING = (
    "Measured: it follows from what was run here. Inferred: the numbers are consistent with it, "
    "and the report says what would settle it."
)
_FINDING_READING = "Run frostline rule CODE for a rule's thresholds and where they come from."
_REMEDY_READING = (
    "Measured on these samples; the model itself stays as it is. A remedy helps if it lowers the "
    "loss and the interval excludes 0; the star marks the first choice among those. "
    "Statistics fitted to these samples may not suit other data: check on held-out samples."
)
