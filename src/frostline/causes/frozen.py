"""Causes at sites that are meant to be frozen: how they normalise, and whether they move."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.causes.assignment import Assigned
from frostline.causes.case import EQUAL, Case, Claim, count, number
from frostline.causes.registry import cause
from frostline.types import Certainty
from frostline.types.codes import CauseCode, Fix

#: Rank of a fact about frozen sites that shows in no gap: reported after those that do.
_QUIET = 0.15

#: Rank of what a reference model shows: the user asked for the comparison.
_SHOWN = 0.95

_BEFORE = "the checkpoint from before training"


@cause(CauseCode.FROZEN_BATCH_STATS, rank=100, treated_by=(Fix.FREEZE, Fix.RECALIBRATE))
def frozen_batch_stats(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Frozen sites that normalise with the batch in training and with stored numbers afterwards.

    ## What it looks like
    Right in training, at chance in evaluation, behind frozen layers: they normalise with the
    batch in training and with stored statistics at inference. Keras 2.1.3 to 2.2.4 did this,
    and so does `track_running_stats=False`.

    ## What helps
    `fl.freeze(model, until=...)` or `fl.convert(model)` and train on: the layers behind must
    learn the statistics that inference uses. Without training: `fl.recalibrate(model, x,
    sites="all")`.

    ## When it is something else
    In Keras 3, layers that were frozen before `compile` do not do this.
    """
    paths = tuple(path for path in case.with_role("frozen batch") if path not in assigned)
    if not paths:
        return
    amount = case.blame(paths) or None
    text = "which shows in no gap on these samples"
    if amount is not None:
        text = f"which is {number(amount)} of the {number(abs(case.bn_gap))} BN gap in loss"
    yield Claim(
        code=CauseCode.FROZEN_BATCH_STATS,
        message=f"{count(len(paths), 'frozen site')} used the statistics of each batch in a "
        f"training-mode pass and stored ones at inference, {text}",
        sites=paths,
        amount=amount,
        standing=_QUIET,
        certainty="is",
        evidence={"frozen_sites_on_batch": float(len(paths)), "bn_gap": case.bn_gap},
        findings=case.found("FL101", sites=paths),
    )


