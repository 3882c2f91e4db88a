"""Every verb on a Keras program, held to what Keras itself says."""

from __future__ import annotations

import math
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
    x, y = program.batches[0]
    table = fl.phases(model, (x, y), batch_size=8)
    require(same(before, weights(model)), "phases changed the model")
    own = model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)["loss"]
    near = math.isclose(float(table["0"].loss or 0), own, rel_tol=2e-3, abs_tol=1e-4)
    require(near, f"loss at phase 0 is {table['0'].loss}; evaluate says {own:.5g}")
    return f"{table['0'].loss:.4g} → {table['1'].loss:.4g}"


def recalibrate(program: Program, model: Any) -> str:
    before = weights(model)
    x, _ = program.batches[0]
    change = fl.recalibrate(model, x, sites="all", batch_size=8)
    once = weights(model)
    fl.recalibrate(model, x, sites="all", batch_size=8)
    for a, b in zip(once, weights(model), strict=True):
        require(bool(np.allclose(a, b, rtol=1e-3, atol=1e-4)), "not a fixed point")
    require(all(np.isfinite(a).all() for a in once), "statistics that are not finite")
    require(not same(before, once), "nothing changed")
    model.set_weights(once)
    change.undo()
    require(same(before, weights(model)), "undo did not put everything back")
    return "fixed point"


def freeze(program: Program, model: Any) -> str:
    x, y = program.batches[0]
    known = norms(model)
    last = fl.sites(model)[-1].path  # Keras flattens nested models from their end
    fl.freeze(model, last if len(known) > 1 else None)
    frozen = [layer for layer in known if not layer.trainable]
    require(bool(frozen), "no layer is frozen")
    before = [np.array(w) for layer in frozen for w in layer.get_weights()]
    trains = any(v.trainable for v in model.variables)
    if trains and model.trainable_variables:
        model.compile("sgd", "sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    after = [np.array(w) for layer in frozen for w in layer.get_weights()]
    require(same(before, after), "a frozen layer moved")
    return "statistics stay"


def diagnose(program: Program, model: Any) -> str:
    before = weights(model)
    report = fl.diagnose(model, program.batches[0], batch_size=8, verbose=0)
    require(same(before, weights(model)), "diagnose changed the model")
    require(bool(report.verdict), "no verdict")
    return report.verdict[:60]


def fold(program: Program, model: Any) -> str:
    x, _ = program.batches[0]
    one, two = model.predict(x, verbose=0), fl.fold(model).predict(x, verbose=0)
    worst = float(np.abs(one - two).max() / np.abs(one).max())
    require(worst < 1e-2, f"the folded model is {worst:.2g} off")
    return f"{worst:.1g}"


def fit(program: Program, model: Any) -> str:
    """Head alone through the cache: the frozen part must not move."""
    x, y = program.batches[0]
    fl.freeze(model, -1)
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    before = [np.array(w) for layer in norms(model) for w in layer.get_weights()]
    augmented = any("Random" in type(layer).__name__ for layer in model.layers)
    views = 2 if augmented else 1
    history = fl.fit(model, x, y, epochs=2, batch_size=8, views=views, verbose=0)
    after = [np.array(w) for layer in norms(model) for w in layer.get_weights()]
    frozen = all(not layer.trainable for layer in norms(model))
    require(not frozen or same(before, after), "a frozen layer moved")
    require(bool(np.isfinite(history.history["loss"]).all()), "loss is not finite")
    return f"{history.history['loss'][-1]:.3g}"


VERBS: dict[str, Callable[[Program, Any], str]] = {
    verb.__name__: verb for verb in (sites, lint, phases, recalibrate, freeze, diagnose, fold, fit)
}
__all__ = ["VERBS", "Wrong"]
