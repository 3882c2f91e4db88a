"""``fl.fit`` with a frozen part in bfloat16, on each backend of Keras."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline import environment
from frostline.engines import openvino as openvino_engine
from frostline.types import ModelError

keras = pytest.importorskip("keras")
L = keras.layers


def model_of() -> Any:
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 3))
    for width in (8, 16):
        x = L.ReLU()(L.BatchNormalization()(L.Conv2D(width, 3, padding="same")(x)))
    model = keras.Model(image, L.Dense(2, name="head")(L.GlobalAveragePooling2D()(x)))
    fl.freeze(model, until="head")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def data(count: int = 32) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 8, 8, 3)).astype("float32"), np.arange(count) % 2


def way_here(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine with bfloat16: torch has it on any processor, where it is let."""
    if backend == "torch":
        monkeypatch.setattr(environment, "has_bfloat16", lambda: True)
        return "native"
    missing = [n for n in ("openvino", "onnx") if importlib.util.find_spec(n) is None]
    if missing or "BF16" not in openvino_engine._capabilities(openvino_engine._quiet_openvino()):
        pytest.skip("OpenVINO has no bfloat16 here")
    return "openvino"


def test_fit_says_how_far_it_is_from_float32(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = way_here(backend, monkeypatch)
    x, y = data()
    model = model_of()
    want = keras.Model(model.inputs, model.get_layer("head").input).predict(x, verbose=0)
    ways: dict[str, Any] = {"epochs": 2, "verbose": 0, "cache": tmp_path, "shuffle": False}
    history = model_of_history = fl.fit(model, x, y, engine=engine, precision="bfloat16", **ways)
    assert history.params["precision"] == "bfloat16"
    part = fl.split(model).prefix
    made = fl.cache_features(part, x, tmp_path, engine=engine, precision="bfloat16", verbose=0)
    assert made.error == history.params["precision_error"]
    few = made.rows([0, 1])[0]
    share = np.abs(few - want[:2]).max() / np.abs(want[:2]).max()
    assert made.error == pytest.approx(share, rel=0.05)
    assert 2.0**-12 < share < 0.1
    whole = model_of()
    plain = whole.fit(x, y, **{name: ways[name] for name in ("epochs", "verbose", "shuffle")})
    np.testing.assert_allclose(
        model_of_history.history["loss"], plain.history["loss"], atol=5 * made.error
    )
    exact = fl.fit(model_of(), x, y, engine=engine, **ways)
    assert "precision" not in exact.params


def test_keras_itself_on_tensorflow_and_jax_is_refused_with_what_works(
    backend: str, tmp_path: Path
) -> None:
    if backend == "torch":
        pytest.skip("torch has it")
    with pytest.raises(ModelError, match=r"native .* dtype of its layers.* engine='auto' with"):
        fl.fit(
            model_of(), *data(), engine="native", precision="bfloat16", cache=tmp_path, verbose=0
        )
