"""Causes that are not BN: what saving, loading or the wrong file made of a model."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.causes.assignment import Assigned
from frostline.causes.case import REORDERED, Case, Claim, count, number
from frostline.causes.data import AT_CHANCE
from frostline.causes.registry import cause
from frostline.types.codes import CauseCode

#: A training run that reported a loss below this share of the present one had other weights.
BETTER = 0.5


@cause(CauseCode.LOADING, rank=40)
def loading(case: Case, _: Assigned) -> Iterator[Claim]:
    """Weights that never arrived, or outputs that differ although all weights are equal.

    ## What it looks like
    Outputs differ although every weight and statistic is equal: a setting, a custom layer or
    the order of layers was lost between saving and loading. Or every BN layer is as new and the
    weights are not the reference's: a clone without its weights, names that did not match.

    ## What helps
    Save the whole model, or rebuild it with the same settings. The report lists those that
    differ. Where weights never arrived, load them and look for names that were skipped.

    ## When it is something else
    It needs `reference=`, or a model that changes when it is saved and loaded.
    """
    trip = case.measurement.round_trip
    if trip is not None and trip > REORDERED:
        yield Claim(
            code=CauseCode.LOADING,
            message=f"saving and loading changes inference outputs by up to {number(trip)} of the "
            "largest one",
            standing=1.8,
            certainty="is",
            evidence={"round_trip": trip},
        )
        return
    known = case.reference
    if known is not None and case.never_loaded:
        farthest = max(known.params, key=lambda path: known.params[path])
        yield Claim(
            code=CauseCode.LOADING,
            message=f"{case.never_loaded} of {count(len(known.params), 'layer')} with weights "
            f"differ from the reference's, most of all '{farthest}', by "
            f"{number(known.params[farthest])} of its size, and mean, variance, gamma and beta of "
            "all BN layers are as in new ones: the reference's weights did not arrive in this "
            "model. Load or copy them first; nothing that was measured tells of BN before",
            standing=1.8,
            certainty="is",
            evidence={
                "layers_from_reference": float(case.never_loaded),
                "params_from_reference": known.params[farthest],
            },
            findings=case.found("FL204", "FL205"),
        )
        return
    if known is None or not case.same_params or case.moved_from_reference or known.epsilons:
        return
    outputs = known.outputs or 0.0
    if outputs <= REORDERED and not known.settings:
        return
    settings = "; ".join(f"{path}: {text}" for path, text in list(known.settings.items())[:3])
    text = f"outputs differ by up to {number(outputs)} of the largest one"
    yield Claim(
        code=CauseCode.LOADING,
        message=f"weights and statistics equal the reference's, but {text}"
        + (f" (settings: {settings})" if settings else ""),
        standing=1.8 if outputs > REORDERED else 0.3,
        certainty="is" if outputs > REORDERED else "may",
        evidence={"outputs_from_reference": outputs, "settings": settings},
        settle=None if outputs > REORDERED else "the reference as a whole model, not its weights",
    )


@cause(CauseCode.STALE_PARAMS, rank=50)
def stale_params(case: Case, _: Assigned) -> Iterator[Claim]:
    """Weights that are still the reference's although training was made.

    ## What it looks like
    Training reported progress, yet every weight equals that of before: the wrong checkpoint,
    the wrong object, or a copy was trained.

    ## What helps
    Find the object that was trained, and evaluate or save that one.

    ## When it is something else
    It needs `reference=`, the weights of before. If nothing was meant to train, there is
    nothing to find.
    """
    known = case.reference
    trains = any(layer.trains for layer in case.facts.layers)
    if known is None or not known.params or not case.same_params or not trains or not case.steps:
        return
    if case.moved_from_reference or known.epsilons or known.settings:
        return
    losses, now = case.measurement.history.get("loss", ()), case.loss("training")
    better = bool(losses) and now is not None and losses[-1] < BETTER * now
    accuracy, chance = case.accuracy("inference"), case.measurement.chance
    poor = accuracy is not None and chance is not None and accuracy < chance + AT_CHANCE
    if not better and not poor:
        return
    text = f", while training reported a loss of {number(losses[-1])}" if better else ""
    yield Claim(
        code=CauseCode.STALE_PARAMS,
        message=f"after {case.steps} steps every weight equals the reference's{text}: these are "
        "not the weights that were trained",
        standing=1.6,
        certainty="is" if better else "may",
        evidence={"steps": float(case.steps)},
        settle=None if better else "the history of training",
    )
