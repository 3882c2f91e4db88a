"""Remedies: repairs for the causes that were named, each with its effect measured beforehand.

A repair is evaluated as the model *would be* with it: other statistics, inputs or weights are
handed to the bench, and the model is left as it is. Nothing is recommended that was not measured.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from frostline.measure import Bench
from frostline.numerics.stats import paired_bootstrap, sure_difference
from frostline.remedies.candidate import Candidate, Workplace
from frostline.remedies.registry import Attempt, all_repairs, verb_of
from frostline.remedies.statistics import group_of
from frostline.types import FrostlineError
from frostline.types.facts import ModelFacts
from frostline.types.measured import Cause, Interval, Measurement, Probe, Remedy

log = logging.getLogger("frostline")

#: Shares of the closable gap that differ by less than this are equal.
_EQUAL_SHARE = 0.05

#: Standard errors of an accuracy by which a renaming must raise it.
_SURE = 3.0

#: Share of the present loss that a repair must save: less is not worth a change of the model.
_MATTERS = 0.01

#: Accuracy that a repair may cost.
_LOST_ACCURACY = 0.02

#: Share of the present loss that a repair may leave where it costs any accuracy at all.
_LEFT = 2 / 3

_SEED = 0


def remedies(
    bench: Bench, facts: ModelFacts, measurement: Measurement, causes: Sequence[Cause]
) -> tuple[Remedy, ...]:
    """Try every repair that treats one of the causes.

    Args:
        bench: What the measurement was made on; the model is the same afterwards, bit for bit.
        facts: Of the model.
        measurement: From :func:`frostline.measure.measure`.
        causes: From :func:`frostline.causes.causes`, the most important first.

    Returns:
        Remedies, best first: those that help for sure before all others, those for the first
        cause before those for later ones, then by how much of the closable gap they close. Empty
        when no repair treats any of the causes; none recommended when no repair helps.
    """
    place = Workplace(bench, facts, measurement, tuple(causes))
    now = measurement.probes.get("inference")
    if now is None:
        return ()
    candidates = [
        candidate for repair in all_repairs() for candidate in _tried(repair.attempt, place)
    ]
    best = _best(measurement, candidates)
    made = [(candidate, _remedy(candidate, now, best)) for candidate in candidates]
    first = place.codes[0] if place.codes else ""

    most = max((remedy.closed or 0.0 for _, remedy in made), default=0.0)

    def rank(pair: tuple[Candidate, Remedy]) -> tuple[bool, bool, float]:
        candidate, remedy = pair
        missing = math.floor((most - (remedy.closed or 0.0)) / _EQUAL_SHARE)
        return not remedy.recommended, first not in candidate.treats, missing

    return tuple(remedy for _, remedy in sorted(made, key=rank))  # stable: ties keep order


def _tried(attempt: Attempt, place: Workplace) -> list[Candidate]:
    """What one kind of repair gives; one that cannot be tried does not take the others with it."""
    try:
        return list(attempt(place))
    except FrostlineError as error:
        log.warning("%s was not tried: %s", attempt.__name__, error)
        return []


def _best(measurement: Measurement, candidates: Sequence[Candidate]) -> float | None:
    """Lowest loss that batch statistics or any repair reach."""
    probes = [measurement.probes.get(name) for name in ("training blend", "batch", "given")]
    probes += [candidate.after for candidate in candidates]
    losses = [probe.loss for probe in probes if probe is not None and math.isfinite(probe.loss)]
    return min(losses, default=None)


def _remedy(candidate: Candidate, now: Probe, best: float | None) -> Remedy:
    change = None if candidate.after is None else _change(candidate.after, now)
    closed = _closed(candidate, now, best)
    return Remedy(
        name=candidate.name,
        fix=candidate.fix.value,
        causes=candidate.treats,
        text=candidate.text,
        python=candidate.python,
        shell=candidate.shell,
        before=_numbers(now),
        after=_after(candidate),
        change=change,
        closed=closed,
        recommended=not candidate.harms and _helps(candidate, now, change),
        note=candidate.note,
    )


def _change(after: Probe, now: Probe) -> Interval | None:
    """Loss with the repair minus loss now, over the samples that are finite in both."""
    if after.losses.shape != now.losses.shape:
        return None
    sound = np.isfinite(after.losses) & np.isfinite(now.losses)
    if not sound.any():
        return None
    return paired_bootstrap(after.losses[sound], now.losses[sound], seed=_SEED)


def _closed(candidate: Candidate, now: Probe, best: float | None) -> float | None:
    after = candidate.after
    if after is None:
        return None
    if not math.isfinite(after.loss):
        return 0.0
    if not math.isfinite(now.loss):  # any finite answer is better than none
        return 1.0 if best is None or after.loss <= best else best / after.loss
    if best is None or best >= now.loss:
        return None
    return min(1.0, max(0.0, (now.loss - after.loss) / (now.loss - best)))


def _helps(candidate: Candidate, now: Probe, change: Interval | None) -> bool:
    after = candidate.after
    if after is None:
        if candidate.accuracy is None or now.accuracy is None:
            return False
        error = math.sqrt(0.25 / len(now.losses))
        return candidate.accuracy - now.accuracy > _SURE * error
    if now.broken:
        return after.broken < now.broken
    if change is None or after.broken:
        return False
    if sure_difference(after.hits, now.hits, seed=_SEED) < -_LOST_ACCURACY:
        return False  # a lower loss at fewer right answers is a network that is less sure of all
    if after.accuracy is not None and after.accuracy < (now.accuracy or 0.0):
        # Chance may cost an answer or two, but then the loss must fall by far.
        return change.high < 0 and after.loss < _LEFT * now.loss
    return change.high < 0 and -change.estimate >= _MATTERS * abs(now.loss)


def _numbers(probe: Probe) -> dict[str, float]:
    found = {"loss": probe.loss}
    return found if probe.accuracy is None else {**found, "accuracy": probe.accuracy}


def _after(candidate: Candidate) -> dict[str, float]:
    if candidate.after is not None:
        return _numbers(candidate.after)
    return {} if candidate.accuracy is None else {"accuracy": candidate.accuracy}


__all__ = ["group_of", "remedies", "verb_of"]
