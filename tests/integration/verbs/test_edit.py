"""freeze, unfreeze, convert and restore on every kind of Keras model, against stock Keras."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.adapters.keras import edit as keras_edit, state as keras_state
from frostline.types import ModelError

L = keras.layers
HAS_RENORM = "renorm" in inspect.signature(L.BatchNormalization.__init__).parameters
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (48, 6, 6, 3)).astype("float32")
Y = RNG.integers(0, 2, 48)


def functional() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = L.BatchNormalization(name="bn1")(L.Conv2D(4, 3, use_bias=False, name="c1")(inputs))
    x = L.Conv2D(4, 3, use_bias=False, name="c2")(L.ReLU(name="r1")(x))
    x = L.BatchNormalization(name="bn2", gamma_regularizer="l2")(x)
    x = L.GlobalAveragePooling2D(name="gap")(x)
    return keras.Model(inputs, L.Dense(2, activation="softmax", name="head")(x))


def sequential() -> Any:
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            L.Conv2D(4, 3, use_bias=False, name="c1"),
            L.BatchNormalization(name="bn1"),
            L.Flatten(),
            L.Dense(4, use_bias=False, name="d1"),
            L.BatchNormalization(name="bn2", scale=False),
            L.Dense(2, activation="softmax", name="head"),
        ]
    )


def nested() -> Any:
    inner_in = keras.Input((6, 6, 3))
    x = L.BatchNormalization(name="bn")(L.Conv2D(4, 3, use_bias=False, name="conv")(inner_in))
    backbone = keras.Model(inner_in, x, name="backbone")
    inputs = keras.Input((6, 6, 3))
    x = L.GlobalAveragePooling2D()(backbone(inputs))
    x = L.BatchNormalization(name="bn")(L.Dense(3, use_bias=False, name="d1")(x))
    return keras.Model(inputs, L.Dense(2, activation="softmax", name="head")(x))


def shared() -> Any:
    inputs = keras.Input((6, 6, 3))
    first, second = (L.Conv2D(4, 3, use_bias=False, name=f"c{i}")(inputs) for i in (1, 2))
    norm = L.BatchNormalization(name="bn")
    x = L.GlobalAveragePooling2D()(L.Add()([norm(first), norm(second)]))
    return keras.Model(inputs, L.Dense(2, activation="softmax", name="head")(x))


class Block(L.Layer):  # type: ignore[misc]
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv = L.Conv2D(4, 3, use_bias=False, name="conv")
        self.norms = [L.BatchNormalization(name="norm")]

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.norms[0](self.conv(x), training=training)


class Subclassed(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(name="block")
        self.pool = L.GlobalAveragePooling2D(name="gap")
        self.norm = L.BatchNormalization(name="top_norm")
        self.head = L.Dense(2, activation="softmax", name="head")

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = self.pool(self.block(x, training=training))
        return self.head(self.norm(x, training=training))


def subclassed() -> Any:
    model = Subclassed()
    model(X[:2])
    return model


KINDS: dict[str, Callable[[], Any]] = {
    "functional": functional,
    "sequential": sequential,
    "nested": nested,
    "shared": shared,
    "subclassed": subclassed,
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def build(kind: str) -> Any:
    keras.utils.set_random_seed(3)
    model = KINDS[kind]()
    for site in sites_of(model):
        site.set_weights([uniform(w.shape) for w in site.weights])
    return model


def uniform(shape: Any) -> Any:
    return np.random.default_rng(int(shape[0])).uniform(0.5, 1.5, shape)


def sites_of(model: Any) -> list[Any]:
    from frostline.adapters.keras.graph import is_site, walk

    return [place.layer for place in walk(model) if is_site(place.layer)]


def compiled(kind: str) -> Any:
    model = build(kind)
    # SGD: Adam would amplify the rounding of gradients that are nearly 0 behind a BN layer.
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["acc"])
    return model


def numbers(model: Any) -> list[Any]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in keras_state.variables_of(model)]


def flags(model: Any) -> list[Any]:
    found = keras_edit.flags(model)
    return [*found.layers, *found.variables]


def equal(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True)
    )


# --- convert and restore --------------------------------------------------------------------------


@every_kind
def test_convert_keeps_outputs_names_and_objects(kind: str) -> None:
    model = build(kind)
    before, names = model.predict(X, verbose=0), [w.path for w in model.weights]
    layers = sites_of(model)
    assert fl.convert(model) is model
    assert all(type(layer) is fl.layers.BatchNormalization for layer in layers)
    assert sites_of(model) == layers
    assert [w.path for w in model.weights] == names
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
    assert fl.restore(model) is model
    assert all(type(layer) is L.BatchNormalization for layer in layers)
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)


@every_kind
def test_converted_model_trains_like_stock(kind: str) -> None:
    """Conversion in the middle of training changes nothing: same weights as without it."""
    stock, ours = compiled(kind), compiled(kind)
    ours.set_weights(stock.get_weights())
    for step in range(6):
        if step == 2:
            fl.convert(ours)
        if step == 4:
            fl.restore(ours)
        for model in (stock, ours):
            model.train_on_batch(X[:24], Y[:24])
    for received, expected in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, atol=2e-6, rtol=1e-5)


@every_kind
def test_convert_with_frozen_sites_keeps_the_optimizer_state(kind: str) -> None:
    """A frozen gamma was unknown to the optimizer; afterwards it can be thawed live."""
    model = compiled(kind)
    site = sites_of(model)[0]
    site.trainable = False
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy")
    model.train_on_batch(X[:24], Y[:24])
    old = {id(v): s for v, s in momenta(model.optimizer)}
    iterations = int(model.optimizer.iterations)
    fl.convert(model)
    new = {id(v): s for v, s in momenta(model.optimizer)}
    assert int(model.optimizer.iterations) == iterations
    assert len(new) > len(old)
    for key, value in old.items():
        np.testing.assert_array_equal(new[key], value)
    frozen = site.get_weights()
    model.train_on_batch(X[:24], Y[:24])
    assert equal(site.get_weights(), frozen)
    site.trainable = True
    model.train_on_batch(X[:24], Y[:24])
    assert not any(np.array_equal(a, b) for a, b in zip(site.get_weights(), frozen, strict=True))


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "AdamW", "Adafactor", "Lamb"])
def test_rebuilt_optimizer_goes_on_where_it_was(name: str) -> None:
    """A frozen gamma joins the optimizer in mid-training; all other weights take the same path."""
    stock, ours = build("functional"), build("functional")
    ours.set_weights(stock.get_weights())
    for model in (stock, ours):
        model.get_layer("bn1").trainable = False
        options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {"epsilon": 1e-3}
        if name == "Adafactor":
            options = {}
        optimizer = getattr(keras.optimizers, name)(1e-2, **options)
        model.compile(optimizer, "sparse_categorical_crossentropy")
    for step in range(5):
        if step == 3:
            fl.convert(ours)
        for model in (stock, ours):
            model.train_on_batch(X[:24], Y[:24])
    for received, expected in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, atol=2e-5, rtol=1e-4)


def momenta(optimizer: Any) -> list[tuple[Any, Any]]:
    return [
        (v, keras.ops.convert_to_numpy(m))
        for v, m in zip(optimizer._trainable_variables, optimizer._momentums, strict=True)
    ]


@every_kind
def test_policies_of_a_converted_model(kind: str) -> None:
    """Frozen sites of policy ``batch`` compute on frozen what stock ones compute thawed."""
    model = build(kind)
    with keras.StatelessScope():
        expected = keras.ops.convert_to_numpy(model(X, training=True))
    fl.convert(model, policy="batch")
    fl.freeze(model)
    before = model.get_weights()
    received = keras.ops.convert_to_numpy(model(X, training=True))
    np.testing.assert_allclose(received, expected, atol=1e-5)
    assert equal(model.get_weights(), before)
    fl.convert(model, policy="inference")
    received = keras.ops.convert_to_numpy(model(X, training=True))
    np.testing.assert_allclose(received, model.predict(X, verbose=0), atol=1e-5)


def test_convert_settings() -> None:
    model = fl.convert(build("functional"), version="2.2.4")
    assert {(s.policy, s.debias, s.version) for s in fl.sites(model)} == {("batch", True, "2.2.4")}
    fl.convert(model)  # nothing asked for: nothing changes
    assert {s.version for s in fl.sites(model)} == {"2.2.4"}
    fl.convert(model, debias=False)
    assert {(s.policy, s.debias, s.version) for s in fl.sites(model)} == {("batch", False, None)}


@pytest.mark.filterwarnings("ignore:.*HDF5")
@pytest.mark.parametrize(
    ("kind", "until", "suffix"),
    [("nested", "backbone/bn", "keras"), ("functional", "c2", "keras"), ("functional", "c2", "h5")],
)  # Keras itself cannot write equal names in nested models to .h5
def test_converted_model_saves_and_loads(
    tmp_path: Path, kind: str, until: str, suffix: str
) -> None:
    model = fl.convert(compiled(kind), policy="batch")
    fl.freeze(model, until=until)
    model.train_on_batch(X[:24], Y[:24])
    model.save(tmp_path / f"model.{suffix}")
    loaded = keras.models.load_model(tmp_path / f"model.{suffix}")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    assert [(s.path, s.policy, s.stats_frozen) for s in fl.sites(loaded)] == [
        (s.path, s.policy, s.stats_frozen) for s in fl.sites(model)
    ]


class OwnNormalization(L.BatchNormalization):  # type: ignore[misc]
    pass


def unbuilt() -> Any:
    return Subclassed()


def without() -> Any:
    return keras.Sequential([keras.Input((3,)), L.Dense(2)])


def renormalised() -> Any:
    return keras.Sequential(
        [keras.Input((3,)), L.BatchNormalization(), L.BatchNormalization(renorm=True, name="re")]
    )


def own() -> Any:
    return keras.Sequential(
        [keras.Input((3,)), L.BatchNormalization(), OwnNormalization(name="own")]
    )


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (without, {}, "no BatchNormalization layer"),
        (own, {}, "'own' is a OwnNormalization"),
        (unbuilt, {}, "build the model first"),
        pytest.param(
            renormalised,
            {"policy": "batch"},
            "'re'.*renorm",
            marks=pytest.mark.skipif(not HAS_RENORM, reason="Keras 3.12 has no renorm"),
        ),
        (functional, {"policy": "frozen"}, "policy must be one of"),
        (functional, {"version": "2.2.4", "policy": "update"}, "version='2.2.4' means"),
        (functional, {"version": "7"}, "version must be one of"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_refused_conversions_change_nothing(
    make: Callable[[], Any], options: dict[str, Any], message: str
) -> None:
    model = make()
    before, kinds = numbers(model), [type(layer) for layer in model.layers]
    with pytest.raises(ModelError, match=message):
        fl.convert(model, **options)
    assert [type(layer) for layer in model.layers] == kinds
    assert equal(numbers(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_conversion_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model = compiled("functional")
    model.train_on_batch(X[:24], Y[:24])
    before, outputs = numbers(model), model.predict(X, verbose=0)
    from frostline import layers

    original, calls = layers.adopt, []

    def second_fails(layer: Any, **options: Any) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise error("stop")
        original(layer, **options)

    monkeypatch.setattr(layers, "adopt", second_fails)
    with pytest.raises(error):
        fl.convert(model)
    assert [type(layer) for layer in sites_of(model)] == [L.BatchNormalization] * 2
    assert equal(numbers(model), before)
    np.testing.assert_array_equal(model.predict(X, verbose=0), outputs)
    model.train_on_batch(X[:24], Y[:24])


# --- freeze and unfreeze --------------------------------------------------------------------------


def trainable_names(model: Any) -> list[str]:
    from frostline.adapters.keras.graph import walk

    return [p.path for p in walk(model) if p.leaf and p.layer.trainable and p.layer.weights]


@pytest.mark.parametrize(
    ("until", "left"),
    [
        ("c2", ["c2", "bn2", "head"]),
        (4, ["c2", "bn2", "head"]),
        (-1, ["head"]),
        ("gap", ["head"]),
        (0, ["c1", "bn1", "c2", "bn2", "head"]),
        (None, []),
        (1.0, []),
        (0.0, ["c1", "bn1", "c2", "bn2", "head"]),
    ],
)
def test_freeze_takes_every_kind_of_boundary(until: Any, left: list[str]) -> None:
    model = build("functional")
    before = flags(model)
    change = fl.freeze(model, until)
    assert trainable_names(model) == left
    assert "froze" in str(change)
    if isinstance(until, int):  # the essay's way
        assert all(not layer.trainable for layer in model.layers[:until])
    change.undo()
    assert flags(model) == before
    with pytest.raises(ModelError, match="undone already"):
        change.undo()


def test_freeze_by_layer_and_inside_a_nested_model() -> None:
    model = build("nested")
    change = fl.freeze(model, model.get_layer("d1"))
    assert trainable_names(model) == ["d1", "bn", "head"]
    assert change.text == ("froze 5 layers (1 BN sites, 116 parameters) before 'd1'"), change.text
    fl.unfreeze(model, "backbone/bn")
    assert trainable_names(model) == ["backbone/bn", "d1", "bn", "head"]
    assert [s.stats_frozen for s in fl.sites(model)] == [False, False]


def test_unfreeze_below_a_frozen_container() -> None:
    model = build("nested")
    model.trainable = False
    before = flags(model)
    change = fl.unfreeze(model, since="backbone/bn")
    assert trainable_names(model) == ["backbone/bn", "d1", "bn", "head"]
    assert not model.get_layer("backbone").get_layer("conv").trainable
    assert len(model.trainable_weights) == 2 + 1 + 2 + 2
    change.undo()
    assert flags(model) == before


@every_kind
def test_frozen_prefix_stays_and_the_rest_moves(kind: str) -> None:
    model = fl.convert(compiled(kind))
    head = next(place for place in keras_places(model) if place.layer.name == "head")
    fl.freeze(model, head.path)
    model.compile("sgd", "sparse_categorical_crossentropy")
    before = {p.path: p.layer.get_weights() for p in keras_places(model) if p.leaf}
    model.fit(X, Y, epochs=1, verbose=0)
    for place in keras_places(model):
        if place.leaf and place.layer.weights:
            same = equal(place.layer.get_weights(), before[place.path])
            assert same == (place.layer.name != "head"), place.path


def keras_places(model: Any) -> Any:
    from frostline.adapters.keras.graph import walk

    return walk(model)


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
def test_parameters_only(ours: bool) -> None:
    """gamma and beta stay, the statistics move on: what many codebases call a frozen BN."""
    model = build("functional")
    if ours:
        fl.convert(model)
    change = fl.freeze(model, statistics=False)
    fl.unfreeze(model, "head")
    model.compile("sgd", "sparse_categorical_crossentropy")
    site = model.get_layer("bn1")
    before = site.get_weights()
    model.fit(X, Y, epochs=1, verbose=0)
    gamma, beta, mean, variance = (
        np.array_equal(a, b) for a, b in zip(site.get_weights(), before, strict=True)
    )
    assert (gamma, beta, mean, variance) == (True, True, False, False)
    found = fl.sites(model)[0]
    assert (found.params_frozen, found.stats_frozen) == (True, False)
    assert "parameters only" in change.text


@every_kind
def test_unfreeze_without_a_boundary_thaws_everything(kind: str) -> None:
    model = build(kind)
    untouched = flags(model)
    fl.freeze(model)
    assert not model.trainable_variables
    change = fl.unfreeze(model)
    assert flags(model) == untouched
    change.undo()
    assert not model.trainable_variables
    model.trainable = False
    fl.unfreeze(model)
    assert flags(model) == untouched


@every_kind
def test_statistics_only_flags_come_back(kind: str) -> None:
    model = build(kind)
    untouched = flags(model)
    change = fl.freeze(model, params=False)
    assert all(s.stats_frozen and not s.params_frozen for s in fl.sites(model))
    assert "statistics only" in change.text
    assert " 0 parameters" in change.text
    again = fl.unfreeze(model, params=False)
    assert flags(model) == untouched
    again.undo()
    assert all(s.stats_frozen for s in fl.sites(model))
    change.undo()
    assert flags(model) == untouched


def test_statistics_only_trains_gamma_and_beta() -> None:
    model = build("functional")  # a ReLU behind the site: without one, the next BN undoes beta
    fl.freeze(model, "c2", params=False)
    found = fl.sites(model)
    assert [(s.params_frozen, s.stats_frozen) for s in found] == [(False, True), (False, False)]
    model.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy")
    site = sites_of(model)[0]
    before = site.get_weights()
    model.fit(X, Y, batch_size=16, verbose=0)
    moved = [not np.array_equal(a, b) for a, b in zip(before, site.get_weights(), strict=True)]
    assert moved == [True, True, False, False]  # gamma, beta, mean, variance


def test_half_a_freeze_says_what_a_file_forgets(tmp_path: Path) -> None:
    model = build("functional")
    change = fl.freeze(model, "c2", params=False)
    assert any("after loading" in note for note in change.notes)
    model.save(tmp_path / "model.keras")
    loaded = fl.sites(keras.models.load_model(tmp_path / "model.keras"))
    assert [s.stats_frozen for s in loaded] == [s.stats_frozen for s in fl.sites(model)]
    assert loaded[0].params_frozen  # the loss that the note is about
    assert not fl.sites(model)[0].params_frozen


def test_our_layer_refuses_to_freeze_the_statistics_alone() -> None:
    model = fl.convert(build("functional"))
    before = flags(model)
    with pytest.raises(ModelError, match=r"'bn1'.*fl\.restore"):
        fl.freeze(model, params=False)
    assert flags(model) == before


def test_refused_freezes_change_nothing() -> None:
    model = build("functional")
    before = flags(model)
    for options, message in (
        ({"until": "c3"}, "Closest: 'c2'"),
        ({"until": 40}, "between -8 and 8"),
        ({"until": 1.5}, r"between 0\.0 and 1\.0"),
        ({"params": False, "statistics": False}, "nothing to do"),
        ({"until": True}, "a layer name, a path"),
    ):
        with pytest.raises(ModelError, match=message):
            fl.freeze(model, **options)
        assert flags(model) == before


def test_compiled_model_is_told_to_compile_again() -> None:
    model = compiled("functional")
    assert "compile() again" in fl.freeze(model, "c2").notes[0]
    assert fl.freeze(model, "c2").notes == ()  # nothing changed


def test_not_a_model() -> None:
    for thing in (None, 3, L.Dense(2), np.ones(3)):
        with pytest.raises(ModelError, match="Received"):
            fl.freeze(thing)


class WithToken(keras.Model):
    """A model that holds a weight itself, as a vision transformer holds its token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = self.add_weight(shape=(4,), name="token")
        self.dense, self.norm, self.head = L.Dense(4), L.BatchNormalization(), L.Dense(2)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.head(self.norm(self.dense(x + self.token), training=training))


def test_weights_of_the_model_itself_are_frozen_with_all_of_it() -> None:
    model = WithToken()
    model(np.zeros((2, 4), "float32"))
    change = fl.freeze(model)
    assert model.trainable_variables == []
    assert "42 parameters" in str(change)
    fl.unfreeze(model)
    assert any(variable is model.token for variable in model.trainable_variables)
    model.token.trainable = False
    fl.freeze(model).undo()
    assert not model.token.trainable
    fl.unfreeze(model)
    fl.freeze(model, -1)  # a boundary: the model itself is around it
    assert model.token.trainable
