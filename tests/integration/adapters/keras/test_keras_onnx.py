"""The ONNX graph of every layer that has a rule, run by ONNX Runtime, against the Keras layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras.src.applications.convnext import LayerScale

from frostline.adapters.keras.graph import walk
from frostline.adapters.keras.onnx.export import to_onnx
from frostline.types import ModelError

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytestmark = pytest.mark.once

L = keras.layers
BN = L.BatchNormalization
TOLERANCE = 2e-5  # of the largest output


def speak(model: Any) -> Any:
    """Random statistics for BN layers, random biases: nothing that is 0 or 1 by default."""
    rng = np.random.default_rng(1)
    for place in walk(model):
        layer = place.layer
        for variable in layer.weights if place.leaf else ():
            if len(variable.shape) == 1:
                variable.assign(rng.uniform(0.3, 1.5, variable.shape))
    return model


def run(model: Any, x: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(to_onnx(model), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    leaves = keras.tree.flatten(x)
    return list(session.run(None, dict(zip(names, leaves, strict=True))))


def agree(model: Any, x: Any) -> None:
    speak(model)
    want = [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x, training=False))]
    have = run(model, x)
    assert len(want) == len(have)
    for one, other in zip(want, have, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert np.abs(one).max() > 1e-3
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(one).max()


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


LAYERS: dict[str, Callable[[], list[Any]]] = {
    "conv": lambda: [L.Conv2D(6, 3, strides=2, padding="same", activation="relu")],
    "conv-even": lambda: [L.Conv2D(6, (4, 2), strides=(3, 2), padding="same")],
    "conv-groups": lambda: [L.Conv2D(8, 3, groups=2, dilation_rate=2, use_bias=False), BN()],
    "conv-bn": lambda: [L.Conv2D(6, 3, padding="same"), BN(scale=False), L.ReLU(6.0)],
    "conv-dilated-same": lambda: [L.Conv2D(6, 3, dilation_rate=2, padding="same")],
    "depthwise": lambda: [L.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), BN()],
    "depthwise-strided": lambda: [L.DepthwiseConv2D(5, strides=2, padding="same")],
    "separable": lambda: [L.SeparableConv2D(5, 3, depth_multiplier=2, padding="same"), BN()],
    "active-bn": lambda: [L.Conv2D(6, 3, activation="silu"), BN()],
    "first-bn": lambda: [BN(), L.Conv2D(3, 1)],
    "max": lambda: [L.MaxPooling2D(3, strides=2, padding="same")],
    "average": lambda: [L.AveragePooling2D(3, strides=2, padding="same")],
    "average-even": lambda: [L.AveragePooling2D(3, strides=1, padding="same"), L.Conv2D(2, 1)],
    "global-average": lambda: [L.GlobalAveragePooling2D(), L.Dense(3), BN()],
    "global-max": lambda: [L.GlobalMaxPooling2D(keepdims=True), L.Conv2D(3, 1)],
    "pad": lambda: [L.ZeroPadding2D(((1, 0), (2, 3))), L.Conv2D(3, 3)],
    "layer-norm": lambda: [L.Conv2D(5, 2), L.LayerNormalization(epsilon=1e-6), L.Conv2D(3, 1)],
    "layer-norm-bare": lambda: [L.LayerNormalization(center=False, scale=False), L.Dense(3)],
    "layer-scale": lambda: [L.Conv2D(5, 2), LayerScale(0.5, 5), L.Conv2D(3, 1)],
    "rescale": lambda: [L.Rescaling([0.5, 2.0, 1.0, 3.0], offset=-1.0), L.Conv2D(2, 1)],
    "normalize": lambda: [
        L.Normalization(mean=[1.0, 2.0, 0.5, 0.1], variance=[2.0, 0.5, 1.0, 3.0])
    ],
    "flatten": lambda: [L.Conv2D(3, 2), L.Flatten(), L.Dense(4, activation="tanh")],
    "reshape": lambda: [L.Conv2D(3, 2), L.Reshape((-1, 3)), L.Dense(2)],
    "softmax": lambda: [L.Conv2D(3, 2, activation="softmax"), L.Softmax(axis=1)],
    "leaky": lambda: [L.LeakyReLU(0.3), L.ReLU(negative_slope=0.1, max_value=1.0)],
    "idle": lambda: [L.Dropout(0.5), L.SpatialDropout2D(0.2), L.Identity(), L.Conv2D(2, 1)],
    "dense-image": lambda: [L.Conv2D(3, 2), L.Dense(4), L.Conv2D(2, 1)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_keras_computes(name: str) -> None:
    keras.utils.set_random_seed(0)
    if name == "average" and keras.backend.backend() == "torch":
        with pytest.raises(ModelError, match="repeats the border"):
            to_onnx(keras.Sequential([keras.Input((9, 10, 4)), *LAYERS[name]()]))
        return
    agree(keras.Sequential([keras.Input((9, 10, 4)), *LAYERS[name]()]), normal(3, 9, 10, 4))


@pytest.mark.parametrize(
    "activation",
    ["relu", "relu6", "sigmoid", "tanh", "silu", "gelu", "softplus", "hard_sigmoid", "hard_silu",
     "elu", "selu", "exponential", "linear", "softmax"],
)  # fmt: skip
def test_an_activation_computes_what_keras_computes(activation: str) -> None:
    x = 4 * normal(3, 2, 4, 4)
    agree(keras.Sequential([keras.Input((2, 4, 4)), L.Activation(activation)]), x)


def test_branches_operations_and_several_inputs_and_outputs() -> None:
    keras.utils.set_random_seed(0)
    image, vector = keras.Input((6, 6, 3), name="b"), keras.Input((4,), name="a")
    x = L.Conv2D(4, 3, padding="same")(image)
    y = BN()(x)  # x is read twice: nothing can be folded
    gate = L.Reshape((1, 1, 4))(L.Dense(4, activation="sigmoid")(vector))
    z = L.Multiply()([y, gate])
    z = keras.ops.relu6(z + 3.0) * (1 / 6)
    joined = L.Concatenate()([x, L.Average()([y, z]), L.Subtract()([x, z])])
    tall = L.Concatenate(axis=1)([x, L.Maximum()([y, z])])
    model = keras.Model({"b": image, "a": vector}, [joined, tall, L.Minimum()([x, y]), vector])
    agree(model, {"a": normal(2, 4), "b": normal(2, 6, 6, 3)})


def test_a_shared_layer_is_folded_only_if_its_site_always_follows() -> None:
    keras.utils.set_random_seed(0)
    one, two = keras.Input((6, 6, 3)), keras.Input((6, 6, 3))
    conv, site = L.Conv2D(4, 3), BN()
    same = keras.Model([one, two], [site(conv(one)), site(conv(two))])
    agree(same, [normal(2, 6, 6, 3), 2 * normal(2, 6, 6, 3)])
    other = keras.Model([one, two], [site(conv(one)), conv(two)])
    agree(other, [normal(2, 6, 6, 3), 2 * normal(2, 6, 6, 3)])


def test_images_of_any_size_and_integer_pixels() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((None, None, 3), dtype="uint8"), L.Rescaling(1 / 127.5, -1.0),
         L.Conv2D(4, 3, strides=2, padding="same"), BN(), L.GlobalAveragePooling2D()]
    )  # fmt: skip
    for size in (7, 8):
        pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype("uint8")
        agree(model, pixels)


def test_channels_first() -> None:
    model = keras.Sequential(
        [keras.Input((3, 8, 7)), L.Conv2D(4, 3, padding="same", data_format="channels_first"),
         BN(axis=1), L.ReLU(), BN(axis=1), L.AveragePooling2D(2, data_format="channels_first"),
         L.GlobalMaxPooling2D("channels_first"), L.Dense(2)]
    )  # fmt: skip
    if keras.backend.backend() == "tensorflow":  # its convolutions take channels first on GPUs only
        assert run(speak(model), normal(2, 3, 8, 7))[0].shape == (2, 2)
    else:
        agree(model, normal(2, 3, 8, 7))


@pytest.mark.once
@pytest.mark.parametrize("name", ["MobileNetV3Small"])
def test_whole_architectures(name: str) -> None:
    keras.utils.set_random_seed(0)
    build = getattr(keras.applications, name)
    agree(build(weights=None, input_shape=(64, 64, 3), classes=5), 100 * normal(2, 64, 64, 3))


class Doubling(L.Conv2D):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        return 2 * super().call(x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Doubling(2, 3, name="odd"), "no rule for .*Doubling"),
        (
            lambda: L.Conv2D(2, 3, activation="mish", name="odd"),
            "no rule for the activation 'mish'",
        ),
        (lambda: L.UnitNormalization(name="odd"), "no rule for .*UnitNormalization"),
        (lambda: L.LayerNormalization(axis=(1, 2), name="odd"), "layer normalization along"),
        (lambda: L.Conv2D(2, 3, dtype="float16", name="odd"), "only float32"),
    ],
    ids=["subclass", "activation", "layer", "axes", "dtype"],
)
def test_what_has_no_rule_is_refused_by_name(layer: Any, reason: str) -> None:
    model = keras.Sequential([keras.Input((6, 6, 3)), layer()])
    with pytest.raises(ModelError, match=f"layer 'odd' cannot be exported: {reason}"):
        to_onnx(model)
