"""FL101 to FL107 and FL901: what is frozen, what only looks frozen, and what a flag really does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from frostline.rules import Hit, rule
from frostline.rules.predicates import (
    expected_behaviour,
    frozen_moves,
    frozen_on_batch,
    is_locked,
    layer_before,
    only_serves,
)
from frostline.types.codes import Fix
from frostline.types.facts import LayerFacts, ModelFacts


@rule("FL101", "frozen-uses-batch-statistics", severity="error", fix=Fix.CONVERT)
def frozen_uses_batch_statistics(model: ModelFacts) -> Iterator[Hit]:
    """A frozen site normalises with the statistics of each batch while training.

    ## What it does
    Reports sites whose statistics neither move nor are used in training: our layer with
    `policy="batch"` (or a `version` that means it), and a wrapped torch layer with
    `track_running_stats` switched off while its buffers are still there.

    ## Why is this bad?
    The layers behind train on features normalised by the batch, and are served features normalised
    by the stored statistics. On a new data set the two differ: training looks perfect, inference
    does not: the bug of Keras 2.1.3 to 2.2.4 that Frostline is named for.

    ## Example
    ```python
    {frozen policy="batch", name="bn"}
    ```

    ## Use instead
    ```python
    {frozen policy="inference", name="bn"}
    ```

    ## When not to use it
    To reproduce a result of an old release exactly.

    ## References
    Keras pull request 9965; Ioffe and Szegedy 2015, section 3.1.
    """
    for facts in model:
        if frozen_on_batch(facts, expected_behaviour(facts)):
            yield Hit(
                sites=(facts.site.path,),
                message=facts.words.frozen_on_batch,
                evidence={"policy": facts.site.policy, "version": facts.site.version or "none"},
                fix=model.words.lock,
            )


@rule("FL102", "frozen-statistics-move", severity="error", fix=Fix.CONVERT)
def frozen_statistics_move(model: ModelFacts) -> Iterator[Hit]:
    """The stored statistics of a frozen site move while training.

    ## What it does
    Reports frozen sites of our layer with `policy="update"`, or a `version` that means it.

    ## Why is this bad?
    Every step replaces a share `1 - decay` of the pretrained statistics: after n steps `decay**n`
    of them is left. The frozen filters behind were trained for the old statistics.

    ## Example
    ```python
    {frozen version="2.1.2", name="bn"}
    ```

    ## Use instead
    ```python
    {frozen version="3", name="bn"}
    ```

    ## When not to use it
    To reproduce Keras before 2.1.3, or to adapt the statistics to a new domain on purpose.

    ## References
    Keras issue 7085.
    """
    for facts in model:
        site, moves = facts.site, frozen_moves(facts, expected_behaviour(facts))
        if moves and site.policy == "update" and facts.words.has_policy:
            yield Hit(
                sites=(site.path,),
                message=f"frozen, but each training step replaces {1 - site.decay:.2g} of its "
                "statistics; set policy='inference'",
                evidence={"replaced_per_step": 1 - site.decay, "policy": site.policy},
            )


@rule("FL103", "frozen-parameters-moving-statistics", severity="warning", fix=Fix.FREEZE)
def frozen_parameters_moving_statistics(model: ModelFacts) -> Iterator[Hit]:
    """Gamma and beta are frozen, the statistics are not.

    ## What it does
    Reports half-frozen sites: gamma and beta do not train (Keras `variable.trainable`, torch
    `requires_grad`, or the root model's `trainable`), while the layer itself still updates its
    statistics.

    ## Why is this bad?
    Freezing variables does not freeze a layer: a training step still normalises with the batch and
    moves the stored statistics, so the "frozen" part changes from step to step.

    ## Example
    ```python
    {network}
    for variable in model.get_layer("bn").trainable_variables:
        variable.trainable = False
    ```

    ## Use instead
    ```python
    {network}
    model.get_layer("bn").trainable = False
    ```

    ## When not to use it
    To adapt only the statistics to a new domain (AdaBN); a mean teacher or a target network
    (BYOL), which is made of weights that train elsewhere and uses its own batches.

    ## References
    torchvision issue 2079; Li et al. 2016 (AdaBN); Tarvainen and Valpola 2017; Grill et al. 2020.
    """
    if only_serves(model):
        return
    for facts in model:
        site = facts.site
        if not frozen_moves(facts, expected_behaviour(facts)):
            continue
        affine = facts.gamma is not None or facts.beta is not None
        by_itself = affine and not facts.wrapper_frozen
        if site.policy != "update" if facts.words.has_policy else by_itself:
            moves = f"each step replaces {1 - site.decay:.2g} of the statistics"
            meant = (
                f"{moves}: right in a mean teacher or target network beside '{facts.twin}', wrong "
                "in a fixed old model; freeze that"
            )
            yield Hit(
                sites=(site.path,),
                message=f"{model.words.frozen_parameters}, but "
                + (f"{moves}; freeze the layer" if facts.twin is None else meant),
                evidence={"replaced_per_step": 1 - site.decay},
                certainty="is" if facts.twin is None else "may",
            )


@rule("FL104", "trained-parameters-frozen-statistics", severity="info", fix=Fix.FREEZE)
def trained_parameters_frozen_statistics(model: ModelFacts) -> Iterator[Hit]:
    """The statistics are frozen, gamma and beta train.

    ## What it does
    Reports the opposite of FL103: the layer is frozen, but one of its variables was thawed again.

    ## Why is this bad?
    It need not be: training the affine part over fixed statistics is a known way to fine-tune. It
    is reported because the layer says `trainable=False` and still changes.

    ## Example
    ```python
    {network}
    model.get_layer("bn").trainable = False
    model.get_layer("bn").gamma.trainable = True
    ```

    ## Use instead
    ```python
    {network}
    model.get_layer("bn").trainable = False
    ```

    ## When not to use it
    When the affine part is trained on purpose.

    ## References
    Frankle, Schwab and Morcos 2021.
    """
    for facts in model:
        if not facts.site.stats_frozen or facts.site.params_frozen or facts.undone:
            continue
        if facts.wrapper_frozen is None:
            yield Hit(
                sites=(facts.site.path,),
                message="the layer is frozen, but gamma or beta trains; freeze the variables too "
                "if that is not wanted",
                evidence={"decay": facts.site.decay},
            )


@rule("FL105", "torch-wrapper-not-frozen", severity="error", fix=Fix.FREEZE)
def torch_wrapper_not_frozen(model: ModelFacts) -> Iterator[Hit]:
    """A frozen `TorchModuleWrapper` still moves the statistics of the BN inside it.

    ## What it does
    Reports torch BN inside a wrapper with `trainable=False`.

    ## Why is this bad?
    Whatever `trainable` says, the wrapper puts the module into training mode in every training
    step. It normalises with the batch, and moves `running_mean` and `running_var` although no
    parameter moves.

    ## Example
    ```python
    import torch

    layer = keras.layers.TorchModuleWrapper(torch.nn.BatchNorm1d(4), output_shape=(None, 4))
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)])
    layer.trainable = False
    ```

    ## Use instead
    ```python
    {network}
    model.get_layer("bn").trainable = False
    ```

    ## When not to use it
    Never.

    ## References
    `keras.layers.TorchModuleWrapper.call`.
    """
    for facts in model:
        if facts.wrapper_frozen and not facts.site.stats_frozen:
            yield Hit(
                sites=(facts.site.path,),
                message="the wrapper is frozen, but each step replaces "
                f"{1 - facts.site.decay:.2g} of the statistics; use a Keras BN layer",
                evidence={"replaced_per_step": 1 - facts.site.decay},
            )


@rule("FL106", "thawed-before-frozen-layer", severity="warning", fix=Fix.FREEZE)
def thawed_before_frozen_layer(
    model: ModelFacts, frozen_behind: Mapping[str, LayerFacts]
) -> Iterator[Hit]:
    """A thawed site feeds a layer that is frozen.

    ## What it does
    Reports sites that train although the next layer with weights, in execution order, does not.
    In a branched graph the next layer need not be a consumer, hence "may".

    ## Why is this bad?
    The frozen weights behind were fitted to the old output of this site. In training its output is
    normalised by the batch, and its statistics drift. The frozen part of the network is then
    neither constant nor free of the gap between training and inference, and its features cannot be
    cached.

    ## Example
    ```python
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(4, name="first"),
        keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(4, name="second"),
        keras.layers.Dense(2, name="head")])

    for name in ("first", "second"):
        model.get_layer(name).trainable = False
    ```

    ## Use instead
    ```python
    {as above}
    for name in ("first", "bn", "second"):
        model.get_layer(name).trainable = False
    ```

    ## When not to use it
    When only the BN layers of a backbone are trained on purpose.

    ## References
    segmentation_models issue 354; keras issue 12353.
    """
    for facts in model:
        behind = frozen_behind.get(facts.site.path)
        if behind is not None:
            yield Hit(
                sites=(facts.site.path,),
                message="trains, but the next layer is frozen and was fitted to its old output; "
                "freeze it too",
                evidence={"next_layer": behind.path},
                certainty="may",
            )


@rule(
    "FL107", "trainable-changed-since-compile", severity="error", needs="optimizer", fix=Fix.COMPILE
)
def trainable_changed_since_compile(model: ModelFacts) -> Iterator[Hit]:
    """`trainable` was flipped after training had begun, and the flip has no effect.

    ## What it does
    Compares the flags of stock sites with the variables that the compiled step writes or, where
    that is not known, those that the optimizer was built for. Our own layer is never reported: its
    `trainable` is live, unless `live=False`.

    ## Why is this bad?
    On TensorFlow the compiled training step ignores the flip: a site frozen since then still trains
    and moves its statistics, and a thawed one stays frozen. JAX refuses to train, and so does torch
    after thawing. Freezing on torch works and is not reported.

    ## Example
    ```python
    {network}
    model.get_layer("bn").trainable = False
    model.compile("sgd", "mse")
    model.train_on_batch(np.ones((8, 4), "float32"), np.ones((8, 2), "float32"))
    model.get_layer("bn").trainable = True
    ```

    ## Use instead
    ```python
    model = keras.Sequential([
        keras.Input((4,)), fl.layers.BatchNormalization(name="bn"), keras.layers.Dense(2)])
    model.get_layer("bn").trainable = False
    model.compile("sgd", "mse")
    model.train_on_batch(np.ones((8, 4), "float32"), np.ones((8, 2), "float32"))
    model.get_layer("bn").trainable = True
    ```

    ## When not to use it
    When `compile` comes next anyway.

    ## References
    Keras pull request 22787; keras issue 4674.
    """
    for facts in model:
        effect = model.flipped(facts)
        if effect is not None:
            flip = "frozen" if facts.site.params_frozen else "thawed"
            yield Hit(
                sites=(facts.site.path,),
                message=f"{flip} after training step {model.steps}: {effect}; compile again",
                evidence={"steps": float(model.steps or 0), "backend": model.backend},
            )


@rule("FL901", "frozen-behind-training-layer", severity="info", fix=Fix.UNFREEZE)
def frozen_behind_training_layer(model: ModelFacts) -> Iterator[Hit]:
    """A frozen site normalises the output of a layer that trains.

    ## What it does
    Reports sites locked to their stored statistics right behind a layer, in execution order,
    whose weights train. Off unless selected: keeping all BN frozen is often the better choice.

    ## Why is this bad?
    The statistics describe the old output of that layer. They become wrong as its weights move, and
    only a recalibration brings them up to date.

    ## Example
    ```python
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(4), keras.layers.BatchNormalization(name="bn")])
    model.get_layer("bn").trainable = False
    ```

    ## Use instead
    ```python
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(4, name="first"),
        keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(2)])
    for name in ("first", "bn"):
        model.get_layer(name).trainable = False
    ```

    ## When not to use it
    When all BN is kept frozen on purpose, as with small batches.

    ## References
    Wu and Johnson 2021.
    """
    for facts in model:
        before = layer_before(model, facts) if is_locked(facts) else None
        if before is not None and before.trains:
            yield Hit(
                sites=(facts.site.path,),
                message="statistics are frozen, but the layer before it trains; recalibrate when "
                "training is done",
                evidence={"layer_before": before.path},
                certainty="may",
            )
