"""How a report says things, the same in every form: numbers, names, groups, reasons.

Plain text only; each form escapes what is special to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from frostline.report import excerpts
from frostline.types import Certainty, Finding, Site, Skipped
from frostline.types.measured import Attribution, Interval

if TYPE_CHECKING:
    from frostline.report.report import Report

#: Shown for a number that does not exist.
MISSING = "–"

#: Severity -> symbol; the word is always there too.
SEVERITIES = {"error": "✗", "warning": "!", "info": "i"}

#: Probe -> what was done with the samples.
PROBES = {
    "inference": "inference: the model as it is",
    "training": "training mode, nothing updated",
    "training blend": "training mode without dropout",
    "batch": "batch statistics at every site",
    "stored": "stored statistics at every site",
    "dropout": "inference with dropout on",
    "population": "inference, all sites recalibrated",
    "population unfrozen": "inference, unfrozen sites recalibrated",
    "population frozen": "inference, frozen sites recalibrated",
    "sorted": "batch statistics, batches sorted by class",
    "validation inference": "validation data: inference",
    "validation batch": "validation data: batch statistics",
    "validation population": "validation data: recalibrated on the training samples",
}

#: Gap -> what it tells.
GAPS = {
    "total": "whole gap: training − inference",
    "bn": "BN's part of it",
    "dropout": "dropout's part of it",
    "all batch": "batch statistics at every site",
    "lag": "recalibrating unfrozen sites",
    "population": "recalibrating all sites",
    "sorted": "sorting batches by class",
}

#: Picture -> its heading.
PICTURES = {
    "gaps": "Differences in loss, with 95% intervals",
    "attribution": "Share of each BN layer in the gap",
    "groups": "Share of each block in the gap",
    "drift": "Stored statistics against the data",
    "path": "From stored to batch statistics",
    "sweep": "Batch size",
    "remedies": "Effect of each remedy",
}


def printable(name: str, *, keep: str = "") -> str:
    r"""Show what does not print as an escape: a terminal would obey it, a file not hold it.

    Args:
        name: Any text.
        keep: Characters to leave as they are all the same.

    >>> printable("bn\x1b[31m"), printable("中文")
    ('bn\\x1b[31m', '中文')
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in name
    )


def count(number: int, word: str) -> str:
    """Return a number with its noun.

    >>> count(1, "site"), count(3, "site")
    ('1 site', '3 sites')
    """
    return f"{number} {word}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int | None = None) -> str:
    """Return names on one line, the rest as a number.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = names if most is None or len(names) <= most else names[:most]
    more = len(names) - len(shown)
    return ", ".join(map(printable, shown)) + (f" and {more} more" if more else "")


def sentence(finding: Finding) -> str:
    """Return a finding's message, with a word when it is inferred."""
    text = printable(finding.message)
    return text if finding.certainty == "is" else f"{text} (inferred)"


def by_code(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Group findings of one rule, in the order in which the rules first appear."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.code, []).append(finding)
    return list(groups.values())


def by_reason(skipped: Iterable[Skipped]) -> dict[str, list[str]]:
    """Return reason -> codes of the rules that were not applied for it."""
    reasons: dict[str, list[str]] = {}
    for each in skipped:
        reasons.setdefault(each.reason, []).append(each.code)
    return reasons


def minus(text: str) -> str:
    """Return a number's text with a real minus sign."""
    return text.replace("-", "−")


def number(value: float | None, *, signed: bool = False, digits: int | None = None) -> str:
    """Return a number with three decimals; more where it is small, none where it is whole.

    Args:
        value: A number; ``None`` and NaN are shown as missing.
        signed: With a plus sign too.
        digits: Decimals, where the number stands beside others.

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
    """Return a value of evidence: a count as a whole number.

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
    """Return an estimate and its interval, with as many decimals.

    >>> interval(Interval(-0.442, -0.497, -0.003, 0.95))
    '−0.442 (−0.497 to −0.003)'
    """
    if value is None:
        return MISSING
    size = max((abs(x) for x in (value.low, value.high) if math.isfinite(x)), default=0.0)
    digits = _digits(size)
    low, middle, high = (
        number(x, signed=True, digits=digits) for x in (value.low, value.estimate, value.high)
    )
    return f"{middle} ({low} to {high})"


def shortened(name: str, most: int) -> str:
    """Return a name with its middle left out where it is too long: both ends tell.

    >>> shortened("backbone/stage1/unit2/bn", 15)
    'backbon…nit2/bn'
    """
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[head + 1 - most :]}"


