"""Causes in the stored statistics: not averaged, too slowly, too hastily, wrongly, or spoilt."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from frostline.causes.assignment import (
    EXTREME,
    LEFT_OF_WAY,
    MOST,
    ON_THE_WAY,
    Assigned,
    abrupt_onset,
    began_at_initial,
    explained_by_input,
    uses_apart,
)
from frostline.causes.case import FAR, Case, Claim, count, number
from frostline.causes.data import other_statistics
from frostline.causes.registry import cause
from frostline.numerics.averages import OLD_SHARE
from frostline.types import Certainty
from frostline.types.codes import CauseCode, Fix

_REFERENCE = "the checkpoint from before, as reference="
_TRAINING_DATA = "the data the model was trained on"
_UNDECIDED = (
    "the checkpoint of the last training step, or of the client whose statistics these are: "
    "fl.diagnose(model, data, reference=checkpoint); or the training inputs with their "
    "augmentation, as data: fl.diagnose(model, training_inputs)"
)


#: Evidence that inference takes another layer than training: its path.
OTHER_LAYER = "instead"

#: Outputs that stacked layers make smaller by less than this are nobody's trouble.
SHRINKS = 0.05


@cause(CauseCode.POISONED, rank=10, treated_by=(Fix.RECALIBRATE,))
def poisoned(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Statistics that no data give, and what they break.

    ## What it looks like
    Inference gives NaN, infinity or absurd numbers while training looks healthy: stored
    statistics are not finite, or a variance is negative. One overflowing batch is enough, since
    an average never forgets a NaN.

    ## What helps
    `fl.recalibrate(model, data)` writes finite statistics. If they turn bad again, look for the
    batch or the half-precision pass that overflows. Finite ones that are one function of those of
    the data at every site were changed by a conversion: mend it as well.

    ## When it is something else
    If gamma or beta is not finite (FL211), the weights are lost and no statistics help.
    """
    paths = tuple(
        path
        for path in _of(CauseCode.POISONED, assigned)
        if "bad_channels" in assigned[path].number
    )
    if paths:
        channels = sum(assigned[path].number["bad_channels"] for path in paths)
        broken = sum(probe.broken for name, probe in case.measurement.probes.items()
                     if name == "inference")  # fmt: skip
        yield Claim(
            code=CauseCode.POISONED,
            message=f"{count(int(channels), 'channel')} at {count(len(paths), 'site')} have stored "
            f"statistics that are not finite or a negative variance; {count(broken, 'sample')} of "
            f"{case.measurement.samples} come out as NaN or infinite",
            sites=paths,
            standing=3.0,
            certainty="is",
            evidence={"bad_channels": channels, "broken_samples": float(broken)},
            findings=case.found("FL201", "FL202", "FL211", sites=paths),
        )
    elif _of(CauseCode.POISONED, assigned):
        yield from _converted(case, assigned)
    else:
        yield from _extreme(case, assigned)


