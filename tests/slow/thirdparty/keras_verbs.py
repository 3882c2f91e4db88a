"""Every verb on a Keras program, held to what Keras itself says."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import frostline as fl

from .judging import Wrong, require
from .program import Program


def norms(model: Any) -> list[Any]:
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def weights(model: Any) -> list[Any]:
    return [np.array(w) for w in model.get_weights()]


def same(before: list[Any], after: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def given(data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``fit`` and ``evaluate`` are called with."""
    if not isinstance(data, tuple):
        return (data,), {}
    weight = {"sample_weight": data[2]} if len(data) == 3 else {}
    return data[:2], {"batch_size": 8, **weight}


def ways(program: Program) -> dict[str, Any]:
    """What a user writes beside model and data."""
    sizes = {"batch_size": 8} if isinstance(program.batches[0], tuple) else {}
    return {**sizes, **program.options}


def inputs(data: Any) -> list[Any]:
    """Of each batch."""
    if isinstance(data, tuple):
        return [data[0]]
    return (
        [batch[0] for batch in data]
        if hasattr(data, "__iter__")
        else [data[i][0] for i in range(len(data))]
    )


def own_loss(program: Program, model: Any) -> float:
    args, kwargs = given(program.batches[0])
    return float(model.evaluate(*args, verbose=0, return_dict=True, **kwargs)["loss"])


def recompiled(program: Program, model: Any) -> None:
    if program.recompile is not None:
        program.recompile(model)
    else:
        model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])


def predicted(model: Any, x: Any) -> list[Any]:
    return [np.asarray(each) for each in keras.tree.flatten(model.predict(x, verbose=0))]


def off(one: list[Any], two: list[Any]) -> float:
    require(len(one) == len(two), f"{len(two)} outputs instead of {len(one)}")
    return max(
        float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12))
        for a, b in zip(one, two, strict=True)
    )


def sites(program: Program, model: Any) -> str:
    found, known = fl.sites(model), norms(model)
    require(len(found) == len(known), f"{len(found)} sites; Keras has {len(known)}")
    return f"{len(found)} sites"


def lint(program: Program, model: Any) -> str:
    before = weights(model)
    report = fl.lint(model)
    require(same(before, weights(model)), "lint changed the model")
    return f"{len(report.findings)} findings"


def phases(program: Program, model: Any) -> str:
    before = weights(model)
    table = fl.phases(model, program.batches[0], **ways(program))
    require(same(before, weights(model)), "phases changed the model")
    own = own_loss(program, model)
    near = math.isclose(float(table["0"].loss or 0), own, rel_tol=2e-3, abs_tol=1e-4)
    require(near, f"loss at phase 0 is {table['0'].loss}; evaluate says {own:.5g}")
    return f"{table['0'].loss:.4g} → {table['1'].loss:.4g}"


