"""Causes that are not BN: dropout, inputs, labels, averages over an epoch, too little data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from frostline.causes.assignment import Assigned, scale_of_inputs, young_average
from frostline.causes.case import (
    MARKED_ACCURACY,
    SMALL_ACCURACY,
    Case,
    Claim,
    count,
    number,
)
from frostline.causes.registry import cause
from frostline.types import Array
from frostline.types.codes import INPUT_TRIAL, CauseCode, Fix
from frostline.types.measured import InputMoments

#: Share of the excess of inference that an input transformation must close to be reported at all,
#: and to be reported as certain.
REPAIRS_PART = 0.3
REPAIRS = 0.8

#: In the right encoding the statistics of the first site fit those of training. They are no further
#: off than with the inputs as given by more than this, in standard deviations; a factor of 2 makes
#: ten times as much.
WORSE_FIT = 0.1

#: Without an accuracy, the loss in the right encoding may be at most this many times the best one.
#: Otherwise inputs mapped to one value would look repaired: a constant answer beats one that is far
#: off.
AS_GOOD = 3.0

#: Inference is as good as it gets when its loss is below this share of guessing.
GOOD = 0.35

#: An accuracy this close to that of the most frequent class is chance (``measure.CHANCE_MARGIN``
#: twice: several probes must be at chance at once).
AT_CHANCE = 0.1

#: Confidently wrong: this many times the loss of guessing.
CONFIDENT = 1.3

#: Gain in accuracy of the best renaming of the classes; random labels gain less.
RENAMED = 0.3

#: A renaming must fit better than this many shuffles of the labels.
SHUFFLES = 20

#: A class that is given to so large a share of the samples is given to all of them.
ALIKE = 0.95

#: Steps after which a network that can learn has left chance.
SOME_STEPS = 50

#: Validation is worse when its accuracy is lower by this much, or its loss this many times as high.
LOWER = 0.1
TIMES = 1.5

#: Part of what validation data lose that what is taken for their cause must give back.
GIVES_BACK = 0.5

#: How often chance alone may make inputs of one source look as if they were of two.
RARE = 0.001

#: Part of the spread of the inputs by which an affine map of them may miss their range.
RANGE = 0.15

#: Transformations that another contrast or brightness could explain -> range they are meant for.
_MILD = {
    "x*2-1": (0.0, 1.0),
    "(x+1)/2": (-1.0, 1.0),
    "torch(x)": (0.0, 1.0),
    "torch⁻¹(x)/255": (-2.0, 2.0),
    "caffe(x)": (0.0, 255.0),
    "caffe⁻¹(x)": (-120.0, 130.0),
}

#: Part of such a range that the inputs must cover.
FILLS = 0.8

#: The model's own inference on the validation data, and with statistics of these.
_VALIDATION = "validation inference"
_OTHER_STATISTICS = ("validation batch", "validation recalibrated")

#: What accuracy is called in a Keras history.
_ACCURACIES = (
    "accuracy",
    "acc",
    "sparse_categorical_accuracy",
    "categorical_accuracy",
    "binary_accuracy",
)

#: Scales that come from preprocessing: 1/255, 1/127.5, 2, and back.
USUAL_SCALES = (255.0, 127.5, 2.0, 1 / 255.0, 1 / 127.5, 0.5)


@cause(CauseCode.DROPOUT, rank=240)
def dropout(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Dropout or noise layers, which act in training only.

    ## What it looks like
    Training loss above validation loss, or a gap that remains with BN as at inference: dropout
    and noise layers act in training only. BN behind dropout sees another variance in training
    than at inference.

    ## What helps
    Nothing, if the gap is that of dropout itself. Where stored variances are those under
    dropout: put dropout behind the last BN layer, or `fl.recalibrate`, which measures without
    it.

    ## When it is something else
    The share that is BN is reported apart from it.
    """
    kinds = case.measurement.noise_layers
    gap = case.dropout_gap
    noise = [name for name, kind in kinds.items() if kind != "augmentation"]
    shifted, text = _shift(case, assigned, CauseCode.DROPOUT)
    if case.random_inference:
        yield Claim(
            code=CauseCode.DROPOUT,
            message="inference is random: the same batches, run again, change an output by up to "
            f"{case.random_inference:.1%} of the largest one; dropout or noise acts there, as a "
            "functional dropout does that is not given training=self.training",
            standing=0.95,
            certainty="is",
            evidence={"repeated": case.random_inference},
        )
    if not (gap or shifted) or (kinds and not noise):
        return
    evidence = {"dropout_gap": gap, "total_gap": case.total_gap}
    what = f"dropout alone, with BN as {case.dropout_beside}, changes the loss by {gap:+.3g} "
    what += f"({count(len(noise), 'layer')} act{'s' * (len(noise) == 1)} in training only)"
    if not kinds:
        what = "what the model or its loss does in training mode only changes the loss by "
        what += f"{gap:+.3g}, with BN as {case.dropout_beside}; no layer is known for it: dropout "
        what += "or noise in a forward of its own, or a loss that depends on the mode"
    yield Claim(
        code=CauseCode.DROPOUT,
        message=what + text,
        amount=abs(gap) - case.lost_to_company[1] + shifted,
        certainty="is" if noise and len(noise) == len(kinds) else "may",
        evidence=evidence | ({"variance_shift": shifted} if shifted else {}),
        settle=None if kinds else "the code that asks for the mode: self.training, or training=",
    )