@cause(CauseCode.STATS_NEVER_UPDATED, rank=120, treated_by=(Fix.RECALIBRATE, Fix.SET_MOMENTUM))
def stats_never_updated(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Statistics that are still those of the first day, or cannot move.

    ## What it looks like
    The stored mean is still 0 and the variance still 1, or only one of the two has moved.
    Training that never runs in training mode does this, and so does a momentum that keeps
    everything.

    ## What helps
    `fl.recalibrate` on training data gives the model statistics now. Fix the loop or the
    momentum before you train on.

    ## When it is something else
    A network that was never trained, or one in front of whose BN layers the data are
    standardised: 0 and 1 are then right.
    """
    paths = _of(CauseCode.STATS_NEVER_UPDATED, assigned)
    if not paths or case.never_loaded:  # LOADING: no statistics make up for weights
        return
    untrained = ", and so are gamma and beta, as in a network that was never trained"
    texts = {
        "initial": "mean and variance are the initial values in every channel"
        + (untrained if case.untrained else ""),
        "half_initial": "one of mean and variance is the initial value in every channel",
        "updates": "the layers have counted none",
        "decay": f"training mode does not move them ({case.decay_text(paths[0])})",
    }
    decided = {name for path in paths for name in assigned[path].number}
    text = next(text for name, text in texts.items() if name in decided)
    trained = f" after {count(case.steps, 'step')}" if case.steps else ""
    yield Claim(
        code=CauseCode.STATS_NEVER_UPDATED,
        message=f"the statistics of {count(len(paths), 'site')} were never updated{trained}: "
        f"{text}; the data are {number(max(case.mismatch(path) for path in paths))} standard "
        "deviations away" + case.untold(paths),
        sites=paths,
        amount=_amount(case, paths) or _gained(case, paths),
        standing=0.9,
        certainty="is",
        evidence={"bn_gap": case.bn_gap, "steps": float(case.steps or 0)},
        findings=case.found("FL204", "FL205", "FL112", sites=paths),
    )


@cause(CauseCode.MOMENTUM_CONVENTION, rank=130, treated_by=(Fix.RECALIBRATE, Fix.SET_MOMENTUM))
def momentum_convention(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """A PyTorch momentum in a Keras layer: the average is the last batch.

    ## What it looks like
    Statistics follow the last batch: accuracy at inference jumps from step to step. Keras'
    momentum is the share that is kept, PyTorch's the share that is replaced; 0.1 in Keras was
    probably meant as 0.9.

    ## What helps
    `fl.set_momentum(model, 0.9)`, which takes the kept share on every framework, and
    `fl.recalibrate` for the statistics of now.

    ## When it is something else
    A short average that was chosen, in a training of a few dozen steps for instance.
    """
    yield from _short(case, assigned, CauseCode.MOMENTUM_CONVENTION)


@cause(CauseCode.EMA_NOISE, rank=140, treated_by=(Fix.RECALIBRATE, Fix.SET_MOMENTUM))
def ema_noise(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """An average over so few batches that it is as noisy as one of them.

    ## What it looks like
    Validation jumps from epoch to epoch while training is smooth. The average spans so few
    batches that it is as noisy as one of them.

    ## What helps
    A longer average (`fl.set_momentum` with `fl.suggest_momentum(steps)`), or `fl.recalibrate`
    before each evaluation, which the callback `Recalibrate` does.

    ## When it is something else
    If validation jumps with exact statistics too, the weights jump: lower the learning rate.
    """
    yield from _short(case, assigned, CauseCode.EMA_NOISE)


@cause(CauseCode.EMA_LAG, rank=190, treated_by=(Fix.RECALIBRATE, Fix.SET_MOMENTUM))
def ema_lag(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Averages that have not caught up with the weights or the data.

    ## What it looks like
    Right in training mode, wrong at inference, on the same samples; typical after a few hundred
    steps or at a high learning rate. The moving averages still hold a share of older
    statistics.

    ## What helps
    `fl.recalibrate(model, x)` replaces the averages with exact statistics. For the next
    training: `fl.set_momentum(model, fl.suggest_momentum(steps))` or `fl.convert(model,
    debias=True)`.

    ## When it is something else
    Averaged or edited weights look alike without `reference=` (STALE_AFTER_WEIGHT_EDIT), and so
    do statistics of other data (DOMAIN_STATS). The repair is the same; what to avoid next time
    is not.
    """
    paths = _of(CauseCode.EMA_LAG, assigned)
    if not paths:
        return
    amount = _amount(case, paths)
    shared = 0.0
    if amount is not None and pretrained_elsewhere(case, assigned):
        shared = case.blame(paths[:1]) * case.stale_part / 2
    evidence: dict[str, float | str] = {"bn_gap": case.bn_gap}
    shares = {path: s for path in paths if (s := case.old_share(path)) is not None}
    lag = f"the moving averages of {count(len(paths), 'site')} lag: "
    text, settle = lag + "they trail the weights", f"{_REFERENCE}, or the training history"
    ways = [n for path in paths if (n := assigned[path].number.get("way_from_initial")) is not None]
    if shares:
        slowest = max(shares, key=lambda path: shares[path])
        updates, oldest = case.updates(slowest) or 0, shares[slowest]
        decay = case.sites[slowest].site.decay
        evidence |= {"steps": float(updates), "decay": decay, "old_share": oldest}
        run = f"{count(updates, 'update')} at {case.decay_text(slowest)}"
        if oldest > OLD_SHARE:
            text = f"{lag}{run} leave {oldest:.0%} of the old statistics"
        elif not ways:
            text = f"the moving averages of {count(len(paths), 'site')} do not fit the weights and "
            text += f"the data, although {run} are {number(case.windows(slowest) or 0.0)} times as "
            text += "many as they look back: the weights still moved fast, or were averaged or "
            text += "edited since, or training saw other inputs (augmented, another domain, one "
            text += "client's)"
            settle = _UNDECIDED
    elif case.sites[paths[0]].cumulative:
        updates = case.updates(paths[0]) or 0
        evidence["steps"] = float(updates)
        text = f"{lag}with momentum=None they are the plain mean over all updates "
        text += f"({updates}), those of earlier weights too"
    plain_mean = case.sites[paths[0]].cumulative  # its first update left nothing of 0 and 1
    if ways and not plain_mean and not max(shares.values(), default=0.0) > OLD_SHARE:
        evidence["way_from_initial"] = min(ways)
        text = f"{lag}they have gone {min(ways):.0%} of the way from 0 and 1 to those of the data"
        if any("averaged" in assigned[path].number for path in paths):
            text += f", although {run} leave nothing of 0 and 1: the statistics were averaged "
            text += "themselves, as an average of a whole network does that begins with the new one"
            settle = "how the average was made, and of which networks"
    yield Claim(
        code=CauseCode.EMA_LAG,
        message=text + _closes(case, ", and exact statistics of the data close {} of the BN gap"),
        sites=paths,
        amount=None if amount is None else amount - shared,
        certainty=_certainty(assigned, paths),
        evidence=evidence,
        settle=_settle(assigned, paths, settle),
        findings=case.found("FL203", "FL120", sites=paths),
    )


@cause(CauseCode.STALE_AFTER_WEIGHT_EDIT, rank=210, treated_by=(Fix.RECALIBRATE,))
def stale_after_weight_edit(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Weights that changed after the statistics had settled.

    ## What it looks like
    A model after SWA, EMA, weight averaging, pruning or quantisation is bad, although each
    model that went into it was good. Its statistics belong to other weights.

    ## What helps
    `fl.recalibrate(averaged, data)`. Inside a training: `with fl.recalibrated(averaged,
    loader):` around each evaluation.

    ## When it is something else
    If the model in training mode is bad too, the edit broke the weights, and statistics do not
    bring them back.
    """
    paths = _of(CauseCode.STALE_AFTER_WEIGHT_EDIT, assigned)
    if not paths:
        return
    first, known = paths[0], assigned[paths[0]].number
    evidence: dict[str, float | str] = {
        "bn_gap": case.bn_gap,
        "mismatch": case.mismatch(first),
        **{name: known[name] for name in ("params_from_reference", "windows") if name in known},
    }
    off, sites = number(case.mismatch(first)), count(len(paths), "site")
    if "params_from_reference" in known:
        text = f"weights were changed after the statistics of {sites} were taken: weights differ "
        text += "from the reference while the stored statistics are the same"
    elif "onset" in known:
        text = f"the statistics of {sites} do not belong to these weights: they are {off} standard "
        text += "deviations off from this site on, and agree at every site before; an edit of the "
        text += "weights in between would do that, and so would noise that only training has there"
    else:
        text = f"the statistics of {sites} belong to other weights or to other inputs: the run was "
        text += f"{number(known.get('windows', 0.0))} times as long as the average looks back, and "
        text += f"the first site is {off} standard deviations off; weights that were averaged, "
        text += "edited or loaded since would do that, and so would training on augmented inputs, "
        text += "on another domain or on one client's data"
    yield Claim(
        code=CauseCode.STALE_AFTER_WEIGHT_EDIT,
        message=text,
        sites=paths,
        amount=_amount(case, paths),
        certainty=_certainty(assigned, paths),
        evidence=evidence,
        settle=_settle(assigned, paths, _UNDECIDED),
    )


@cause(CauseCode.DOMAIN_STATS, rank=200, treated_by=(Fix.RECALIBRATE,))
def domain_stats(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Statistics of other data than these.

    ## What it looks like
    Good on the data of training, bad on another camera, scanner or site. Stored statistics
    describe the old data from the first layer on.

    ## What helps
    `fl.recalibrate(model, new_data)`, with `fl.phases` before and after. Enough samples matter:
    hundreds, of every class.

    ## When it is something else
    If training and inference take different layers of a network with one BN per domain (the
    message says which), new statistics would spoil those of the domain that they are of: let
    inference take the layer of training. If new data are a mixture of many sources, or come one at
    a time: no single set of statistics fits. If frozen filters were fitted to the old statistics,
    new ones can lower accuracy: measure it.
    """
    if case.replaced_at_inference:
        yield _of_another_domain(case)
        return
    yield from _other_data_locked(case, assigned)
    if (claim := other_statistics(case)) is not None:
        yield claim
    paths = _of(CauseCode.DOMAIN_STATS, assigned)
    amount = _amount(case, paths)
    if pretrained_elsewhere(case, assigned):
        paths = _of(CauseCode.EMA_LAG, assigned)[:1]
        amount = case.blame(paths) * case.stale_part / 2
    if not paths:
        return
    first, settle = paths[0], _TRAINING_DATA
    text = "the stored statistics are of other data"
    if case.old_share(first) is None:
        text += ", or of weights that have moved since (how often they were updated is not known)"
        settle += f", or {_REFERENCE}"
    yield Claim(
        code=CauseCode.DOMAIN_STATS,
        message=f"{text}: those given are {number(case.mismatch(first))} standard deviations away "
        "at the first site already" + _closes(case, ", and their own close {} of the BN gap"),
        sites=paths,
        amount=amount,
        certainty="may",
        evidence={"first_mismatch": case.mismatch(first), "bn_gap": case.bn_gap},
        settle=settle,
        findings=case.found("FL203", sites=paths),
    )


@cause(CauseCode.MIXED_SOURCES, rank=150, treated_by=(Fix.RECALIBRATE,))
def mixed_sources(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """One average over batches, or uses, that are not alike.

    ## What it looks like
    One average over batches that are not alike: real and generated images in batches of their
    own, several domains, or one layer that normalises several tensors. Each batch is fine by
    itself; the average fits none.

    ## What helps
    Mix the sources within each batch and train on, or give each its own BN layers; then
    `fl.recalibrate` on mixed batches.

    ## When it is something else
    If batches are mixed at random already, look at BATCH_LEAK or EMA_LAG.
    """
    paths = _of(CauseCode.MIXED_SOURCES, assigned)
    if case.own_batches_gain:
        yield _in_own_batches(case, paths)
        return
    if not paths:
        yield from _left_by_lag(case, assigned)
        return
    worse = max(0.0, -case.change("population", "inference"))
    sorted_better = max(0.0, -case.change("sorted", "inference"))
    shared = tuple(path for path in paths if "uses_apart" in assigned[path].number)
    # No one pair of statistics serves uses that see different data: the whole gap is theirs.
    amount = max(_amount(case, paths) or 0.0, case.blame(shared), worse, sorted_better)
    if not amount:
        return
    text, evidence = _mixed_text(assigned, paths)
    yield Claim(
        code=CauseCode.MIXED_SOURCES,
        message=f"{count(len(paths), 'site')} mix sources: {text}",
        sites=paths,
        amount=amount,
        certainty=_certainty(assigned, paths),
        evidence={**evidence, "bn_gap": case.bn_gap},
        settle=_settle(assigned, paths, "how the training batches were drawn"),
        findings=case.found("FL114", sites=paths),
    )


def _left_by_lag(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Shared sites whose averages lag: what exact statistics leave is that one serves all uses."""
    apart = {path: uses_apart(case, path) for path in _of(CauseCode.EMA_LAG, assigned)}
    paths = tuple(path for path, distance in apart.items() if distance > FAR)
    left = -case.change("training blend", "population")
    if not paths or left <= 0 or not case.inference_is_worse:
        return
    yield Claim(
        code=CauseCode.MIXED_SOURCES,
        message=f"{count(len(paths), 'site')} mix sources: {_apart_text(max(apart.values()))}",
        sites=paths,
        amount=left,
        certainty="is",
        evidence={"uses_apart": max(apart.values()), "bn_gap": case.bn_gap},
        findings=case.found("FL114", sites=paths),
    )


def _in_own_batches(case: Case, paths: tuple[str, ...]) -> Claim:
    """Batches as they come that do better than mixed ones and than any fixed statistics."""
    blamed = tuple(path for path in case.sites if path in {*paths, *case.own_batches})
    apart = max(case.measurement.sites[path].own_batches or 0.0 for path in case.own_batches)
    losses = {name: case.loss(name) or 0.0 for name in ("given", "given inference")}
    mixed = "" if case.unmixed else f" and mixed batches {number(case.loss('training blend') or 0)}"
    text = "the batches as they come are of different sources"
    text += "" if case.probe("sorted") else ", or of a class each"
    text += f", {number(apart)} standard deviations apart; each by itself gives a loss of "
    text += f"{number(losses['given'])}, the same samples "
    text += f"{number(losses['given inference'])} at inference{mixed}: "
    text += "no one average serves them all, so that each source needs BN layers of its own, or "
    text += "training needs mixed batches"
    # Sites whose averages lag have their own part of what fixed statistics close.
    amount = case.own_batches_gain if paths else case.own_batches_alone
    return Claim(
        code=CauseCode.MIXED_SOURCES,
        message=f"{count(len(blamed), 'site')} mix sources: {text}",
        sites=blamed,
        amount=amount,
        certainty="is",
        evidence={
            "own_batches": apart,
            "given": losses["given"],
            "given_inference": losses["given inference"],
            "bn_gap": case.bn_gap,
        },
        findings=case.found("FL114", sites=blamed),
    )


def _apart_text(apart: float) -> str:
    return f"one average serves inputs that are {number(apart)} standard deviations apart"


def _mixed_text(assigned: Assigned, paths: tuple[str, ...]) -> tuple[str, dict[str, float]]:
    missing, apart, pure = (
        max((assigned[path].number.get(name, 0.0) for path in paths), default=0.0)
        for name in ("missing_variance", "uses_apart", "pure_batches")
    )
    if apart:
        return _apart_text(apart), {"uses_apart": apart}
    last = [numbers for path in paths if "last_class" in (numbers := assigned[path].number)]
    if last:
        label, off = int(last[0]["last_class"]), max(numbers["off_class"] for numbers in last)
        text = f"the stored statistics are those of class {label} alone, to {number(off)} standard "
        text += "deviations: the data came in the order of their classes"
        return text, {"last_class": float(label), "off_class": off}
    if missing:
        text = f"the stored variance lacks {missing:.0%}, just the part between the classes: it "
        return text + "was averaged over batches of one class each", {"missing_variance": missing}
    text = f"batches of one class each give a loss {number(pure)} lower than mixed ones, as if "
    return text + "trained on such, and one average serves all of them", {"pure_batches": pure}


@cause(CauseCode.BESSEL, rank=180, treated_by=(Fix.RECALIBRATE,))
def bessel(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """The unbiased variance, stacked: each site shrinks its output by √((n − 1)/n).

    ## What it looks like
    A small gap that grows with depth. Stored variances are unbiased (n − 1), batch variances
    are not, and each layer shrinks its output by √((n − 1)/n).

    ## What helps
    `fl.recalibrate` stores variances of the whole data, where n is large. Larger batches make
    the bias vanish.

    ## When it is something else
    With more than about 100 values per channel and batch it is far below what can be measured.
    """
    paths = _of(CauseCode.BESSEL, assigned)
    if not paths:
        return
    biases = np.array([assigned[path].number["bias"] for path in paths])
    product = float(np.sqrt(np.prod(biases)))
    amount = _amount(case, paths)
    saved = max(0.0, -case.change("population", "inference"))
    if amount is None and (product - 1 < SHRINKS or not saved):
        return  # benign
    yield Claim(
        code=CauseCode.BESSEL,
        message=f"the stored variances of {count(len(paths), 'site')} are n/(n − 1) = "
        f"{float(np.median(biases)):.4g} times those of the batches; stacked, inference outputs "
        f"are smaller by up to {product:.4g}",
        sites=paths,
        amount=amount,
        standing=0.5 if amount is None else 0.0,
        certainty="is",
        evidence={"predicted_ratio": product, "bias": float(np.median(biases))},
    )


@cause(CauseCode.EPS_MISMATCH, rank=80, treated_by=(Fix.SET_EPSILON, Fix.RECALIBRATE))
def eps_mismatch(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Another epsilon than the one the weights were trained with.

    ## What it looks like
    A converted network is slightly wrong everywhere, most where variances are small. Frameworks
    differ: 1e-3 in Keras, 1e-5 in PyTorch.

    ## What helps
    Set epsilon to that of the original; recalibrating hides only a part.

    ## When it is something else
    Where variances are far above epsilon (FL113 and FL315 weigh that), the difference does not
    matter.
    """
    known = case.reference
    closes = max(0.0, -case.change("epsilon", "inference"))
    if known is not None and known.epsilons:
        paths = tuple(path for path in case.sites if path in known.epsilons)
        mine, theirs = known.epsilons[paths[0]] if paths else next(iter(known.epsilons.values()))
        yield Claim(
            code=CauseCode.EPS_MISMATCH,
            message=f"epsilon is {mine:g} where the reference has {theirs:g}, at "
            f"{count(len(known.epsilons), 'site')}",
            sites=paths,
            amount=closes or _amount(case, _of(CauseCode.EPS_MISMATCH, assigned)),
            # A fact, but what it costs says whether it comes first.
            standing=0.95 if case.closed_by("epsilon") >= MOST else 0.0 if closes else 0.2,
            certainty="is",
            evidence={"epsilon": mine, "reference_epsilon": theirs},
            findings=case.found("FL113"),
        )
        return
    tried, onset = case.measurement.epsilon, abrupt_onset(case)
    if tried is not None and onset is not None and case.closed_by("epsilon") >= MOST and closes:
        # Sites before the onset agree with the data: what they hand on is wrong.
        paths = tuple(case.mismatches)[:onset]
        yield Claim(
            code=CauseCode.EPS_MISMATCH,
            message=f"with epsilon {tried:g}, the default of another framework, inference saves "
            f"{number(closes)} of loss; the statistics agree with the data up to '{paths[-1]}', "
            "whose variances are so small that epsilon matters, and not behind it",
            sites=paths,
            amount=closes,
            standing=0.2,
            certainty="may",
            evidence={"tried": tried, "closes": closes},
            settle="the model that the weights come from, as reference=",
        )
        return
    findings, paths = case.of_rule("FL113")
    if findings:
        effect = max(float(finding.evidence.get("effect", 0.0)) for finding in findings)
        yield Claim(
            code=CauseCode.EPS_MISMATCH,
            message=f"epsilon of {count(len(paths), 'site')} is not that of the others, which "
            f"changes outputs by up to {effect:.0%}"
            + (f"; with theirs inference saves {number(closes)} of loss" if closes else ""),
            sites=paths,
            amount=closes or None,
            standing=0.2,
            certainty="may",
            evidence={"effect": effect} | ({"closes": closes} if closes else {}),
            settle="the model that the weights come from, as reference=",
            findings=("FL113",),
        )


@cause(CauseCode.RANK_DIVERGENCE, rank=220, treated_by=(Fix.MERGE_STATISTICS, Fix.RECALIBRATE))
def rank_divergence(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Equal weights, different statistics: a replica, or a pass in training mode since.

    ## What it looks like
    Validation differs between GPUs, or depends on the rank that wrote the checkpoint: weights
    are equal, statistics are not.

    ## What helps
    `fl.recalibrate` in the process group gives every rank the statistics of all data;
    `fl.merge_statistics` merges what was saved.

    ## When it is something else
    It needs `reference=`, the other replica. A single pass in training mode since the
    checkpoint looks the same.
    """
    drift = case.moved_from_reference
    initial = _of(CauseCode.STATS_NEVER_UPDATED, assigned)  # no replica has trained with those
    paths = tuple(
        path
        for path in case.sites
        if path in drift and path not in initial and not case.meant_frozen(case.sites[path])
    )
    if not paths or not case.same_params:
        return
    farthest = max(drift[path] for path in paths)
    yield Claim(
        code=CauseCode.RANK_DIVERGENCE,
        message=f"all weights equal the reference's, but the stored statistics of "
        f"{count(len(paths), 'site')} differ, by up to {number(farthest)} standard deviations",
        sites=paths,
        amount=case.blame(paths) * case.stale_part or None,
        standing=0.95,
        certainty="is" if case.steps else "may",
        evidence={"statistics_from_reference": farthest},
        settle=None if case.steps else "whether the reference is another replica",
    )


def pretrained_elsewhere(case: Case, assigned: Assigned) -> bool:
    """Lagging averages whose old part is of other data: the first site shows one input map.

    Weights and inputs of a first site hardly change in training, so that its statistics tell data
    from lag, unless the old part is the initial 0 and 1.
    """
    paths = _of(CauseCode.EMA_LAG, assigned)
    if not paths or not case.mismatches or paths[0] != next(iter(case.mismatches)):
        return False
    young = any("way_from_initial" in assigned[path].number for path in paths)
    young = young or began_at_initial(case, paths[0])
    share = case.old_share(paths[0])
    if share is not None and LEFT_OF_WAY * share <= 1 - ON_THE_WAY:  # so little old that is left
        return False
    return not young and case.mismatch(paths[0]) > FAR and explained_by_input(case, paths[0])


def _short(case: Case, assigned: Assigned, code: CauseCode) -> Iterator[Claim]:
    paths = _of(code, assigned)
    if not paths:
        return
    amount = _amount(case, paths) if case.inference_is_worse else None
    decay = case.sites[paths[0]].site.decay
    noise = max((case.measurement.sites[p].noise for p in paths if p in case.measurement.sites),
                default=0.0)  # fmt: skip
    text = f"an update replaces {1 - decay:.0%} of the statistics, so that they are those of the "
    text += f"last batch, off by up to {number(noise)} standard deviations"
    if code == CauseCode.MOMENTUM_CONVENTION:
        text += f"; {case.sites[paths[0]].words.other_convention(decay)}"
    yield Claim(
        code=code,
        message=f"{count(len(paths), 'site')} with {case.decay_text(paths[0])}: {text}",
        sites=paths,
        amount=amount,
        standing=0.1,
        certainty=_certainty(assigned, paths),
        evidence={"decay": decay, "noise": noise, "bn_gap": case.bn_gap},
        settle=_settle(assigned, paths, "where the momentum comes from"),
        findings=case.found("FL111", "FL112", sites=paths),
    )


_STORED_FOR_VARIANCE = {
    0.5: "the square roots of the variances (standard deviations)",
    -0.5: "the inverse standard deviations",
    -1.0: "the inverse variances",
    2.0: "the squares of the variances",
}


def _converted(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Statistics that a conversion changed in one way at every site."""
    paths = _of(CauseCode.POISONED, assigned)
    amount = _amount(case, paths) if case.inference_is_worse else _gained(case, paths)
    if not amount:
        return
    numbers, sites = assigned[paths[0]].number, count(len(paths), "site")
    if "factor" in numbers:
        text = f"the stored means and variances of all {sites} are {number(numbers['factor'])} "
        text += "times those of the data, so that it is they that were scaled: other inputs reach "
        text += "the first site only"
    else:
        text = f"the stored variances of all {sites} are {_STORED_FOR_VARIANCE[numbers['power']]} "
        text += "of the data, while the means agree"
    yield Claim(
        code=CauseCode.POISONED,
        message=f"{text}; a conversion of the checkpoint does that",
        sites=paths,
        amount=amount,
        certainty="is",
        evidence={**numbers, "bn_gap": case.bn_gap},
    )


def _extreme(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Finite, but so large that some extreme batch is in the average."""
    moving = [path for path in case.mismatches if case.roles[path] == "moving"]
    if not moving or not case.inference_is_worse or assigned.get(moving[0]) is None:
        return
    ratio = float(np.median(case.measurement.sites[moving[0]].ratio))
    if not 0 < ratio < 1 / EXTREME or assigned[moving[0]].certainty == "is":
        return
    yield Claim(
        code=CauseCode.POISONED,
        message=f"the stored variance of the first site is {1 / ratio:.3g} times that of the data: "
        "an extreme batch may be in the average",
        sites=(moving[0],),
        standing=0.05,
        certainty="may",
        evidence={"variance_quotient": 1 / ratio},
        settle=_TRAINING_DATA,
    )


def _of_another_domain(case: Case) -> Claim:
    """Inference takes the BN of another domain than training does on the same samples."""
    pairs = case.replaced_at_inference
    first, other = next(iter(pairs.items()))
    more = f", and so on at {count(len(pairs), 'place')}" if len(pairs) > 1 else ""
    return Claim(
        code=CauseCode.DOMAIN_STATS,
        message=f"on the same samples training uses '{first}' and inference '{other}' in its place"
        f"{more}: the forward, or the step, takes the BN of another domain in evaluation mode",
        sites=tuple(dict.fromkeys((*pairs, *pairs.values()))),
        amount=-case.total_gap,
        standing=0.95,
        certainty="is",
        evidence={"places": float(len(pairs)), OTHER_LAYER: other, "bn_gap": case.bn_gap},
    )


def _other_data_locked(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Locked sites whose statistics are not those of the data, where that costs loss."""
    locked, gained = case.with_role("locked"), case.locked_gain
    if {*locked} <= {*_of(CauseCode.STATS_NEVER_UPDATED, assigned)}:
        return  # they are of no data
    far = max((case.mismatch(path) for path in locked), default=0.0)
    if not gained or far <= FAR or {*locked} & {*case.of_rule("FL107")[1]}:
        return
    onset = abrupt_onset(case)
    first = None if onset is None else tuple(case.mismatches)[onset]
    if first in locked:
        yield Claim(
            code=CauseCode.STALE_AFTER_WEIGHT_EDIT,
            message=f"{count(len(locked), 'locked site')} keep statistics that agree with the data "
            f"at every site before '{first}' and are {number(case.mismatch(first))} standard "
            "deviations away from there on, so that the data are not others: weights in between "
            "were edited or loaded since, or epsilon is another one; those of the data save "
            f"{number(gained)} of loss",
            sites=locked,
            amount=gained,
            certainty="may",
            evidence={"mismatch": far, "gained": gained, "onset": float(onset or 0)},
            settle=_REFERENCE,
        )
        return
    yield Claim(
        code=CauseCode.DOMAIN_STATS,
        message=f"{count(len(locked), 'locked site')} keep statistics of other data, up to "
        f"{number(far)} standard deviations away; those of the data save "
        f"{number(gained)} of loss" + case.untold(locked),
        sites=locked,
        amount=gained,
        certainty="is",
        evidence={"mismatch": far, "gained": gained},
    )


def _gained(case: Case, paths: tuple[str, ...]) -> float | None:
    """What exact statistics save where all locked sites are among these."""
    return (case.locked_gain or None) if {*case.with_role("locked")} <= {*paths} else None


def _amount(case: Case, paths: tuple[str, ...]) -> float | None:
    return case.blame(paths) * case.stale_part or None


def _of(code: CauseCode, assigned: Assigned) -> tuple[str, ...]:
    return tuple(path for path, verdict in assigned.items() if verdict.code == code)


def _certainty(assigned: Assigned, paths: tuple[str, ...]) -> Certainty:
    return "is" if all(assigned[path].certainty == "is" for path in paths) else "may"


def _settle(assigned: Assigned, paths: tuple[str, ...], what: str) -> str | None:
    return None if _certainty(assigned, paths) == "is" else what


def _closes(case: Case, words: str) -> str:
    # Behind locked sites exact statistics everywhere may do harm: those that do best count.
    tried = [case.difference(n, "inference") for n in ("population", "population unfrozen")]
    saved = [-exact.estimate for exact in tried if exact is not None]
    if not case.inference_is_worse or not saved:
        return ""
    closed = min(1.0, max(0.0, *saved) / abs(case.bn_gap))
    return words.format(f"{closed:.0%}")
