"""FL309, FL310, FL313 and FL315: where the stored statistics come from.

Arrays have shape ``(channels,)`` and are float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from frostline.numerics.averages import OLD_SHARE
from frostline.rules import Hit, rule
from frostline.rules.fixtures import Measured
from frostline.rules.predicates import epsilon_effect, is_locked
from frostline.types import Array
from frostline.types.codes import Fix
from frostline.types.measured import Measurement


@rule(
    "FL309",
    "between-source-variance-missing",
    severity="warning",
    needs="data",
    fix=Fix.RECALIBRATE,
)
def between_source_variance_missing(
    measured_sites: Measured,
    old_shares: Mapping[str, float],
    *,
    min_ratio: float = 1.5,
    min_share: float = 0.25,
) -> Iterator[Hit]:
    """The stored variance is that within one class, without what lies between the classes.

    ## What it does
    Splits the variance on the data into the part within a class and the part between classes. In
    channels where the total is at least `min_ratio` times the part within, it compares the stored
    variance with both on a logarithmic scale, and reports thawed sites where it is nearer to the
    part within.

    ## Why is this bad?
    A moving average gives this when every batch has a single source: real images or fakes, one
    domain, one class. Training centres each source by itself. Inference keeps the difference
    between the sources, scaled up by a variance that does not contain it.

    ## Example
    ```python
    rng = np.random.default_rng(0)
    y = np.arange(64) % 2
    x = (rng.normal(size=(64, 4)) + 4 * y[:, None] - 2).astype("float32")
    data = (x, y)

    model = keras.Sequential([
        keras.Input((4,)), keras.layers.BatchNormalization(moving_variance_initializer="ones"),
        keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    ```

    ## Use instead
    ```python
    {as above}
    total = keras.initializers.Constant(5.0)
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.BatchNormalization(moving_variance_initializer=total),
        keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    ```

    ## When not to use it
    When inference, too, is only ever asked about one source at a time.

    ## Options
    `min_ratio` (default 1.5): of the total variance to that within a class.
    `min_share` (default 0.25): of the channels that have it.

    ## References
    Keras issue 12353; Zajac et al. 2019 (split batch normalization).
    """
    for facts, numbers in measured_sites:
        within = numbers.within_variance
        lags = old_shares.get(facts.site.path, 0.0) > OLD_SHARE
        if facts.site.stats_frozen or within is None or lags:
            continue
        alive = (within > 0) & (numbers.stored_variance > 0)
        chosen = alive & (numbers.variance >= min_ratio * np.where(alive, within, 1.0))
        if np.sum(chosen) < max(1.0, min_share * within.size):
            continue
        total = np.log(numbers.variance[chosen] / within[chosen])
        position = float(
            np.median(np.log(numbers.stored_variance[chosen] / within[chosen]) / total)
        )
        between = float(1 - np.exp(-np.median(total)))
        if abs(position) < 0.5:
            yield Hit(
                sites=(facts.site.path,),
                message=f"the stored variance lacks what lies between classes, {between:.0%} of "
                "the total; mix the sources in each batch, or recalibrate",
                evidence={"between": between, "position": position},
                certainty="may",
            )


@rule("FL310", "shared-site-different-sources", severity="warning", needs="data")
def shared_site_different_sources(
    measured_sites: Measured, *, max_shift: float = 0.5, max_scale: float = 1.5
) -> Iterator[Hit]:
    """One BN layer normalises several tensors that were seen to differ.

    ## What it does
    For a site that the model uses more than once, compares mean and standard deviation of what
    each use saw: distance of the means in units of the mean standard deviation, and ratio of the
    standard deviations; the median channel of the two uses that differ most.

    ## Why is this bad?
    Training normalises each use by its own batch. At inference all uses share one average that
    describes none of them, so every source has an offset and a scale that the layers behind never
    saw in training.

    ## Example
    ```python
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    left, right = keras.Input((4,)), keras.Input((4,))
    norm = keras.layers.BatchNormalization(name="bn")
    both = keras.layers.Add()([norm(left), norm(right)])
    model = keras.Model([left, right], keras.layers.Dense(2)(both))
    model.compile("sgd", "mse")

    data = ((x, 3 * x + 5), x[:, :2])
    ```

    ## Use instead
    ```python
    {as above}
    data = ((x, x[::-1]), x[:, :2])
    ```

    ## When not to use it
    When the site is frozen in training and at inference, and was so when the rest was trained.

    ## Options
    `max_shift` (default 0.5): of a standard deviation. `max_scale` (default 1.5): ratio of
    standard deviations, either way.

    ## References
    Keras issue 12353.
    """
    for facts, numbers in measured_sites:
        if is_locked(facts) or len(numbers.uses) < 2:
            continue
        pairs = [
            _difference(a, b, facts.site.epsilon)
            for a, b in itertools.combinations(numbers.uses, 2)
        ]
        shift, scale = max(pairs, key=lambda pair: max(pair[0] / max_shift, pair[1] / max_scale))
        if shift > max_shift or scale > max_scale:
            yield Hit(
                sites=(facts.site.path,),
                message=f"its {len(numbers.uses)} uses differ by {shift:.2g} standard deviations "
                f"and a factor of {scale:.2g}; use one layer for each",
                evidence={"shift": shift, "scale": scale, "uses": float(len(numbers.uses))},
            )


@rule("FL313", "channels-dead-on-data", severity="info", needs="data")
def channels_dead_on_data(
    measured_sites: Measured, *, max_ratio: float = 1e-3, min_share: float = 0.05
) -> Iterator[Hit]:
    """Channels that were alive when the statistics were taken are constant on the data.

    ## What it does
    Counts the channels whose variance on the data is below `max_ratio` times epsilon while the
    stored one is above epsilon; reports the site when they are `min_share` of all.

    ## Why is this bad?
    The information of these channels is gone: a filter died in training (a learning rate too high),
    or the new data lack what it detects (a colour channel, a range). Training mode outputs beta
    there; inference outputs a constant that may be far from it.

    ## Example
    ```python
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    x[:, 1] = 0
    data = (x, x[:, :2])
    {network}
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    data = (x, x[:, :2])
    {network}
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    With few samples: rare features need many to show.

    ## Options
    `max_ratio` (default 1e-3), of epsilon. `min_share` (default 0.05), of all channels.

    ## References
    Lu et al. 2019 (dying ReLU).
    """
    for facts, numbers in measured_sites:
        epsilon = facts.site.epsilon
        dead = (numbers.variance <= max_ratio * epsilon) & (numbers.stored_variance > epsilon)
        count, offset = int(np.sum(dead)), float(np.max(np.where(dead, numbers.shift, 0.0)))
        if count and count >= min_share * dead.size:
            yield Hit(
                sites=(facts.site.path,),
                message=f"{count} of {dead.size} channels are constant on these data and were not "
                "when the statistics were taken; look at the inputs",
                evidence={"channels": float(count), "offset": offset},
            )


@rule("FL315", "epsilon-differs-from-reference", severity="warning", needs="data")
def epsilon_differs_from_reference(
    measurement: Measurement, measured_sites: Measured, *, min_effect: float = 0.05
) -> Iterator[Hit]:
    """A site has another epsilon than in the reference model, and it matters for its variances.

    ## What it does
    Needs a reference model. Reports the largest change of scale over the channels, `sqrt((var +
    theirs) / (var + ours)) - 1`, when it is at least `min_effect`. FL113 finds single sites without
    a reference; this rule finds models that are wrong throughout.

    ## Why is this bad?
    Keras' default is 1e-3, torch's 1e-5. In a converted model the wrong one changes the scale of
    channels with a small variance, and nothing raises an error.

    ## Example
    ```python
    x = np.random.default_rng(0).normal(0, 0.03, (64, 4)).astype("float32")
    data = (x, x[:, :2])
    def converted(epsilon):
        norm = keras.layers.BatchNormalization(epsilon=epsilon, name="bn")
        net = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(2, name="head")])
        norm.moving_variance.assign(x.var(0))
        net.compile("sgd", "mse")
        return net

    reference, model = converted(1e-5), converted(1e-3)
    ```

    ## Use instead
    ```python
    {as above}
    reference, model = converted(1e-5), converted(1e-5)
    ```

    ## When not to use it
    When the model was trained on with the new epsilon.

    ## Options
    `min_effect` (default 0.05): smallest change of scale that is reported, of 1.

    ## References
    Defaults of `keras.layers.BatchNormalization` and `torch.nn.BatchNorm2d`.
    """
    if measurement.difference is None:
        return
    for facts, numbers in measured_sites:
        pair = measurement.difference.epsilons.get(facts.site.path)
        if pair is None:
            continue
        ours, theirs = pair
        effect = epsilon_effect(numbers.stored_variance, ours, theirs)
        if effect >= min_effect:
            yield Hit(
                sites=(facts.site.path,),
                message=f"epsilon {ours:g}, but {theirs:g} in the reference: scale is up to "
                f"{effect:.0%} off; set the reference's",
                evidence={"epsilon": ours, "reference": theirs, "effect": effect},
            )


def _difference(
    first: tuple[Array, Array], second: tuple[Array, Array], epsilon: float
) -> tuple[float, float]:
    """Shift and scale between two (mean, variance) pairs, median channel."""
    (mean, variance), (other_mean, other_variance) = first, second
    shift = np.abs(mean - other_mean) / np.sqrt((variance + other_variance) / 2 + epsilon)
    logs = np.abs(np.log((variance + epsilon) / (other_variance + epsilon)))
    return float(np.median(shift)), float(np.exp(np.median(logs) / 2))
