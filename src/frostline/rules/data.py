"""FL304 to FL306, FL311 and FL312: stored statistics beside those of the data.

Arrays have shape ``(channels,)`` and are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from frostline.numerics.averages import OLD_SHARE, update_count
from frostline.rules import Hit, rule
from frostline.rules.fixtures import Measured
from frostline.rules.predicates import in_place_of
from frostline.types import Site
from frostline.types.codes import Fix
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts
from frostline.types.measured import Measurement, SiteMeasurement

#: Standard errors that are added to each limit: nine channels in ten must lie beyond by chance
#: before a site is reported.
_STANDARD_ERRORS = 2.0

#: Share of the channels that may lie beyond the number that a site is judged by.
_TAIL = 0.1


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """How far a site's stored statistics are from those of the data.

    Attributes:
        shift: Distance of the means in stored standard deviations, 90th percentile over channels.
        scale: Ratio of the standard deviations or its inverse, whichever is above 1, 90th
            percentile over channels.
        large: Beyond the limits that were asked for, and beyond what chance explains.
    """

    shift: float
    scale: float
    large: bool

    @property
    def text(self) -> str:
        """The larger of the two in words."""
        if self.shift >= math.log2(max(self.scale, 1.0)):
            return f"means are {self.shift:.2g} standard deviations off"
        return f"standard deviations are off by a factor of {self.scale:.3g}"

    @property
    def evidence(self) -> dict[str, float | str]:
        """The numbers by name."""
        return {"shift": self.shift, "scale": self.scale}


@rule("FL304", "statistics-far-from-data", severity="warning", needs="data", fix=Fix.RECALIBRATE)
def statistics_far_from_data(
    model: ModelFacts,
    measurement: Measurement,
    measured_sites: Measured,
    old_shares: Mapping[str, float],
    frozen_behind: Mapping[str, LayerFacts],
    *,
    max_shift: float = 0.5,
    max_scale: float = 1.5,
) -> Iterator[Hit]:
    """The stored statistics of a thawed site do not describe the data.

    ## What it does
    Compares the stored mean and variance with those of the site's inputs on the data, measured with
    correct statistics at all sites before it: `|mean - stored| / sqrt(stored variance + epsilon)`
    and the ratio of the standard deviations, each as the 90th percentile over channels. FL306
    reports sites that trained for too few steps, FL311 those before a frozen layer.

    ## Why is this bad?
    Training normalises with the batch and does not notice; inference uses what is stored. When an
    average had time to settle and is still off, it was taken on other data, or with other weights
    that were edited, averaged, pruned or loaded since.

    ## Example
    ```python
    {samples}
    {network}
    model.get_layer("bn").moving_mean.assign(np.full(4, -3.0))
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    {samples}
    {network}
    model.get_layer("bn").moving_mean.assign(x.mean(0))
    model.get_layer("bn").moving_variance.assign(x.var(0))
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    When the data given are not those of training, and the difference is known.

    ## Options
    `max_shift` (default 0.5): of a stored standard deviation. `max_scale` (default 1.5): ratio of
    standard deviations, either way.

    ## References
    Wu and Johnson 2021; Izmailov et al. 2018 (weight averaging needs new statistics).
    """
    # FL306 and FL311 report the others; what inference takes by mistake is of other data rightly.
    others = {path for path, share in old_shares.items() if share > OLD_SHARE} | set(frozen_behind)
    others |= {*in_place_of(model, measurement).values()}
    sites = _where(measured_sites, lambda site: not (site.stats_frozen or site.path in others))
    for facts, found in _disagreeing(sites, measurement, max_shift, max_scale):
        yield Hit(
            sites=(facts.site.path,),
            message=f"on these data {found.text}; recalibrate",
            evidence=found.evidence,
        )


@rule("FL305", "frozen-statistics-far-from-data", severity="info", needs="data")
def frozen_statistics_far_from_data(
    measurement: Measurement,
    measured_sites: Measured,
    *,
    max_shift: float = 0.5,
    max_scale: float = 1.5,
) -> Iterator[Hit]:
    """The stored statistics of a frozen site describe other data.

    ## What it does
    The comparison of FL304 for sites whose statistics do not move.

    ## Why is this bad?
    Often it is not: frozen filters were trained for these statistics, and a layer that uses them in
    training and at inference has no gap. It is bad where training uses the batch (FL301), and it
    can mean that the inputs have another scale or domain than in pretraining.

    ## Example
    ```python
    {samples}
    {network}
    model.get_layer("bn").trainable = False
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    x = np.random.default_rng(0).normal(3, 2, (64, 4)).astype("float32")
    x = (x - 3) / 2
    data = (x, x[:, :2])
    {network}
    model.get_layer("bn").trainable = False
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    When the network is meant to see the new domain through the old statistics.

    ## Options
    `max_shift` (default 0.5): of a stored standard deviation. `max_scale` (default 1.5): ratio of
    standard deviations, either way.

    ## References
    Li et al. 2016 (AdaBN); Wu and Johnson 2021.
    """
    sites = _where(measured_sites, lambda site: site.stats_frozen)
    for facts, found in _disagreeing(sites, measurement, max_shift, max_scale):
        yield Hit(
            sites=(facts.site.path,),
            message=f"frozen at other data's: {found.text}; try what recalibrating it gives",
            evidence=found.evidence,
            certainty="may",
        )


@rule("FL306", "old-statistics-remain", severity="warning", needs="data", fix=Fix.RECALIBRATE)
def old_statistics_remain(
    model: ModelFacts,
    measurement: Measurement,
    measured_sites: Measured,
    old_shares: Mapping[str, float],
    frozen_behind: Mapping[str, LayerFacts],
    *,
    max_share: float = OLD_SHARE,
    max_shift: float = 0.2,
    max_scale: float = 1.2,
) -> Iterator[Hit]:
    """Much of the moving average is from before training, and the data disagree with it.

    ## What it does
    After n updates a moving average keeps `decay**n` of its old value. Reports thawed sites that
    keep more than `max_share` (FL203 does that without data) *and* whose stored statistics differ
    from those of the data.

    ## Why is this bad?
    Inference normalises with a mixture of old and new statistics, training only with new ones. The
    gap shrinks as slowly as the average forgets.

    ## Example
    ```python
    {samples}
    {network}
    model.compile("sgd", "mse")
    for _ in range(3):
        model.train_on_batch(*data)
    ```

    ## Use instead
    ```python
    {samples}
    {network momentum=0.1}
    model.compile("sgd", "mse")
    for _ in range(3):
        model.train_on_batch(*data)
    ```

    ## When not to use it
    While training still goes on for many times `1 / (1 - decay)` steps.

    ## Options
    `max_share` (default 0.1): old share that is tolerated. `max_shift` (default 0.2): of a stored
    standard deviation. `max_scale` (default 1.2): ratio of standard deviations, either way.

    ## References
    tensorflow issue 46414; keras issues 7265 and 605.
    """
    shares = {path: share for path, share in old_shares.items() if share > max_share}
    sites = _where(
        measured_sites, lambda site: site.path in shares and site.path not in frozen_behind
    )
    for facts, found in _disagreeing(sites, measurement, max_shift, max_scale):
        share, updates = shares[facts.site.path], update_count(facts, model.steps) or 0
        yield Hit(
            sites=(facts.site.path,),
            message=f"{share:.0%} is from before training ({facts.site.decay:g}**"
            f"{updates}); {found.text}; recalibrate",
            evidence={"old_share": share, "steps": float(updates), **found.evidence},
        )


@rule("FL311", "thawed-before-frozen-differs", severity="warning", needs="data", fix=Fix.FREEZE)
def thawed_before_frozen_differs(
    measurement: Measurement,
    measured_sites: Measured,
    frozen_behind: Mapping[str, LayerFacts],
    *,
    max_shift: float = 0.2,
    max_scale: float = 1.2,
) -> Iterator[Hit]:
    """A thawed site feeds a frozen layer and gives it something else in training than at inference.

    ## What it does
    Reports the sites of FL106 (thawed, next layer with weights frozen) whose stored statistics
    differ from those of the data. The next layer in execution order need not be a consumer in a
    branched graph, hence "may".

    ## Why is this bad?
    The frozen weights behind were fitted to the site's old output. In training they see features
    normalised by the batch; at inference the statistics are a mixture of old and new data.

    ## Example
    ```python
    {samples}
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.BatchNormalization(name="bn"),
        keras.layers.Dense(4, name="second"), keras.layers.Dense(2, name="head")])

    model.get_layer("second").trainable = False
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    {as above}
    for name in ("bn", "second"):
        model.get_layer(name).trainable = False
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    When only the BN layers of a backbone are trained on purpose; recalibrate then.

    ## Options
    `max_shift` (default 0.2): of a stored standard deviation. `max_scale` (default 1.2): ratio of
    standard deviations, either way.

    ## References
    segmentation_models issue 354; Lightning issue 21531.
    """
    sites = _where(measured_sites, lambda site: site.path in frozen_behind)
    for facts, found in _disagreeing(sites, measurement, max_shift, max_scale):
        yield Hit(
            sites=(facts.site.path,),
            message=f"trains before a frozen layer, and {found.text}; freeze it too",
            evidence=found.evidence,
            certainty="may",
        )


@rule("FL312", "input-scale-differs", severity="warning", needs="data", fix=Fix.FIX_PREPROCESSING)
def input_scale_differs(
    measurement: Measurement,
    measured_sites: Measured,
    *,
    min_factor: float = 2.0,
    max_spread: float = 0.2,
) -> Iterator[Hit]:
    """The first site's inputs vary by another scale than before, by one factor in all channels.

    ## What it does
    Looks at the first site in execution order. When the logarithm of the ratio of data variance to
    stored variance is the same in all channels, up to `max_spread` of its size, the model's inputs
    have another scale. The factor is the square root of that ratio.

    ## Why is this bad?
    The inputs are not preprocessed as in training: a division by 255 is missing or done twice. The
    stored statistics do not fit either, but recalibrating them repairs the first layer only. If the
    moving average lags, the factor is that of a mixture.

    ## Example
    ```python
    x = np.random.default_rng(0).uniform(0, 1, (64, 4)).astype("float32")
    {network}
    model.get_layer("bn").moving_mean.assign(x.mean(0))
    model.get_layer("bn").moving_variance.assign(x.var(0))
    model.compile("sgd", "mse")

    data = (x * 255, x[:, :2])
    ```

    ## Use instead
    ```python
    {as above}
    data = (x, x[:, :2])
    ```

    ## When not to use it
    When the new domain really has another contrast.

    ## Options
    `min_factor` (default 2): of the scale, either way. `max_spread` (default 0.2): interquartile
    range over channels of the logarithm of the ratio, of its median.

    ## References
    Keras issue 13517; deep-learning-models issue 96.
    """
    if not measured_sites:
        return
    facts, numbers = measured_sites[0]
    alive = (numbers.variance > 0) & (numbers.stored_variance > 0)
    if np.sum(alive) < 2:  # one channel always agrees with itself
        return
    logs = np.log(numbers.variance[alive] / numbers.stored_variance[alive])
    low, middle, high = np.quantile(logs, [0.25, 0.5, 0.75])
    factor = math.exp(middle / 2)
    if abs(middle) / 2 < math.log(min_factor) or high - low > max_spread * abs(middle):
        return
    inputs = measurement.input
    span = (
        {}
        if inputs is None
        else {"low": float(np.min(inputs.low)), "high": float(np.max(inputs.high))}
    )
    yield Hit(
        sites=(facts.site.path,),
        message=f"all channels vary {factor:.3g} times as much as when the statistics were taken; "
        "check the scale of the inputs",
        evidence={"factor": factor, "spread": float(high - low), **span},
        certainty="may",
    )


def _where(measured_sites: Measured, chosen: Callable[[Site], bool]) -> Measured:
    return tuple(pair for pair in measured_sites if chosen(pair[0].site))


def _disagreeing(
    sites: Measured, measurement: Measurement, max_shift: float, max_scale: float
) -> Iterator[tuple[SiteFacts, Disagreement]]:
    """Sites whose stored statistics differ from those of the data by more than the limits."""
    for facts, numbers in sites:
        found = disagreement(numbers, measurement, max_shift=max_shift, max_scale=max_scale)
        if found.large:
            yield facts, found


def disagreement(
    numbers: SiteMeasurement, measurement: Measurement, *, max_shift: float, max_scale: float
) -> Disagreement:
    """Compare stored statistics with those of the data; chance is allowed for.

    A mean over B batches of n samples in all is uncertain by ``noise / √B`` population standard
    deviations, at most by ``1 / √n``, and the logarithm of a standard deviation by about as much.
    """
    batches = max(1.0, measurement.samples / measurement.batch_size)
    noise = numbers.noise / math.sqrt(batches) if numbers.noise > 0 else math.inf  # NaN: one batch
    error = _STANDARD_ERRORS * min(noise, 1 / math.sqrt(measurement.samples))
    ratio = np.maximum(numbers.ratio, np.finfo(float).tiny)
    shift = float(np.quantile(numbers.shift, 1 - _TAIL))
    scale = math.exp(float(np.quantile(np.abs(np.log(ratio)), 1 - _TAIL)) / 2)
    wide = shift > max_shift + error * math.sqrt(float(np.median(ratio)))
    return Disagreement(
        shift=shift, scale=scale, large=wide or math.log(scale) > math.log(max_scale) + error
    )
