"""One measured case, and the numbers derived from it that every cause is judged by.

Nothing here names a cause. Differences between probes matter or do not, sites get a role, and the
BN gap is split among the sites.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from frostline.numerics import averages
from frostline.numerics.stats import paired_bootstrap, sure_difference
from frostline.rules.predicates import (
    affine_is_trained,
    expected_behaviour,
    in_place_of,
    initial_values,
    is_frozen,
    layer_behind,
    uses_batch,
)
from frostline.types import Array, Certainty, Finding
from frostline.types.codes import CauseCode, probe_name
from frostline.types.facts import ModelFacts, SiteFacts
from frostline.types.measured import Difference, Interval, Measurement, Probe

Role = Literal["locked", "frozen batch", "frozen drift", "moving", "unmoved", "unused"]

#: Powers of the variance that conversions store for it: standard deviations, their inverses, those
#: of the variances, and squares.
POWERS = (0.5, -0.5, -1.0, 2.0)

#: A difference below this share of the larger loss needs no cause: dropout and rounding leave as
#: much in a healthy model (the same number as ``measure.SMALL_GAP``).
SMALL_SHARE = 0.05

#: Nor is one below this share of the loss of guessing (``log(classes)``): a cross-entropy of 0.02
#: against 0.01 over ten classes is a healthy model, whatever their quotient.
SMALL_OF_GUESSING = 0.02

#: The same for regression, of the targets' variance: R² differs in the third digit.
SMALL_OF_VARIANCE = 0.002

#: Unless the accuracy differs for sure, and by at least this much.
SMALL_ACCURACY = 0.02

#: Accuracy that differs by so much, in the direction of the loss, matters whatever the quotient of
#: the losses: a network of few steps is unsure of all classes, and its loss hardly moves.
MARKED_ACCURACY = 0.05

#: Distance of stored and measured statistics, in standard deviations, below which they agree. A
#: moving average at 0.99 over batches of 32 values is off by 0.013, at 0.9 by 0.04.
AGREES = 0.1

#: Distance from which the two are far apart.
FAR = 0.25

#: Below this many values per channel, batch statistics are mostly noise: the variance of 16 values
#: has a relative standard error of 37% (rule FL116).
FEW_VALUES = 16

#: Up to this many samples per batch, all values of a channel come from one or two images.
FEW_SAMPLES = 2

#: Weights, statistics or outputs are equal up to this relative difference: float32 rounding summed
#: over some thousand terms.
EQUAL = 1e-5

#: Another batch size or other neighbours may change an output by this share of the largest one:
#: other convolution algorithms reorder float32 sums.
REORDERED = 1e-3

#: The same where sites compute in half precision.
REORDERED_HALF = 5e-2

#: Batches as they come must save this part of what they save beyond any other statistics.
OWN_PART = 0.2

#: Residual up to which an attribution is good enough to split a gap by.
_TRUSTED = 0.5

#: Distances are cut here where they weigh sites.
_FAR_ENOUGH = 10.0

_SEED = 0


#: Probes with the exact statistics of the data at some sites.
_POPULATIONS = ("population", "population unfrozen", "population frozen")

#: What BN does beside dropout -> probes with and without dropout.
_WITH_DROPOUT = {
    "at inference": ("dropout", "inference"),
    "in training": ("training", "training blend"),
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What one cause claims; shares are computed once all claims are known.

    Attributes:
        code: Code of the cause.
        message: One sentence with the number that decides it.
        sites: Paths of the sites to blame.
        amount: What it explains, in units of the loss; ``None`` where there is no such number.
        standing: Rank of a fact that needs no gap, on the scale of shares: above 1 it comes
            before whatever a gap says.
        certainty: ``"is"`` or ``"may"``.
        evidence: Numbers by name.
        settle: What further input would settle it.
        findings: Codes of findings behind it.
    """

    code: CauseCode
    message: str
    sites: tuple[str, ...] = ()
    amount: float | None = None
    standing: float = 0.0
    certainty: Certainty = "may"
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    settle: str | None = None
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class HistoryExcess:
    """A training run that reported a higher loss than the final weights give.

    Attributes:
        reported: Loss of the last epoch.
        now: Loss of the final weights in training mode, on these samples.
        flat: The reported loss changed by less over the last three epochs than it is off, so it
            is no average over weights that still changed.
    """

    reported: float
    now: float
    flat: bool


