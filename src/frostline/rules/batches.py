"""FL307, FL308 and FL314: what one batch is worth, measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from frostline.rules import Hit, rule
from frostline.rules.fixtures import Measured, fixture
from frostline.rules.predicates import uses_batch
from frostline.types.codes import Fix
from frostline.types.measured import Measurement

#: Fewer batches than this do not tell how much batches differ.
_FEWEST_BATCHES = 4


@rule("FL307", "few-effective-samples", severity="warning", needs="data", fix=Fix.FREEZE)
def few_effective_samples(
    measurement: Measurement, noisy_sites: Measured, *, min_values: float = 16.0
) -> Iterator[Hit]:
    """One batch is worth too few independent values per channel for batch statistics.

    ## What it does
    Measures how much the batch means of a site scatter over the batches of the data, as a share s
    of the population's standard deviation: a batch is worth `1 / s**2` independent values. Reports
    sites that train on the batch's statistics when that is below `min_values`. Pixels of one image
    are alike, so the number is far below batch times height times width; batches of one class
    lower it too. Needs four batches at least.

    ## Why is this bad?
    In every step the batch's mean is off by s standard deviations and its variance by about sqrt(2)
    s. Training sees noise that inference does not, and the stored variance, which is the average
    within a batch, lacks the variance between batches.

    ## Example
    ```python
    {pairs}
    {network}
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    {pairs}
    {network}
    model.get_layer("bn").trainable = False
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    When the data are given in other batches than those of training.

    ## Options
    `min_values` (default 16): at 16 the batch's mean is off by a quarter of a standard deviation.

    ## References
    Wu and He 2018; DMS issue 30.
    """
    for facts, numbers in noisy_sites:
        worth = 1 / numbers.noise**2
        if worth < min_values:
            size = (
                "" if numbers.values is None else f" of {measurement.batch_size * numbers.values}"
            )
            yield Hit(
                sites=(facts.site.path,),
                message=f"a batch is worth {worth:.2g}{size} values: its mean is off by "
                f"{numbers.noise:.0%} of a standard deviation; freeze, or larger batches",
                evidence={"effective_values": worth, "noise": numbers.noise},
            )


@rule("FL308", "stacked-bessel-bias", severity="info", needs="data", fix=Fix.RECALIBRATE)
def stacked_bessel_bias(
    measurement: Measurement, measured_sites: Measured, *, min_effect: float = 0.05
) -> Iterator[Hit]:
    """Stored variances are unbiased, batch variances are not, and the factors multiply over depth.

    ## What it does
    Compares each stored variance with the mean biased variance of a batch. Where the average was
    made of unbiased variances, as in PyTorch and old Keras, the ratio is `n / (n - 1)` for n values
    per channel and batch. Reports the sites together when the product of their ratios is the
    predicted one and the model's scale, which changes by the product of `sqrt((n - 1) / n)`,
    differs by more than `min_effect`.

    ## Why is this bad?
    Nobody made a mistake, and for n in the thousands the effect vanishes. With small batches, no
    pixels and many BN layers in a row the outputs of inference shrink: 20 layers at n = 64 give
    1/1.17 of what training gives.

    ## Example
    ```python
    rows = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    rows = (rows - rows.mean(0)) / rows.std(0)
    data = [(rows, rows[:, :2]) for _ in range(4)]

    unbiased = keras.initializers.Constant(8 / 7)
    model = keras.Sequential([keras.Input((4,))] + [
        keras.layers.BatchNormalization(epsilon=1e-6, moving_variance_initializer=unbiased)
        for _ in range(6)] + [keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    {as above}
    model = keras.Sequential([keras.Input((4,))] + [
        keras.layers.BatchNormalization(epsilon=1e-6) for _ in range(6)] + [keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    When the data are given in other batches than those of training: n is taken from these.

    ## Options
    `min_effect` (default 0.05): smallest change of the model's scale that is reported.

    ## References
    pytorch issue 100048; Ioffe and Szegedy 2015, section 3.1.
    """
    logs, predicted, paths = 0.0, 0.0, []
    for facts, numbers in measured_sites:
        count = measurement.batch_size * (numbers.values or 0)
        alive = (numbers.batch_variance > 0) & (numbers.stored_variance > 0)
        if count < 2 or not np.any(alive):
            continue
        found = float(
            np.median(np.log(numbers.stored_variance[alive] / numbers.batch_variance[alive]))
        )
        factor = math.log(count / (count - 1))
        if 0.5 * factor < found < 1.5 * factor:
            logs, predicted = logs + found, predicted + factor
            paths.append(facts.site.path)
    ratio, expected = math.exp(-logs / 2), math.exp(-predicted / 2)
    if 1 - expected >= min_effect and abs(logs - predicted) <= 0.25 * predicted:
        yield Hit(
            sites=tuple(paths),
            message=f"stored variances are unbiased, which adds up over {len(paths)} sites: "
            f"inference gives {ratio:.3g} of training's scale (predicted {expected:.3g})",
            evidence={"ratio": ratio, "predicted": expected, "sites": float(len(paths))},
        )


@rule("FL314", "noisy-moving-average", severity="warning", needs="data", fix=Fix.SET_MOMENTUM)
def noisy_moving_average(noisy_sites: Measured, *, max_error: float = 0.2) -> Iterator[Hit]:
    """The moving average forgets so fast that it follows the last batches.

    ## What it does
    Measures how much batch means scatter (FL307) and computes the scatter of their moving average:
    `noise * sqrt((1 - decay) / (1 + decay))` standard deviations. Reports thawed sites where that
    is above `max_error`. Needs four batches at least.

    ## Why is this bad?
    The stored statistics are those of the last few batches, so inference depends on which batches
    came last. Batches sorted by class make it worse.

    ## Example
    ```python
    {pairs}
    {network momentum=0.1}
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    {pairs}
    {network momentum=0.99}
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    When the statistics are set by a recalibration anyway.

    ## Options
    `max_error` (default 0.2): of a standard deviation.

    ## References
    Variance of an exponentially weighted mean of independent values; PyTorch-YOLOv3 issue 230.
    """
    for facts, numbers in noisy_sites:
        decay = facts.site.decay
        if facts.cumulative or not 0 <= decay < 1 or facts.site.stats_frozen:
            continue
        error = numbers.noise * math.sqrt((1 - decay) / (1 + decay))
        if error > max_error:
            yield Hit(
                sites=(facts.site.path,),
                message=f"an average over {1 / (1 - decay):.1f} batches is off by {error:.2g} "
                "standard deviations, as the last batches are; raise the momentum",
                evidence={"error": error, "noise": numbers.noise, "decay": decay},
            )


@fixture
def noisy_sites(measurement: Measurement, measured_sites: Measured) -> Measured:
    """Sites that train on batch statistics, where there are batches enough to tell their noise."""
    if measurement.samples < _FEWEST_BATCHES * measurement.batch_size:
        return ()
    found = []
    for facts, numbers in measured_sites:
        seen = measurement.behaviour.get(facts.site.path)
        known = seen is not None and seen.training is not None
        trains = uses_batch(seen.training) if seen and known else not facts.site.stats_frozen
        if trains and math.isfinite(numbers.noise) and numbers.noise > 0:
            found.append((facts, numbers))
    return tuple(found)
