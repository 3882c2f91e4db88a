"""Causes in what shares a batch: too few values, or neighbours that tell something."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from frostline.causes.assignment import SOURCES, Assigned, uses_apart
from frostline.causes.case import FAR, FEW_VALUES, SMALL_ACCURACY, Case, Claim, count, number
from frostline.causes.registry import cause
from frostline.rules.predicates import overrides_phase, uses_batch
from frostline.types.codes import CauseCode, Fix

#: Batches must save this share of the gap beyond what population statistics save.
BEYOND = 0.2


@cause(CauseCode.FORCED_TRAIN, rank=20, treated_by=(Fix.INFERENCE_MODE, Fix.RECALIBRATE))
def forced_train(case: Case, _: Assigned) -> Iterator[Claim]:
    """Inference that normalises with the batch at hand.

    ## What it looks like
    A prediction depends on what else is in the batch; a batch of one gives nonsense. Some layer
    normalises with the batch at inference: it was called with `training=True`, is in `train()`,
    or keeps no statistics.

    ## What helps
    Call it in inference mode, then `fl.recalibrate`, since its stored statistics may never have
    been used. Where the layer around it overrides the phase, `model(x, training=False)` changes
    nothing: pass the phase on in that layer's `call` or `forward`.

    ## When it is something else
    Instance-like behaviour by design, as in style transfer and some GANs.
    """
    paths = tuple(
        path
        for path in case.sites
        if (seen := case.measurement.behaviour.get(path)) is not None and uses_batch(seen.inference)
    )
    if not paths:
        return
    neighbours = case.measurement.neighbours or 0.0
    evidence = {"sites": float(len(paths)), "neighbours": neighbours}
    spread = _inference_spread(case)
    texts = []
    if neighbours > 0:  # NaN where no outputs are known, as with a step
        texts.append(
            f"outputs change by up to {number(neighbours)} with the neighbours in the batch"
        )
    if spread is not None:
        evidence["loss_over_batch_sizes"] = spread
        texts.append(f"the loss by {number(spread)} over batch sizes")
    text = ", ".join(texts) or "it is what their calls ask for"
    better = case.change("inference", "population")
    if better < 0:
        evidence["better_than_population"] = -better
        text += f"; the score is too good: with fixed statistics the loss is {number(-better)} more"
    behaviour = case.measurement.behaviour
    overriding = [
        path
        for path in paths
        if overrides_phase(case.facts, case.sites[path], behaviour[path].inference)
    ]
    if overriding:
        first, more = overriding[0], len(overriding) - 1
        text += "; the whole model was asked for inference, and what calls "
        text += f"'{first}'{f' and {more} more' if more else ''} overrides it: pass the phase on "
        text += f"there ({case.sites[first].words.passed_phase})"
    yield Claim(
        code=CauseCode.FORCED_TRAIN,
        message=f"{count(len(paths), 'site')} used statistics of the batch at inference: {text}",
        sites=paths,
        standing=2.5,
        certainty="is",
        evidence=evidence,
        findings=case.found("FL109", "FL110", "FL119", "FL121", sites=paths),
    )


@cause(CauseCode.KERNEL_BUG, rank=30)
def kernel_bug(case: Case, _: Assigned) -> Iterator[Claim]:
    """Outputs that depend on the batch although no site uses it.

    ## What it looks like
    Outputs at inference change with the batch although no BN layer uses it. Other layers mix
    samples (padding to the longest sample, attention across the batch), or an operation of the
    backend is wrong.

    ## What helps
    Another backend or device tells the two apart. Report a wrong operation to its project.

    ## When it is something else
    Differences at the level of rounding, which larger batches reorder, are not reported.
    """
    behaviour = case.measurement.behaviour.values()
    if any(seen.inference is not None and seen.inference > 0 for seen in behaviour):
        return
    # Company cannot be told from chance, nor from what a pass before it left behind.
    if case.random_inference or case.measurement.moved_at_inference:
        return
    tolerance = case.tolerance
    wrong = [p for p in case.measurement.sweep if p.inference_change > tolerance]
    neighbours = case.measurement.neighbours or 0.0
    if not wrong and not neighbours > tolerance:  # NaN where outputs are broken
        return
    if wrong:
        worst = max(wrong, key=lambda point: point.inference_change)
        text = f"by {number(worst.inference_change)} at batch size {worst.batch_size}"
        text += f" ({len(wrong)} of {len(case.measurement.sweep)} batch sizes differ)"
    else:
        text = f"by {number(neighbours)} with the neighbours in the batch"
    change = max([neighbours, *(point.inference_change for point in wrong)])
    unseen = [seen for seen in behaviour if seen.inference is None]
    branches = any(seen.training is None and seen.moves is False for seen in unseen)
    # A site that sees so many values of one sample and other ones of the next is given some rows.
    branches = branches or any(site.values is None for site in case.measurement.sites.values())
    unknown = any(seen.moves is not False for seen in unseen)
    # One bad batch size leaves the neighbours alone; a branch that the batch picks is meant.
    padded = any(point.padded for point in wrong)
    by_design = neighbours > tolerance or branches or padded
    sure = bool(wrong) and not unknown and not by_design
    if unknown:
        text += ", and whether a BN layer uses the batch could not be seen at every site"
    else:
        text += ", although no BN layer uses the batch"
    if by_design:
        text += ": the model mixes the samples of a batch by design, as padding to the longest of "
        text += "them does where layers do not mask it"
        text += " (they are padded to other lengths here)" if padded else ""
        text += " or a branch that the batch picks" if branches else ""
        text += ", or an operation is wrong"
    size, lost = case.lost_to_company
    settle = "whether the model is meant to mix samples"
    if lost:
        text += f"; in batches of {size} inference gives a loss {number(lost)} lower"
        settle += f": then ask it in batches of {size}, or report the batch size with the result"
    yield Claim(
        code=CauseCode.KERNEL_BUG,
        message=f"inference outputs change {text}",
        amount=lost or None,
        # What may be meant voids nothing that was measured.
        standing=2.0 if sure else 0.4 if branches else 0.95,
        certainty="is" if sure else "may",
        evidence={"largest_change": change},
        settle=None
        if sure
        else "the same samples without padding, and a mask behind each layer that shifts zeros"
        if padded
        else f"{settle}; if not, another backend or device",
    )


@cause(CauseCode.SMALL_BATCH, rank=170, treated_by=(Fix.RECALIBRATE, Fix.LARGER_BATCH))
def small_batch(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Batches of so few values that the network fits each batch, not the data.

    ## What it looks like
    Training works in batches of one or two, or in segmentation and detection with few images;
    inference is worse than every batch. A batch of so few values normalises each sample almost
    by itself.

    ## What helps
    Larger batches; frozen BN (`fl.freeze`) where the backbone is pretrained; group
    normalisation for a new network.

    ## When it is something else
    If exact statistics close the gap, the average was at fault and not the batch: EMA_NOISE.
    """
    if _tells_class(case):
        return
    size = case.measurement.batch_size
    paths = case.few_values(size)
    amount = case.beyond_population
    averaged = tuple(
        path for path, explanation in assigned.items() if explanation.code == CauseCode.SMALL_BATCH
    )
    if case.inference_is_worse and paths and amount >= BEYOND * abs(case.bn_gap):
        # How many is not known where samples differ in it.
        known = [n for path in paths if (n := case.values_per_batch(path, size))]
        fewest = min(known, default=0)
        text = f"see as few as {count(fewest, 'value')} per channel in a batch of {size}"
        if not known:
            text = f"see few values per channel in a batch of {size}"
        elif fewest >= FEW_VALUES:
            text = f"see {fewest} values per channel in a batch of {size}, of images so unlike "
            text += "that they are worth few"
        yield Claim(
            code=CauseCode.SMALL_BATCH,
            message=f"{count(len(paths), 'site')} {text}: batches of that size give a loss "
            f"{number(amount)} lower than exact statistics of all the data",
            sites=paths,
            amount=min(amount, abs(case.bn_gap)) + case.blame(averaged) * case.stale_part,
            certainty="is",
            evidence={"values": float(fewest), "beyond_population": amount},
            findings=case.found("FL116", sites=paths),
        )
        return
    yield from _training_is_worse(case, assigned)
    yield from _trained_on_smaller(case)