@cause(CauseCode.AUGMENT_TRAIN_ONLY, rank=250)
def augment_train_only(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Augmentation in the model, or in the data of training only.

    ## What it looks like
    Training reports a worse loss than the same weights reach on plain samples: augmentation
    makes training harder, and statistics are those of augmented images.

    ## What helps
    Nothing, if it is only the metric. If augmentation shifts the statistics, `fl.recalibrate`
    on plain images.

    ## When it is something else
    To be sure, give `fl.diagnose` the training pipeline, augmentation included.
    """
    kinds = case.measurement.noise_layers
    layers = [name for name, kind in kinds.items() if kind == "augmentation"]
    gap = case.dropout_gap
    shifted, cost = _shift(case, assigned, CauseCode.AUGMENT_TRAIN_ONLY)
    if layers and (gap or shifted):
        only = len(layers) == len(kinds)
        yield Claim(
            code=CauseCode.AUGMENT_TRAIN_ONLY,
            message=f"{count(len(layers), 'augmentation layer')}, with BN as "
            f"{case.dropout_beside}, change the loss by {gap:+.3g}{cost}",
            amount=abs(gap) + shifted if only else None,
            standing=0.3,
            certainty="is" if only else "may",
            evidence={"dropout_gap": gap} | ({"variance_shift": shifted} if shifted else {}),
        )
        return
    worse = case.history_excess
    if not shifted and (worse is None or not worse.flat):
        return
    text = "the training inputs were harder"
    evidence = {"variance_shift": shifted} if shifted else {}
    if worse is not None:
        evidence |= {"reported": worse.reported, "now": worse.now}
        text = f"training reported a loss of {number(worse.reported)} over its last epochs, the "
        text += f"final weights give {number(worse.now)} in training mode on these samples: "
        text += "training saw harder inputs"
    yield Claim(
        code=CauseCode.AUGMENT_TRAIN_ONLY,
        message=text + cost,
        amount=shifted or None,
        standing=0.4,
        certainty="may",
        evidence=evidence,
        settle="the training pipeline, augmentation included, as data",
    )


def _shift(case: Case, assigned: Assigned, code: CauseCode) -> tuple[float, str]:
    """What statistics taken under dropout or augmentation cost at inference, and that in words."""
    paths = tuple(path for path, verdict in assigned.items() if verdict.code == code)
    amount = case.blame(paths) * case.stale_part
    if not amount:
        return 0.0, ""
    text = f"; the stored statistics of {count(len(paths), 'site')} are those with it, which costs "
    return amount, text + f"{number(amount)} at inference"


@cause(CauseCode.EPOCH_AVERAGE, rank=260)
def epoch_average(case: Case, _: Assigned) -> Iterator[Claim]:
    """A training metric that is the mean over an epoch in which the weights changed.

    ## What it looks like
    The progress bar says one thing, `evaluate` on the same samples another, and both phases
    agree with each other. A training metric is the mean over an epoch in which the weights
    changed.

    ## What helps
    Nothing is broken: evaluate the final weights on the training samples.

    ## When it is something else
    If the phases differ as well, that gap is reported first.
    """
    worse = case.history_excess
    if worse is None or worse.flat or case.gap_parts:
        return
    reported, now = worse.reported, worse.now
    yield Claim(
        code=CauseCode.EPOCH_AVERAGE,
        message=f"the last epoch reported a loss of {number(reported)}, the final weights give "
        f"{number(now)} in training mode and {number(case.loss('inference') or now)} at inference: "
        "the report is the mean over an epoch of changing weights",
        standing=0.9,
        certainty="is",
        evidence={"reported": reported, "now": now},
    )


@cause(CauseCode.PREPROCESS, rank=70, treated_by=(Fix.FIX_PREPROCESSING,))
def preprocess(case: Case, assigned: Assigned) -> Iterator[Claim]:
    """Inputs that are not prepared as in training.

    ## What it looks like
    Everything is wrong at once, in both phases. Inputs are scaled, ordered or encoded in
    another way than in training: 0 to 255 instead of 0 to 1, BGR for RGB.

    ## What helps
    Prepare the inputs as in training; the report names the encoding that does best.

    ## When it is something else
    If only inference is wrong, it is not the inputs.
    """
    repair = best_trial(case)
    if repair is not None:
        name, loss, part = repair
        inference = case.loss("inference") or math.nan
        yield Claim(
            code=CauseCode.PREPROCESS,
            message=f"with {name} inference gives a loss of {number(loss)} instead of "
            f"{number(inference)}{_training_too(case, loss)}: the inputs are prepared in another "
            "way than in training",
            amount=inference - loss,
            standing=0.6 if part >= REPAIRS else 0.0,
            certainty="is" if part >= REPAIRS else "may",
            evidence={"trial": name, "loss": loss, "inference": inference, "closes": part},
        )
        return
    scale = scale_of_inputs(case, assigned)
    if scale is not None:
        text = (
            f"{number(scale)} times as strong" if scale > 1 else f"1/{number(1 / scale)} of these"
        )
        yield Claim(
            code=CauseCode.PREPROCESS,
            message=f"the statistics of the first site were taken of inputs {text}, by one factor "
            "in all channels, as between pixels from 0 to 255 and others: the inputs are scaled in "
            "another way than then",
            standing=0.3,
            certainty="may",
            evidence={"scale": scale},
            settle="the preprocessing of both",
        )
        return
    if _gives_back(case, "validation resized") >= GIVES_BACK:
        yield _other_validation_size(case)
        return
    yield from _other_validation_inputs(case)


def _training_too(case: Case, loss: float) -> str:
    """Words for a training mode that does not reach what other inputs do."""
    training, inference = case.loss("training"), case.loss("inference") or math.nan
    if training is None or not training - loss >= REPAIRS_PART * (inference - loss):
        return ""
    return f", and training mode one of {number(training)}"


def _other_validation_size(case: Case) -> Claim:
    """Validation images that inference knows in the size of the training images only."""
    return Claim(
        code=CauseCode.PREPROCESS,
        message=f"{_sizes(case)}: inference gives {_both(case, 'validation inference')} on them as "
        f"they are, {_both(case, 'validation resized')} resized to that, and "
        f"{_both(case, 'inference')} on training samples",
        standing=0.9,
        certainty="is",
        evidence=_losses(case),
    )


def _sizes(case: Case) -> str:
    """Words for validation samples of another size; empty where none is known."""
    known = case.measurement.input, case.measurement.validation_input
    own, other = ("×".join(map(str, seen.size)) if seen else "" for seen in known)
    if not own or not other or own == other:
        return ""
    return f"validation samples have the size {other} and training samples {own}"


def unexplained_trial(case: Case) -> Claim | None:
    """The best other encoding of the inputs, where no cause was found for a poor inference.

    It need not be plausible by the range of the inputs: it is a hint, and better than none.
    """
    now, name = case.probe("inference"), _best_gain(case, all_names=True)
    if now is None or name is None:
        return None
    then, gain = case.probe(name), -case.change(name, "inference")
    worse = then is None or (then.accuracy or 0.0) < (now.accuracy or 0.0)
    if worse or gain <= REPAIRS_PART * now.loss:
        return None
    trial = name.removeprefix(INPUT_TRIAL)
    return Claim(
        code=CauseCode.PREPROCESS,
        message=f"with {trial} inference gives a loss of {number(now.loss - gain)} instead of "
        f"{number(now.loss)}: the inputs may be prepared in another way than in training",
        standing=0.3,
        certainty="may",
        evidence={"trial": trial, "loss": now.loss - gain, "inference": now.loss},
        settle="the preprocessing of training",
    )


def _best_gain(case: Case, *, all_names: bool = False) -> str | None:
    """Name of the probe with the inputs in the encoding that lowers the loss most.

    Where the first site's statistics fit worse with it, that is chance.
    """
    off = case.measurement.input_misfits
    worse = {f"{INPUT_TRIAL}{name}" for name in off if off[name] > off["x"] + WORSE_FIT}
    names = [
        name
        for name in case.measurement.probes
        if name.startswith(INPUT_TRIAL)
        and name not in worse
        and (all_names or _plausible(name.removeprefix(INPUT_TRIAL), case))
    ]
    return min(names, key=lambda name: case.change(name, "inference"), default=None)


def best_trial(case: Case) -> tuple[str, float, float] | None:
    """The input transformation that repairs inference best: name, loss, part of the excess closed.

    The excess of inference is over the best of what batch statistics reach, in loss and, where
    there is one, in accuracy: the smaller part counts. A trial must be about as good as those, and
    better than guessing: where all are wrong, it is compared with nothing but itself.
    """
    now, name = case.probe("inference"), _best_gain(case)
    gain = 0.0 if name is None else -case.change(name, "inference")
    if now is None or name is None or gain <= REPAIRS_PART * now.loss:
        return None
    found = [case.probe(probe) for probe in (name, "training blend", "batch", "population")]
    probes = [probe for probe in found if probe is not None]
    best = min(probe.loss for probe in probes)
    part, guessing = gain / (now.loss - best), case.measurement.chance
    if now.accuracy is None:
        bad = case.measurement.task == "regression" and best >= (guessing or math.inf)
        if bad or now.loss - gain > AS_GOOD * best > 0:
            return None
    else:
        reached = [probe.accuracy or 0.0 for probe in probes]
        if guessing is not None and reached[0] < guessing + SMALL_ACCURACY:
            return None
        missing = max(reached) - now.accuracy
        if missing < SMALL_ACCURACY:
            return None
        part = min(part, (reached[0] - now.accuracy) / missing)
    if part < REPAIRS_PART:
        return None
    return name.removeprefix(INPUT_TRIAL), now.loss - gain, min(1.0, part)


def _plausible(name: str, case: Case) -> bool:
    """Whether the inputs could be in the encoding that this transformation starts from.

    No change of contrast explains a factor of a hundred, but it explains a factor of two or an
    offset. For those the inputs must fill the range of the transformation, and the stored
    statistics must have left their initial values: on the way, another contrast may suit them.
    """
    ends = _MILD.get(name)
    if ends is None and not name.endswith("-x"):
        return True
    if any(young_average(case, path) is not None for path in case.with_role("moving")):
        return False
    seen = case.measurement.input
    if seen is None or ends is None:
        return True
    low, high = float(np.min(seen.low)), float(np.max(seen.high))
    return high - low >= FILLS * (ends[1] - ends[0])


@cause(CauseCode.LABEL_ORDER, rank=60, treated_by=(Fix.RELABEL,))
def label_order(case: Case, _: Assigned) -> Iterator[Claim]:
    """Labels that belong to other samples, or classes under other names.

    ## What it looks like
    Accuracy at chance or below, and right after renaming the classes: two tools numbered the
    classes in different orders.

    ## What helps
    Compare the lists of class names; the remedy prints the renaming that fits.

    ## When it is something else
    With two classes, AUC near 0 shows it. AUC near 1 at chance accuracy is a shift of the
    outputs: BN.
    """
    known = case.measurement
    now = case.accuracy("inference")
    if now is None or known.chance is None or known.task not in ("binary", "multiclass"):
        return
    names = ("inference", "training", "training blend", "batch", "population", "sorted", "given")
    found = [value for name in names if (value := case.accuracy(name)) is not None]
    # A phase that does well shows that the labels are right.
    renamed = 0.0 if known.relabelled is None or max(found) >= now + RENAMED else known.relabelled
    if renamed >= max(0.5, now + RENAMED) and _beats_chance(case):
        yield Claim(
            code=CauseCode.LABEL_ORDER,
            message=f"accuracy is {now:.1%}, and {renamed:.1%} after a one-to-one "
            "renaming of the classes",
            standing=1.5,
            certainty="is",
            evidence={"accuracy": now, "relabelled": renamed},
        )
        return
    yield from _validation_renamed(case)
    if max(found) > known.chance + AT_CHANCE or best_trial(case) is not None:
        return
    yield from _at_chance(case, now)


def _validation_renamed(case: Case) -> Iterator[Claim]:
    """Validation labels that number the classes in another order than those of training."""
    renamed = _renamed(case)
    if renamed is None:
        return
    now, other = case.accuracy("inference") or 0.0, case.accuracy("validation inference") or 0.0
    sure = renamed - other >= REPAIRS * (now - other)
    yield Claim(
        code=CauseCode.LABEL_ORDER,
        message=f"accuracy is {now:.1%} on training samples, {other:.1%} on validation samples, "
        f"and {renamed:.1%} there after a one-to-one renaming of the classes: validation labels "
        "number the classes in another order",
        standing=0.9,
        certainty="is" if sure else "may",
        evidence=_losses(case) | {"validation_relabelled": renamed},
        settle=None if sure else "the lists of class names of both",
    )


def _renamed(case: Case) -> float | None:
    """Accuracy on validation samples with other names of the classes, where that gives it back."""
    counts, now = case.measurement.validation_confusion, case.accuracy("inference")
    other = case.accuracy("validation inference")
    if counts is None or now is None or other is None or not _is_worse(case, _VALIDATION):
        return None
    if not _is_sound(case) or any(
        _gives_back(case, name) >= GIVES_BACK for name in _OTHER_STATISTICS
    ):
        return None
    renamed = _best_renaming(counts) / max(1, int(counts.sum()))
    enough = renamed - other >= max(LOWER, GIVES_BACK * (now - other))
    return renamed if enough and _beats_shuffles(counts, renamed) else None


@cause(CauseCode.OVERFIT, rank=270)
def overfit(case: Case, _: Assigned) -> Iterator[Claim]:
    """Training samples are fitted, others are not, whatever the statistics.

    ## What it looks like
    Training samples are right, validation samples are not, and training mode and inference
    agree on both.

    ## What helps
    More data, augmentation, regularisation. Nothing about BN.

    ## When it is something else
    It needs `validation=`. If exact statistics of the validation data help, it is DOMAIN_STATS.
    """
    if case.inference_is_worse or not _is_good(case, "inference"):
        return
    validation = case.probe(_VALIDATION)
    if validation is None:
        yield from _overfit_by_history(case)
        return
    rivals = ("validation population", *_OTHER_STATISTICS)
    if not _is_worse(case, _VALIDATION) or any(
        case.probe(name) is not None and not _is_worse(case, name) for name in rivals
    ):
        return
    if inputs_differ(case.measurement.input, case.measurement.validation_input) > RANGE:
        return  # other inputs: PREPROCESS tells
    told = ("validation resized", "validation recalibrated")
    if _renamed(case) or any(_gives_back(case, name) >= GIVES_BACK for name in told):
        return  # LABEL_ORDER, PREPROCESS and DOMAIN_STATS tell
    agreeing, doubts, settle = "", [], []
    if case.probe("validation batch") is not None:
        agreeing = f" and {_both(case, 'validation batch')} with batch statistics"
        if _agree(case, _VALIDATION, "validation batch"):
            agreeing += ": both phases agree"
        else:
            doubts.append("the phases do not agree, so that it is not overfitting alone")
            settle.append("the preprocessing of both")
    if sizes := _sizes(case):
        doubts.append(f"{sizes}, and what that costs cannot be told from overfitting")
        settle.append("validation samples in the size of the training samples")
    if (validation.accuracy or 1.0) <= (case.measurement.chance or 0.0) + MARKED_ACCURACY:
        doubts.append(
            "that is no better than a guess, as it is with labels of other samples, or with inputs "
            "of another kind"
        )
        settle.append("some validation samples, looked at with their labels")
    text = f"training samples {_both(case, 'inference')}, validation samples "
    text += f"{_both(case, _VALIDATION)} at inference{agreeing}"
    yield Claim(
        code=CauseCode.OVERFIT,
        message="; ".join([text, *doubts]),
        standing=0.9,
        certainty="may" if doubts else "is",
        evidence=_losses(case),
        settle=", and ".join(settle) or None,
    )


def other_statistics(case: Case) -> Claim | None:
    """Validation data to which the stored statistics do not belong, while their own suit them.

    Where their inputs are seen to be others, PREPROCESS tells.
    """
    seen = inputs_differ(case.measurement.input, case.measurement.validation_input) > RANGE
    own = "validation recalibrated"
    worse = _is_worse(case, _VALIDATION) or _costs_more(case, _VALIDATION)
    if seen or not worse or not _is_sound(case) or _gives_back(case, own) < GIVES_BACK:
        return None
    if _gives_back(case, "validation resized") >= GIVES_BACK:
        return None
    return Claim(
        code=CauseCode.DOMAIN_STATS,
        message=f"inference gives {_both(case, 'inference')} on training samples, "
        f"{_both(case, _VALIDATION)} on validation samples, and {_both(case, own)} there with "
        "exact statistics of their own: those that are stored are of other data, or of inputs "
        "prepared in another way; fl.recalibrate on the validation inputs stores these",
        sites=tuple(case.sites),
        standing=0.9,
        certainty="may",
        evidence=_losses(case),
        settle="whether both are prepared alike: if not, prepare them alike",
    )


def validation_loses(case: Case) -> str:
    """Words for validation data that lose more, where no accuracy tells why; else empty."""
    if case.accuracy("inference") is not None or not _costs_more(case, _VALIDATION):
        return ""
    text = f"validation data give a loss of {_both(case, _VALIDATION)} at inference"
    if case.probe("validation batch") is not None:
        text += f" and {_both(case, 'validation batch')} with batch statistics"
    return (
        f"{text}, against {_both(case, 'inference')} on the training samples: what new samples "
        "cost, overfitting, other labels or other inputs, which a loss alone cannot tell apart"
    )


def inputs_differ(first: InputMoments | None, second: InputMoments | None) -> float:
    """Distance of two inputs per channel: means in deviations, and deviations in logarithms.

    0 where samples of one source would be as far apart in one of a thousand cases: the mean of
    ``n`` samples scatters by at most ``deviation / √n``, and the farthest channel is looked at.
    """
    if first is None or second is None or first.mean.shape != second.mean.shape:
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.abs(first.mean - second.mean) / np.maximum(first.deviation, second.deviation)
        spread = np.abs(np.log(second.deviation / first.deviation))
    values = np.concatenate([shift, spread])
    values = values[np.isfinite(values)]
    apart = float(values.max()) if values.size else 0.0
    if not first.samples or not second.samples:
        return apart
    scatter = math.sqrt(1 / first.samples + 1 / second.samples)
    chance = scatter * NormalDist().inv_cdf(1 - RARE / max(1, 2 * values.size))
    return apart if apart > chance else 0.0


def input_map(first: InputMoments, second: InputMoments) -> tuple[float, float] | None:
    """One affine map ``x → a·x + b`` that takes first inputs to second ones, by their ranges.

    Median over channels of ``a = deviation₂ / deviation₁``; both ends of the range must follow.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = second.deviation / first.deviation
    if not np.isfinite(scales).all() or not (scales > 0).all():
        return None
    offsets = second.mean - scales * first.mean
    span = np.maximum(second.high - second.low, 1e-12)
    miss_low = np.abs(scales * first.low + offsets - second.low) / span
    miss_high = np.abs(scales * first.high + offsets - second.high) / span
    if max(float(miss_low.max()), float(miss_high.max())) > RANGE:
        return None
    return float(np.median(scales)), float(np.median(offsets))


def _other_validation_inputs(case: Case) -> Iterator[Claim]:
    first, second = case.measurement.input, case.measurement.validation_input
    apart, name = inputs_differ(first, second), "validation inference"
    # Right answers may outlast such inputs, at a loss that does not.
    worse = _is_worse(case, name) or _costs_more(case, name)
    restored = ""
    if _gives_back(case, "validation recalibrated") >= GIVES_BACK:
        restored = f", and {_both(case, 'validation recalibrated')} there with exact statistics of "
        restored += "their own: where they cannot be prepared alike, fl.recalibrate on them"
    if not worse or apart <= RANGE:
        return
    assert first is not None  # `apart` is 0 without both
    assert second is not None
    found = input_map(first, second)
    evidence: dict[str, float | str] = {"inputs_apart": apart}
    text = f"they are {number(apart)} deviations from the training inputs"
    sure = False
    if found is not None:
        scale, offset = found
        evidence |= {"scale": scale, "offset": offset}
        text = f"they are the training inputs times {number(scale)} plus {number(offset)}"
        sure = any(abs(math.log(scale / usual)) < 0.05 for usual in USUAL_SCALES)
        if abs(math.log(scale)) > 5 * math.log(2):
            sure = True
    yield Claim(
        code=CauseCode.PREPROCESS,
        message=f"validation inputs are prepared in another way: {text}; inference gives "
        f"{_both(case, 'inference')} on training samples and "
        f"{_both(case, 'validation inference')} on validation samples{restored}",
        standing=0.9,
        certainty="is" if sure else "may",
        evidence=evidence,
        settle=None if sure else "the preprocessing of both",
    )


def _beats_chance(case: Case) -> bool:
    """The best renaming fits better than those of labels that are shuffled.

    Of few samples, or of two classes, some renaming fits well whatever the labels are.
    """
    confusion, reached = case.measurement.confusion, case.measurement.relabelled
    return confusion is None or reached is None or _beats_shuffles(confusion, reached)


def _best_renaming(counts: Array) -> int:
    from scipy.optimize import linear_sum_assignment

    return int(counts[linear_sum_assignment(-counts)].sum())


def _beats_shuffles(confusion: Array, reached: float) -> bool:
    labels = np.repeat(np.arange(len(confusion)), confusion.sum(axis=1))
    predicted = np.concatenate([np.repeat(np.arange(len(row)), row) for row in confusion])
    rng = np.random.default_rng(0)
    for _ in range(SHUFFLES):
        shuffled = np.zeros_like(confusion)
        np.add.at(shuffled, (rng.permutation(labels), predicted), 1)
        if _best_renaming(shuffled) >= reached * len(labels):
            return False
    return True


def _at_chance(case: Case, now: float) -> Iterator[Claim]:
    known = case.measurement
    chance, guessing = known.chance or 0.0, math.log(known.classes or 2)
    found = [case.loss(name) for name in ("inference", "batch", "training")]
    lowest = min((value for value in found if value is not None), default=0.0)
    # A network that was never trained is as sure of itself where its inputs are large.
    confident = lowest >= CONFIDENT * guessing and not case.untrained
    reported = _last(case, *_ACCURACIES)
    trained_well = reported is not None and reported > chance + 2 * AT_CHANCE
    elsewhere = case.accuracy("validation inference")
    fine = elsewhere is not None and elsewhere > chance + 2 * AT_CHANCE
    if not (confident or trained_well or fine or (case.steps or 0) >= SOME_STEPS):
        return
    text = f"accuracy is {now:.1%} in every phase, as by guessing ({chance:.1%})"
    if not (trained_well or fine) and (not confident or _answers_alike(case)):
        few = case.few_values(known.batch_size)
        if few:
            yield _learned_nothing(case, text, few)
            return
        if confident:  # one answer to all is no answer of other samples
            return
    if confident:
        text += f", with {number(lowest / guessing)} times the loss of guessing"
    if trained_well:
        text += f", while training reported {reported:.1%}"
    if fine:
        text += f", while validation samples reach {elsewhere:.1%}"
    settled = trained_well and confident
    yield Claim(
        code=CauseCode.LABEL_ORDER,
        message=f"{text}: labels and samples may not belong together"
        + ("" if settled else ", or the inputs are not those of training"),
        standing=1.2 if confident or trained_well or fine else 0.35,
        certainty="is" if settled else "may",
        evidence={"accuracy": now, "chance": chance, "loss": lowest},
        settle=None
        if settled
        else "the history of training, or validation data; and some samples, looked at with their "
        "labels",
    )


def _answers_alike(case: Case) -> bool:
    """Nearly all samples are given one class, so that the answer is that of no sample."""
    confusion = case.measurement.confusion
    if confusion is None or not confusion.sum():
        return False
    return bool(confusion.sum(axis=0).max() >= ALIKE * confusion.sum())


def _learned_nothing(case: Case, text: str, few: tuple[str, ...]) -> Claim:
    """A network at chance whose batches are too small to have taught it anything.

    Its answers are as unsure as a guess, or one and the same, also in shuffled batches of the
    size at hand; those of a network that learned from other labels are sure and differ.
    """
    size = case.measurement.batch_size
    return Claim(
        code=CauseCode.SMALL_BATCH,
        message=f"{text}, in shuffled batches of {size} as well: {count(len(few), 'site')} "
        f"{'normalise' if len(few) > 1 else 'normalises'} each of their samples almost by itself, "
        "and a training in such batches learns little",
        sites=few,
        standing=0.35,
        certainty="may",
        evidence={"batch_size": float(size)},
        settle="a training in larger, shuffled batches; if it stays at chance there, whether the "
        "labels belong to their samples",
    )


def _overfit_by_history(case: Case) -> Iterator[Claim]:
    validation = _last(case, "val_loss")
    inference = case.loss("inference")
    if validation is None or inference is None:
        return
    if validation < max(TIMES * inference, inference + 5 * case.floor):
        return
    yield Claim(
        code=CauseCode.OVERFIT,
        message=f"inference gives {number(inference)} on these samples and gave "
        f"{number(validation)} on those of validation, without a gap between the phases",
        standing=0.4,
        certainty="may",
        evidence={"train_loss": inference, "validation_loss": validation},
        settle="the validation data, as validation=",
    )


def _last(case: Case, *names: str) -> float | None:
    for name in names:
        values = case.measurement.history.get(name)
        if values and math.isfinite(values[-1]):
            return float(values[-1])
    return None


def _is_good(case: Case, name: str) -> bool:
    """Far better than guessing, by accuracy where there is one, else by loss."""
    found, known = case.probe(name), case.measurement
    if found is None:
        return False
    if found.accuracy is not None and known.chance is not None:
        return found.accuracy >= known.chance + (1 - known.chance) * (1 - GOOD)
    return known.chance is not None and found.loss <= GOOD * known.chance


def _is_sound(case: Case) -> bool:
    """Inference does well on the training samples, as far as can be told."""
    unknown = case.measurement.chance is None
    return not case.inference_is_worse and (unknown or _is_good(case, "inference"))


def _gives_back(case: Case, name: str) -> float:
    """Part of what validation data lose that a probe of them does not, of accuracy or loss."""
    found, then, now = case.probe(name), case.probe(_VALIDATION), case.probe("inference")
    if found is None or then is None or now is None:
        return 0.0
    if found.accuracy is not None and then.accuracy is not None and now.accuracy is not None:
        missing = now.accuracy - then.accuracy
        if missing >= LOWER:
            return (found.accuracy - then.accuracy) / missing
    lost = then.loss - now.loss
    return (then.loss - found.loss) / lost if lost > 0 and _costs_more(case, _VALIDATION) else 0.0


def _agree(case: Case, first: str, second: str) -> bool:
    """Two probes are alike: in accuracy, where there is one, else in loss."""
    one, other = case.probe(first), case.probe(second)
    if one is None or other is None:
        return True
    if one.accuracy is not None and other.accuracy is not None:
        return abs(one.accuracy - other.accuracy) < MARKED_ACCURACY
    return max(one.loss, other.loss) < TIMES * min(one.loss, other.loss)


def _losses(case: Case) -> dict[str, float | str]:
    return {
        "train_loss": case.loss("inference") or math.nan,
        "validation_loss": case.loss(_VALIDATION) or math.nan,
    }


def _is_worse(case: Case, name: str) -> bool:
    """A validation probe is clearly worse than inference on the training samples."""
    found, now = case.probe(name), case.probe("inference")
    if found is None or now is None:
        return False
    if found.accuracy is not None and now.accuracy is not None:
        pairs = ((found.accuracy, len(found.losses)), (now.accuracy, len(now.losses)))
        noise = math.sqrt(sum(accuracy * (1 - accuracy) / samples for accuracy, samples in pairs))
        return now.accuracy - found.accuracy >= max(LOWER, 2 * noise)
    return _costs_more(case, name)


def _costs_more(case: Case, name: str) -> bool:
    """A validation probe has a clearly higher loss than inference on the training samples."""
    loss, now = case.loss(name), case.loss("inference")
    return loss is not None and now is not None and loss >= max(TIMES * now, now + 5 * case.floor)


def _both(case: Case, name: str) -> str:
    found = case.probe(name)
    if found is None:
        return "(not measured)"
    return number(found.loss) if found.accuracy is None else f"{found.accuracy:.1%}"
