"""Set up a bench: samples, a loss to compare by, and what the layers do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from frostline.adapters import ModelView, read_facts as read_facts
from frostline.data.batches import Batch, leaves
from frostline.measure.bench import Bench, joined_arrays, only, task_of
from frostline.measure.phases import class_labels, infer_task
from frostline.measure.samples import Samples, draw, take
from frostline.types import Array, DataError, FrostlineError, ModelError, Site
from frostline.types.facts import ModelFacts
from frostline.types.measured import Behaviour
from frostline.types.reasons import first_line

#: Batches in which the sites are watched, and samples of each: stored and batch statistics are
#: told apart the better the fewer there are.
WATCHED, WATCHED_SAMPLES = 2, 8

#: What terminals read as colours.


def facts_of(view: ModelView) -> ModelFacts:
    """What the view knows without data."""
    own = getattr(view, "facts", None)
    return own() if own is not None else read_facts(view.model)


def make_bench(
    view: ModelView,
    data: Any,
    *,
    loss: Any = None,
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
    fixed = facts_of(view).batch
    samples = draw(
        data,
        max_samples=max_samples,
        batch_size=fixed or batch_size,
        seed=seed,
        fixed=fixed is not None,
    )
    notes = list(samples.notes)
    first = samples.batches[0]
    outputs = None
    if loss is None and view.objective()[0] is None and not _has_loss(view):
        outputs = only(joined_arrays([view.forward(first.x, training=False)]))
        loss, told = _inferred_loss(outputs, first)
        notes.append(told)
    forward, foreign = _forward(view, loss)
    notes += foreign
    objective = view.objective() if loss is None else _named(loss)
    labels = only(joined_arrays([batch.y for batch in samples.batches]))
    if labels is not None and labels.dtype.kind not in "buif":
        raise DataError(f"labels must be numbers. Received: dtype {labels.dtype}")
    if outputs is None:  # a pass that the inference probe needs anyway: it is compiled only once
        try:
            outcome = forward.own(first, training=False)
        except FrostlineError:
            raise
        except Exception:
            own = only(joined_arrays([view.forward(first.x, training=False)]))
            _require_known_classes(labels, own, objective[0])
            raise
        outputs = only(joined_arrays([outcome.outputs]))
    if getattr(loss or getattr(view.model, "loss", None), "ignore_class", None) is None:
        _require_known_classes(labels, outputs, objective[0])
    task, logits = task_of(outputs, only(joined_arrays([first.y])), objective)
    judged = labels
    if task in ("binary", "multiclass") and labels is not None and outputs is not None:
        judged = class_labels(labels, outputs)
    behaviour = behaviour_of(view, samples, whole=fixed is not None)
    noise = getattr(view, "noise_layers", None)
    bench = Bench(
        view=view,
        forward=forward,
        samples=samples,
        task=task,
        logits=logits,
        labels=None if task == "unknown" else judged,
        blend_in_training=training_blend(forward.paths, view.sites(), behaviour),
        noisy=noise is None or bool(noise()),
    )
    return bench, behaviour, notes


def training_blend(
    paths: tuple[str, ...], sites: tuple[Site, ...], behaviour: Mapping[str, Behaviour]
) -> Array:
    """λ of each site in training, shape ``(sites,)``; 1 for thawed ones that could not be told."""
    frozen = {site.path: site.stats_frozen for site in sites}
    found = []
    for path in paths:
        each = behaviour.get(path)
        known = None if each is None else each.training
        found.append(float(not frozen[path]) if known is None else float(known))
    blend: Array = np.clip(np.array(found, dtype=np.float64), 0.0, 1.0)
    return blend


def behaviour_of(view: ModelView, samples: Samples, *, whole: bool) -> dict[str, Behaviour]:
    """What each site does, watched in passes of the model; ``whole``: it takes no other batches."""
    watch = getattr(view, "behaviour", None)
    if watch is not None:
        few = slice(None) if whole else slice(WATCHED_SAMPLES)
        parts = [take(batch, few) for batch in samples.batches[:WATCHED]]
        try:
            return dict(watch([(part.x, part.y) for part in parts]))
        except FrostlineError:
            raise
        except Exception as error:  # inference has run already
            raise ModelError(
                "the model fails in training mode, so that it cannot be compared with inference, "
                f"which works. Received: {first_line(error)}"
            ) from error
    return {site.path: _from_flags(site) for site in view.sites()}


def _from_flags(site: Site) -> Behaviour:
    stored = site.stats_frozen and site.policy == "inference"
    moves = not site.stats_frozen or site.policy == "update"
    return Behaviour(path=site.path, training=float(not stored), inference=0.0, moves=moves)


def _forward(view: ModelView, loss: Any) -> tuple[Any, list[str]]:
    """λ-passes over all sites that can be blended, and which cannot."""
    make = getattr(view, "blend_forward", None)
    if make is None:
        from frostline.adapters.keras.blend import BlendForward

        def make(loss: Any = None, paths: Any = None) -> Any:
            return BlendForward(view.model, paths, loss=loss)

    try:
        return make(loss=loss), []
    except ModelError:
        own = [site.path for site in view.sites() if not site.kind.startswith("torch.")]
        foreign = len(view.sites()) - len(own)
        if not foreign:
            raise
        note = f"{foreign} BN layer(s) inside torch modules are left as they are in all probes"
        return make(loss=loss, paths=own), [note]


def _has_loss(view: ModelView) -> bool:
    """Whether ``compile`` was given losses, of which there may be several without one name."""
    return view.compiled() and getattr(view.model, "loss", None) is not None


def _require_known_classes(labels: Any, outputs: Any, loss_name: str | None) -> None:
    """Class numbers must be those of outputs: JAX takes others for no class, TensorFlow raises."""
    if loss_name != "sparse_categorical_crossentropy" or labels is None or outputs is None:
        return
    classes, low, high = outputs.shape[-1], labels.min(), labels.max()
    if outputs.ndim > 1 and (low < 0 or high >= classes):
        raise DataError(
            f"labels must be class numbers from 0 to {classes - 1}, for outputs of {classes} "
            f"classes. Received: labels from {low} to {high}"
        )


def _named(loss: Any) -> tuple[str | None, bool | None]:
    """Snake-case name of a loss that the user gave, and its ``from_logits``."""
    if isinstance(loss, str):
        return _snake(loss), None
    if isinstance(loss, Mapping) and loss.keys() == {"class_name", "config"}:
        return _snake(loss["class_name"]), loss["config"].get("from_logits")
    if isinstance(loss, (Mapping, list, tuple)):
        return None, None
    name = getattr(loss, "__name__", None) or type(loss).__name__
    return _snake(name), getattr(loss, "_fn_kwargs", {}).get("from_logits")


def _snake(name: str) -> str:
    return "".join(
        f"_{c.lower()}" if c.isupper() and i and name[i - 1].islower() else c.lower()
        for i, c in enumerate(name)
    )


def _inferred_loss(outputs: Any, first: Batch) -> tuple[dict[str, Any], str]:
    """The usual loss for these outputs and labels, as a configuration, and a note that says so."""
    labels = only(joined_arrays([first.y]))
    task = "unknown" if outputs is None or labels is None else infer_task(labels, outputs)
    if task == "unknown" or outputs is None or labels is None:
        shapes = [leaf.shape for part in (first.y, outputs) for _, leaf in leaves(part)]
        raise ModelError(
            "the model is not compiled with a loss, and labels and outputs do not tell which it "
            f"is: pass loss=. Received: loss=None, arrays of shapes {shapes}"
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
    told = f"the model is not compiled with a loss; from labels and outputs: {name}" + (
        "(from_logits=True)" if logits and config else ""
    )
    return {"class_name": name, "config": config}, told
