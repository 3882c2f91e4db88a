"""``fl.frozen`` and the GAN example, against a loop written by hand in numpy."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.types import ModelError

L = keras.layers
EXAMPLES = Path(__file__).parents[2] / "examples"


class CountTraces(L.Layer):  # type: ignore[misc]
    traces = 0

    def call(self, inputs: Any) -> Any:
        CountTraces.traces += 1
        return inputs


def build() -> Any:
    keras.utils.set_random_seed(0)
    inner = keras.Sequential(
        [keras.Input((4,)), L.Dense(4, name="d"), fl.layers.BatchNormalization(name="bn")],
        name="inner",
    )
    norm = L.BatchNormalization(name="stock")
    model = keras.Sequential([keras.Input((4,)), inner, CountTraces(), norm, L.Dense(2)])
    model.layers[0].layers[0].kernel.trainable = False  # a flag that no setter would restore
    return model


def flags(model: Any) -> list[Any]:
    layers = [model, *model.layers, *model.layers[0].layers]
    return [
        *(layer.trainable for layer in layers),
        *(v.trainable for v in model.variables),
        *(v.path for v in model.trainable_variables),
    ]


@pytest.mark.parametrize("problem", [None, RuntimeError, KeyboardInterrupt])
def test_every_flag_comes_back_on_any_exit(problem: Any) -> None:
    model = build()
    before = flags(model)
    bn = model.layers[0].layers[1]
    if problem is None:
        with fl.frozen(model) as change:
            assert not model.trainable_weights
            with fl.frozen([bn, model.layers[0]]):
                pass
            assert not bn.trainable  # the outer block still holds
        assert "froze 5 layers (2 BN sites, " in change.text
        assert "1 of the BN sites are stock Keras layers" in change.notes[0]
    else:
        with pytest.raises(problem), fl.frozen(model), fl.frozen(bn):
            raise problem
    assert flags(model) == before


def test_ended_early_and_what_cannot_be_frozen() -> None:
    model = build()
    before = flags(model)
    with fl.frozen(model) as change:
        change.undo()
        assert flags(model) == before
    assert flags(model) == before
    for nonsense, words in (([], "an empty list"), ("bn", "not a model"), ([model, 3], "not a")):
        with pytest.raises(ModelError, match=words), fl.frozen(nonsense):
            pass


def test_our_layers_follow_in_a_compiled_step() -> None:
    model = build()
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), "mse")
    bn = model.layers[0].layers[1]
    x, y = np.random.default_rng(0).normal(2, 3, (16, 4)).astype("float32"), np.ones((16, 2))
    model.train_on_batch(x, y)
    traces = CountTraces.traces
    for frozen in (True, False, True, False):
        before = bn.get_weights()
        if frozen:
            with fl.frozen(bn):
                model.train_on_batch(x, y)
        else:
            model.train_on_batch(x, y)
        same = [np.array_equal(a, b) for a, b in zip(before, bn.get_weights(), strict=True)]
        assert same == [frozen] * 4
    if keras.backend.backend() != "torch":
        assert CountTraces.traces == traces


# --- the GAN ------------------------------------------------------------------------------------


class ByHand:
    """Both networks of the example, their two steps and SGD with momentum; float64 numpy."""

    def __init__(self, generator: Any, discriminator: Any) -> None:
        names = ("w1", "gamma", "beta", "mean", "variance", "w2", "b2")
        self.g, self.d = (
            {
                name: np.array(keras.ops.convert_to_numpy(w), dtype="float64")
                for name, w in zip(names, model.weights, strict=True)
            }
            for model in (generator, discriminator)
        )
        self.velocity: dict[tuple[str, str], Any] = {}

    def forward(self, w: dict[str, Any], x: Any, act: Any, batch: bool) -> dict[str, Any]:
        h = x @ w["w1"]
        mean, variance = (h.mean(0), h.var(0)) if batch else (w["mean"], w["variance"])
        if batch:
            w["mean"] = 0.9 * w["mean"] + 0.1 * mean
            w["variance"] = 0.9 * w["variance"] + 0.1 * variance
        s = np.sqrt(variance + 1e-3)
        hat = (h - mean) / s
        a = hat * w["gamma"] + w["beta"]
        return {
            "x": x,
            "s": s,
            "hat": hat,
            "a": a,
            "z": act(a),
            "batch": batch,
            "out": act(a) @ w["w2"] + w["b2"],
        }

    def backward(
        self, w: dict[str, Any], p: dict[str, Any], slope: Any, d_out: Any
    ) -> tuple[dict[str, Any], Any]:
        da = (d_out @ w["w2"].T) * slope(p["a"])
        dhat = da * w["gamma"]
        if p["batch"]:
            dhat = dhat - dhat.mean(0) - p["hat"] * (dhat * p["hat"]).mean(0)
        dh = dhat / p["s"]
        grads = {
            "w1": p["x"].T @ dh,
            "gamma": (da * p["hat"]).sum(0),
            "beta": da.sum(0),
            "w2": p["z"].T @ d_out,
            "b2": d_out.sum(0),
        }
        return grads, dh @ w["w1"].T

    def descend(self, kind: str, w: dict[str, Any], grads: dict[str, Any]) -> None:
        for name, grad in grads.items():
            v = 0.5 * self.velocity.get((kind, name), 0.0) - 0.05 * grad
            self.velocity[kind, name] = v
            w[name] = w[name] + v

    def step(self, real: Any, noise: Any) -> tuple[float, float]:
        tanh, dtanh = np.tanh, lambda a: 1 - np.tanh(a) ** 2
        leaky, dleaky = (lambda a: np.where(a > 0, a, 0.2 * a)), lambda a: np.where(a > 0, 1, 0.2)
        fake = self.forward(dict(self.g), noise, tanh, False)["out"]
        labels = np.concatenate([np.ones((len(real), 1)), np.zeros((len(fake), 1))])
        p = self.forward(self.d, np.concatenate([real, fake]), leaky, True)
        d_loss = np.mean(np.logaddexp(0, p["out"]) - labels * p["out"])
        d_out = (1 / (1 + np.exp(-p["out"])) - labels) / len(labels)
        self.descend("d", self.d, self.backward(self.d, p, dleaky, d_out)[0])

        made = self.forward(self.g, noise, tanh, True)
        p = self.forward(self.d, made["out"], leaky, False)
        g_loss = np.mean(np.logaddexp(0, -p["out"]))
        d_out = (1 / (1 + np.exp(-p["out"])) - 1) / len(noise)
        _, into = self.backward(self.d, p, dleaky, d_out)
        self.descend("g", self.g, self.backward(self.g, made, dtanh, into)[0])
        return float(d_loss), float(g_loss)


def test_gan_equals_a_loop_by_hand_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("gan")
    keras.utils.set_random_seed(2)
    gan = example.build(units=6)
    by_hand = ByHand(gan.generator, gan.discriminator)
    rng = np.random.default_rng(1)
    for number in range(6):
        real = rng.normal(1, 2, (32, 2)).astype("float32")
        noise = rng.normal(size=(32, example.NOISE)).astype("float32")
        losses = example.step(gan, real, noise)
        assert losses == pytest.approx(by_hand.step(real, noise), rel=1e-4)
        for model, wanted in ((gan.generator, by_hand.g), (gan.discriminator, by_hand.d)):
            for weight, (name, value) in zip(model.weights, wanted.items(), strict=True):
                np.testing.assert_allclose(
                    keras.ops.convert_to_numpy(weight),
                    value,
                    rtol=2e-4,
                    atol=1e-5,
                    err_msg=f"{model.name} {name}, step {number}",
                )
    assert gan.discriminator.trainable
    assert all(layer.trainable for layer in gan.discriminator.layers)
