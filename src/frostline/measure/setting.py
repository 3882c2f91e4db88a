"""Set up a bench: samples, a loss to compare by, and what the layers do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from frostline.adapters import Adapter, Forward, Outcome, OutputDistance
from frostline.adapters.protocol import Condition
from frostline.data.arrays import leaves
from frostline.data.batch import Batch, all_inputs, failure, take
from frostline.measure.bench import Bench, joined_arrays, only, task_of
from frostline.measure.phases import (
    class_labels,
    infer_task,
    loss_name_of,
    require_known_classes,
    require_one,
    tried,
)
from frostline.measure.samples import Samples, draw
from frostline.types import Array, DataError, FrostlineError, ModelError, Site
from frostline.types.facts import ModelFacts
from frostline.types.measured import Behaviour, Task
from frostline.types.reasons import first_line

#: Batches in which the sites are watched, and samples of each: stored and batch statistics are
#: told apart the better the fewer there are.
WATCHED, WATCHED_SAMPLES = 2, 8

#: Batches that are too few for an interval over them.
FEW_BATCHES = 5


def make_bench(
    adapter: Adapter,
    data: Any,
    *,
    facts: ModelFacts | None = None,
    loss: Any = None,
    step: Any = None,
    batch_size: int | None = None,
    max_samples: int = 1024,
    seed: int = 0,
) -> tuple[Bench, dict[str, Behaviour], list[str]]:
    """Draw the samples and find out how to judge the model on them.

    Returns:
        The bench; what each site does; and notes for a person.

    Raises:
        DataError: Data that cannot be used.
        ModelError: No loss is compiled, none is given, and none can be inferred.
    """
    require_one(loss, step)
    fixed = (adapter.facts() if facts is None else facts).batch
    samples = draw(
        data,
        max_samples=max_samples,
        batch_size=fixed or batch_size,
        seed=seed,
        fixed=fixed is not None,
        labels=False,
        whole=step is not None,
        inputs=adapter.inputs(),
    )
    notes = list(samples.notes)
    first = samples.batches[0]
    labels = only(joined_arrays([batch.y for batch in samples.batches])) if step is None else None
    if labels is not None and labels.dtype.kind not in "buif":
        raise DataError(f"labels must be numbers. Received: dtype {labels.dtype}")
    outputs: Any = None
    outcome: Outcome | None = None
    objective = adapter.objective()
    compiled = objective[0] is not None or _has_loss(adapter)
    forward: Any = None
    if step is None and loss is None and not compiled:
        own = not first.regular or first.y is None or adapter.judges_itself()
        if own:  # a model that computes its own loss, perhaps
            try:
                forward, foreign = _forward(adapter)
                outcome = tried(forward, first)
            except FrostlineError:
                outcome = None
        if outcome is None:
            needed = adapter.inputs(labels=True)
            asked = tuple(all_inputs(batch, needed) for batch in samples.batches)
            samples, first = replace(samples, batches=asked), asked[0]
            labels = None if first.y is None else labels
        if outcome is None and first.y is not None:
            outputs = only(joined_arrays([adapter.forward(first.x, training=False)]))
            loss, note = _inferred_loss(outputs, first)
            notes.append(note)
    if loss is not None or step is not None:
        objective = (None, None) if step is not None else loss_name_of(loss)
    behaviour = behaviour_of(adapter, samples, whole=fixed is not None, step=step)
    if outcome is None and first.y is None and step is None and loss is None and not compiled:
        samples, loss, note = _by_outputs(adapter, samples, behaviour)
        first = samples.batches[0]
        notes.append(note)
    if outcome is None:
        forward, foreign = _forward(adapter, loss, step)
    notes += foreign
    if outputs is None and outcome is None:
        # A pass that the inference probe needs anyway: it is compiled only once.
        outcome = _first_pass(adapter, forward, first, labels, objective, step)
    if outcome is not None:
        outputs = only(joined_arrays([outcome.outputs]))
    if getattr(loss or adapter.own_loss(), "ignore_class", None) is None:
        require_known_classes(labels, outputs, objective[0])
    unit = "sample" if outcome is None else outcome.unit
    losses = outcome.losses if outcome is not None and unit == "sample" else None
    task: Task = "unknown"
    logits = False
    if labels is not None and not isinstance(loss, OutputDistance):
        task, logits = task_of(outputs, only(joined_arrays([first.y])), objective, losses)
    judged = labels
    if task in ("binary", "multiclass") and labels is not None and outputs is not None:
        judged = class_labels(labels, outputs)
    if unit == "batch":
        number = len(samples.batches)
        note = f"the loss is one number per batch: the units of comparison are {number} batches"
        if number < FEW_BATCHES:
            note += ", too few for an interval to rely on: pass more data"
        notes.append(note)
    bench = Bench(
        adapter=adapter,
        forward=forward,
        samples=samples,
        task=task,
        logits=logits,
        labels=None if task == "unknown" else judged,
        blend_in_training=training_blend(forward.paths, adapter.sites(), behaviour),
        unit=unit,
        step=step,
        noisy=bool(adapter.noise_layers()),
    )
    return bench, behaviour, notes


def _first_pass(
    adapter: Adapter,
    forward: Any,
    first: Batch,
    labels: Any,
    objective: tuple[str | None, bool | None],
    step: Any,
) -> Outcome:
    try:
        return tried(forward, first)
    except FrostlineError as error:
        if first.y is None and step is None:
            raise DataError(
                "a diagnosis compares losses, which need labels here: pass (x, y), or step= for a "
                f"loss of another kind. Received: batches without labels ({first_line(error)})"
            ) from error
        if error.__cause__ is not None and not isinstance(error.__cause__, FrostlineError):
            own = only(joined_arrays([adapter.forward(first.x, training=False)]))
            require_known_classes(labels, own, objective[0])
        raise


def _by_outputs(
    adapter: Adapter, samples: Samples, behaviour: Mapping[str, Behaviour]
) -> tuple[Samples, OutputDistance, str]:
    """Samples whose labels are the outputs with λ as training has it, and the distance from them.

    Raises:
        ModelError: Outputs that are no floating numbers, or of one size in one phase only.
    """
    forward, _ = _forward(adapter)
    blend = training_blend(forward.paths, adapter.sites(), behaviour)
    wanted, stored = [], []
    for number, batch in enumerate(samples.batches):
        try:
            wanted.append(_floating(forward.outputs(batch, Condition(blend, number=number))))
            stored.append(_floating(forward.outputs(batch, Condition(0.0, number=number))))
        except FrostlineError:
            raise
        except Exception as error:
            raise failure(error, batch) from error
    same = [[leaf.shape for leaf in part] for part in wanted] == [
        [leaf.shape for leaf in part] for part in stored
    ]
    if not wanted[0] or not same:
        raise ModelError(
            "there are neither labels nor a loss, and the outputs cannot be compared: pass step=, "
            "a function (model, batch) that returns a loss. Received: outputs that are no floating "
            "numbers, or not as many in both phases"
        )
    columns = zip(*stored, strict=True)
    spread = tuple(
        max(float(np.std(np.concatenate([np.ravel(leaf) for leaf in column]))), 1e-12)
        for column in columns
    )
    parts = tuple(
        replace(batch, y=goal) for batch, goal in zip(samples.batches, wanted, strict=True)
    )
    note = (
        "no labels and no loss: outputs are compared. A loss here is the squared distance of a "
        "sample's outputs from those with the statistics that training uses, in variances of the "
        "outputs; which of the two is right it does not say"
    )
    return replace(samples, batches=parts, items=()), OutputDistance(spread=spread), note


def _floating(outputs: Any) -> tuple[Array, ...]:
    """The arrays of outputs, where all of them are floating numbers."""
    found = tuple(leaf for _, leaf in leaves(outputs))
    kinds = {leaf.dtype.kind if isinstance(leaf, np.ndarray) else "O" for leaf in found}
    return found if kinds == {"f"} else ()


def training_blend(
    paths: tuple[str, ...], sites: tuple[Site, ...], behaviour: Mapping[str, Behaviour]
) -> Array:
    """λ of each site in training, shape ``(sites,)``; 1 for thawed ones of unknown behaviour."""
    frozen = {site.path: site.stats_frozen for site in sites}
    found = []
    for path in paths:
        each = behaviour.get(path)
        known = None if each is None else each.training
        found.append(float(not frozen[path]) if known is None else float(known))
    blend: Array = np.clip(np.array(found, dtype=np.float64), 0.0, 1.0)
    return blend


def behaviour_of(
    adapter: Adapter, samples: Samples, *, whole: bool, step: Any = None
) -> dict[str, Behaviour]:
    """What each site does, watched in passes of the model.

    Args:
        adapter: The model.
        samples: Some of their batches are passed through it.
        whole: The model takes no other batch size.
        step: The user's own step, which runs the model instead.

    Raises:
        ModelError: The model fails in training mode.
    """
    whole = whole or not samples.divisible
    few = [
        batch if whole else take(batch, slice(WATCHED_SAMPLES))
        for batch in samples.batches[:WATCHED]
    ]
    try:
        return dict(adapter.behaviour(few, step=step))
    except FrostlineError:
        raise
    except Exception as error:
        raise ModelError(
            "the model fails in training mode on these batches, so that it cannot be "
            "compared with inference; where it takes a batch in its own way, pass step=. "
            f"Received: {first_line(error)}"
        ) from error


def _forward(adapter: Adapter, loss: Any = None, step: Any = None) -> tuple[Forward, list[str]]:
    """λ-passes over all sites that can be blended, and which cannot."""
    try:
        return adapter.blend_forward(loss=loss, step=step), []
    except ModelError:
        own = [site.path for site in adapter.sites() if not site.kind.startswith("torch.")]
        foreign = len(adapter.sites()) - len(own)
        if not foreign:
            raise
        note = f"{foreign} BN layer(s) inside torch modules are left as they are in all probes"
        return adapter.blend_forward(loss=loss, step=step, paths=own), [note]


def _has_loss(adapter: Adapter) -> bool:
    """Whether ``compile`` was given losses, of which there may be several without one name."""
    return adapter.compiled() and adapter.own_loss() is not None


def _inferred_loss(outputs: Any, first: Batch) -> tuple[dict[str, Any], str]:
    """The usual loss for these outputs and labels, as a configuration, and a note that says so."""
    labels = only(joined_arrays([first.y]))
    task = "unknown" if outputs is None or labels is None else infer_task(labels, outputs)
    if task == "unknown" or outputs is None or labels is None:
        shapes = [leaf.shape for part in (first.y, outputs) for _, leaf in leaves(part)]
        several = " (the model returns several outputs)" if outputs is None else ""
        raise ModelError(
            "the model is not compiled with a loss, and labels and outputs do not tell which it "
            f"is{several}: pass loss=, a function that takes what the model returns, or step=. "
            f"Received: loss=None, arrays of shapes {shapes}"
        )
    finite = outputs[np.isfinite(outputs)]
    logits = bool(finite.size and (finite.min() < 0 or finite.max() > 1))
    columns = 1 if outputs.ndim == 1 else outputs.shape[1]
    if task == "regression":
        name, config = "MeanSquaredError", {}
    else:
        one_hot = labels.ndim == 2 and labels.shape[1] > 1
        kind = "Binary" if columns == 1 else "Categorical" if one_hot else "SparseCategorical"
        name, config = f"{kind}Crossentropy", {"from_logits": logits}
    note = f"the model is not compiled with a loss; from labels and outputs: {name}" + (
        "(from_logits=True)" if logits and config else ""
    )
    return {"class_name": name, "config": config}, note
