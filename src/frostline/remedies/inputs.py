"""Repairs outside of the model: another encoding of the inputs, other names of the classes."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.measure.inputs import SIZED, written
from frostline.remedies.candidate import Candidate, Workplace
from frostline.remedies.registry import remedy
from frostline.types.codes import INPUT_TRIAL, CauseCode, Fix

#: Classes whose new numbers fit on a line.
_FEW_CLASSES = 20


@remedy(Fix.FIX_PREPROCESSING, rank=10)
def fix_preprocessing(place: Workplace) -> Iterator[Candidate]:
    """The encoding of the inputs that inference does best with, where it is taken for the cause.

    ## When to use it
    The report finds PREPROCESS: inference is right with another encoding of the same inputs.

    ## When not to use it
    When only a part of the inputs is prepared differently: fix the pipeline, not the array.
    """
    named = {
        cause.evidence.get("trial") for cause in place.causes if cause.code == CauseCode.PREPROCESS
    }
    constant = place.words.constant
    for name, probe in place.measurement.probes.items():
        if name.startswith(INPUT_TRIAL) and name.removeprefix(INPUT_TRIAL) in named:
            change = name.removeprefix(INPUT_TRIAL)
            yield Candidate(
                name=f"inputs as {change}",
                fix=Fix.FIX_PREPROCESSING,
                treats=(CauseCode.PREPROCESS,),
                text=f"prepare the inputs as {change}, with x as they are given now",
                after=probe,
                python=None
                if change.startswith(SIZED)
                else f"x = {written(change, axis=place.bench.channels, constant=constant)}",
            )


@remedy(Fix.RELABEL, rank=20)
def rename_classes(place: Workplace) -> Iterator[Candidate]:
    """The one-to-one renaming of the classes that fits the predictions best.

    ## When to use it
    The report finds LABEL_ORDER: a one-to-one renaming of the classes explains the predictions.

    ## When not to use it
    When accuracy after renaming is far from that of training: a renaming can always be found,
    and on few samples it fits by chance.
    """
    known = place.measurement
    # Some renaming always fits best; only one that was found to be the cause repairs something.
    found = any("relabelled" in cause.evidence for cause in place.causes)
    if not found or known.relabelled is None or known.confusion is None:
        return
    now = place.probe("inference")
    if now is None or now.accuracy is None or known.relabelled <= now.accuracy:
        return
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-known.confusion)
    names = [int(columns[list(rows).index(row)]) for row in range(len(rows))]
    yield Candidate(
        name="rename the classes",
        fix=Fix.RELABEL,
        treats=(CauseCode.LABEL_ORDER,),
        text="give each class the number under which the model knows it",
        accuracy=known.relabelled,
        python=f"y = np.array({names})[y]" if len(names) <= _FEW_CLASSES else None,
        note="look at some samples first: it is the order of the class names that must be right",
    )