@cause(CauseCode.FROZEN_DRIFT, rank=110, treated_by=(Fix.FREEZE, Fix.RECALIBRATE))
def frozen_drift(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Frozen sites whose statistics (or gamma and beta) move, or have moved from a reference.

    ## What it looks like
    Layers that are called frozen still change: `requires_grad=False` stops gradients and no
    statistics, and Keras before 2.1.3 moved them too. After training the pretrained network is
    gone.

    ## What helps
    `fl.freeze(model, until=...)` locks the statistics as well; take the statistics of the old
    checkpoint. `fl.assert_frozen` is the test for it.

    ## When it is something else
    BN layers that are meant to adapt while filters stay frozen (AdaBN, BN tuning).
    """
    moving = tuple(
        path
        for path in case.with_role("frozen drift")
        if path not in assigned and not _is_reset(case, path) and not case.served
    )
    drifted = tuple(
        path
        for path, facts in case.sites.items()
        if case.meant_frozen(facts) and path in case.moved_from_reference
    )
    paths = tuple(path for path in case.sites if path in {*moving, *drifted})
    if paths:
        yield _drift(case, paths, moving, drifted)
    yield from _drift_in_prefix(case, assigned)


@cause(CauseCode.MODE_RESET, rank=90, treated_by=(Fix.FREEZE, Fix.RECALIBRATE))
def mode_reset(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Sites frozen by a flag or by eval(), which each training step undoes.

    ## What it looks like
    BN was put into `eval()` by hand, and `model.train()` at the start of the next epoch undid
    it.

    ## What helps
    `fl.freeze(model, until=...)`, which survives `train()`; or `eval()` after every `train()`.

    ## When it is something else
    If your loop calls `eval()` on these layers after each `train()`, or never calls `train()` on
    the whole model, as Lightning's Trainer from 2.2 on, the state that was diagnosed is not that
    of training. Where nothing shows that `train()` is called, no part of the gap is blamed on it.
    """
    paths = tuple(
        path
        for path in case.with_role("frozen drift")
        if path not in assigned and _is_reset(case, path)
    )
    if not paths:
        return
    replaced = max(1 - case.sites[path].site.decay for path in paths)
    by_hand = tuple(path for path in paths if case.sites[path].undone)
    stays = not by_hand or all(path in case.moved_from_reference for path in by_hand)
    counted = bool(by_hand) and all(_counted_with_others(case, path) for path in by_hand)
    if stays or counted:
        text = "went back to training mode with the model: a step used the batch and replaced "
        text += f"{replaced:.2g} of the statistics"
        if not stays:
            text += "; they have counted as many updates as those that train, so that no step was "
            text += "made in which they alone stayed in inference mode"
    else:
        text = "would go back to training mode with the next train() of the whole model: each step "
        text += f"would then use the batch and replace {replaced:.2g} of the statistics. Training "
        text += "mode was looked at so; nothing shows that your training calls train() "
        text += "(Lightning's Trainer, from 2.2 on, does not)"
    yield Claim(
        code=CauseCode.MODE_RESET,
        message=f"{count(len(paths), 'site')} put into inference mode (by eval(), or by a frozen "
        f"wrapper around) {text}",
        sites=paths,
        amount=case.blame(paths) or None if stays or counted else None,
        standing=_QUIET,
        certainty="is" if stays else "may",
        evidence={"replaced_per_step": replaced, "bn_gap": case.bn_gap},
        settle=None
        if stays
        else "whether train() is called on the whole model behind eval(), as "
        f"most loops do in each epoch; or {_BEFORE}, as reference=",
        findings=case.found("FL105", "FL118", sites=paths),
    )


@cause(CauseCode.STALE_SWITCH, rank=230, treated_by=(Fix.FREEZE, Fix.RECALIBRATE))
def stale_switch(case: Case, _: Assigned) -> Iterator[Claim]:
    """``trainable`` was flipped since the training step was compiled.

    ## What it looks like
    `trainable` was flipped after `compile` or after training began: the compiled step goes on
    as before, while the summary shows the new flags.

    ## What helps
    Compile again after flipping, or `fl.convert(model)`, whose layers obey at once.

    ## When it is something else
    Loops of your own in eager PyTorch read the flag at every step.
    """
    findings, paths = case.of_rule("FL107")
    if not paths:
        return
    amount = case.blame(paths) + case.locked_gain * bool({*paths} & {*case.with_role("locked")})
    yield Claim(
        code=CauseCode.STALE_SWITCH,
        message=f"trainable of {count(len(paths), 'site')} was changed after training had begun: "
        f"{findings[0].message}",
        sites=paths,
        amount=amount or None,
        standing=0.55,
        certainty="is",
        evidence={"steps": float(case.steps or 0), "backend": case.facts.backend},
        findings=("FL107",),
    )


def _is_reset(case: Case, path: str) -> bool:
    return bool(case.sites[path].wrapper_frozen) or case.sites[path].undone


def _counted_with_others(case: Case, path: str) -> bool:
    """Whether a site has counted just as many updates as those that are in training mode now."""
    others = [f.updates or 0 for f in case.sites.values() if not f.undone and f.mode]
    own = case.sites[path].updates
    return bool(own) and own == max(others, default=0)


def _drift(
    case: Case, paths: tuple[str, ...], moving: tuple[str, ...], drifted: tuple[str, ...]
) -> Claim:
    evidence: dict[str, float | str] = {"bn_gap": case.bn_gap}
    if drifted:
        farthest = max(case.moved_from_reference[path] for path in drifted)
        evidence["drift_from_reference"] = farthest
        text = f"the stored statistics are up to {number(farthest)} standard deviations from the "
        text += "reference"
    else:
        replaced = max(1 - case.sites[path].site.decay for path in moving)
        evidence["replaced_per_step"] = replaced
        text = f"a training-mode pass replaces {replaced:.2g} of the statistics"
        if case.steps is not None and (old := case.old_share(moving[0])) is not None:
            evidence |= {"steps": float(case.steps), "old_share": old}
            text += f", {case.steps} steps leave {old:.0%} of the old ones"
    return Claim(
        code=CauseCode.FROZEN_DRIFT,
        message=f"the statistics of {count(len(paths), 'frozen site')} move: {text}",
        sites=paths,
        amount=case.blame(paths) or None,
        standing=_SHOWN if drifted else _QUIET,
        certainty="is",
        evidence=evidence,
        settle=None if drifted else "the checkpoint from before training, as reference",
        findings=case.found("FL102", "FL103", sites=paths),
    )


def _drift_in_prefix(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Thawed sites among frozen layers: gamma, beta and the statistics leave what was fitted."""
    paths = tuple(path for path in case.thawed_in_prefix if path not in assigned)
    known = case.reference
    changed = {
        path: value
        for path, value in ({} if known is None else known.params).items()
        if path in paths and value > EQUAL
    }
    amount = case.blame(paths) or None
    if not paths or (amount is None and not changed):
        return
    evidence: dict[str, float | str] = {"bn_gap": case.bn_gap}
    certainty: Certainty = "may"
    text = "gamma, beta and statistics move while the filters around them stay"
    if changed:
        evidence["params_from_reference"] = max(changed.values())
        certainty = "is"
        text = f"gamma and beta are up to {max(changed.values()):.2%} from the reference"
    if case.steps is not None and (old := case.old_share(paths[0])) is not None:
        evidence |= {"steps": float(case.steps), "old_share": old}
    yield Claim(
        code=CauseCode.FROZEN_DRIFT,
        message=f"{count(len(paths), 'site')} among frozen layers are not frozen: {text}",
        sites=paths,
        amount=amount,
        standing=_SHOWN if changed else 0.0,
        certainty=certainty,
        evidence=evidence,
        settle=None if changed else "the checkpoint from before training, as reference",
        findings=case.found("FL103", "FL106", sites=paths),
    )