def probe(name: str) -> str:
    """Return what a probe is, in words; its name where it has no words."""
    return PROBES.get(name, name)


def gap(name: str) -> str:
    """Return what a gap is, in words."""
    return GAPS.get(name, name)


def _digits(size: float) -> int:
    if size >= 1000:
        return 0
    return 3 if size >= 0.01 or not size else 1 - math.floor(math.log10(size))


def certainty(value: Certainty) -> str:
    """Return how sure a statement is, in a word."""
    return "measured" if value == "is" else "inferred"


def state(site: Site) -> str:
    """Return what of a site is frozen."""
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


def origin(report: Report) -> list[tuple[str, str]]:
    """Return where the report comes from, with what the measurement knows of it."""
    facts = dict(report.origin)
    measured = report.measurement
    if measured is not None:
        facts.setdefault("samples", str(measured.samples))
        facts.setdefault("batch size", str(measured.batch_size))
        facts.setdefault("task", measured.task)
    return list(facts.items())


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return (label, number, what stands beside it) of the few numbers that matter most."""
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
    """Return on how many samples the shares rest, in words."""
    return f"{found.samples} samples" if found.samples else "a part of the samples"


def _share_reading(found: Attribution) -> str:
    return _SHARE_READING.format(
        nodes=found.nodes, residual=percent(found.residual), samples=differentiated(found)
    )


def unchecked(report: Report) -> list[tuple[str, str]]:
    """Return (what, why) of everything that was not measured or not applied."""
    rows = [(", ".join(codes), reason) for reason, codes in by_reason(report.skipped).items()]
    if report.measurement is not None:
        rows += list(report.measurement.skipped.items())
        found = report.attribution
        if found is not None and not found.complete:
            missing = percent(found.residual)
            rows.append(("shares", f"they miss {missing} of the gap at {found.nodes} nodes"))
    return rows


def readings(report: Report) -> list[tuple[str, str]]:
    """Return (name, meaning with formula, unit and where a threshold comes from)."""
    measured, found = report.measurement, report.attribution
    rows: list[tuple[str, str]] = []
    if measured is not None:
        rows += [
            ("gap", _GAP_READING.format(n=measured.samples)),
            ("interval", _INTERVAL_READING),
        ]
    if found is not None:
        rows += [
            ("λ", _BLEND_READING),
            ("share", _share_reading(found)),
        ]
    if measured is not None and measured.sites:
        rows += [("shift", _SHIFT_READING), ("variance ratio", _RATIO_READING)]
    if report.causes:
        rows.append(("measured, inferred", _CERTAINTY_READING))
    if report.remedies:
        rows.append(("remedy", _REMEDY_READING))
    if report.findings:
        rows.append(("finding", "Thresholds and their origin: frostline rule CODE."))
    return rows


_GAP_READING = (
    "Loss in training mode minus loss at inference, on the same {n} samples with nothing updated; "
    "in units of the loss. Negative: the model looks better in training than it is. A model that "
    "computes the same in both has a gap of 0."
)
_INTERVAL_READING = (
    "Paired bootstrap over the samples. When it contains 0, the sign of the difference is not "
    "known and nothing is concluded from it. Few samples give wide intervals."
)
_BLEND_READING = (
    "Statistics that a BN layer normalises with: mean = (1 − λ)·stored + λ·batch, the variance "
    "alike. λ = 0 is inference, λ = 1 training."
)
_SHARE_READING = (
    "∫ ∂loss/∂λᵢ dλ from inference to training, as a part of the gap (Gauss–Legendre, {nodes} "
    "nodes, on {samples}; the shares miss {residual} of their gap, at most 5% is accepted). "
    "Negative: the layer works against the gap. “Switched alone” changes one layer and leaves the "
    "others in training mode; these effects do not add up."
)
_SHIFT_READING = (
    "|mean of the data − stored mean| / √(stored variance + ε) per channel: standard deviations of "
    "the stored statistics. 0 means that they fit. The little picture counts channels by shift, "
    "from 0.01 to 10 on a log scale, the same for every row."
)
_RATIO_READING = (
    "(variance of the data + ε) / (stored variance + ε) per channel. 1 means that they fit; below "
    "1 the layer's output is too small at inference, above 1 too large."
)
_CERTAINTY_READING = (
    "Measured: it follows from what was run here. Inferred: the numbers agree with it, and what "
    "would settle it stands beside it."
)
_REMEDY_READING = (
    "Measured on these samples with the model left as it is. It helps when it lowers the loss and "
    "the interval excludes 0; the star marks the first choice among those. "
    "Statistics fitted to these samples say nothing about other data: check on held-out samples."
)
