"""FL118 to FL120: what the mode and the momentum of a torch module do behind one's back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from frostline.rules import Hit, rule
from frostline.types.codes import Fix
from frostline.types.facts import ModelFacts, SiteFacts


@rule("FL118", "eval-undone-by-train", severity="warning", fix=Fix.FREEZE)
def eval_undone_by_train(model: ModelFacts) -> Iterator[Hit]:
    """A torch site was put into `eval()` by hand, and the next `train()` of the model undoes it.

    ## What it does
    Calls the model's own `train()`, looks at the modes, and restores them. Reports sites of a model
    in training mode that are in evaluation mode now and would not be afterwards.

    ## Why is this bad?
    Most training loops call `model.train()` at the start of every epoch, and Lightning before 2.2
    did so after each validation, too. From then on the "frozen" layer normalises with the batch,
    and its statistics move, while `requires_grad` and the checkpoint still say frozen.

    ## Example
    ```python
    {torch}
    model[1].eval()
    ```

    ## Use instead
    ```python
    {torch}
    fl.freeze(model)
    ```

    ## When not to use it
    When the loop itself calls `eval()` again behind every `train()`, or leaves all modes as they
    are: Lightning's `Trainer` does, from 2.2 on.

    ## References
    gt-pyg issue 112; `torch.nn.Module.train`.
    """
    for facts in model:
        if facts.undone:
            replaced = (
                "" if facts.cumulative else f", each step replacing {1 - facts.site.decay:.2g}"
            )
            yield Hit(
                sites=(facts.site.path,),
                message="in eval() by hand, which the next train() undoes: its statistics then move"
                f"{replaced}; lock it",
                evidence={"replaced_per_step": 1 - facts.site.decay},
                certainty="may",
            )


@rule("FL119", "training-mode-inside-eval", severity="error", fix=Fix.INFERENCE_MODE)
def training_mode_inside_eval(model: ModelFacts) -> Iterator[Hit]:
    """A torch site is in training mode while the model around it is in evaluation mode.

    ## What it does
    Reports sites with `training=True`, not locked, in a model with `training=False`.

    ## Why is this bad?
    Every prediction is normalised by its own batch, so it depends on the other samples, and moves
    the stored statistics. It happens to layers that are put into the model after `eval()`, and to
    code that sets `training` itself.

    ## Example
    ```python
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()
    model[1].train()
    ```

    ## Use instead
    ```python
    {torch}
    model.eval()
    ```

    ## When not to use it
    When the statistics are adapted to the test data on purpose.

    ## References
    `torch.nn.Module.eval`; LearningToCompare issue 48.
    """
    for facts in model:
        stores = facts.mean is not None and facts.site.policy != "batch"
        if model.mode is False and facts.mode and stores and not facts.live:
            yield Hit(
                sites=(facts.site.path,),
                message="in training mode inside of a model in eval(): predictions depend on their "
                "batch and move the statistics; call eval()",
                evidence={"replaced_per_step": 1 - facts.site.decay},
            )


@rule("FL120", "cumulative-average", severity="warning", fix=Fix.SET_MOMENTUM)
def cumulative_average(model: ModelFacts) -> Iterator[Hit]:
    """A torch site has `momentum=None`: its statistics are the plain mean over all batches so far.

    ## What it does
    Reports thawed torch sites with `momentum=None`.

    ## Why is this bad?
    In training the mean covers the activations of all earlier weights, and follows the present ones
    slower and slower. With `num_batches_tracked` at 0 the first batch replaces whatever was loaded.
    `update_bn` sets `None` while it runs, and leaves it behind when its loader raises.

    ## Example
    ```python
    {torch, momentum=None}
    ```

    ## Use instead
    ```python
    {torch, momentum=0.1}
    ```

    ## When not to use it
    While the statistics are estimated anew with fixed weights.

    ## References
    `torch.nn.BatchNorm2d`, `momentum`; `torch.optim.swa_utils.update_bn`.
    """
    for facts in model:
        if not facts.cumulative or facts.site.stats_frozen:
            continue
        seen = facts.updates or 0
        text = f"momentum=None averages over all {seen + 1} batches, those of old weights too"
        if not seen and _stored(facts):
            text = "momentum=None at 0 batches: the next one replaces all of the stored statistics"
        yield Hit(
            sites=(facts.site.path,),
            message=f"{text}; set 0.1",
            evidence={"updates": float(seen), "replaced_per_step": 1 - facts.site.decay},
            certainty="may",
        )


def _stored(facts: SiteFacts) -> bool:
    """Whether it holds statistics of anything."""
    pairs = ((facts.mean, 0.0), (facts.variance, 1.0))
    return any(values is not None and bool(np.any(values != first)) for values, first in pairs)