@dataclass(frozen=True, eq=False)
class Case:
    """One model on one data set.

    Attributes:
        facts: Of the model.
        measurement: Of the model on the data.
        findings: Of the rules.
        victims: Sites with nothing wrong of their own, which only pass on what those before them
            do; see :meth:`blame`.
    """

    facts: ModelFacts
    measurement: Measurement
    findings: Sequence[Finding] = ()
    victims: frozenset[str] = frozenset()

    # --- probes -------------------------------------------------------------------------------

    def probe(self, name: str) -> Probe | None:
        """A probe with a finite loss.

        Raises:
            ValueError: No probe has this name.
        """
        found = self.measurement.probes.get(probe_name(name))
        return found if found is not None and math.isfinite(found.loss) else None

    def loss(self, name: str) -> float | None:
        """Mean loss of a probe; ``None`` when it was not made or is not finite."""
        found = self.probe(name)
        return None if found is None else found.loss

    def accuracy(self, name: str) -> float | None:
        """Accuracy of a probe; ``None`` when there is none."""
        found = self.probe(name)
        return None if found is None else found.accuracy

    def difference(self, of: str, minus: str) -> Interval | None:
        """Loss of one probe minus that of another on the same samples, with its interval."""
        for gap in self.measurement.gaps.values():
            if (gap.of, gap.minus) == (of, minus):
                return gap.loss if math.isfinite(gap.loss.estimate) else None
        first, second = self.probe(of), self.probe(minus)
        if first is None or second is None or first.losses.shape != second.losses.shape:
            return None
        return paired_bootstrap(first.losses, second.losses, seed=_SEED)

    def change(self, of: str, minus: str) -> float:
        """The same as a number: 0 when it is uncertain or too small to matter."""
        interval = self.difference(of, minus)
        if interval is None or not interval.excludes_zero:
            return 0.0
        first, second = self.probe(of), self.probe(minus)
        if first is None or second is None:
            return 0.0
        size = abs(interval.estimate)
        little = size < SMALL_SHARE * max(abs(first.loss), abs(second.loss))
        if little or size < self.floor:
            more = self.more_accurate(first, second)
            against = more * interval.estimate > 0
            if abs(more) < (MARKED_ACCURACY if little else SMALL_ACCURACY) or (little and against):
                return 0.0
        return interval.estimate

    @cached_property
    def floor(self) -> float:
        """Smallest difference in loss that matters on its own, in units of the loss."""
        known = self.measurement
        if self.compares_outputs:
            return SMALL_OF_VARIANCE
        if known.task == "regression":
            return SMALL_OF_VARIANCE * known.chance if known.chance is not None else 0.0
        if known.task == "unknown" or not known.classes or known.classes < 2:
            return 0.0
        return SMALL_OF_GUESSING * math.log(known.classes) if self._is_cross_entropy else 0.0

    @cached_property
    def _is_cross_entropy(self) -> bool:
        # A missed sample has a probability of at most 1/2 for its class: log 2 at least.
        for probe in self.measurement.probes.values():
            if probe.hits is not None and probe.hits.shape == probe.losses.shape:
                missed = probe.losses[probe.hits < 0.5]
                if missed.size and float(np.quantile(missed, 0.1)) < 0.6:
                    return False
        return True

    @staticmethod
    def more_accurate(first: Probe, second: Probe) -> float:
        """Accuracy of one probe minus that of another; 0 where it is uncertain or not known."""
        return sure_difference(first.hits, second.hits, seed=_SEED)

    @cached_property
    def history_excess(self) -> HistoryExcess | None:
        """How much worse training reported itself; ``None`` unless it clearly did."""
        losses = self.measurement.history.get("loss", ())
        now = self.loss("training")
        if not losses or now is None or not math.isfinite(losses[-1]):
            return None
        excess = losses[-1] - now
        if excess <= max(SMALL_SHARE * losses[-1], self.floor):
            return None
        recent = losses[-3:]
        flat = len(recent) == 3 and max(recent) - min(recent) < excess / 2
        return HistoryExcess(losses[-1], now, flat)

    @cached_property
    def tolerance(self) -> float:
        """Change of an output, as a share of the largest one, that reordered sums explain."""
        half = any("16" in site.site.dtype for site in self.facts)
        return REORDERED_HALF if half else REORDERED

    @cached_property
    def random_inference(self) -> float:
        """Change of an inference output when the same batch is run again; 0 where it is none."""
        repeated = self.measurement.repeated or 0.0
        return repeated if repeated > self.tolerance else 0.0

    # --- the parts of the gap -----------------------------------------------------------------

    @cached_property
    def compares_outputs(self) -> bool:
        """The loss is the distance from the outputs of training, in variances of the outputs.

        There the training blend is at 0 by construction, and whatever has other statistics than
        each batch is at the noise of batches at least.
        """
        probe = self.probe("training blend")
        unlabelled = self.measurement.task == "unknown" and probe is not None
        return unlabelled and probe is not None and not np.any(probe.losses)

    @cached_property
    def bn_gap(self) -> float:
        """Loss at the training blend minus inference; 0 when it does not matter.

        Where outputs are compared: that of the best fixed statistics, since no others can do what
        batches do.
        """
        if not self.compares_outputs:
            return self.change("training blend", "inference")
        tried = [name for name in _POPULATIONS if self.probe(name) is not None]
        return min((self.change(name, "inference") for name in tried), default=0.0)

    @cached_property
    def dropout_gaps(self) -> dict[str, float]:
        """Loss with everything but BN as in training, minus without, by what BN does there."""
        known = self.measurement.probes.keys()
        return {
            beside: self.change(*pair)
            for beside, pair in _WITH_DROPOUT.items()
            if beside == "at inference" or known >= {*pair}
        }

    @property
    def dropout_beside(self) -> str:
        """Where it is smaller: on top of statistics that are off, noise does what neither does."""
        return min(self.dropout_gaps, key=lambda phase: abs(self.dropout_gaps[phase]))

    @property
    def dropout_gap(self) -> float:
        """The smaller one; 0 when it is nothing."""
        return self.dropout_gaps[self.dropout_beside]

    @cached_property
    def lost_to_company(self) -> tuple[int, float]:
        """A batch size, and what inference saves there, where no noise is known; else 0 and 0.

        Of the same samples as in the batches given; most of the gap, and no more than that.
        """
        gap, own = -self.dropout_gap, self.measurement.batch_size
        if gap <= 0 or self.measurement.noise_layers:
            return 0, 0.0
        losses = {point.batch_size: point.inference_loss for point in self.measurement.sweep}
        best = min(losses, key=lambda size: losses[size], default=own)
        saved = losses[own] - losses[best] if own in losses else 0.0
        return (best, min(saved, gap)) if saved > gap / 2 else (0, 0.0)

    @cached_property
    def total_gap(self) -> float:
        """Loss in the model's own training mode minus inference; 0 when it does not matter."""
        if self.compares_outputs and not self.measurement.noise_layers:
            return self.bn_gap
        return self.change("training", "inference")

    @cached_property
    def batch_noise(self) -> tuple[int, float] | None:
        """A larger batch and its loss, where it ends most of what training mode loses."""
        size, inference = self.measurement.batch_size, self.loss("inference")
        points = {p.batch_size: p.batch_loss for p in self.measurement.sweep}
        large = max(points, default=size)
        if self.bn_gap <= 0 or inference is None or size not in points or large <= size:
            return None
        saved = points[size] - points[large]
        return (large, points[large]) if saved > (points[size] - inference) / 2 else None

    @cached_property
    def replaced_at_inference(self) -> Mapping[str, str]:
        """Path of a site that training uses -> the one in its place at inference; by a gap."""
        pairs = in_place_of(self.facts, self.measurement)
        return pairs if self.total_gap < 0 else {}

    @property
    def inference_is_worse(self) -> bool:
        """Inference loses to the same model at its training blend."""
        return self.bn_gap < 0

    @cached_property
    def beyond_population(self) -> float:
        """What the training blend saves beyond the population's statistics, at least 0.

        No stored statistics can close this part of the gap: it lies in the batches themselves.
        Layers behind locked sites were fitted to what those have stored, so the best of three
        trials counts: exact statistics at all, at the unfrozen or at the frozen sites.
        """
        if self.compares_outputs:
            return 0.0
        tried = [name for name in _POPULATIONS if self.probe(name) is not None]
        least = min((self.change(name, "training blend") for name in tried), default=0.0)
        return max(0.0, least)

    def closed_by(self, name: str) -> float:
        """Share of what exact statistics save at inference that a probe saves; 1 without either."""
        tried = [probe for probe in _POPULATIONS if self.probe(probe) is not None]
        exact = max((-self.change(probe, "inference") for probe in tried), default=0.0)
        if exact <= 0 or self.probe(name) is None:
            return 1.0
        return max(0.0, -self.change(name, "inference")) / exact

    @cached_property
    def own_batches_gain(self) -> float:
        """What the batches as they come save at inference, where no other statistics do as well.

        0 unless they save clearly more than mixed batches, batches of one class and any fixed
        statistics: then it is their make-up that the network relies on.
        """
        return self._own_batches[0]

    @cached_property
    def own_batches_alone(self) -> float:
        """The part of it that none of those reaches."""
        return self._own_batches[1]

    @cached_property
    def _own_batches(self) -> tuple[float, float]:
        gain = -self.change("given", "given inference")
        mixed = () if self.unmixed else ("training blend",)
        rivals = ("sorted", *mixed, *_POPULATIONS)
        known = [name for name in rivals if self.probe(name) is not None]
        reached = max((-self.change(name, "inference") for name in known), default=0.0)
        alone = gain - max(0.0, reached)
        return (
            (gain, alone) if gain > 0 and alone > max(OWN_PART * gain, self.floor) else (0.0, 0.0)
        )

    @property
    def unmixed(self) -> bool:
        """All probes are of the batches as they come, since nothing can mix them."""
        given, blended = self.probe("given"), self.probe("training blend")
        if given is None or blended is None:
            return False
        return np.array_equal(given.losses, blended.losses)

    @property
    def own_batches(self) -> tuple[str, ...]:
        """Sites that see the batches as they come far apart, in execution order."""
        sites = self.measurement.sites
        return tuple(p for p in self.sites if p in sites and (sites[p].own_batches or 0.0) > FAR)

    @cached_property
    def best_in_pure_batches(self) -> bool:
        """Batches of one class each beat mixed batches, inference and exact statistics.

        In a network trained on mixed batches they lose what separates the classes.
        """
        rivals = ("batch", "inference", "population")
        return self.measurement.batch_size > 1 and all(
            self.change("sorted", rival) < 0 for rival in rivals
        )

    @cached_property
    def stale_part(self) -> float:
        """Part of the BN gap that lies in stored statistics of sites that move, in [0, 1]."""
        gap = abs(self.bn_gap)
        if not self.inference_is_worse:
            return 1.0
        part = max(0.0, 1 - self.beyond_population / gap)
        return min(part, self._halves[1] / gap) if self.locked_gain else part

    @cached_property
    def locked_gain(self) -> float:
        """What the population's statistics at locked sites would save, in units of the loss.

        Locked sites have no part in the gap between the modes: both use what is stored. The gain
        must show once all other statistics are right; with thawed sites beside them it is shared
        by :attr:`_halves`.
        """
        locked = self.with_role("locked")
        if not locked or self.with_role("frozen batch", "frozen drift"):
            return 0.0
        if self.probe("population unfrozen") is None or len(locked) == len(self.roles):
            return max(0.0, -self.change("population", "inference"))
        further = self.change("population", "population unfrozen")
        return self._halves[0] if further < 0 else 0.0

    @cached_property
    def _halves(self) -> tuple[float, float]:
        """What exact statistics of frozen and of unfrozen sites save: Shapley's values of the two.

        Each is the mean of what it saves alone and what it saves after the other one.
        """
        names = ("inference", "population frozen", "population unfrozen", "population")
        losses = [self.loss(name) for name in names]
        known = [value for value in losses if value is not None]
        if len(known) < len(names):
            return 0.0, 0.0
        nothing, frozen, unfrozen, both = known
        return (
            max(0.0, (nothing - frozen + unfrozen - both) / 2),
            max(0.0, (nothing - unfrozen + frozen - both) / 2),
        )

    @cached_property
    def left_over(self) -> float:
        """Part of the total gap that is neither BN nor dropout, in absolute value."""
        noise = _WITH_DROPOUT[self.dropout_beside]
        pairs = (("training", "inference"), ("training blend", "inference"), noise)
        parts = [self.difference(*pair) for pair in pairs]
        if not self.total_gap or parts[0] is None:
            return 0.0
        text = sum(part.estimate for part in parts[1:] if part is not None)
        return abs(parts[0].estimate - text)

    @cached_property
    def gap_parts(self) -> float:
        """All parts of the gap that matter, in absolute value: what shares are shares of."""
        return abs(self.bn_gap) + abs(self.dropout_gap) + self.left_over

    def blame(self, paths: Iterable[str]) -> float:
        """Part of the BN gap that lies at some sites, at least 0, in units of the loss.

        From the attribution; without one the gap is split by how far each site's stored
        statistics are from those of the data. What is attributed to victims (batch statistics
        there undo what sites before have done) goes to the others in proportion.
        """
        chosen, gap = set(paths) - self.victims, self.bn_gap
        if not gap or not chosen:
            return 0.0
        found = self.measurement.attribution
        if found is not None and found.residual <= _TRUSTED and np.isfinite(found.shares).all():
            # Of some samples, and short of their gap by the residual: in units of the gap on
            # all, so that what is said of a cause is what its share says.
            scale = abs(gap) / float(found.shares.sum())
            toward = dict(zip(found.paths, found.shares * scale, strict=True))
            here = max(0.0, sum(float(toward.get(path, 0.0)) for path in chosen))
            passed_on = sum(float(toward.get(path, 0.0)) for path in self.victims)
            culprits = sum(float(v) for path, v in toward.items() if path not in self.victims)
            if passed_on <= 0 or culprits <= 0:
                return here
            return here * (1 + passed_on / culprits)
        active = [path for path in self.roles if self.roles[path] != "locked"]
        weights = {path: min(self.mismatch(path), _FAR_ENOUGH) for path in active}
        total = sum(weights.values())
        if not total:
            return abs(gap) * len(chosen & set(active)) / max(1, len(active))
        return abs(gap) * sum(weights.get(path, 0.0) for path in chosen) / total

    # --- sites --------------------------------------------------------------------------------

    @cached_property
    def served(self) -> bool:
        """Nothing trains and the whole module is in inference mode: no training step will come."""
        trains = any(layer.trains for layer in self.facts.layers)
        return (
            self.facts.mode is False
            and not trains
            and all(site.mode is False and site.site.params_frozen for site in self.facts)
        )

    @cached_property
    def sites(self) -> Mapping[str, SiteFacts]:
        """Path -> facts, in execution order; a count that training does not move is none."""
        seen = self.measurement.behaviour
        uncounted = {path for path, behaviour in seen.items() if behaviour.uncounted}
        return {
            site.site.path: replace(site, updates=None) if site.site.path in uncounted else site
            for site in self.facts
        }

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """Path -> what the site does in training, judged by what it did, else by its flags."""
        return {path: self._role(facts) for path, facts in self.sites.items()}

    def with_role(self, *roles: Role) -> tuple[str, ...]:
        """Paths of the sites with one of these roles, in execution order."""
        return tuple(path for path, role in self.roles.items() if role in roles)

    def _role(self, facts: SiteFacts) -> Role:
        site = facts.site
        if site.path in self.measurement.unused:
            return "unused"
        expected = expected_behaviour(facts)
        seen = self.measurement.behaviour.get(site.path, expected)
        blend = expected.training if seen.training is None else seen.training
        moves = expected.moves if seen.moves is None else seen.moves
        # No trace where its flags let it move: the passes that were watched did not come to it.
        unused = seen.training is None and seen.moves is False and bool(expected.moves)
        # Parameters of a served module need no gradient, which is no freeze of its statistics.
        free = self.served and bool(moves) and site.path not in self.moved_from_reference
        if self.meant_frozen(facts) and not free:
            if moves:
                return "frozen drift"
            return "frozen batch" if uses_batch(blend) and not unused else "locked"
        if moves or unused:
            return "moving"
        return "unmoved" if uses_batch(blend) else "locked"

    @staticmethod
    def meant_frozen(facts: SiteFacts) -> bool:
        """Some flag says that the site, or what holds it, is frozen.

        Not where it may be a teacher's, which has no gradients by design.
        """
        frozen = is_frozen(facts) and facts.twin is None
        return frozen or bool(facts.wrapper_frozen) or facts.undone

    def untold(self, paths: Iterable[str]) -> str:
        """Words for thawed sites that training runs as at inference; empty where there are none."""
        locked = set(paths) & set(self.with_role("locked"))
        thawed = [path for path in locked if not self.meant_frozen(self.sites[path])]
        if not thawed:
            return ""
        return (
            f"; training runs {count(len(thawed), 'site')} as at inference and updates none of "
            "them, although no flag freezes them: their calls do not learn the phase (a call() "
            "without training, or training=False by hand)"
        )

    @cached_property
    def thawed_in_prefix(self) -> tuple[str, ...]:
        """Thawed sites among frozen layers: none of the layers before them trains.

        A site at the head of the first thawed block, as in pre-activation networks, has frozen
        layers before it too; by its path it belongs to the layer behind it.
        """
        found: list[str] = []
        if self.served:
            return ()
        for path in self.with_role("moving"):
            order = self.facts.order.get(path, self.sites[path].site.index)
            before = [layer for layer in self.facts.layers if layer.order < order]
            if not before or any(layer.trains for layer in before):
                continue
            behind = layer_behind(self.facts, self.sites[path])
            own = _kinship(path, before[-1].path)
            if behind is None or not behind.trains or _kinship(path, behind.path) <= own:
                found.append(path)
        return tuple(found)

    def mismatch(self, path: str) -> float:
        """Distance of stored and population statistics in standard deviations.

        ``√(shift² + log(ratio)²/2)``, the median over channels: the root of twice the divergence
        of two normal distributions, to second order. Infinite where it is not finite.
        """
        found = self.measurement.sites.get(path)
        if found is None or not found.shift.size:
            return 0.0
        with np.errstate(invalid="ignore", divide="ignore"):
            distances = np.sqrt(np.square(found.shift) + np.square(np.log(found.ratio)) / 2)
        value = float(np.median(distances))
        return value if math.isfinite(value) else math.inf

    @cached_property
    def mismatches(self) -> Mapping[str, float]:
        """Path -> distance, of the sites that were measured, in execution order."""
        return {path: self.mismatch(path) for path in self.sites if path in self.measurement.sites}

    @cached_property
    def conversion(self) -> Mapping[str, float]:
        """``factor`` of mean and variance, ``power`` of the variance beside a right mean, or none.

        Two sites at least, and none that fits worse: the first one alone may have other inputs.
        """
        sites = [self.measurement.sites[path] for path in self.mismatches]
        far = [path for path in self.mismatches if self.mismatch(path) > FAR]
        if len(sites) < 2 or 2 * len(far) < len(sites):
            return {}
        variances = [v for site in sites for v in (site.stored_variance, site.batch_variance)]
        if not all((np.isfinite(values) & (values > 0)).all() for values in variances):
            return {}
        stored = [np.log(site.stored_variance) for site in sites]
        data = [np.log(site.batch_variance) for site in sites]
        deviation = [np.sqrt(site.batch_variance) for site in sites]
        factor = float(np.median(np.concatenate(stored) - np.concatenate(data)))

        def fits(means: float, variances: Sequence[Array]) -> bool:
            return all(
                float(np.median(np.abs(mine - want))) <= AGREES
                and float(np.median(np.abs(site.stored_mean / means - site.batch_mean) / spread))
                <= AGREES
                for site, spread, mine, want in zip(
                    sites, deviation, stored, variances, strict=True
                )
            )

        # Means near 0 tell nothing: weights that were scaled since would leave the same variances.
        telling = max(
            float(np.median(np.abs(site.batch_mean) / spread))
            for site, spread in zip(sites, deviation, strict=True)
        )
        if (
            telling > FAR
            and abs(factor) > FAR
            and fits(math.exp(factor), [v + factor for v in data])
        ):
            return {"factor": math.exp(factor)}
        for power in POWERS:
            if fits(1.0, [power * values for values in data]):
                return {"power": power}
        return {}

    def values_per_batch(self, path: str, batch_size: int) -> int | None:
        """Values per channel that one batch gives a site."""
        found = self.measurement.sites.get(path)
        values = found.values if found is not None else None
        values = self.sites[path].values if values is None and path in self.sites else values
        return None if values is None else values * batch_size

    def few_values(self, batch_size: int) -> tuple[str, ...]:
        """Sites to which one batch of this size gives few values that are independent."""
        active = self.with_role("moving", "frozen batch", "frozen drift", "unmoved")
        if batch_size <= FEW_SAMPLES:
            return active
        return tuple(
            path
            for path in active
            if (values := self.values_per_batch(path, batch_size)) is not None
            and (values < FEW_VALUES or self._as_noisy(path, batch_size))
        )

    def _as_noisy(self, path: str, batch_size: int) -> bool:
        """Batch means scatter as those of few values do: by more than ``1 / √FEW_VALUES``.

        Neighbouring pixels are alike, so that many of them are worth few. Batches of different
        sources scatter whatever their size.
        """
        if self.own_batches_gain and path in self.own_batches:
            return False
        found, size = self.measurement.sites.get(path), self.measurement.batch_size
        return found is not None and found.noise**2 * size > batch_size / FEW_VALUES

    def stored(self, path: str) -> tuple[Array, Array] | None:
        """Stored mean and variance of a site."""
        facts = self.sites[path]
        if facts.mean is None or facts.variance is None:
            return None
        return facts.mean, facts.variance

    # --- the moving average -------------------------------------------------------------------

    @cached_property
    def steps(self) -> int | None:
        """Training steps that were made; ``None`` when that is not known."""
        known = self.measurement.steps
        known = self.facts.steps if known is None else known
        return known or None

    @cached_property
    def untrained(self) -> bool:
        """Every site is as a new layer is: statistics, gamma and beta, and no step is known.

        Gamma and beta that cannot train tell nothing.
        """
        if self.steps or all(facts.site.params_frozen for facts in self.sites.values()):
            return False
        for facts in self.sites.values():
            new = initial_values(facts)
            affine = facts.gamma is not None or facts.beta is not None
            if new is None or not (new.mean and new.variance and affine):
                return False
            if affine_is_trained(facts):
                return False
        return True

    def updates(self, path: str) -> int | None:
        """How often the statistics of a site were updated; ``None`` when not known."""
        return averages.update_count(self.sites[path], self.steps)

    def old_share(self, path: str) -> float | None:
        """Share of the statistics from before training: decayⁿ; ``None`` when not known."""
        return averages.old_share(self.sites[path], self.steps)

    def windows(self, path: str) -> float | None:
        """Length of the run in windows of the moving average, ``1 / (1 − decay)`` updates each."""
        return averages.run_length(self.sites[path], self.steps)

    def decay_text(self, path: str) -> str:
        """The decay of a site in words of its framework."""
        facts = self.sites[path]
        if facts.cumulative:
            return "momentum=None"
        return facts.words.decay(facts.site.decay)

    # --- reference and findings ---------------------------------------------------------------

    @cached_property
    def reference(self) -> Difference | None:
        """How a reference differs; ``None`` when none was given."""
        return self.measurement.difference

    @cached_property
    def same_params(self) -> bool:
        """A reference was given and its weights are those of the model."""
        known = self.reference
        return known is not None and all(value <= EQUAL for value in known.params.values())

    @cached_property
    def moved_from_reference(self) -> Mapping[str, float]:
        """Path -> distance of the stored statistics from the reference's, where they differ."""
        statistics = {} if self.reference is None else self.reference.statistics
        return {
            path: value
            for path, value in statistics.items()
            if value > EQUAL or not math.isfinite(value)
        }

    @cached_property
    def never_loaded(self) -> int:
        """Layers that differ from a trained reference where every site is as in a new layer.

        0 where a site has trained, or stores what the reference does.
        """
        known = self.reference
        if known is None or not self.untrained or not {*self.sites} <= {*self.moved_from_reference}:
            return 0
        return sum(value > EQUAL for value in known.params.values())

    def found(self, *codes: str, sites: Iterable[str] | None = None) -> tuple[str, ...]:
        """Which of these codes were found, optionally at some of these sites."""
        wanted = None if sites is None else set(sites)
        found = {
            finding.code
            for finding in self.findings
            if finding.code in codes and (wanted is None or wanted & set(finding.sites))
        }
        return tuple(sorted(found))

    def of_rule(self, code: str) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
        """Findings of a rule, and their sites in execution order."""
        findings = tuple(finding for finding in self.findings if finding.code == code)
        named = {path for finding in findings for path in finding.sites}
        return findings, tuple(path for path in self.sites if path in named)


def _kinship(first: str, second: str) -> int:
    """How many leading words two paths share: ``block2/0/bn1`` and ``block2/0/conv1`` share 2."""
    pairs = zip(re.split(r"[/_.]", first), re.split(r"[/_.]", second), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def number(value: float) -> str:
    """A number for a sentence: three digits."""
    return f"{value:.3g}"


def count(number_of: int, word: str) -> str:
    """``1 site``, ``3 sites``."""
    return f"{number_of} {word}{'' if number_of == 1 else 's'}"
