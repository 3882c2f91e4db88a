"""FL201 to FL205: stored statistics that are broken, stale, or were never taken.

Arrays have shape ``(channels,)`` and are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from frostline.numerics.averages import OLD_SHARE, update_count
from frostline.rules import Hit, rule
from frostline.rules.fixtures import Stored
from frostline.rules.predicates import (
    affine_is_trained,
    bad_channels,
    initial_values,
    is_identity,
)
from frostline.types.codes import Fix
from frostline.types.facts import ModelFacts, SiteFacts


@rule("FL201", "non-finite-statistics", severity="error", needs="statistics", fix=Fix.RECALIBRATE)
def non_finite_statistics(model: ModelFacts) -> Iterator[Hit]:
    """Stored statistics are NaN or infinite.

    ## What it does
    Counts the channels whose stored mean or variance is not finite.

    ## Why is this bad?
    One bad batch is enough: a moving average never forgets NaN. Training does not show it, because
    it normalises with the batch; inference gives NaN, or a constant where the variance is infinite.

    ## Example
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").moving_mean.assign(np.array([0.0, np.nan, 0.0, 0.0]))
    ```

    ## Use instead
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").moving_mean.assign(np.array([0.0, 0.5, 0.0, 0.0]))
    ```

    ## When not to use it
    Never.

    ## References
    Ioffe and Szegedy 2015, algorithm 2.
    """
    for facts in model:
        found = bad_channels(facts)
        bad = 0 if found is None else int(np.sum(found.not_finite))
        if found is not None and bad:
            channels = found.not_finite.size
            yield Hit(
                sites=(facts.site.path,),
                message=f"{bad} of {channels} channels have statistics that are not finite: "
                "inference is useless; recalibrate",
                evidence={"channels": float(bad), "share": bad / channels},
            )


@rule("FL202", "negative-variance", severity="error", needs="statistics", fix=Fix.RECALIBRATE)
def negative_variance(stored: Stored) -> Iterator[Hit]:
    """A stored variance is below 0.

    ## What it does
    Reports channels whose stored variance is negative, by whatever amount.

    ## Why is this bad?
    No variance is negative: weights were loaded in the wrong order (a mean in place of the
    variance), or cancellation destroyed it. Below `-epsilon` the square root is NaN; just above it
    the channel is amplified without limit.

    ## Example
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").moving_variance.assign(np.array([1.0, -0.2, 1.0, 1.0]))
    ```

    ## Use instead
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").moving_variance.assign(np.array([1.0, 0.2, 1.0, 1.0]))
    ```

    ## When not to use it
    Never.

    ## References
    Chan, Golub and LeVeque 1983.
    """
    for facts, _, variance in stored:
        found = bad_channels(facts)
        bad = 0 if found is None else int(np.sum(found.negative))
        if bad:
            lowest = float(np.nanmin(variance))
            yield Hit(
                sites=(facts.site.path,),
                message=f"variance is negative in {bad} of {variance.size} channels, lowest "
                f"{lowest:.2g}; check the order of the weights",
                evidence={"channels": float(bad), "lowest": lowest},
            )


@rule(
    "FL203", "stale-running-statistics", severity="warning", needs="optimizer", fix=Fix.RECALIBRATE
)
def stale_running_statistics(
    model: ModelFacts, old_shares: Mapping[str, float], *, max_share: float = OLD_SHARE
) -> Iterator[Hit]:
    """Too few training steps for the moving average: much of it is from before.

    ## What it does
    After n updates a moving average keeps `decay**n` of its old value. n is the layer's own count
    where it has one, else the number of training steps of the present optimizer. Reports thawed
    sites that keep more than `max_share`.

    ## Why is this bad?
    Weights move faster than the average: 48 steps at 0.99 leave 62% of the statistics of the old
    data, or of the 0 and 1 of a new layer. Training uses the batch and looks fine; inference does
    not.

    ## Example
    ```python
    {network momentum=0.99}
    model.compile("sgd", "mse")
    for _ in range(3):
        model.train_on_batch(np.eye(4, dtype="float32"), np.ones((4, 2), "float32"))
    ```

    ## Use instead
    ```python
    {network momentum=0.4}
    model.compile("sgd", "mse")
    for _ in range(3):
        model.train_on_batch(np.eye(4, dtype="float32"), np.ones((4, 2), "float32"))
    ```

    ## When not to use it
    When training goes on with data like those of before, or after a recalibration, which leaves no
    trace in the optimizer's count.

    ## Options
    `max_share` (default 0.1): old share that is tolerated; reached after 230 steps at 0.99.

    ## References
    tensorflow issue 46414; keras issue 7265.
    """
    for facts in model:
        site, share = facts.site, old_shares.get(facts.site.path, 0.0)
        if share > max_share:
            updates = update_count(facts, model.steps) or 0
            yield Hit(
                sites=(site.path,),
                message=f"{share:.0%} of the statistics are from before training "
                f"({site.decay:g}**{updates} is left); recalibrate",
                evidence={"steps": float(updates), "decay": site.decay, "old_share": share},
                certainty="may",
            )


@rule("FL204", "initial-statistics", severity="error", needs="statistics", fix=Fix.RECALIBRATE)
def initial_statistics(model: ModelFacts, stored: Stored) -> Iterator[Hit]:
    """The statistics were never updated, or only one of the two was.

    ## What it does
    Reports sites whose stored mean is exactly 0 and variance exactly 1 in every channel although
    the layer is in use: frozen, its gamma or beta trained, or training steps made. Also those
    where one of the two has moved and the other has not.

    ## Why is this bad?
    At inference such a site does not normalise. Causes: a training loop that calls the model
    without `training=True`, a custom layer that forgets one of the updates, a new layer that is
    frozen before it has seen data.

    ## Example
    ```python
    {network}
    model.get_layer("bn").trainable = False
    ```

    ## Use instead
    ```python
    {network}
    ```

    ## When not to use it
    When the inputs are standardised already and only gamma and beta of the layer are wanted, or
    when training used a frozen layer so: `fl.diagnose` tells. A class that never moves anything
    (`FrozenBatchNorm2d`) and has gamma 1 and beta 0 besides is a note: statistics of the data would
    change what the layers behind it have learned.

    ## References
    keras-core issue 338; tf-frrn issue 2.
    """
    for facts, mean, _ in stored:
        initial, reason = initial_values(facts), _in_use(model, facts)
        if initial is None or initial.zero:  # FL205
            continue
        if initial.mean and initial.variance and reason is not None:
            message = f"mean 0 and variance 1 as in a new layer, although {reason}; recalibrate"
            message += ", unless it was trained so" if is_identity(facts) else ""
        elif initial.half:
            kept, moved = ("mean", "variance") if initial.mean else ("variance", "mean")
            value = "0" if initial.mean else "1"
            message = f"the {moved} has moved, the {kept} is {value} in every channel; recalibrate"
        else:
            continue
        evidence = {"channels": float(mean.size), "steps": float(model.steps or 0)}
        hit = Hit(sites=(facts.site.path,), message=message, evidence=evidence)
        if initial.mean and initial.variance and is_identity(facts) and facts.site.decay >= 1:
            # No update was ever meant: the layer scales and shifts, in training as at inference.
            message = "mean 0 and variance 1 for good: nothing is wrong if training used them so; "
            message += "else load those of the pretrained network"
            hit = replace(hit, message=message, certainty="may", severity="info", fix="")
        yield hit


@rule("FL205", "zero-variance", severity="error", needs="statistics", fix=Fix.RECALIBRATE)
def zero_variance(stored: Stored) -> Iterator[Hit]:
    """The stored variance is 0 in every channel.

    ## What it does
    Reports sites whose stored variances are all exactly 0.

    ## Why is this bad?
    Every channel is then multiplied by gamma / sqrt(epsilon), 32 at Keras' default. The layer was
    initialised with 0 and never updated, or has only seen constant inputs or batches of one value.

    ## Example
    ```python
    norm = keras.layers.BatchNormalization(moving_variance_initializer="zeros")
    model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(2)])
    ```

    ## Use instead
    ```python
    norm = keras.layers.BatchNormalization(moving_variance_initializer="ones")
    model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(2)])
    ```

    ## When not to use it
    Never.

    ## References
    equinox issue 955.
    """
    for facts, _, variance in stored:
        initial, epsilon = initial_values(facts), facts.site.epsilon
        if initial is not None and initial.zero:
            gain = 1 / np.sqrt(epsilon) if epsilon > 0 else np.inf
            yield Hit(
                sites=(facts.site.path,),
                message=f"variance 0 in all {variance.size} channels: inputs are multiplied by "
                f"{gain:.3g}; recalibrate",
                evidence={"channels": float(variance.size), "gain": float(gain)},
            )


def _in_use(model: ModelFacts, facts: SiteFacts) -> str | None:
    """Why a site should have seen data by now; ``None`` for a new one."""
    trained = affine_is_trained(facts)
    if facts.site.stats_frozen:
        return "the site is frozen"
    if trained and facts.updates == 0:
        return "gamma and beta have trained (num_batches_tracked is 0)"
    if model.steps:
        return f"training is at step {model.steps}"
    return "gamma and beta have trained" if trained else None
