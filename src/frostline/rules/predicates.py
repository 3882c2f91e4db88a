"""What rules and causes both ask of a site: one answer each, so that they cannot disagree.

Arrays have shape ``(channels,)`` and are float64.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from frostline.types import Array
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts
from frostline.types.measured import Behaviour, Measurement

#: λ from which a site counts as one that uses the batch; sites in between are rare (renorm).
USES_BATCH = 0.5


# --- stored numbers -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BadChannels:
    """Channels with statistics that no data give.

    Attributes:
        not_finite: The mean or the variance is NaN or infinite.
        negative: The variance is below 0.
    """

    not_finite: Array
    negative: Array

    @property
    def count(self) -> int:
        """How many channels have either fault."""
        return int(np.sum(self.not_finite | self.negative))


def bad_channels(facts: SiteFacts) -> BadChannels | None:
    """Find channels with impossible statistics; ``None`` when all are sound, or none are stored."""
    if facts.mean is None or facts.variance is None:
        return None
    with np.errstate(invalid="ignore"):
        found = BadChannels(
            ~(np.isfinite(facts.mean) & np.isfinite(facts.variance)), facts.variance < 0
        )
    return found if found.count else None


@dataclass(frozen=True)
class InitialValues:
    """Which statistics of a site are those of a new layer, in every channel.

    Attributes:
        mean: The mean is 0.
        variance: The variance is 1, or 0.
        zero: The variance is 0.
        half: One of the two has moved, with a value of its own in each channel; one constant in
            all channels would be an initializer.
    """

    mean: bool
    variance: bool
    zero: bool
    half: bool


def initial_values(facts: SiteFacts) -> InitialValues | None:
    """Compare stored statistics with those of a new layer; ``None`` when none are stored."""
    mean, variance = facts.mean, facts.variance
    if mean is None or variance is None:
        return None
    zero, mean_kept = not variance.any(), not mean.any()
    variance_kept = zero or bool(np.all(variance == 1))
    moved = variance if mean_kept else mean
    half = mean_kept != variance_kept and bool(np.ptp(moved) > 0)
    return InitialValues(mean_kept, variance_kept, zero, half)


def affine_is_trained(facts: SiteFacts) -> bool:
    """Whether gamma or beta shows training: a constant over all channels is an initializer.

    The last gamma of a residual branch often starts at 0.
    """
    return any(
        values is not None
        and bool(np.any(values != values.flat[0]) if values.size > 1 else values.flat[0] not in new)
        for values, new in ((facts.gamma, (0.0, 1.0)), (facts.beta, (0.0,)))
    )


def is_identity(facts: SiteFacts) -> bool:
    """Whether a locked site has nothing of a training: gamma and beta of a new layer, and frozen.

    At initial statistics it is an affine layer that training used as it is, if there was any.
    """
    return is_locked(facts) and facts.site.params_frozen and not affine_is_trained(facts)


def epsilon_effect(variance: Array, ours: float, theirs: float) -> float:
    """Largest change of scale over the channels that another epsilon makes."""
    variance = np.maximum(variance, 0.0)
    return float(np.max(np.abs(np.sqrt((variance + theirs) / (variance + ours)) - 1)))


# --- frozen sites ---------------------------------------------------------------------------------


def expected_behaviour(facts: SiteFacts) -> Behaviour:
    """What the flags of a site say that it does in training."""
    site = facts.site
    stores = site.policy == "batch" or facts.mean is not None
    locked = site.stats_frozen and (site.policy == "inference" or not stores)
    return Behaviour(
        path=site.path, training=0.0 if locked else 1.0, inference=None, moves=not site.stats_frozen
    )


def uses_batch(blend: float | None) -> bool:
    """Whether a measured blend is that of the batch; ``None``, not known, is not."""
    return blend is not None and blend >= USES_BATCH


def overrides_phase(model: ModelFacts, facts: SiteFacts, inference: float | None) -> bool:
    """A site uses the batch although the whole model was asked for inference.

    Not one that was left in training mode inside of a model in evaluation mode, which ``eval()``
    reaches, nor one that stores nothing to use instead.
    """
    left = model.mode is False and bool(facts.mode)
    stores, passed = facts.mean is not None, facts.words.passed_phase is not None
    return uses_batch(inference) and stores and passed and not left


def is_frozen(facts: SiteFacts) -> bool:
    """Whether the parameters or the statistics of a site are frozen."""
    return facts.site.params_frozen or facts.site.stats_frozen


def frozen_on_batch(facts: SiteFacts, seen: Behaviour) -> bool:
    """A frozen site normalises with the batch, and its statistics do not move (FL101, FL301)."""
    return is_frozen(facts) and uses_batch(seen.training) and seen.moves is False


def frozen_moves(facts: SiteFacts, seen: Behaviour) -> bool:
    """The statistics of a frozen site move in training (FL102, FL103, FL302)."""
    return is_frozen(facts) and seen.moves is True


def is_locked(facts: SiteFacts) -> bool:
    """Whether a site uses its stored statistics in training, by its flags."""
    return facts.site.stats_frozen and facts.site.policy == "inference"


def only_serves(model: ModelFacts) -> bool:
    """True for an eval-mode model with no trainable parameters; its training flags mean nothing."""
    trains = any(not facts.site.params_frozen for facts in model)
    return model.mode is False and not trains and not any(layer.trains for layer in model.layers)


def in_place_of(model: ModelFacts, measurement: Measurement) -> dict[str, str]:
    """Path of a site that training alone uses -> of the one that inference uses in its place.

    As a layer with one BN per domain does that takes the first one in evaluation mode. Such a pair
    has one place, so that its paths differ in one word, with nothing but BN below it: another part
    of the network, as a teacher, has layers of its own. A second head of training takes no place.
    """
    seen, channels = measurement.behaviour, {f.site.path: f.site.channels for f in model}
    left = [path for path in channels if path in seen and seen[path].calls[1] > seen[path].calls[0]]
    found: dict[str, str] = {}
    for path in channels:
        if path not in seen or not seen[path].calls[0] or seen[path].calls[1]:
            continue
        for other in left:
            word = _one_word_apart(path, other)
            if word is None or channels[path] != channels[other]:
                continue
            inside = "/".join(path.split("/")[: word + 1]) + "/"
            if not any(layer.path.startswith(inside) for layer in model.layers):
                found[path] = other
                break
    return found


def _one_word_apart(first: str, second: str) -> int | None:
    """Position of the one word in which two paths differ; ``None``: there is no such one."""
    words = first.split("/"), second.split("/")
    apart = [i for i, pair in enumerate(zip(*words, strict=False)) if pair[0] != pair[1]]
    return apart[0] if len(words[0]) == len(words[1]) and len(apart) == 1 else None


# --- neighbours -----------------------------------------------------------------------------------


def layer_before(model: ModelFacts, facts: SiteFacts) -> LayerFacts | None:
    """The last layer with weights before a site, in execution order."""
    order = model.order.get(facts.site.path, facts.site.index)
    place = bisect.bisect_left(model.orders, order)
    return model.layers[place - 1] if place else None


def layer_behind(model: ModelFacts, facts: SiteFacts) -> LayerFacts | None:
    """The first layer with weights behind a site, in execution order."""
    order = model.order.get(facts.site.path, facts.site.index)
    place = bisect.bisect_right(model.orders, order)
    return model.layers[place] if place < len(model.layers) else None


def frozen_layer_fed(model: ModelFacts, facts: SiteFacts) -> LayerFacts | None:
    """The frozen layer right behind a thawed site (FL106, FL311); ``None`` without one."""
    behind = None if is_frozen(facts) else layer_behind(model, facts)
    return None if behind is None or behind.trains else behind
