"""Which cause explains the stored statistics of each site: one cause per site.

Tests run from facts about the numbers to inferences from the length and decay of the average. The
first one that fits a site wins, so no part of the gap is counted twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from frostline.causes.case import AGREES, EQUAL, FAR, Case
from frostline.numerics.averages import OLD_SHARE, is_short
from frostline.numerics.stats import normals_apart
from frostline.rules.predicates import affine_is_trained, bad_channels, initial_values
from frostline.types import Array, Certainty
from frostline.types.codes import CauseCode
from frostline.types.measured import SiteMeasurement

#: A run shorter than this many windows of the moving average, ``1 / (1 − decay)`` updates each, is
#: so short that the average still trails weights that settle. After a longer run the average has
#: seen the last weights for long enough, so a remaining difference arose after the last update. The
#: public reports of lag end at five windows.
WINDOWS = 7.5

#: The remaining distance from the initial values may be this many times ``decayⁿ``, because the
#: average also holds batches of early training, which were close to the initial values.
LEFT_OF_WAY = 5.0

#: With two classes, batches of one class each mean two sources: real and generated.
SOURCES = 2

#: Largest error of the channels, and of their median, relative to the predicted n/(n − 1).
BESSEL_FITS = 0.35

#: PyTorch momenta that people copy into Keras, where they should be one minus these.
TORCH_MOMENTA = (0.1, 0.05, 0.03, 0.02, 0.01, 0.003, 0.001, 0.0003, 0.0001)

#: Smallest ratio of the total to the within-class variance that can be distinguished from 1: the
#: variance of a batch of 32 values has a relative standard error of 0.25.
BETWEEN = 1.25

#: Stored statistics lie on the line from their initial values to those of the data when the
#: correlation over channels exceeds the first number, and have not arrived below the second.
ON_THE_LINE = 0.9
ON_THE_WAY = 0.9

#: Sites have gone the same part of the way when their parts differ by no more: behind the first one
#: weights that are averaged make other inputs than the average of those that were seen.
SAME_PART = 0.15

#: Up to this distance from 0 and 1 the old part of an average counts as the initial values: it also
#: holds batches of early training.
NEAR_INITIAL = 0.5

#: One map of the input explains a site when the variance ratio spreads over channels by less than
#: this share of its size; the borders of padded images add to the spread.
ONE_RATIO = 0.4

#: Ratio of pixels from 0 to 255 to the usual other encodings: 0 to 1, −1 to 1, ImageNet's standard
#: deviations. Then: the extra contrast that other images may have, the spread of the logarithm over
#: channels, and the least correlation of stored and measured channels.
ENCODINGS = (255.0, 127.5, 57.0)
CONTRAST = 2.7
ONE_SCALE = 0.5
SAME_CHANNELS = 0.6

#: Share of what exact statistics save that another epsilon must save to be what is wrong.
MOST = 0.5

#: A site differs abruptly when it is this many times farther off than every site before it.
ABRUPT = 4.0

#: Below this share of the distance of an earlier site, a site has no distance of its own.
FAINT = 0.25

#: Above this ratio of stored to measured variance, a few extreme batches are more likely than other
#: data: it is ten times the contrast.
EXTREME = 100.0


#: Roles of frozen sites that do something else in training than at inference.
_UNSTEADY = ("frozen batch", "frozen drift")

#: Causes at the first site for which its inputs may be to blame.
_TELLING = (CauseCode.EMA_LAG, CauseCode.DOMAIN_STATS, CauseCode.STALE_AFTER_WEIGHT_EDIT)

#: Path -> what explains the stored statistics of the site.
Assigned = Mapping[str, "SiteExplanation"]


#: Case and path -> what explains the site, or ``None``.
Test = Callable[[Case, str], "SiteExplanation | None"]


@dataclass(frozen=True)
class SiteExplanation:
    """What explains one site.

    Attributes:
        code: The cause.
        number: The number that decides it, by name.
        certainty: Of this site.
    """

    code: CauseCode
    number: Mapping[str, float]
    certainty: Certainty = "is"


def assign(case: Case) -> Assigned:
    """Map each site with questionable stored statistics to what explains them.

    Frozen sites with sound statistics are left out: their gap comes from how they are frozen.
    """
    later = _later_tests(case)
    found = _explained(case, later)
    if _by_chance(case, found):
        found = _explained(case, tuple(test for test in later if test is not missing_between))
    return _as_young(case, found)


def _explained(case: Case, later: Sequence[Test]) -> dict[str, SiteExplanation]:
    """The first test that fits each site."""
    found: dict[str, SiteExplanation] = {}
    for path, role in case.roles.items():
        tests = _FACTS if role != "moving" or path in case.thawed_in_prefix else (*_FACTS, *later)
        for test in tests:
            verdict = test(case, path)
            if verdict is not None:
                found[path] = verdict
                break
    return found


def _by_chance(case: Case, found: Assigned) -> bool:
    """Whether sites that lack what is between the classes stand beside others that are off anyhow.

    Batches of one class each leave the sites before them as they are, where no class shows. Those
    behind them see what such batches make of their inputs; if more of them are off in another way,
    other weights explain all of them. A network that does better in such batches was trained on
    them.
    """
    if case.change("sorted", "batch") < 0:
        return False
    off = [path for path in case.with_role("moving") if case.mismatch(path) > FAR]
    lacking = [path for path in off if "missing_variance" in _numbers(found, path)]
    others = [path for path in off if path not in lacking]
    if not lacking or not others:
        return False
    return off[0] not in lacking or len(others) > len(lacking)


def _numbers(found: Assigned, path: str) -> Mapping[str, float]:
    return found[path].number if path in found else {}


def _as_young(case: Case, found: dict[str, SiteExplanation]) -> dict[str, SiteExplanation]:
    """Sites whose average cannot be older than that of another one, which is seen to be young.

    What is left of the old statistics depends on the decay and on the number of updates. Where
    that number is not known, a site that is on its way from 0 and 1 tells it of all that keep as
    much or more per update.
    """
    ways = {
        case.sites[path].site.decay: explanation
        for path, explanation in found.items()
        if "way_from_initial" in explanation.number and case.old_share(path) is None
    }
    if not ways:
        return found
    least = min(ways)
    inferred = (CauseCode.DOMAIN_STATS, CauseCode.STALE_AFTER_WEIGHT_EDIT, CauseCode.EMA_LAG)
    return {
        path: ways[least]
        if explanation.certainty == "may"
        and explanation.code in inferred
        and case.old_share(path) is None
        and case.sites[path].site.decay >= least
        else explanation
        for path, explanation in found.items()
    }


def victims(case: Case, assigned: Assigned) -> frozenset[str]:
    """Thawed sites whose statistics agree with the data once those before them are right."""
    return frozenset(
        path
        for path in case.with_role("moving")
        if path not in assigned
        and path not in case.thawed_in_prefix
        and (agrees(case, path) or _behind_mixed_uses(case, path))
    )


def agrees(case: Case, path: str) -> bool:
    """Whether a site is near the data, or much nearer than an unsteady frozen site before it.

    A frozen site that is far off makes those behind it average what it does meanwhile.
    """
    before = 0.0
    for other, size in case.mismatches.items():
        if other == path:
            break
        before = max(before, size) if case.roles[other] in _UNSTEADY else before
    return case.mismatch(path) <= max(AGREES / 2, min(FAR, FAINT * before))


def _behind_mixed_uses(case: Case, path: str) -> bool:
    """Whether a site agrees with the batches of training, behind one that no statistics serve.

    Training gives each use of that one its own statistics; the exact ones of the data are those of
    what a single pair of numbers for all uses hands on, which this site has never seen.
    """
    found = case.measurement.sites.get(path)
    if found is None or _stored_apart(found, found.batch_mean, found.batch_variance) > AGREES:
        return False
    before = itertools.takewhile(lambda other: other != path, case.mismatches)
    return any(mixed_uses(case, other) is not None for other in before)


# --- facts about the numbers ----------------------------------------------------------------------


def poisoned(case: Case, path: str) -> SiteExplanation | None:
    """Statistics that no data give: NaN, infinite, or a negative variance."""
    bad = bad_channels(case.sites[path])
    if bad is None:
        return None
    return SiteExplanation(CauseCode.POISONED, {"bad_channels": float(bad.count)})


def never_updated(case: Case, path: str) -> SiteExplanation | None:
    """Mean 0 or variance 1 (or 0) in every channel although in use, or a decay of 1."""
    facts = case.sites[path]
    initial = initial_values(facts)
    unused = bool(case.measurement.sites) and path not in case.measurement.sites
    if initial is None or unused:  # an auxiliary head, a branch that no batch takes
        return None
    used, off = bool(case.steps) or affine_is_trained(facts), case.mismatch(path)
    if initial.mean and initial.variance and _trained_with(case, path):
        return None
    if initial.mean and initial.variance and (used or off > AGREES):
        return SiteExplanation(CauseCode.STATS_NEVER_UPDATED, {"initial": 1.0})
    if initial.half and off > FAR:
        return SiteExplanation(CauseCode.STATS_NEVER_UPDATED, {"half_initial": 1.0})
    if facts.updates == 0 and case.steps and case.mismatch(path) > AGREES / 2:
        return SiteExplanation(CauseCode.STATS_NEVER_UPDATED, {"updates": 0.0})
    stuck = case.roles[path] == "unmoved" or (
        case.roles[path] == "moving" and facts.site.decay >= 1 and not facts.cumulative
    )
    if stuck and case.mismatch(path) > AGREES / 2:
        return SiteExplanation(CauseCode.STATS_NEVER_UPDATED, {"decay": facts.site.decay})
    return None


def _trained_with(case: Case, path: str) -> bool:
    """Whether a frozen site is one that training used as it is: no other statistics do better."""
    if case.roles[path] != "locked" or not case.meant_frozen(case.sites[path]):
        return False
    population = case.difference("population", "inference")
    return population is not None and not case.locked_gain and population.estimate > 0


def short_average(case: Case, path: str) -> SiteExplanation | None:
    """A decay so low that the average is the last batch or two."""
    facts = case.sites[path]
    decay = facts.site.decay
    moved = case.roles[path] in ("moving", "frozen drift")
    if not moved or not is_short(facts) or facts.site.debias:
        return None
    usual = any(math.isclose(decay, value, rel_tol=1e-6) for value in TORCH_MOMENTA)
    code = CauseCode.MOMENTUM_CONVENTION if usual else CauseCode.EMA_NOISE
    return SiteExplanation(code, {"decay": decay}, "may" if usual else "is")


def converted(case: Case, path: str) -> SiteExplanation | None:
    """Statistics that are one function of those of the data, the same at every site.

    BN takes the scale of its inputs off, so that other inputs reach the first site alone.
    """
    numbers = case.conversion
    if not numbers or path not in case.measurement.sites:
        return None
    return SiteExplanation(CauseCode.POISONED, numbers)


_FACTS: tuple[Callable[[Case, str], SiteExplanation | None], ...] = (
    poisoned,
    never_updated,
    converted,
    short_average,
)


# --- what is inferred -----------------------------------------------------------------------------


def mixed_uses(case: Case, path: str) -> SiteExplanation | None:
    """One average for uses that see different data."""
    apart = uses_apart(case, path)
    # An average over all uses lies between them; what lies elsewhere is off for another reason.
    if apart > FAR and case.mismatch(path) <= 2 * apart and not _closed_by_lag(case, path):
        return SiteExplanation(CauseCode.MIXED_SOURCES, {"uses_apart": apart})
    return None


def missing_between(case: Case, path: str) -> SiteExplanation | None:
    """Stored variance as within one class.

    Law of total variance: variance = mean variance within classes + variance of class means. An
    average over batches of one class each holds the first part only.
    """
    found = case.measurement.sites.get(path)
    if found is None or found.within_variance is None:
        return None
    if (case.old_share(path) or 0.0) > OLD_SHARE:
        return None  # what a young average lacks may be what it has not seen yet
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.log(found.batch_variance / found.within_variance)
        missing = np.log(found.batch_variance / found.stored_variance)
        shift = np.abs(found.stored_mean - found.batch_mean) / np.sqrt(found.batch_variance)
    sound = np.isfinite(between) & np.isfinite(missing) & np.isfinite(shift)
    telling = sound & (between > math.log(BETWEEN))  # channels that can tell the two apart
    if telling.sum() < max(1, sound.sum() / 2):
        return None
    if (
        float(np.median(np.abs(missing - between)[telling]))
        > float(np.median(between[telling])) / 2
    ):
        return None
    if float(np.median(shift[telling])) > 2 * FAR:
        return None
    missing_part = 1 - math.exp(-float(np.median(missing[telling])))
    return SiteExplanation(CauseCode.MIXED_SOURCES, {"missing_variance": missing_part}, "may")


def young_average(case: Case, path: str) -> SiteExplanation | None:
    """decayⁿ of the old statistics is left, or they are still on the way from 0 and 1."""
    share = case.old_share(path)
    if share is not None and share > OLD_SHARE and case.mismatch(path) > AGREES / 2:
        return SiteExplanation(CauseCode.EMA_LAG, {"old_share": share})
    way = way_from_initial(case, path)
    possible = way is not None and (share is None or 1 - way <= LEFT_OF_WAY * share)
    if way is not None and possible and way < ON_THE_WAY:
        return SiteExplanation(CauseCode.EMA_LAG, {"way_from_initial": way})
    if way is not None and way < 1 and share is not None and averaged_again(case):
        numbers = {"way_from_initial": way, "averaged": 1.0}
        return SiteExplanation(CauseCode.EMA_LAG, numbers, "may")
    return None


def averaged_again(case: Case) -> bool:
    """Whether all sites are the same part of the way from 0 and 1, whatever their updates leave.

    An average of a whole network, statistics and all, begins where the network began. Its first
    site shows that to the digit: inputs are those of the data, and what a linear layer makes of
    them is averaged as its weights are. Another scale of inputs or weights fits it no better, and
    does not leave each site the same part.
    """
    moving = [p for p in case.with_role("moving") if case.mismatch(p) > AGREES]
    ways = [way_from_initial(case, path) for path in moving]
    known = [way for way in ways if way is not None]
    if not known or len(known) < len(ways) or max(known) - min(known) > SAME_PART:
        return False
    found = case.measurement.sites[moving[0]]
    if moving[0] != next(iter(case.mismatches)):
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        predicted = 1 + known[0] * (found.batch_variance - 1)
        left = np.log(found.stored_variance / predicted)
        scale = np.log(found.stored_variance / found.batch_variance)
    if not (np.isfinite(left).all() and np.isfinite(scale).all()):
        return False
    off = float(np.median(np.abs(left)))
    return off <= AGREES and off <= float(np.median(np.abs(scale - np.median(scale)))) / 2


def began_at_initial(case: Case, path: str) -> bool:
    """Whether the part of a lagging average that is from before training is 0 and 1.

    That part is what is left of the stored statistics without the share that was averaged since,
    for which the present statistics of the batches stand.
    """
    found, share = case.measurement.sites.get(path), case.old_share(path)
    if found is None or share is None or share <= OLD_SHARE:
        return False
    mean = (found.stored_mean - (1 - share) * found.batch_mean) / share
    variance = (found.stored_variance - (1 - share) * found.batch_variance) / share
    off = np.maximum(np.abs(mean), np.abs(variance - 1))
    return bool(np.median(off) <= NEAR_INITIAL)


def way_from_initial(case: Case, path: str) -> float | None:
    """Part of the way that the statistics have gone from 0 and 1 to those of the data.

    Least squares through the initial values over channels, at λ = 1: ``stored_mean`` on
    ``batch_mean`` and ``stored_variance − 1`` on ``batch_variance − 1``. ``None`` unless both agree
    and fit.
    """
    found = case.measurement.sites.get(path)
    if found is None or found.stored_mean.size < 4 or case.mismatch(path) <= AGREES:
        return None
    pairs = (
        (found.stored_mean, found.batch_mean),
        (found.stored_variance - 1, found.batch_variance - 1),
    )
    ways = []
    for moved, target in pairs:
        if not (np.isfinite(moved).all() and np.isfinite(target).all()):
            return None
        sizes = float(np.dot(moved, moved)), float(np.dot(target, target))
        if min(sizes) <= 0:
            return None
        product = float(np.dot(moved, target))
        if product / math.sqrt(sizes[0] * sizes[1]) < ON_THE_LINE:
            return None
        ways.append(product / sizes[1])
    low, high = sorted(ways)
    return (low + high) / 2 if low > 0 and high < 1.5 * low + 0.05 else None


def _later_tests(case: Case) -> tuple[Test, ...]:
    """Tests of sites that train, the last of them one for all that is left."""
    if not case.inference_is_worse:
        return (mixed_uses, missing_between, _last_class(case), _exact_bessel)
    first = (
        _edited_since_reference,
        _other_epsilon,
        mixed_uses,
        missing_between,
        _pure_batches,
        young_average,
        _last_class(case),
        _own_batches,
    )
    return (*first, _as_with_dropout, _as_in_batches, _stacked_bessel, _settled(case))


def _pure_batches(case: Case, path: str) -> SiteExplanation | None:
    """A network that does best in batches of one class each was trained on such."""
    if not case.best_in_pure_batches or agrees(case, path):
        return None
    if (case.old_share(path) or 0.0) > OLD_SHARE:
        return None
    code = CauseCode.MIXED_SOURCES if case.measurement.classes == SOURCES else CauseCode.BATCH_LEAK
    return SiteExplanation(code, {"pure_batches": -case.change("sorted", "batch")})


def _own_batches(case: Case, path: str) -> SiteExplanation | None:
    """A network that does best in the batches as they come, which are far apart."""
    if not case.own_batches_gain or agrees(case, path):
        return None
    apart = case.measurement.sites[path].own_batches if path in case.own_batches else None
    return SiteExplanation(CauseCode.MIXED_SOURCES, {"own_batches": apart or 0.0})


def _edited_since_reference(case: Case, path: str) -> SiteExplanation | None:
    known = case.reference
    if known is None or not known.params or path not in known.statistics:
        return None
    changed = [value for value in known.params.values() if value > EQUAL]
    if not changed or known.statistics[path] > EQUAL or case.mismatch(path) <= AGREES:
        return None
    return SiteExplanation(
        CauseCode.STALE_AFTER_WEIGHT_EDIT, {"params_from_reference": max(changed)}
    )


def _other_epsilon(case: Case, path: str) -> SiteExplanation | None:
    """Weights and statistics of the reference behind another epsilon, which moves what follows.

    ``√((variance + ε) / (variance + ε'))`` is the factor by which a site's output differs; the
    sites behind the first one that it matters at see other inputs than their statistics are of.
    """
    known = case.reference
    if known is None or not known.epsilons or not case.same_params or case.moved_from_reference:
        return None
    if case.closed_by("epsilon") < MOST:  # it was tried, and something else is left
        return None
    if agrees(case, path) or young_average(case, path) is not None:
        return None
    largest = 0.0
    for other in case.sites:
        if other in known.epsilons and (stored := case.stored(other)) is not None:
            mine, theirs = known.epsilons[other]
            with np.errstate(divide="ignore", invalid="ignore"):
                factor = np.abs(np.log((stored[1] + mine) / (stored[1] + theirs)) / 2)
            factor = factor[np.isfinite(factor)]
            largest = max(largest, float(np.median(factor)) if factor.size else 0.0)
        if other == path:
            break
    if largest <= AGREES:
        return None
    return SiteExplanation(CauseCode.EPS_MISMATCH, {"factor": math.exp(largest)})


def _last_class(case: Case) -> Callable[[Case, str], SiteExplanation | None]:
    """Statistics of one class, the same at all sites: data in the order of their classes."""
    off = {
        path: site.class_distances
        for path, site in case.measurement.sites.items()
        if site.class_distances is not None and case.roles.get(path) == "moving"
    }
    label = _nearest_class(case, off) if len(off) > 1 else None

    def test(_: Case, path: str) -> SiteExplanation | None:
        if label is None or path not in off:
            return None
        return SiteExplanation(
            CauseCode.MIXED_SOURCES,
            {"last_class": float(label), "off_class": float(off[path][label])},
        )

    return test


def _nearest_class(case: Case, off: Mapping[str, Array]) -> int | None:
    """The class whose batches have the stored statistics at each site; ``None`` without one."""
    total = np.sum(np.stack([*off.values()]), axis=0)
    if not np.isfinite(total).any():
        return None
    label = int(np.nanargmin(total))
    for path, distances in off.items():
        found = case.measurement.sites[path]
        if not distances[label] <= _stored_apart(found, found.batch_mean, found.batch_variance) / 2:
            return None
    return label


def _as_with_dropout(case: Case, path: str) -> SiteExplanation | None:
    """Statistics of passes with dropout or augmentation, which inference does without.

    Dropout keeps the mean of its input and adds to the variance, so that averages behind it are
    those of training, and too large for inference (Li et al. 2019, variance shift).
    """
    found = case.measurement.sites.get(path)
    if found is None or found.noisy_mean is None or found.noisy_variance is None:
        return None
    off = _stored_apart(found, found.noisy_mean, found.noisy_variance)
    if agrees(case, path) or not off <= case.mismatch(path) / 2:
        return None
    kinds = {*case.measurement.noise_layers.values()}
    code = CauseCode.AUGMENT_TRAIN_ONLY if kinds == {"augmentation"} else CauseCode.DROPOUT
    return SiteExplanation(code, {"off_dropout": off})


def _as_in_batches(case: Case, path: str) -> SiteExplanation | None:
    """Statistics of batches that are too small to be those of the data."""
    found = case.measurement.sites.get(path)
    if found is None or path not in case.few_values(case.measurement.batch_size):
        return None
    off = _stored_apart(found, found.batch_mean, found.batch_variance)
    if agrees(case, path) or not off <= case.mismatch(path) / 2:
        return None
    return SiteExplanation(CauseCode.SMALL_BATCH, {"off_batches": off})


def _stacked_bessel(case: Case, path: str) -> SiteExplanation | None:
    bias = bessel_bias(case, path)
    return None if bias is None else SiteExplanation(CauseCode.BESSEL, {"bias": bias})


def _exact_bessel(case: Case, path: str) -> SiteExplanation | None:
    """The same in every channel, which neither lag nor other data are; no gap is needed."""
    bias, found = bessel_bias(case, path), case.measurement.sites.get(path)
    if bias is None or found is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        measured = np.log(found.stored_variance / found.batch_variance)
    low, high = np.quantile(measured[np.isfinite(measured)], [0.25, 0.75])
    if high - low > BESSEL_FITS * math.log(bias):
        return None
    return SiteExplanation(CauseCode.BESSEL, {"bias": bias})


def bessel_bias(case: Case, path: str) -> float | None:
    """N / (n − 1) where the stored variance exceeds that of the batches by just this quotient."""
    found = case.measurement.sites.get(path)
    count = case.values_per_batch(path, case.measurement.batch_size)
    if found is None or count is None or count < 2:
        return None
    predicted = math.log(count / (count - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        measured = np.log(found.stored_variance / found.batch_variance)
    measured = measured[np.isfinite(measured)]
    if not measured.size or predicted < 2e-4:  # within rounding and noise
        return None
    shift = np.abs(found.stored_mean - found.batch_mean) / np.sqrt(found.batch_variance + 1e-12)
    fits = abs(float(np.median(measured)) - predicted) <= BESSEL_FITS * predicted
    return math.exp(predicted) if fits and float(np.median(shift)) <= AGREES else None


def _settled(case: Case) -> Callable[[Case, str], SiteExplanation | None]:
    """One answer for all sites whose average has forgotten its start, and still is wrong."""
    code, certainty, number = _settled_answer(case)

    def test(case: Case, path: str) -> SiteExplanation | None:
        if agrees(case, path) or _behind_mixed_uses(case, path):
            return None
        return SiteExplanation(code, number, certainty)

    return test


def _settled_answer(case: Case) -> tuple[CauseCode, Certainty, dict[str, float]]:
    moving = [p for p in case.mismatches if case.roles[p] in ("moving", "unmoved")]
    sizes = [case.mismatches[path] for path in moving]
    if not sizes:
        return CauseCode.EMA_LAG, "may", {}
    first = sizes[0]
    share = case.old_share(moving[0])
    windows = case.windows(moving[0])
    if share is not None and windows is not None and windows < WINDOWS:
        return CauseCode.EMA_LAG, "may", {"windows": windows, "old_share": share}
    onset = abrupt_onset(case)
    if onset is not None and case.roles[list(case.mismatches)[onset]] != "locked":
        return CauseCode.STALE_AFTER_WEIGHT_EDIT, "may", {"onset": float(onset)}
    if first > FAR and explained_by_input(case, moving[0]):
        return CauseCode.DOMAIN_STATS, "may", {"first_mismatch": first}
    if first > FAR and first >= 2 * float(np.median(sizes)):
        return CauseCode.DOMAIN_STATS, "may", {"first_mismatch": first}
    # Weights that an average trails leave little at a first site, whose inputs are the data's.
    early = first > FAR or (first > AGREES and first >= float(np.median(sizes)) / 2)
    if early and case.history_excess is not None and case.history_excess.flat:
        return CauseCode.AUGMENT_TRAIN_ONLY, "may", {"first_mismatch": first}
    if windows is not None and first > FAR:
        numbers = {"windows": windows, "first_mismatch": first}
        return CauseCode.STALE_AFTER_WEIGHT_EDIT, "may", numbers
    return CauseCode.EMA_LAG, "may", {"first_mismatch": first}


def abrupt_onset(case: Case) -> int | None:
    """Position of the first site that is far off while every one before it agrees."""
    before = 0.0
    for position, size in enumerate(case.mismatches.values()):
        if size > FAR:
            calm = before <= AGREES and size >= ABRUPT * before
            return position if position > 0 and calm else None
        before = max(before, size)
    return None


def explained_by_input(case: Case, path: str) -> bool:
    """Whether one affine map of the input, the same for all pixels, explains a first site.

    ``x → a·x + b`` turns the variance of every channel of a linear layer into ``a²`` times itself:
    the ratio is one number over the channels (padding adds to its spread).
    """
    found = case.measurement.sites.get(path)
    if found is None or found.ratio.size < 3:
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(found.ratio)
    if not np.isfinite(logs).all():
        return False
    low, middle, high = np.quantile(logs, [0.25, 0.5, 0.75])
    return bool(high - low <= max(ONE_RATIO * abs(middle), AGREES))


def scale_of_inputs(case: Case, assigned: Assigned) -> float | None:
    """By how much stronger inputs were when the first site's statistics were taken.

    Contrast and light change them by a small factor, an encoding of pixels by one of
    :data:`ENCODINGS`: the quotient of the stored and the present standard deviation, one number
    over the channels of the first site. Initial values, alike in all channels, tell nothing.
    """
    path = next(iter(case.mismatches), None)
    if path is None or (path in assigned and assigned[path].code not in _TELLING):
        return None
    found = case.measurement.sites[path]
    if found.stored_variance.size < 3 or began_at_initial(case, path):
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        both = np.log([found.stored_variance, found.batch_variance])
    both = both[:, np.isfinite(both).all(axis=0)]
    if both.shape[1] < max(3, found.stored_variance.size / 2) or not np.ptp(both, axis=1).all():
        return None
    if float(np.corrcoef(both)[0, 1]) < SAME_CHANNELS:
        return None
    low, middle, high = np.quantile((both[0] - both[1]) / 2, [0.25, 0.5, 0.75])
    near = min(abs(abs(middle) - math.log(factor)) for factor in ENCODINGS)
    if near > math.log(CONTRAST) or high - low > ONE_SCALE:
        return None
    return math.exp(float(middle))


def _stored_apart(site: SiteMeasurement, mean: Array, variance: Array) -> float:
    """Distance of the stored statistics from others."""
    return normals_apart((site.stored_mean, site.stored_variance), (mean, variance))


def _closed_by_lag(case: Case, path: str) -> bool:
    """Whether an average lags and exact ones close most of the gap: one for all uses will do."""
    if (case.old_share(path) or 0.0) <= OLD_SHARE:
        return False
    return -case.change("population", "inference") > MOST * abs(case.bn_gap)


def uses_apart(case: Case, path: str) -> float:
    """Largest distance of two uses of a shared layer, in standard deviations, median channel."""
    found = case.measurement.sites.get(path)
    uses = () if found is None else found.uses
    apart = 0.0
    for index, (mean, variance) in enumerate(uses):
        for other_mean, other_variance in uses[index + 1 :]:
            with np.errstate(divide="ignore", invalid="ignore"):
                pooled = np.sqrt((variance + other_variance) / 2)
                shift = np.abs(mean - other_mean) / pooled
                size = np.sqrt(np.square(shift) + np.square(np.log(variance / other_variance)) / 2)
            if np.isfinite(size).any():
                apart = max(apart, float(np.median(size[np.isfinite(size)])))
    return apart
