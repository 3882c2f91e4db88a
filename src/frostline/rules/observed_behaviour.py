"""FL301 to FL303: what sites were seen to do, whatever their flags say."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.rules import Hit, rule
from frostline.rules.fixtures import Behaved
from frostline.rules.predicates import frozen_moves, frozen_on_batch, only_serves, uses_batch
from frostline.types.codes import Fix
from frostline.types.facts import ModelFacts
from frostline.types.measured import Measurement


@rule("FL301", "frozen-seen-using-batch", severity="error", needs="data", fix=Fix.CONVERT)
def frozen_seen_using_batch(model: ModelFacts, behaved: Behaved) -> Iterator[Hit]:
    """A frozen site was seen to normalise with the batch in training mode.

    ## What it does
    Runs the model in training mode and looks at what each site gives, not at its flags: reports
    sites that are frozen, whose statistics do not move, and whose output follows the statistics of
    the batch. Finds custom layers too, of which FL101 knows nothing.

    ## Why is this bad?
    The layers behind are trained on features normalised by the batch and are served with features
    normalised by the stored statistics. On a new data set the two differ, so training looks
    perfect and inference does not: the bug of Keras 2.1.3 to 2.2.4 that Frostline is named for.

    ## Example
    ```python
    {samples}
    {frozen policy="batch", name="bn"}
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    {samples}
    {frozen policy="inference", name="bn"}
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    To reproduce a result of an old release exactly.

    ## References
    Keras pull request 9965; keras issue 9522.
    """
    for facts, seen in behaved:
        if frozen_on_batch(facts, seen):
            yield Hit(
                sites=(facts.site.path,),
                message="frozen, but training mode normalises with the batch, as seen in its "
                "output; lock it to its stored statistics",
                evidence={"blend": float(seen.training or 0.0), "policy": facts.site.policy},
                fix=model.words.lock,
            )


@rule("FL302", "frozen-seen-moving", severity="error", needs="data", fix=Fix.FREEZE)
def frozen_seen_moving(model: ModelFacts, behaved: Behaved) -> Iterator[Hit]:
    """The stored statistics of a frozen site were seen to move in training mode.

    ## What it does
    Runs the model in training mode, looks whether the stored statistics of sites whose parameters
    or statistics are frozen would have moved, and takes the move back. Not in a torch module that
    only serves: all of it in inference mode, and no parameter trains.

    ## Why is this bad?
    Every step replaces a share `1 - decay` of the pretrained statistics; one forward pass without
    an optimizer is enough to change what the model predicts. The frozen filters behind were
    trained for the old statistics.

    ## Example
    ```python
    {samples}
    {frozen version="2.1.2", name="bn"}
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    {samples}
    {frozen version="3", name="bn"}
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    To adapt only the statistics to a new domain on purpose (AdaBN).

    ## References
    Keras issue 7085; torchvision issue 2079.
    """
    if only_serves(model):
        return
    for facts, seen in behaved:
        # FL118 speaks of one that train() itself thawed.
        if frozen_moves(facts, seen) and facts.twin is None and not facts.undone:
            yield Hit(
                sites=(facts.site.path,),
                message=f"frozen, but a pass in training mode moved {1 - facts.site.decay:.2g} of "
                "its statistics; freeze the layer, and restore them",
                evidence={"replaced_per_step": 1 - facts.site.decay},
            )


@rule("FL303", "batch-dependent-inference", severity="error", needs="data", fix=Fix.FREEZE)
def batch_dependent_inference(measurement: Measurement, behaved: Behaved) -> Iterator[Hit]:
    """A site was seen to normalise with the batch at inference.

    ## What it does
    Runs the model's own inference and looks at what each site gives: reports sites that follow
    the statistics of the batch. The same sample is also put into batches of other samples; the
    largest change of its output is part of the evidence.

    ## Why is this bad?
    A prediction depends on the other samples of its batch: on their number, on their classes, on
    their order. Scores measured so do not hold for one sample at a time, and can be too good as
    well as too bad.

    ## Example
    ```python
    class Insisting(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return super().call(inputs, training=True, mask=mask)

    {samples}
    model = keras.Sequential([keras.Input((4,)), Insisting(name="bn"), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    ```

    ## Use instead
    ```python
    {samples}
    {network}
    model.compile("sgd", "mse")
    ```

    ## When not to use it
    When batch statistics at inference are wanted and every batch is a fair sample.

    ## References
    jax issue 139; LearningToCompare issue 48.
    """
    change = measurement.neighbours
    text = "" if change is None else f" (its neighbours change an output by up to {change:.1%})"
    for facts, seen in behaved:
        if uses_batch(seen.inference):
            yield Hit(
                sites=(facts.site.path,),
                message=f"inference normalises with the batch{text}; use the stored statistics",
                evidence={"blend": float(seen.inference or 0.0), "neighbours": change or 0.0},
            )
