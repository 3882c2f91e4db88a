"""FL111 to FL116: arguments and graph: decay, epsilon, sharing, names, batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from frostline.numerics.averages import SHORTEST_DECAY, is_short
from frostline.rules import Hit, rule
from frostline.rules.predicates import epsilon_effect, is_locked
from frostline.types.codes import Fix
from frostline.types.facts import ModelFacts


@rule("FL111", "swapped-momentum-convention", severity="warning", fix=Fix.SET_MOMENTUM)
def swapped_momentum_convention(
    model: ModelFacts, *, lowest: float = SHORTEST_DECAY
) -> Iterator[Hit]:
    """The moving average forgets so fast that its momentum was probably meant the other way round.

    ## What it does
    Reports thawed sites that keep less than `lowest` of the old statistics per step. Keras'
    `momentum` is the kept share (0.99), torch's is the new share (0.1).

    ## Why is this bad?
    With decay d the statistics cover about 1/(1 - d) batches: at 0.1 only the last one. Inference
    then depends on which batch happened to come last.

    ## Example
    ```python
    {network momentum=0.1}
    ```

    ## Use instead
    ```python
    {network momentum=0.9}
    ```

    ## When not to use it
    When a few large batches are all there is.

    ## Options
    `lowest` (default 0.5): half way between the two conventions' defaults.

    ## References
    PyTorch-YOLOv3 issue 230; pretrained-models.pytorch issue 44.
    """
    for facts in model:
        decay = facts.site.decay
        if is_short(facts, lowest) and decay > 0 and not facts.site.stats_frozen:
            meant = facts.words.momentum(1 - decay)
            yield Hit(
                sites=(facts.site.path,),
                message=f"{facts.words.step(decay)} keeps {decay:.2g} of the statistics: they are "
                f"those of {1 / (1 - decay):.1f} batches; {meant:.2g} may be meant",
                evidence={"decay": decay, "batches": 1 / (1 - decay)},
                certainty="may",
            )


@rule("FL112", "momentum-out-of-range", severity="error", fix=Fix.SET_MOMENTUM)
def momentum_out_of_range(model: ModelFacts) -> Iterator[Hit]:
    """The moving average never moves, remembers nothing, or is none at all.

    ## What it does
    Reports thawed sites whose decay is 1 or more, or 0 or less.

    ## Why is this bad?
    At 1 training normalises with the batch while inference keeps using whatever was stored
    before. At 0 the statistics are those of the last batch. Outside of [0, 1] they diverge.

    ## Example
    ```python
    {network momentum=1.0}
    ```

    ## Use instead
    ```python
    {network momentum=0.99}
    ```

    ## When not to use it
    When the statistics are set by a recalibration anyway.

    ## References
    pretrained-models.pytorch issue 5.
    """
    for facts in model:
        decay = facts.site.decay
        if 0 < decay < 1 or facts.site.stats_frozen or facts.cumulative:
            continue
        effect = {0.0: "its statistics are those of the last batch", 1.0: "they never move"}
        yield Hit(
            sites=(facts.site.path,),
            message=f"{facts.words.step(decay)} keeps {decay:g} of the statistics: "
            f"{effect.get(decay, 'they diverge')}; set {facts.words.usual_momentum}",
            evidence={"decay": decay},
        )


@rule("FL113", "epsilon-mismatch", severity="warning", needs="statistics")
def epsilon_mismatch(model: ModelFacts, *, min_effect: float = 0.05) -> Iterator[Hit]:
    """A few sites have another epsilon than the rest, and it matters for their variances.

    ## What it does
    Takes the most frequent epsilon of the model; for every other site it reports the largest
    change of scale over the channels that the frequent one would make,
    `sqrt((var + epsilon) / (var + frequent)) - 1`, when that is at least `min_effect`.

    ## Why is this bad?
    Keras' default is 1e-3, torch's 1e-5. In a converted layer the wrong one changes the scale of
    channels with a small variance, and nothing raises an error.

    ## Example
    ```python
    def norm(epsilon):
        return keras.layers.BatchNormalization(
            epsilon=epsilon, moving_variance_initializer=keras.initializers.Constant(0.001))

    model = keras.Sequential([keras.Input((4,)), norm(1e-5), norm(1e-5), norm(1e-3)])
    ```

    ## Use instead
    ```python
    {as above}
    model = keras.Sequential([keras.Input((4,)), norm(1e-5), norm(1e-5), norm(1e-5)])
    ```

    ## When not to use it
    When a new head with another epsilon was put on a backbone on purpose.

    ## Options
    `min_effect` (default 0.05): smallest change of scale that is reported, of 1.

    ## References
    Defaults of `keras.layers.BatchNormalization` and `torch.nn.BatchNorm2d`.
    """
    odd = model.odd_epsilons
    others = len(model.sites) - len(odd)
    for facts in model:
        epsilon, frequent = facts.site.epsilon, odd.get(facts.site.path)
        if frequent is None or facts.variance is None or not np.isfinite(facts.variance).all():
            continue
        effect = epsilon_effect(facts.variance, frequent, epsilon)
        if effect >= min_effect:
            yield Hit(
                sites=(facts.site.path,),
                message=f"epsilon {epsilon:g}, but {frequent:g} in {others} of {len(model.sites)} "
                f"sites: one is up to {effect:.0%} off; check where the weights come from",
                evidence={"epsilon": epsilon, "frequent": frequent, "effect": effect},
                certainty="may",
            )


@rule("FL114", "shared-site", severity="warning")
def shared_site(model: ModelFacts) -> Iterator[Hit]:
    """One BN layer normalises several tensors.

    ## What it does
    Reports sites, not locked to stored statistics, that the model uses more than once.

    ## Why is this bad?
    Training normalises every use by its own batch. At inference all uses share one average, which
    describes none of them unless they are alike. Each step also updates it several times.

    ## Example
    ```python
    left, right = keras.Input((4,)), keras.Input((4,))
    norm = keras.layers.BatchNormalization(name="bn")
    model = keras.Model([left, right], keras.layers.Add()([norm(left), norm(right)]))
    ```

    ## Use instead
    ```python
    left, right = keras.Input((4,)), keras.Input((4,))
    norms = [keras.layers.BatchNormalization(name=name) for name in ("bn_left", "bn_right")]
    model = keras.Model([left, right], keras.layers.Add()([norms[0](left), norms[1](right)]))
    ```

    ## When not to use it
    When the sources are alike, as the two images of a siamese network.

    ## References
    Keras issue 12353.
    """
    for facts in model:
        if facts.site.calls > 1 and not is_locked(facts):
            yield Hit(
                sites=(facts.site.path,),
                message=f"used {facts.site.calls} times: one average serves all its inputs, alike "
                "or not; use one layer for each",
                evidence={"calls": float(facts.site.calls)},
                certainty="may",
            )


@rule("FL115", "duplicate-site-name", severity="info", fix=Fix.RENAME)
def duplicate_site_name(model: ModelFacts) -> Iterator[Hit]:
    """Several BN layers, in different nested models, have one name.

    ## What it does
    Reports names that more than one site has. Frostline tells them apart by their path.

    ## Why is this bad?
    Loading weights by name, `layer.path` and lists of layers to freeze can reach the wrong layer,
    or both.

    ## Example
    ```python
    def block():
        return keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model = keras.Sequential([keras.Input((4,)), block(), block()])
    ```

    ## Use instead
    ```python
    def block(name):
        return keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name=name)])
    model = keras.Sequential([keras.Input((4,)), block("bn_1"), block("bn_2")])
    ```

    ## When not to use it
    When layers are only ever reached through their container.

    ## References
    `keras.Model.load_weights` with `by_name`.
    """
    named: dict[str, list[str]] = {}
    for facts in model:
        if not facts.words.positional_names:
            named.setdefault(facts.site.name, []).append(facts.site.path)
    for paths in named.values():
        if len(paths) > 1:
            yield Hit(
                sites=tuple(paths),
                message=f"{len(paths)} BN layers have one name: what looks layers up by name "
                "reaches the wrong one; rename them",
                evidence={"layers": float(len(paths))},
            )


@rule("FL116", "few-values-per-channel", severity="warning", fix=Fix.FREEZE)
def few_values_per_channel(model: ModelFacts, *, min_values: int = 16) -> Iterator[Hit]:
    """The batch size that is built into the model leaves too few values for a variance.

    ## What it does
    Where the model's input has a fixed batch size, reports thawed sites that see fewer than
    `min_values` values per channel and batch (batch times height times width).

    ## Why is this bad?
    A variance estimated from n values has a relative standard error of about sqrt(2/(n - 1)); from
    one value it is 0, and the output is beta whatever the input.

    ## Example
    ```python
    model = keras.Sequential([
        keras.Input((4,), batch_size=2), keras.layers.BatchNormalization(name="bn")])
    ```

    ## Use instead
    ```python
    model = keras.Sequential([
        keras.Input((4,), batch_size=64), keras.layers.BatchNormalization(name="bn")])
    ```

    ## When not to use it
    When the model is only served, not trained, at this batch size.

    ## Options
    `min_values` (default 16): at 16 the standard error is 37%.

    ## References
    Wu and He 2018; DMS issue 30.
    """
    for facts in model:
        if model.batch is None or facts.values is None or facts.site.stats_frozen:
            continue
        count = model.batch * facts.values
        if count >= min_values:
            continue
        error = math.sqrt(2 / (count - 1)) if count > 1 else 1.0
        effect = f"is off by {error:.0%}" if count > 1 else "is 0 and the output beta"
        yield Hit(
            sites=(facts.site.path,),
            message=f"{count} values per channel and batch: the variance {effect}; freeze it, or "
            "use larger batches",
            evidence={"values": float(count), "relative_error": error},
        )
