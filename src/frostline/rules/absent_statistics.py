"""FL110 and FL121: sites without stored statistics, by design or by accident."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.rules import Hit, rule
from frostline.rules.predicates import affine_is_trained
from frostline.types.facts import ModelFacts, SiteFacts


@rule("FL110", "no-stored-statistics", severity="error")
def no_stored_statistics(model: ModelFacts) -> Iterator[Hit]:
    """A torch site keeps no statistics, so inference uses those of the batch.

    ## What it does
    Reports torch BN layers, native or wrapped, made with `track_running_stats=False`.

    ## Why is this bad?
    A prediction depends on the other samples in its batch: on their number, and on their classes.

    ## Example
    ```python
    import torch

    norm = torch.nn.BatchNorm1d(4, track_running_stats=False)
    layer = keras.layers.TorchModuleWrapper(norm, output_shape=(None, 4))
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)])
    ```

    ## Use instead
    ```python
    {network}
    ```

    ## When not to use it
    When batch statistics at inference are wanted and every batch is a fair sample.

    ## References
    jax issue 139; LearningToCompare issue 48.
    """
    for facts in model:
        if _keeps_none(facts) and not _has_lost(model, facts):
            yield Hit(
                sites=(facts.site.path,),
                message="keeps no statistics: every prediction depends on the other samples of its "
                "batch; track them",
                evidence={"channels": float(facts.site.channels or 0)},
            )


@rule("FL121", "lost-statistics", severity="error")
def lost_statistics(model: ModelFacts) -> Iterator[Hit]:
    """A trained site has no stored statistics any more.

    ## What it does
    Reports sites without stored statistics whose gamma or beta have trained, in a model with other
    BN layers that keep statistics, or have trained and lost theirs as well. FL110 reports all
    others.

    ## Why is this bad?
    `torch.func.replace_all_batch_norm_modules_` drops the buffers in place, to make a model fit for
    `vmap`, and `load_state_dict(strict=False)` into layers without buffers drops them silently. The
    weights were trained to be served with stored statistics; now every prediction depends on the
    other samples of its batch, and a checkpoint written from here has none to restore.

    ## Example
    ```python
    import torch

    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4),
        torch.nn.BatchNorm1d(4))
    for norm in (model[1], model[3]):
        torch.nn.init.uniform_(norm.weight)

    torch.func.replace_all_batch_norm_modules_(model)
    ```

    ## Use instead
    ```python
    {as above}
    import copy

    without = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(model))
    ```

    ## When not to use it
    When the network was trained to use batch statistics at inference, too.

    ## References
    `torch.func.replace_all_batch_norm_modules_`; the PyTorch guide to patching batch norm.
    """
    lost = tuple(facts.site.path for facts in model if _has_lost(model, facts))
    if lost:
        yield Hit(
            sites=lost,
            message=f"{len(lost)} trained BN layers have no statistics: predictions depend on "
            "their batch; load the model anew",
            evidence={"layers": float(len(lost))},
            certainty="may",
        )


def _keeps_none(facts: SiteFacts) -> bool:
    """Whether a built site stores no statistics."""
    return facts.site.channels is not None and facts.mean is None


def _has_lost(model: ModelFacts, facts: SiteFacts) -> bool:
    """Whether a site and its siblings show that there were statistics once."""
    siblings = (other for other in model if other is not facts and other.site.channels is not None)
    return (
        _keeps_none(facts)
        and affine_is_trained(facts)
        and any(other.mean is not None or affine_is_trained(other) for other in siblings)
    )
