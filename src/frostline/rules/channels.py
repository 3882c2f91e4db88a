"""FL206 to FL211: channels that are dead, imprecise or not finite.

Arrays have shape ``(channels,)`` and are float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from frostline.rules import Hit, rule
from frostline.rules.fixtures import Stored
from frostline.types.codes import Fix
from frostline.types.facts import ModelFacts

#: Unit roundoff: half of the spacing of numbers at 1.
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@rule("FL206", "collapsed-channels", severity="info", needs="statistics")
def collapsed_channels(
    stored: Stored, *, max_ratio: float = 1e-3, min_gain: float = 10.0
) -> Iterator[Hit]:
    """Some channels were constant when the statistics were taken, and are amplified since.

    ## What it does
    Reports channels whose variance is below `max_ratio` times epsilon while
    `|gamma| / sqrt(var + epsilon)` is above `min_gain`.

    ## Why is this bad?
    The channel was dead on the old data (a filter that never fires). If new data wakes it, its
    output is amplified by that gain, far beyond the range that the next layer was trained on.

    ## Example
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").moving_variance.assign(np.array([1.0, 0.0, 1.0, 1.0]))
    ```

    ## Use instead
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").moving_variance.assign(np.array([1.0, 0.01, 1.0, 1.0]))
    ```

    ## When not to use it
    When new data are like the old ones: large pretrained nets have such channels and live well.

    ## Options
    `max_ratio` (default 1e-3): epsilon decides the scale to 0.05%. `min_gain` (default 10).

    ## References
    Ioffe and Szegedy 2015, algorithm 1.
    """
    for facts, _, variance in stored:
        if np.all(variance == 0):  # FL205
            continue
        epsilon = facts.site.epsilon
        gamma = np.ones_like(variance) if facts.gamma is None else np.abs(facts.gamma)
        dead = (variance >= 0) & (variance < max_ratio * epsilon)
        gain = np.where(dead, gamma / np.sqrt(np.maximum(variance, 0) + epsilon), 0.0)
        count = int(np.sum(gain > min_gain))
        if count:
            yield Hit(
                sites=(facts.site.path,),
                message=f"{count} of {variance.size} channels were constant; if new data change "
                f"them, the change is multiplied by {np.nanmax(gain):.3g}",
                evidence={"channels": float(count), "gain": float(np.nanmax(gain))},
                certainty="may",
            )


@rule("FL207", "silent-channels", severity="info", needs="statistics")
def silent_channels(
    model: ModelFacts, *, max_ratio: float = 1e-3, min_share: float = 0.05
) -> Iterator[Hit]:
    """Gamma is nearly 0: the channels give beta, whatever comes in.

    ## What it does
    Reports sites in which at least `min_share` of the channels have a gamma below `max_ratio`
    times the site's largest. A site that is 0 throughout is reported once it has trained; before,
    it is the usual start of a residual branch.

    ## Why is this bad?
    Often it is not: weight decay and sparsity penalties do this. Such channels cost time, carry no
    information, and pass almost no gradient to the filters before them.

    ## Example
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").gamma.assign(np.array([1.0, 0.0, 1.0, 1.0]))
    ```

    ## Use instead
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").gamma.assign(np.array([1.0, 0.1, 1.0, 1.0]))
    ```

    ## When not to use it
    When the network is being pruned.

    ## Options
    `max_ratio` (default 1e-3). `min_share` (default 0.05), of all channels.

    ## References
    Liu et al. 2017 (network slimming); Goyal et al. 2017, section 5.1.
    """
    for facts in model:
        if facts.gamma is None or not np.isfinite(facts.gamma).all():
            continue
        size = np.abs(facts.gamma)
        if not size.any() and not model.steps:
            continue
        count = int(np.sum(size <= max_ratio * size.max()))
        if count >= min_share * size.size and count:
            yield Hit(
                sites=(facts.site.path,),
                message=f"gamma is near 0 in {count} of {size.size} channels: they give beta "
                "whatever comes in; they can be pruned",
                evidence={"channels": float(count), "share": count / size.size},
            )


@rule("FL208", "half-precision-statistics", severity="warning", needs="statistics")
def half_precision_statistics(stored: Stored) -> Iterator[Hit]:
    """The moving average is stored in half precision, where small updates vanish.

    ## What it does
    Reports thawed sites that store their statistics in float16 or bfloat16.

    ## Why is this bad?
    An update adds `(1 - decay) * (batch - stored)`. With unit roundoff u it is always rounded away
    when batch and stored differ by less than `u / (2 * (1 - decay))` of the stored value: 2.4% in
    float16 and 20% in bfloat16 at decay 0.99. The average then stops before it arrives. In float16
    a variance above 65504 is infinite.

    ## Example
    ```python
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.BatchNormalization(dtype="float16")])
    ```

    ## Use instead
    ```python
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.BatchNormalization(dtype="mixed_float16")])
    ```

    ## When not to use it
    When the model is only served.

    ## References
    Micikevicius et al. 2018, section 3.1.
    """
    for facts, _, _ in stored:
        site = facts.site
        if facts.dtype not in ("float16", "bfloat16") or site.stats_frozen or site.decay >= 1:
            continue
        lost = _ROUNDOFF[facts.dtype] / (2 * (1 - site.decay))
        yield Hit(
            sites=(site.path,),
            message=f"stored in {facts.dtype}: at decay {site.decay:g} changes below {lost:.1%} "
            "are rounded away; store them in float32",
            evidence={"lost_below": lost, "dtype": facts.dtype},
        )


@rule(
    "FL209", "renorm-shadow-statistics", severity="error", needs="statistics", fix=Fix.RECALIBRATE
)
def renorm_shadow_statistics(stored: Stored, *, tolerance: float = 0.01) -> Iterator[Hit]:
    """With `renorm`, the stored variance is not the one that training will go on from.

    ## What it does
    Compares `moving_variance` with `moving_stddev**2 - epsilon`, from which Keras derives it at
    every update.

    ## Why is this bad?
    A recalibration or a copy of weights wrote one and not the other. Inference uses the first; the
    next training step overwrites it from the second.

    ## Example
    ```python
    norm = keras.layers.BatchNormalization(renorm=True)
    model = keras.Sequential([keras.Input((4,)), norm])
    norm.moving_variance.assign(np.full(4, 2.0))
    ```

    ## Use instead
    ```python
    norm = keras.layers.BatchNormalization(renorm=True)
    model = keras.Sequential([keras.Input((4,)), norm])
    norm.moving_variance.assign(np.full(4, 2.0))
    norm.moving_stddev.assign(np.sqrt(np.full(4, 2.0) + norm.epsilon))
    ```

    ## When not to use it
    When the model will not train any more.

    ## Options
    `tolerance` (default 0.01): relative difference; a fresh layer differs by epsilon.

    ## References
    Ioffe 2017; `keras.layers.BatchNormalization._update_renorm_statistics`.
    """
    for facts, _, variance in stored:
        if facts.shadow_variance is None:
            continue
        scale = np.maximum(facts.shadow_variance, facts.site.epsilon)
        worst = float(np.max(np.abs(variance - facts.shadow_variance) / scale))
        if worst > tolerance:
            yield Hit(
                sites=(facts.site.path,),
                message=f"moving_variance is {worst:.0%} off moving_stddev, from which the next "
                "step restores it; write both",
                evidence={"difference": worst},
            )


@rule("FL210", "cancelling-mean", severity="warning", needs="statistics")
def cancelling_mean(stored: Stored, *, max_error: float = 0.05) -> Iterator[Hit]:
    """The mean is so far from 0 that rounding eats the signal.

    ## What it does
    Takes the largest `r = |mean| / sqrt(var + epsilon)` over the channels, without constant ones,
    and reports the site when rounding costs more than `max_error`: `r * u` of a standard deviation
    with u the unit roundoff of the layer's compute dtype, or, on Keras' torch backend, which
    computes the batch variance as E[x²] - E[x]² in float32, `r² * 2**-24` of the variance.

    ## Why is this bad?
    Normalising subtracts two nearly equal numbers. The stored variance, and with it the scale at
    inference, becomes noise; it may even turn negative.

    ## Example
    ```python
    norm = keras.layers.BatchNormalization(dtype="mixed_float16", name="bn")
    model = keras.Sequential([keras.Input((4,)), norm])
    norm.moving_mean.assign(np.full(4, 500.0))
    ```

    ## Use instead
    ```python
    norm = keras.layers.BatchNormalization(dtype="mixed_float16", name="bn")
    model = keras.Sequential([keras.Input((4,)), norm])
    norm.moving_mean.assign(np.full(4, 5.0))
    ```

    ## When not to use it
    For a first layer whose inputs cannot be scaled before.

    ## Options
    `max_error` (default 0.05), of a standard deviation or of the variance.

    ## References
    Chan, Golub and LeVeque 1983; `keras/src/backend/torch/nn.py`, `moments`.
    """
    for facts, mean, variance in stored:
        epsilon = facts.site.epsilon
        alive = np.isfinite(mean) & np.isfinite(variance) & (variance > 1e-3 * epsilon)
        if not alive.any():
            continue
        ratio = float(np.max(np.abs(mean[alive]) / np.sqrt(variance[alive] + epsilon)))
        error = ratio * _ROUNDOFF.get(facts.site.dtype, 2.0**-24)
        if facts.cancels:
            error = max(error, ratio**2 * 2.0**-24)
        if error > max_error:
            yield Hit(
                sites=(facts.site.path,),
                message=f"mean {ratio:.3g} standard deviations from 0: rounding costs {error:.2g} "
                "of one; centre the input",
                evidence={"ratio": ratio, "error": error, "dtype": facts.site.dtype},
                certainty="may",
            )


@rule("FL211", "non-finite-parameters", severity="error", needs="statistics")
def non_finite_parameters(model: ModelFacts) -> Iterator[Hit]:
    """Gamma or beta is NaN or infinite.

    ## What it does
    Counts the channels whose gamma or beta is not finite.

    ## Why is this bad?
    Training has diverged. No recalibration repairs this; load an earlier checkpoint.

    ## Example
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").gamma.assign(np.array([1.0, np.inf, 1.0, 1.0]))
    ```

    ## Use instead
    ```python
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").gamma.assign(np.array([1.0, 2.0, 1.0, 1.0]))
    ```

    ## When not to use it
    Never.

    ## References
    None.
    """
    for facts in model:
        own = [values for values in (facts.gamma, facts.beta) if values is not None]
        bad = int(np.sum(np.any([~np.isfinite(values) for values in own], axis=0))) if own else 0
        if bad:
            yield Hit(
                sites=(facts.site.path,),
                message=f"gamma or beta is not finite in {bad} of {own[0].size} channels; go back "
                "to an earlier checkpoint",
                evidence={"channels": float(bad)},
            )
