"""Moving averages: how much of the old value is left, and which decay suits a run."""

from __future__ import annotations

import math
import operator

from frostline.types import DataError, ModelError
from frostline.types.arguments import checked
from frostline.types.facts import SiteFacts

#: Share of the old statistics above which an average has not caught up (FL203, FL306, EMA_LAG).
OLD_SHARE = 0.1

#: A decay below this averages fewer than two batches: ``1 / (1 − decay)``.
SHORTEST_DECAY = 0.5


def remaining_share(decay: float, updates: int) -> float:
    """Share of its old value that a moving average keeps: decayⁿ after n updates.

    Raises:
        DataError: A decay outside of [0, 1], or a negative number of updates.

    Example:
        >>> round(remaining_share(0.99, 48), 2)
        0.62
    """
    if not 0 <= decay <= 1 or updates < 0:
        raise DataError(
            "decay must be between 0 and 1 and updates not negative. "
            f"Received: decay={decay}, updates={updates}"
        )
    return float(decay) ** updates


def update_count(facts: SiteFacts, steps: int | None) -> int | None:
    """How often the statistics of a site were updated in training.

    Args:
        facts: Of the site. Its own count comes first; a shared layer is updated once per use.
        steps: Training steps of the model; ``None`` when not known.

    Returns:
        The number of updates; ``None`` when it is not known that the model was trained.
    """
    if not steps:
        return facts.updates or None
    return steps * max(1, facts.site.calls) if facts.updates is None else facts.updates


def is_exponential(facts: SiteFacts) -> bool:
    """Whether the statistics are an exponential average with a decay between 0 and 1.

    A cumulative or debiased average has no old share, nor has one that never or only moves.
    """
    return not (facts.cumulative or facts.site.debias) and 0 < facts.site.decay < 1


def old_share(facts: SiteFacts, steps: int | None) -> float | None:
    """Share of a site's statistics that is from before training, as :func:`remaining_share`.

    The one number that rules, data rules and causes judge a lagging average by.

    Args:
        facts: Of the site.
        steps: Training steps of the model; ``None`` when not known.

    Returns:
        A share in [0, 1]; ``None`` when the updates are not known or the average is not
        exponential.
    """
    updates = update_count(facts, steps)
    if updates is None or not is_exponential(facts):
        return None
    return remaining_share(facts.site.decay, updates)


def run_length(facts: SiteFacts, steps: int | None) -> float | None:
    """Length of the training run in windows of the average, ``1 / (1 − decay)`` updates each."""
    updates = update_count(facts, steps)
    if not updates or facts.cumulative or facts.site.debias:
        return None
    return updates * (1 - facts.site.decay)


def is_short(facts: SiteFacts, lowest: float = SHORTEST_DECAY) -> bool:
    """Whether the average holds fewer than ``1 / (1 − lowest)`` batches: two by default."""
    return facts.site.decay < lowest and not facts.cumulative


@checked
def suggest_momentum(steps: int, learning_rate_ratio: float = 1.0) -> float:
    """Suggest a Keras momentum for a planned number of training steps.

    An exponential average keeps ``decay**n`` of its old value after n updates. The suggestion is
    the slowest average that has forgotten all but 1% of it by the end::

        decay = 0.01 ** (learning_rate_ratio / steps),   at least 0.5 and at most 0.999

    (Keras' default 0.99 needs 459 steps for that; 70 steps leave 49%.) The variance of the average
    is (1 − decay) / (1 + decay) of that of one batch (Hunter, J. Quality Technology 18, 1986), so a
    slower one is less noisy. The lower bound keeps at least three batches' worth of averaging; it
    is reached at 6 steps, for which :func:`frostline.recalibrate` is the better tool.

    Args:
        steps: Updates that are planned, for example epochs times batches per epoch.
        learning_rate_ratio: Learning rate of the layers below divided by the usual one. With a
            smaller one their outputs move more slowly and the average may be longer in proportion:
            at 0.1 its horizon is ten times as long (63% of the old value is left at the end).

    Returns:
        The share of the old value that one update keeps; 1 minus it is PyTorch's momentum.

    Raises:
        ModelError: Not a positive number of steps or ratio.

    Example:
        >>> round(suggest_momentum(70), 3), suggest_momentum(10**6), suggest_momentum(1)
        (0.936, 0.999, 0.5)
    """
    try:
        count = 0 if isinstance(steps, bool) else operator.index(steps)
    except TypeError:
        count = 0
    if count < 1:
        raise ModelError(f"steps must be a whole number of at least 1. Received: steps={steps!r}")
    if not (math.isfinite(learning_rate_ratio) and learning_rate_ratio > 0):
        raise ModelError(
            "learning_rate_ratio must be a positive number. "
            f"Received: learning_rate_ratio={learning_rate_ratio!r}"
        )
    decay = math.pow(0.01, learning_rate_ratio / count)
    return min(max(decay, 0.5), 0.999)
