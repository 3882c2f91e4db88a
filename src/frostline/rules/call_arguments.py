"""FL108, FL109 and FL117: how a site is called decides its mode, not its flags."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.rules import Hit, rule
from frostline.rules.predicates import is_locked
from frostline.types.codes import Fix
from frostline.types.facts import ModelFacts


@rule("FL108", "written-inference-mode-ignored", severity="error", fix=Fix.FREEZE)
def written_inference_mode_ignored(model: ModelFacts) -> Iterator[Hit]:
    """A thawed site is called with `training=False`, which `fit` does not respect.

    ## What it does
    Reads `training=` from the calls in functional graphs, of the site and of the models around it,
    and reports thawed sites under `training=False`.

    ## Why is this bad?
    `base(inputs, training=False)` is the recipe that is meant to keep BN in inference mode also
    after thawing. In Keras 3 a functional model hands its own `training` to every layer and
    overwrites what is written in the graph: `fit` normalises with the batch and moves the
    statistics. Only `model(x)` without `training` respects it.

    ## Example
    ```python
    inputs = keras.Input((4,))
    base = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model = keras.Model(inputs, keras.layers.Dense(2)(base(inputs, training=False)))
    ```

    ## Use instead
    ```python
    inputs = keras.Input((4,))
    base = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model = keras.Model(inputs, keras.layers.Dense(2)(base(inputs, training=False)))
    base.get_layer("bn").trainable = False
    ```

    ## When not to use it
    When all training goes through `model(x)` in a loop of your own.

    ## References
    `keras/src/models/functional.py`, `operation_fn`; the Keras guide to transfer learning.
    """
    for facts in model:
        if facts.training is False and not facts.site.stats_frozen:
            yield Hit(
                sites=(facts.site.path,),
                message="called with training=False, which fit() overrides: its statistics move; "
                "freeze it instead",
                evidence={"training": "False", "replaced_per_step": 1 - facts.site.decay},
            )


@rule("FL109", "written-training-mode", severity="warning", fix=Fix.FREEZE)
def written_training_mode(model: ModelFacts) -> Iterator[Hit]:
    """A site is called with `training=True`, so that inference depends on how the model is called.

    ## What it does
    Reads `training=` from the calls in functional graphs, of the site and of the models around it.
    Calls inside custom layers and subclassed models cannot be read without running them.

    ## Why is this bad?
    `model(x)` then normalises with the batch and moves the statistics: a prediction depends on the
    other samples. `predict` and `evaluate` of a functional model override it and use the stored
    statistics, so the same model gives two answers.

    ## Example
    ```python
    inputs = keras.Input((4,))
    normed = keras.layers.BatchNormalization(name="bn")(inputs, training=True)
    model = keras.Model(inputs, keras.layers.Dense(2)(normed))
    ```

    ## Use instead
    ```python
    inputs = keras.Input((4,))
    normed = keras.layers.BatchNormalization(name="bn")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(normed))
    ```

    ## When not to use it
    When batch statistics at inference are wanted, as in some image translation networks.

    ## References
    `keras/src/models/functional.py`, `operation_fn`.
    """
    for facts in model:
        if facts.training is True and not is_locked(facts):
            yield Hit(
                sites=(facts.site.path,),
                message="called with training=True: model(x) uses batch statistics, predict() "
                "stored ones; remove it",
                evidence={"training": "True"},
            )


@rule("FL117", "two-regimes", severity="info", fix=Fix.FREEZE)
def two_regimes(model: ModelFacts) -> Iterator[Hit]:
    """One layer trains in one model and is frozen in another that contains it.

    ## What it does
    Reports sites inside an inner model that was trained for itself, and which this model freezes:
    the discriminator of a GAN inside the combined model.

    ## Why is this bad?
    It need not be, but both models read one flag. On TensorFlow each step keeps the flag of its
    first call; JAX and torch read it at every step, so that the model which is called under the
    other's flag raises, or trains what should be frozen.

    ## Example
    ```python
    inner = keras.Sequential([
        keras.Input((4,)), keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(2)])
    inner.compile("sgd", "mse")
    inner.train_on_batch(np.ones((8, 4), "float32"), np.ones((8, 2), "float32"))
    inner.trainable = False
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), inner])
    ```

    ## Use instead
    ```python
    inner = keras.Sequential([
        keras.Input((4,)), keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(2)])
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), inner])
    ```

    ## When not to use it
    When every step of this model runs inside `with fl.frozen(inner)`, as in `examples/gan.py`.

    ## References
    `examples/gan.py`; Keras issue 4674.
    """
    for facts in model:
        if facts.two_regimes and facts.site.trained_by is not None:
            name = facts.site.trained_by
            yield Hit(
                sites=(facts.site.path,),
                message=f"trains in '{name[:30]}', frozen here, under one flag: run each step of "
                "this model in fl.frozen(...)",
                evidence={"trained_by": name},
            )