def _hooked(program: Program, model: Any) -> dict[int, list[Any]]:
    """Inputs of every BN layer at inference, by the identity of the layer."""
    seen: dict[int, list[Any]] = {}

    def watched(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def call_and_keep(x: Any, *args: Any, **kwargs: Any) -> Any:
            seen.setdefault(id(layer), []).append(keras.ops.convert_to_numpy(x).astype("float64"))
            return call(x, *args, **kwargs)

        return call_and_keep

    known = norms(model)
    for layer in known:
        layer.__dict__["call"] = watched(layer, layer.call)
    try:
        for x in inputs(program.batches[0]):
            model(x, training=False)
    finally:
        for layer in known:
            del layer.__dict__["call"]
    return seen


def recalibrate(program: Program, model: Any) -> str:
    before = weights(model)
    sizes = {k: v for k, v in ways(program).items() if k == "batch_size"}
    data = program.batches[0]  # labels and weights are not looked at
    change = fl.recalibrate(model, data, sites="all", **sizes)
    once = weights(model)
    require(all(np.isfinite(a).all() for a in once), "statistics that are not finite")
    require(not same(before, once), "nothing changed")
    seen = _hooked(program, model) if keras.backend.backend() == "torch" else {}
    for layer in norms(model):
        if id(layer) not in seen:
            continue
        axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
        x = np.concatenate(
            [np.moveaxis(i, axis, -1).reshape(-1, i.shape[axis]) for i in seen[id(layer)]]
        )
        if program.own_ways:  # positions that a mask hides are among the inputs
            continue
        mean, variance = np.array(layer.moving_mean), np.array(layer.moving_variance)
        spread = np.sqrt(x.var(0)) + 1e-3
        worst = float((np.abs(mean - x.mean(0)) / spread).max())
        require(worst < 1e-3, f"the mean of {layer.name} is {worst:.2g} deviations off")
        big = x.var(0) > 1e-6
        ratio = variance[big] / x.var(0)[big]
        most = len(x) / (len(x) - 1) * 1.001
        require(
            bool(((ratio > 0.999) & (ratio < most)).all()),
            f"the variance of {layer.name} is {ratio.min():.5g} to {ratio.max():.5g} of the batch",
        )
    fl.recalibrate(model, data, sites="all", **sizes)
    for a, b in zip(once, weights(model), strict=True):
        require(bool(np.allclose(a, b, rtol=1e-3, atol=1e-4)), "not a fixed point")
    model.set_weights(once)
    change.undo()
    require(same(before, weights(model)), "undo did not put everything back")
    return "fixed point"


def freeze(program: Program, model: Any) -> str:
    known = norms(model)
    last = fl.sites(model)[-1].path  # Keras flattens nested models from their end
    fl.freeze(model, last if len(known) > 1 else None)
    frozen = [layer for layer in known if not layer.trainable]
    require(bool(frozen), "no layer is frozen")
    before = [np.array(w) for layer in frozen for w in layer.get_weights()]
    trains = any(v.trainable for v in model.variables)
    if trains and model.trainable_variables:
        recompiled(program, model)
        args, kwargs = given(program.batches[0])
        model.fit(*args, epochs=1, verbose=0, **kwargs)
    after = [np.array(w) for layer in frozen for w in layer.get_weights()]
    require(same(before, after), "a frozen layer moved")
    return "statistics stay"


def assert_frozen(program: Program, model: Any) -> str:
    data = program.batches[0]  # labels and weights are not looked at
    fl.freeze(model)
    recompiled(program, model)  # as fl.freeze asks: TensorFlow's old step would train it on
    fl.assert_frozen(model, data=data)
    fl.unfreeze(model, since=fl.sites(model)[-1].path)
    try:
        fl.assert_frozen(model, data=data)
    except fl.NotFrozenError:
        return "no false alarm; a thaw is found"
    raise Wrong("a thawed layer was not found")


def watch(program: Program, model: Any) -> str:
    args, kwargs = given(program.batches[0])
    with fl.watch(model, program.batches[0], **program.options) as seen:
        model.fit(*args, epochs=1, verbose=0, **kwargs)
    gap = seen.checks[-1].gap
    require(gap is not None and math.isfinite(gap), f"the gap is {gap}")
    return f"{gap:.3g}"


def diagnose(program: Program, model: Any) -> str:
    before = weights(model)
    report = fl.diagnose(model, program.batches[0], verbose=0, **ways(program))
    require(same(before, weights(model)), "diagnose changed the model")
    require(bool(report.verdict), "no verdict")
    if program.lags:
        blamed = bool(report.causes) and report.causes[0].is_bn
        require(blamed, f"BN is not blamed: {report.verdict}")
    if program.healthy:
        blamed = any(cause.is_bn for cause in report.causes)
        require(not blamed, f"BN is blamed, which is well: {report.verdict}")
    return report.verdict[:60]


def split(program: Program, model: Any) -> str:
    fl.freeze(model, boundary(program, model))
    x = sample(program)
    parts = fl.split(model, sample=x)
    features = parts.prefix.predict(x, verbose=0)
    whole = predicted(model, x)
    worst = off(whole, predicted(parts.suffix, features))
    require(worst < 1e-4, f"suffix(prefix(x)) is {worst:.2g} off")
    return f"{len(parts.frontier)} tensors cross"


def boundary(program: Program, model: Any) -> Any:
    """Where its user freezes: before the last BN layer, if the program does not say."""
    known = [site.path for site in fl.sites(model)]
    return program.until or (known[-1] if len(known) > 1 else -1)


def sample(program: Program) -> Any:
    return program.sample if program.sample is not None else inputs(program.batches[0])[0]


def fold(program: Program, model: Any) -> str:
    x = sample(program)
    worst = off(predicted(model, x), predicted(fl.fold(model), x))
    require(worst < 1e-2, f"the folded model is {worst:.2g} off")
    return f"{worst:.1g}"


def fit(program: Program, model: Any) -> str:
    """Head alone through the cache: the frozen part must not move."""
    args, kwargs = given(program.batches[0])
    fl.freeze(model, program.until or -1)
    recompiled(program, model)
    before = [np.array(w) for layer in norms(model) for w in layer.get_weights()]
    augmented = any("Random" in type(layer).__name__ for layer in model._flatten_layers())
    views = 2 if augmented else 1
    history = fl.fit(model, *args, epochs=2, views=views, verbose=0, **kwargs)
    after = [np.array(w) for layer in norms(model) for w in layer.get_weights()]
    frozen = all(not layer.trainable for layer in norms(model))
    require(not frozen or same(before, after), "a frozen layer moved")
    require(bool(np.isfinite(history.history["loss"]).all()), "loss is not finite")
    return f"{history.history['loss'][-1]:.3g}"


def set_momentum(program: Program, model: Any) -> str:
    before = [layer.momentum for layer in norms(model)]
    change = fl.set_momentum(model, 0.9)
    wrong = [m for m in (layer.momentum for layer in norms(model)) if not math.isclose(m, 0.9)]
    require(not wrong, f"a momentum of {wrong[:1]}")
    change.undo()
    require(before == [layer.momentum for layer in norms(model)], "undo did not put it back")
    return "set and undone"


def unfreeze(program: Program, model: Any) -> str:
    def flags() -> list[bool]:
        return [layer.trainable for layer in model._flatten_layers()]

    fl.freeze(model, 0.5)
    frozen = flags()
    fl.unfreeze(model).undo()
    require(frozen == flags(), "undo did not freeze it again")
    fl.unfreeze(model)
    still = [layer.name for layer in norms(model) if not layer.trainable]
    require(not still, f"{still[:1]} is still frozen")
    return "nothing is frozen"


def cache_features(program: Program, model: Any) -> str:
    x = sample(program)
    fl.freeze(model, boundary(program, model))
    prefix = fl.split(model, sample=x).prefix
    own = predicted(prefix, x)
    x = (x,) if type(x) is tuple else x  # else its second would be targets
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the second time they are read
            found = fl.cache_features(prefix, x, folder, verbose=0)
            stored = found.rows(range(len(found)))
    require(len(found) == len(own[0]), f"{len(found)} rows; the prefix returns {len(own[0])}")
    worst = max(float(np.abs(a - b).max()) for a, b in zip(stored, own, strict=True))
    require(worst < 1e-3, f"features are {worst:.2g} off")
    return f"{len(found)} rows"


VERBS: dict[str, Callable[[Program, Any], str]] = {
    verb.__name__: verb
    for verb in (
        sites, lint, phases, recalibrate, freeze, assert_frozen, watch, diagnose, split, fold, fit,
        set_momentum, unfreeze, cache_features
    )
}  # fmt: skip
__all__ = ["VERBS", "Wrong"]
