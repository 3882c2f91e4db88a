"""Causes: what explains the gap, ranked, each with its share of it.

One function per cause, under :func:`~frostline.causes.registry.cause`, in the module of its family.
A function reads a :class:`~frostline.causes.case.Case` and claims a part of the gap. This module
calls them in order of rank, takes from each what another one explains, and computes the shares. It
knows no framework, no model and no repair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from frostline.causes import data
from frostline.causes.assignment import Assigned, assign, scale_of_inputs, victims
from frostline.causes.case import MARKED_ACCURACY, Case, Claim, number
from frostline.causes.registry import all_causes
from frostline.causes.verdict import SCATTER
from frostline.types import Finding
from frostline.types.codes import CauseCode
from frostline.types.facts import ModelFacts
from frostline.types.measured import Cause, Measurement

#: A share below this is not worth a line of its own, unless it is a fact.
_SMALLEST_SHARE = 0.03

#: Rank from which on a claim stands by itself, whatever the gap.
_A_FACT = 0.9


def causes(
    facts: ModelFacts, measurement: Measurement, findings: Sequence[Finding]
) -> tuple[Cause, ...]:
    """Explain the gap between training mode and inference.

    Args:
        facts: Of the model.
        measurement: Of the model on the data.
        findings: Of the rules.

    Returns:
        Causes, the most important first; shares add up to at most 1, the rest is not explained.
        Never empty: ``NONE`` when nothing was found.
    """
    case = Case(facts, measurement, tuple(findings))
    assigned = assign(case)
    case = replace(case, victims=victims(case, assigned))
    claims = [claim for entry in all_causes() for claim in entry.explain(case, assigned)]
    claims = _explained_away(case, assigned, _not_void(_merged(claims)))
    if case.replaced_at_inference:  # the two modes differ in more than the statistics of a site
        kept = {CauseCode.DOMAIN_STATS, *_VOIDING}
        claims = [c for c in claims if c.code in kept or c.standing >= _A_FACT]
    total = max(case.gap_parts, sum(claim.amount or 0.0 for claim in claims))
    made = [(claim, _share(claim, total)) for claim in claims]
    made = [(c, s) for c, s in made if c.standing > 0 or (s is not None and s >= _SMALLEST_SHARE)]
    made.sort(key=lambda pair: -max(pair[0].standing, pair[1] or 0.0))  # stable: ties keep order
    found = tuple(_cause(claim, share) for claim, share in made)
    if found:
        return found
    trial = data.unexplained_trial(case)
    return (_none(case) if trial is None else _cause(trial, None),)


def _merged(claims: Sequence[Claim]) -> list[Claim]:
    """Merge the claims of one code: the first message, all sites, the sum of the amounts."""
    found: dict[str, Claim] = {}
    for claim in claims:
        first = found.get(claim.code)
        if first is None:
            found[claim.code] = claim
            continue
        amounts = [amount for amount in (first.amount, claim.amount) if amount is not None]
        found[claim.code] = replace(
            first,
            sites=tuple(dict.fromkeys((*first.sites, *claim.sites))),
            amount=sum(amounts) if amounts else None,
            standing=max(first.standing, claim.standing),
        )
    return list(found.values())


#: With one of these the losses or the statistics of the data are not those of training, so nothing
#: can be inferred from them.
_VOIDING = (CauseCode.LABEL_ORDER, CauseCode.LOADING, CauseCode.STALE_PARAMS, CauseCode.KERNEL_BUG)


def _not_void(claims: list[Claim]) -> list[Claim]:
    """Drop what is inferred from a gap that wrong labels, weights or outputs make."""
    strong = [claim for claim in claims if claim.code in _VOIDING and claim.standing >= 1]
    if not strong:
        return claims
    return [claim for claim in claims if not claim.code.is_bn or claim.standing > 0]


def _explained_away(case: Case, assigned: Assigned, claims: list[Claim]) -> list[Claim]:
    """Take from the other BN causes what repaired inputs, or another epsilon, explain."""
    repair, scale = data.best_trial(case), scale_of_inputs(case, assigned)
    if repair is not None or scale is not None:
        part = 1.0 if repair is None else repair[2]
        claims = _taken(claims, CauseCode.PREPROCESS, part)
    epsilon = next((claim for claim in claims if claim.code == CauseCode.EPS_MISMATCH), None)
    excess = abs(case.bn_gap) or case.locked_gain
    if epsilon is not None and epsilon.amount and excess:
        part = min(1.0, epsilon.amount / excess)
        kept = [replace(claim, amount=None) if claim is epsilon else claim for claim in claims]
        others = _taken(kept, CauseCode.EPS_MISMATCH, part)
        claims = [
            replace(claim, amount=epsilon.amount) if claim.code == epsilon.code else claim
            for claim in others
        ]
    return claims


def _taken(claims: list[Claim], by: CauseCode, part: float) -> list[Claim]:
    """Give a part of what the BN causes claim to the cause of a repair that closes it.

    With wrong inputs the stored statistics cannot fit, so what is only inferred from their misfit
    is dropped. Where a site is at fault by other evidence too, either repair alone closes the gap,
    and each gets half of it (Shapley's value of two such causes).
    """
    kept, taken = [], 0.0
    for claim in claims:
        if claim.code == by or not claim.code.is_bn or claim.amount is None:
            kept.append(claim)
            continue
        fact = claim.certainty == "is"
        rest = claim.amount * (1 - part / 2 if fact else 1 - part)
        taken += claim.amount - rest
        if fact or 1 - part > 1 - data.REPAIRS:
            kept.append(replace(claim, amount=rest))
    return [replace(c, amount=taken) if taken and c.code == by else c for c in kept]


def _share(claim: Claim, total: float) -> float | None:
    if claim.amount is None or total <= 0:
        return None
    return claim.amount / total


def _cause(claim: Claim, share: float | None) -> Cause:
    return Cause(
        code=claim.code.value,
        share=share,
        sites=() if not claim.code.is_bn else claim.sites,
        certainty=claim.certainty,
        message=claim.message,
        evidence=claim.evidence,
        settle=claim.settle,
        findings=claim.findings,
    )


def _none(case: Case) -> Cause:
    total = case.difference("training", "inference")
    blended = case.difference("training blend", "inference")
    known = total if case.total_gap and not case.bn_gap else blended or total
    # What else acts in training, or BN of a kind of its own, is not what λ makes of it.
    apart = bool(case.bn_gap) and total is not None and abs(total.estimate) < abs(case.bn_gap) / 2
    samples = case.measurement.samples
    saved = max(0.0, -case.change("population", "inference"))
    settled = known is not None and math.isfinite(known.low)
    settled = settled and not (case.bn_gap or case.total_gap or saved)
    scatter: dict[str, float] = {}
    if known is None:
        text, settle = "no gap was measured, and nothing else explains one", "labelled data"
    elif case.bn_gap or case.total_gap:
        text = f"training mode and inference differ by {number(known.estimate)} in loss, and "
        text += "nothing that is known here explains it"
        if apart and total is not None:
            text = f"with the statistics of each batch the loss differs by {number(known.estimate)}"
            text += f", and in the model's own training mode by {number(total.estimate)}: "
            text += "something else acts in that mode only, in the model, its loss or step=, as a "
            text += "crop or another head does, or a BN layer that does more than BN"
        settle = "the data and the batch size of training, and a reference, as reference="
        if saved:
            text += f"; exact statistics of these data would save {number(saved)}"
        elif noise := case.batch_noise:
            size, loss = noise
            text = f"training mode, with the statistics of batches of {case.measurement.batch_size}"
            text += f", gives a loss {number(case.bn_gap)} higher than inference, and a loss of "
            text += f"{number(loss)} in batches of {size}: that is how much batch statistics "
            text += "scatter, which inference does without"
            settle = "the batch size of training, as batch_size="
        elif not apart and _is_scatter(case):
            text = f"training mode, with the statistics of batches of {case.measurement.batch_size}"
            text += f", gives a loss {number(known.estimate)} higher than inference, and exact "
            text += "statistics of these data would save nothing: that is how much batch statistics"
            text += " cost, which inference does without"
            settle, settled, scatter = None, True, {SCATTER: known.estimate}
        elif 0 < known.estimate < 2 * case.change("population", "inference"):
            text = f"training mode gives a loss {number(known.estimate)} higher than inference, and"
            text += " so do exact statistics of these data: the network does better with those that"
            text += " are stored, although they are not those of what it has become"
            settle = "how the statistics came about: averages that lag, or other inputs"
    elif saved:
        text = f"training mode and inference differ by {number(known.estimate)} in loss, "
        text += "too little to look for causes, " if known.excludes_zero else ""
        text += f"but exact statistics of these data would save {number(saved)}"
        settle = "recalibrate and compare"
        if any(site.uses for site in case.measurement.sites.values()):
            text += ", which take all uses of a shared layer together; in training each use has "
            text += "statistics of its own"
        elif not known.excludes_zero:
            text += f", which batches of {case.measurement.batch_size} are too small to show"
            settle = f"the batch size of training, as batch_size=, or {settle}"
    elif known.excludes_zero:
        text = f"training mode and inference differ by {number(known.estimate)} in loss, too "
        text += "little to matter, and nothing else was found"
        settle = "validation data, as validation="
    elif not math.isfinite(known.low):
        text = f"training mode and inference differ by {number(known.estimate)} in loss, and one "
        text += "loss for all samples cannot tell whether by chance"
        settle = "a loss per sample (reduction='none' in the loss, or in step=), or more batches"
    else:
        text = f"training mode and inference differ by {number(known.estimate)} in loss, which may "
        text += f"be chance ({known.level:.0%} interval {number(known.low)} to "
        text += f"{number(known.high)}, {samples} samples)"
        settle = "more samples, or validation data, as validation="
    if loses := data.validation_loses(case):
        text, settled = f"{text}; {loses}", False
        settle = "labels and outputs that give an accuracy, as (x, y) with loss=, for both"
    if accuracy := _accuracy_apart(case):
        text, settled = text + accuracy, False
        settle = "recalibrate and compare by the metric that counts, on validation data"
    return Cause(
        code=CauseCode.NONE.value,
        share=None,
        sites=(),
        certainty="is" if settled else "may",
        message=text,
        evidence={}
        if known is None
        else {"gap": known.estimate, "samples": float(samples), **scatter},
        settle=settle,
    )


def _is_scatter(case: Case) -> bool:
    """Training mode is a little worse, and the stored statistics do as exact ones do."""
    now = case.loss("inference")
    if now is None or case.probe("population") is None or case.change("population", "inference"):
        return False
    return 0 < case.bn_gap < abs(now) and not case.dropout_gap


def _accuracy_apart(case: Case) -> str:
    """Words for an accuracy that differs where the loss does not, or the other way; else empty."""
    first, second = case.probe("training"), case.probe("inference")
    if first is None or second is None:
        return ""
    more = case.more_accurate(first, second)
    if abs(more) < MARKED_ACCURACY or more * case.total_gap < 0:
        return ""
    exact = case.accuracy("population")
    return (
        f"; but accuracy is {second.accuracy:.1%} at inference and {first.accuracy:.1%} in "
        "training mode"
        + ("" if exact is None else f", and {exact:.1%} with exact statistics of these data")
    )


__all__ = ["causes"]