@cause(CauseCode.BATCH_LEAK, rank=160, treated_by=(Fix.RECALIBRATE,))
def batch_leak(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Batches whose composition reveals the label, or more than any fixed statistics hold.

    ## What it looks like
    Batches of one class, or sorted data: the make-up of a batch tells the label, and training
    learns to read it.

    ## What helps
    Shuffle the training data and train again. Statistics alone do not help: the weights rely on
    the leak.

    ## When it is something else
    If the samples that you gave are sorted but training shuffled them, pass them as training
    saw them.
    """
    if not _tells_class(case):
        yield from _beyond_statistics(case, assigned)
        return
    if any(verdict.code == CauseCode.MIXED_SOURCES for verdict in assigned.values()):
        return  # two sources, one in each batch: MIXED_SOURCES says so
    sorted_loss, inference = case.loss("sorted"), case.loss("inference")
    if sorted_loss is None or inference is None:
        return
    accuracies = case.accuracy("sorted"), case.accuracy("inference")
    # Less confident in wrong answers, but no label leaks; nor does one where all is guessed.
    guessed = (case.measurement.chance or 0.0) + SMALL_ACCURACY
    first, then = accuracies
    if first is not None and then is not None and first <= max(then, guessed):
        return
    amount = max(0.0, -case.change("sorted", "inference"))
    exact = max(0.0, -case.change("sorted", "population"))
    if not amount or not exact:  # without an advantage over inference there is nothing to explain
        return
    amount = min(amount, exact)
    size = case.measurement.batch_size
    yield Claim(
        # Two classes in batches of their own are two sources: real and made up.
        code=CauseCode.MIXED_SOURCES
        if case.measurement.classes == SOURCES
        else CauseCode.BATCH_LEAK,
        message=f"batches of one class give a loss {number(-case.change('sorted', 'batch'))} lower "
        f"than mixed batches, and {number(amount)} lower than exact statistics: the make-up of a "
        "batch tells the label",
        sites=case.with_role("moving", "frozen batch", "frozen drift", "unmoved"),
        amount=amount,
        certainty="is",
        evidence={"sorted": sorted_loss, "inference": inference, "batch_size": float(size)},
    )


def _beyond_statistics(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Batch statistics that no fixed ones can replace, although the batches are large enough."""
    amount, accuracy = case.beyond_population, case.accuracy("training blend")
    if not case.inference_is_worse or amount < BEYOND * abs(case.bn_gap):
        return
    if accuracy is not None and accuracy <= (case.measurement.chance or 0.0) + SMALL_ACCURACY:
        return  # batches that are guessed tell nothing
    if case.few_values(case.measurement.batch_size) or any(
        verdict.code == CauseCode.MIXED_SOURCES for verdict in assigned.values()
    ):
        return
    if case.own_batches_gain or any(uses_apart(case, path) > FAR for path in case.sites):
        return  # each source or use has statistics of its own in training: MIXED_SOURCES says so
    yield Claim(
        code=CauseCode.BATCH_LEAK,
        message=f"batches give a loss {number(amount)} lower than exact statistics of all the "
        "data, although they are large: the model reads something from what shares a batch",
        sites=case.with_role("moving", "frozen batch", "frozen drift", "unmoved"),
        amount=min(amount, abs(case.bn_gap)),
        certainty="may",
        evidence={"beyond_population": amount},
        settle="the batches of training, in their order, as data",
    )


def _tells_class(case: Case) -> bool:
    return case.measurement.batch_size > 1 and case.change("sorted", "batch") < 0


def _training_is_worse(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Batches that are worth so few values that their statistics do worse than stored ones."""
    size = case.measurement.batch_size
    few = set(case.few_values(size)) - set(assigned)
    paths = tuple(path for path in case.with_role("moving", "unmoved") if path in few)
    amount = case.bn_gap - case.blame(set(case.sites) - set(paths))
    if case.compares_outputs or not paths or amount <= 0:
        return
    fewest = min((n for path in paths if (n := case.values_per_batch(path, size))), default=0)
    yield Claim(
        code=CauseCode.SMALL_BATCH,
        message=f"training mode, with the statistics of batches of {size}, gives a loss "
        f"{number(case.bn_gap)} higher than inference: so few independent values share a batch "
        f"at {count(len(paths), 'site')} that each sample is normalised almost by itself; "
        "inference is the better one",
        sites=paths,
        amount=amount,
        certainty="may",
        evidence={"values": float(fewest), "bn_gap": case.bn_gap},
        settle="the batches of training, as data: in larger ones this gap is no gap of training",
        findings=case.found("FL116", "FL307", sites=paths),
    )


def _trained_on_smaller(case: Case) -> Iterator[Claim]:
    """Batches much smaller than the given ones do better than those, and than inference."""
    inference, population = case.loss("inference"), case.loss("population")
    sound = [p for p in case.measurement.sweep if np.isfinite(p.batch_loss)]
    smaller = [p for p in sound if p.batch_size < case.measurement.batch_size]
    if not smaller or inference is None:
        return
    best = min(smaller, key=lambda point: point.batch_loss)
    paths = case.few_values(best.batch_size)
    others = [p.batch_loss for p in sound if p.batch_size >= 4 * best.batch_size]
    rivals = [inference, *others, *([] if population is None else [population])]
    # A loss of the whole batch may depend on its size, with stored statistics as well.
    amount = min(*rivals, best.inference_loss) - best.batch_loss
    # One number per batch size, without an interval: only a large difference counts.
    if not paths or not others or amount < max(BEYOND * inference, 5 * case.floor):
        return
    # Where exact statistics close the gap between the phases, what small batches do beyond it is no
    # part of it: a likelihood that counts the variance of its batch, as a flow's does, falls with
    # every size.
    closed = case.inference_is_worse and case.stale_part >= 1 - BEYOND
    yield Claim(
        code=CauseCode.SMALL_BATCH,
        message=f"the model does best in batches of {best.batch_size}: {number(best.batch_loss)} "
        f"against {number(min(others))} in larger ones and {number(inference)} at inference, with "
        f"fewer than {FEW_VALUES} values per channel at {count(len(paths), 'site')}",
        sites=paths,
        amount=None if closed else amount,
        standing=0.1 if closed else 0.0,
        certainty="may",
        evidence={"best_batch_size": float(best.batch_size), "batch_loss": best.batch_loss},
        settle="the batch size of training, as batch_size=",
    )


def _inference_spread(case: Case) -> float | None:
    losses = [p.inference_loss for p in case.measurement.sweep if np.isfinite(p.inference_loss)]
    return max(losses) - min(losses) if len(losses) > 1 else None
