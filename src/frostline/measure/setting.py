"""Set up a bench: samples, a loss to compare by, and what the layers do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from frostline.adapters import Adapter, Forward, Outcome, OutputDistance
from frostline.adapters.protocol import Condition
from frostline.data.arrays import leaves
from frostline.data.batch import Batch, all_inputs, failure, take
from frostline.data.batches import is_reiterable
from frostline.measure.bench import Bench, joined_arrays, only, task_of
from frostline.measure.judged import class_labels, infer_task
from frostline.measure.phases import (
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
    drawn = partial(
        draw,
        data,
        max_samples=max_samples,
        batch_size=fixed or batch_size,
        seed=seed,
        fixed=fixed is not None,
        labels=False,
        whole=step is not None,
        inputs=adapter.inputs(),
        finite=partial(finite_samples, adapter, step),
    )
    samples = drawn()
    try:
        return _bench(adapter, samples, loss, step, fixed=fixed is not None)
    except ModelError:
        if samples.given is None or not _takes_no_part(adapter, samples.given, loss, step):
            raise
    if not is_reiterable(data):
        raise ModelError(
            "the model takes a batch as a whole and no part of it, so that the batches have to be "
            "read again: pass a list of them. Received: an iterator, which is read once"
        )
    return _bench(adapter, drawn(cut=False), loss, step, fixed=fixed is not None)


def _bench(
    adapter: Adapter, samples: Samples, loss: Any, step: Any, *, fixed: bool
) -> tuple[Bench, dict[str, Behaviour], list[str]]:
    """The bench of these samples; ``fixed``: the model takes no other batch size."""
    labels = None if step is not None else _numbers([batch.y for batch in samples.batches])
    given = loss is not None or step is not None or _is_compiled(adapter)
    judge = _Judge(samples=samples, loss=loss) if given else _without_loss(adapter, samples)
    behaviour = behaviour_of(adapter, judge.samples, whole=fixed, step=step)
    if judge.first.y is None:
        labels = None
        if not given and judge.outcome is None:
            judge = _by_outputs(adapter, judge, behaviour)
    if step is not None:
        objective: _Objective = (None, None)
    elif judge.loss is None or isinstance(judge.loss, OutputDistance):
        objective = adapter.objective()
    else:
        objective = loss_name_of(judge.loss)
    judge = _with_first_pass(adapter, judge, labels, objective, step)
    if getattr(judge.loss or adapter.own_loss(), "ignore_class", None) is None:
        require_known_classes(labels, judge.outputs, objective[0])
    task: Task = "unknown"
    logits = False
    if labels is not None:
        truth = only(joined_arrays([judge.first.y]))
        task, logits = task_of(judge.outputs, truth, objective, judge.losses)
        if task in ("binary", "multiclass") and judge.outputs is not None:
            labels = class_labels(labels, judge.outputs)
    bench = Bench(
        adapter=adapter,
        forward=judge.forward,
        samples=judge.samples,
        task=task,
        logits=logits,
        labels=None if task == "unknown" else labels,
        blend_in_training=training_blend(judge.forward.paths, adapter.sites(), behaviour),
        unit=judge.unit,
        step=step,
        noisy=bool(adapter.noise_layers()),
    )
    return bench, behaviour, [*samples.notes, *judge.notes, *_few_units(bench)]


def _takes_no_part(adapter: Adapter, batch: Batch, loss: Any, step: Any) -> bool:
    """Whether the model takes a batch, and not a part of it.

    A graph of all nodes is one batch: the model multiplies it with a matrix of its own.
    """
    forward = None if loss is None and step is None else _forward(adapter, loss, step)[0]

    def takes(given: Batch) -> bool:
        try:
            if forward is None:
                adapter.forward(given.x, training=True)
            else:
                tried(forward, given, training=True)
        except Exception:  # whatever the model's own code says to it
            return False
        return True

    return takes(batch) and not takes(take(batch, slice(WATCHED_SAMPLES)))


def finite_samples(adapter: Adapter, step: Any, batch: Batch) -> Array:
    """Which samples the model makes finite numbers of at its sites and outputs, shape ``(n,)``.

    None where the model does not take them alone, or where what they share is not finite.
    """
    none = np.zeros(len(batch), dtype=bool)
    condition = Condition(0.0, record=True)
    try:
        forward, _ = _forward(adapter, step=step)
        if step is None:
            outputs, seen = forward.outputs(batch, condition)
        else:
            outcome = forward.outcome(batch, condition)
            outputs, seen = outcome.losses, outcome.moments
    except Exception:
        return none
    sound = ~none
    for _, leaf in leaves(outputs):
        if leaf.dtype.kind not in "fc":
            continue
        if len(leaf) != len(batch):
            if not np.isfinite(leaf).all():
                return none
            continue
        sound &= np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1)
    if sound.all():
        return sound if all(moments.finite for moments in seen.values()) else none
    kept = np.flatnonzero(sound)
    if len(kept):
        sound[kept] = finite_samples(adapter, step, take(batch, kept))
    return sound


#: Snake-case name of a loss and its ``from_logits``; ``None``: not known.
_Objective = tuple[str | None, bool | None]


@dataclass(frozen=True)
class _Judge:
    """What a model is judged by, and what is known of its first batch."""

    samples: Samples
    loss: Any = None
    forward: Any = None
    outputs: Any = None
    outcome: Outcome | None = None
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Batch:
        return self.samples.batches[0]

    @property
    def unit(self) -> Any:
        return "sample" if self.outcome is None else self.outcome.unit

    @property
    def losses(self) -> Array | None:
        """Losses of the first batch, one per sample, where they are known."""
        return None if self.outcome is None or self.unit == "batch" else self.outcome.losses


def _without_loss(adapter: Adapter, samples: Samples) -> _Judge:
    """Judge by the loss that the model computes itself, or by the usual one for its outputs."""
    first = samples.batches[0]
    if not first.regular or first.y is None or adapter.judges_itself():
        try:
            forward, foreign = _forward(adapter)
            outcome = tried(forward, first)
        except FrostlineError:
            pass  # it computes none
        else:
            return _Judge(samples, forward=forward, outcome=outcome, notes=foreign)
    needed = adapter.inputs(labels=True)
    asked = tuple(all_inputs(batch, needed) for batch in samples.batches)
    as_read = tuple(all_inputs(batch, needed) for batch in samples.as_read)
    judge = _Judge(replace(samples, batches=asked, as_read=as_read))
    if judge.first.y is None:
        return judge
    outputs = only(joined_arrays([adapter.forward(judge.first.x, training=False)]))
    loss, note = _inferred_loss(outputs, judge.first)
    return replace(judge, loss=loss, outputs=outputs, notes=(note,))


def _with_first_pass(
    adapter: Adapter, judge: _Judge, labels: Any, objective: _Objective, step: Any
) -> _Judge:
    """The same with λ-passes, and with what the model makes of the first batch."""
    if judge.outcome is None:
        forward, foreign = _forward(adapter, judge.loss, step)
        judge = replace(judge, forward=forward, notes=(*judge.notes, *foreign))
    if judge.outcome is None and judge.outputs is None:
        # A pass that the inference probe needs anyway: it is compiled only once.
        outcome = _first_pass(adapter, judge, labels, objective, step)
        judge = replace(judge, outcome=outcome)
    if judge.outcome is None:
        return judge
    return replace(judge, outputs=only(joined_arrays([judge.outcome.outputs])))


def _numbers(labels: list[Any]) -> Array | None:
    """Labels of all batches as one array.

    Raises:
        DataError: They are no numbers.
    """
    joined = only(joined_arrays(labels))
    if joined is not None and joined.dtype.kind not in "buif":
        raise DataError(f"labels must be numbers. Received: dtype {joined.dtype}")
    return joined


def _few_units(bench: Bench) -> list[str]:
    """What a person should know of the units that are compared."""
    if bench.unit == "sample":
        return []
    number = len(bench.samples.batches)
    note = f"the loss is one number per batch: the units of comparison are {number} batches"
    if number < FEW_BATCHES:
        note += ", too few for an interval to rely on: pass more data"
    return [note]


def _first_pass(
    adapter: Adapter, judge: _Judge, labels: Any, objective: _Objective, step: Any
) -> Outcome:
    first = judge.first
    try:
        return tried(judge.forward, first)
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


def _by_outputs(adapter: Adapter, judge: _Judge, behaviour: Mapping[str, Behaviour]) -> _Judge:
    """Judge by the distance from the outputs with λ as training has it, which become the labels.

    Raises:
        ModelError: Outputs that are no floating numbers, or of one size in one phase only.
    """
    forward, _ = _forward(adapter)
    blend = training_blend(forward.paths, adapter.sites(), behaviour)
    wanted, stored = [], []
    for number, batch in enumerate(judge.samples.batches):
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
        replace(batch, y=goal) for batch, goal in zip(judge.samples.batches, wanted, strict=True)
    )
    note = (
        "no labels and no loss: outputs are compared. A loss here is the squared distance of a "
        "sample's outputs from those with the statistics that training uses, in variances of the "
        "outputs; which of the two is right it does not say"
    )
    return replace(
        judge,
        samples=replace(judge.samples, batches=parts, items=(), as_read=()),
        loss=OutputDistance(spread=spread),
        notes=(note,),
    )


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


def _forward(
    adapter: Adapter, loss: Any = None, step: Any = None
) -> tuple[Forward, tuple[str, ...]]:
    """λ-passes over all sites that can be blended, and which cannot."""
    try:
        return adapter.blend_forward(loss=loss, step=step), ()
    except ModelError:
        own = [site.path for site in adapter.sites() if not site.kind.startswith("torch.")]
        foreign = len(adapter.sites()) - len(own)
        if not foreign:
            raise
        note = f"{foreign} BN layer(s) inside torch modules are left as they are in all probes"
        return adapter.blend_forward(loss=loss, step=step, paths=own), (note,)


def _is_compiled(adapter: Adapter) -> bool:
    """Whether ``compile`` was given a loss, or several, which have no name together."""
    return adapter.objective()[0] is not None or (
        adapter.compiled() and adapter.own_loss() is not None
    )


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
