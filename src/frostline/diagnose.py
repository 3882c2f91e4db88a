"""The public questions about a model: the only place that knows views, measurements and rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frostline import measure
from frostline.models import view
from frostline.types import ModelError, PhaseTable, Site


def sites(model: Any) -> tuple[Site, ...]:
    """List every BN layer of a model.

    Args:
        model: A Keras 3 model; functional, sequential or subclassed, with any nesting.

    Returns:
        One :class:`~frostline.types.Site` per BN layer, in execution order where the graph is
        known. Empty for a model without BN.

    Raises:
        ModelError: Not a model that Frostline can read.
    """
    return view(model).sites()


def require_sites(found: Sequence[Site]) -> None:
    """Raise when a model has no BN layer, for verbs that have nothing to do without one.

    Raises:
        ModelError: ``found`` is empty.
    """
    if not found:
        raise ModelError("no BatchNormalization layer: BN cannot be the cause")


def phases(
    model: Any,
    data: Any,
    *,
    metrics: measure.Metrics | None = None,
    batch_size: int = 32,
) -> PhaseTable:
    """Compare a model with itself in the dynamic phase, phase 0 and phase 1, on the same data.

    The dynamic phase is the model's own ``evaluate``. Phase 0 is an inference forward pass. Phase
    1 is a training-mode forward pass, with dropout and with the statistics of each batch, in which
    nothing is updated. A healthy model gives nearly the same in all three; a gap between 0 and 1
    on the same samples is the sign of a layer that behaves differently in training.

    The model is left bit for bit as it was found (weights, statistics, optimizer, metric states,
    seed generators), also when interrupted.

    Args:
        model: A Keras 3 model. Without ``compile`` there is no loss and no dynamic phase.
        data: ``(x, y)`` or ``(x, y, sample_weight)`` arrays, a dataset or loader, or an iterable
            of batches. Read twice; a one-shot iterator is held in memory.
        metrics: More metrics of phases 0 and 1: name -> function of labels and outputs, arrays of
            shape ``(n, ...)``, to a number. Not weighted by ``sample_weight``, nor are the
            built-in ones; the loss is.
        batch_size: Samples per batch for data given as arrays. Phase 1 depends on it, as training
            does: use the one that you train with.

    Returns:
        A table with loss, and accuracy (AUC too for two classes) or MSE and Spearman's rank
        correlation; ``patterns`` names the tell-tale signs that are present.

    Raises:
        ModelError: Not a model that Frostline can read.
        DataError: Data without labels, or unusable; see :mod:`frostline.data`.

    Example:
        >>> table = fl.phases(model, (x, y))                             # doctest: +SKIP
        >>> table["1"].metrics["accuracy"] - table["0"].metrics["accuracy"]   # doctest: +SKIP
    """
    return measure.phase_table(view(model), data, metrics=metrics, batch_size=batch_size)
