"""Cached training against Keras' own ``fit``: same seed, same weights, same history."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import frostline as fl
from frostline.engines import choice
from frostline.types import DataError, ModelError

# What Keras says of data sets that bring their own order, in plain `fit` as well.
pytestmark = pytest.mark.filterwarnings("ignore:.shuffle=True. was passed:UserWarning")

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(52, 8, 8, 3)).astype(np.float32), RNG.integers(0, 3, 52)
XV, YV = RNG.normal(size=(20, 8, 8, 3)).astype(np.float32), RNG.integers(0, 3, 20)
FROZEN = ("conv0", "bn0", "conv1", "bn1")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def network(frozen: tuple[str, ...] = FROZEN, *, use_bias: bool = True) -> Any:
    """Three residual blocks with BN, dropout and a regularizer; cut inside the second block."""
    keras.utils.set_random_seed(1)
    inputs = h = keras.Input((8, 8, 3))
    for block in range(3):
        skip = h
        h = L.Conv2D(4, 3, padding="same", use_bias=use_bias, name=f"conv{block}")(h)
        h = L.BatchNormalization(name=f"bn{block}", momentum=0.9)(h)
        h = L.ReLU()(L.Add()([skip, h]) if block else h)
    h = L.Dropout(0.3)(L.GlobalAveragePooling2D()(h))
    outputs = L.Dense(3, activation="softmax", kernel_regularizer="l2", name="head")(h)
    model = keras.Model(inputs, outputs)
    for name in frozen:
        model.get_layer(name).trainable = False
    return model


def compiled(optimizer: Any, **options: Any) -> Any:
    model = network(**options)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def adam() -> Any:
    return keras.optimizers.Adam(0.01)


def sgd() -> Any:
    return keras.optimizers.SGD(0.05, momentum=0.9)


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """A ``PyDataset`` of 16 samples a batch."""

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __len__(self) -> int:
        return -(-len(self.x) // 16)

    def __getitem__(self, index: int) -> Any:
        rows = slice(16 * index, 16 * index + 16)
        return self.x[rows], self.y[rows]


def tf_data(x: Any, y: Any, *, shuffle: bool = True) -> Any:
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices((x, y))
    return (data.shuffle(len(x), seed=3) if shuffle else data).batch(16)


def loader(x: Any, y: Any, *, shuffle: bool = True) -> Any:
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    order = torch.Generator().manual_seed(3)  # Keras seeds torch's own on its torch backend only
    return torch.utils.data.DataLoader(data, batch_size=16, shuffle=shuffle, generator=order)


def weights(model: Any) -> list[Any]:
    return [np.asarray(w) for w in model.get_weights()]


def slots(model: Any) -> list[Any]:
    return [np.asarray(keras.ops.convert_to_numpy(v)) for v in model.optimizer.variables]


def assert_same(one: Any, other: Any, start: Any) -> None:
    """Weights to 1e-5 and optimizer state; and training did something."""
    for mine, theirs in zip(weights(one), weights(other), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    for mine, theirs in zip(slots(one), slots(other), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    moved = [np.abs(a - b).max() for a, b in zip(weights(one), weights(start), strict=True)]
    assert max(moved) > 0.01


def assert_same_history(one: Any, other: Any) -> None:
    assert one.history.keys() == other.history.keys()
    assert one.epoch == other.epoch
    for name, values in one.history.items():
        np.testing.assert_allclose(values, other.history[name], atol=1e-4, err_msg=name)


def trained(fit: Callable[..., Any], make: Any, data: Any, options: Any) -> tuple[Any, Any]:
    model = compiled(make())
    keras.utils.set_random_seed(7)
    given = {name: value() if callable(value) else value for name, value in options.items()}
    history = fit(model, *data(), epochs=3, verbose=0, **given)
    return model, history


def plain(model: Any, *data: Any, **options: Any) -> Any:
    return model.fit(*data, **options)


CASES = {
    "arrays": (adam, lambda: (X, Y), {"validation_data": (XV, YV), "batch_size": 16}),
    "validation split": (sgd, lambda: (X, Y), {"validation_split": 0.3, "batch_size": 8}),
    "weights": (
        adam,
        lambda: (X, Y),
        {
            "sample_weight": np.linspace(0, 2, 52),
            "shuffle": "batch",
            "validation_data": (XV, YV, np.linspace(1, 2, 20)),
            "validation_freq": 2,
            "initial_epoch": 1,
        },
    ),
    "steps": (
        sgd,
        lambda: (X, Y),
        {
            "class_weight": {0: 1.0, 1: 2.0, 2: 3.0},
            "batch_size": 16,
            "shuffle": False,
            "steps_per_epoch": 2,
            "validation_data": (XV, YV),
            "validation_steps": 1,
        },
    ),
    "PyDataset": (adam, lambda: (Batches(X, Y),), {"validation_data": lambda: Batches(XV, YV)}),
    "tf.data": (
        adam,
        lambda: (tf_data(X, Y),),
        {"validation_data": lambda: tf_data(XV, YV, shuffle=False)},
    ),
    "DataLoader": (
        sgd,
        lambda: (loader(X, Y),),
        {"validation_data": lambda: loader(XV, YV, shuffle=False)},
    ),
}


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_fit_gives_the_weights_and_history_of_keras(case: str) -> None:
    make, data, options = CASES[case]
    one, expected = trained(plain, make, data, options)
    other, history = trained(fl.fit, make, data, options)
    assert_same(one, other, compiled(make()))
    assert_same_history(expected, history)
    assert history is other.history


def test_shuffling_matters_in_these_tests() -> None:
    """The comparison above would notice another order."""
    one, _ = trained(plain, adam, lambda: (X, Y), {"batch_size": 16})
    other, _ = trained(plain, adam, lambda: (X, Y), {"batch_size": 16, "shuffle": False})
    assert (
        max(np.abs(a - b).max() for a, b in zip(weights(one), weights(other), strict=True)) > 1e-3
    )


def test_the_optimizer_goes_on_in_later_calls() -> None:
    def in_turn(first: Any, second: Any) -> tuple[Any, Any]:
        model = compiled(adam())
        optimizer = model.optimizer
        keras.utils.set_random_seed(7)
        first(model, X, Y, epochs=1, verbose=0)
        history = second(model, X, Y, epochs=3, initial_epoch=1, verbose=0)
        assert model.optimizer is optimizer
        return model, history

    one, expected = in_turn(plain, plain)
    for order in ((fl.fit, plain), (plain, fl.fit)):
        other, history = in_turn(*order)
        assert_same(one, other, compiled(adam()))
        assert_same_history(expected, history)


def test_nested_model_with_layers_that_are_ours() -> None:
    """A backbone in a model, its BN layers converted: frozen ones can thaw at any time."""

    def make() -> Any:
        inner = network(())
        backbone = keras.Model(inner.inputs, inner.get_layer("bn2").output, name="backbone")
        model = keras.Sequential([keras.Input((8, 8, 3)), backbone, L.Flatten(), L.Dense(1)])
        model = fl.convert(model)
        fl.freeze(model, until="backbone/conv2")
        model.compile(adam(), "mse", metrics=["mae"])
        return model

    one, other = make(), make()
    targets = RNG.normal(size=(52, 1)).astype(np.float32)
    keras.utils.set_random_seed(7)
    expected = one.fit(X, targets, epochs=2, verbose=0, validation_split=0.2)
    keras.utils.set_random_seed(7)
    history = fl.fit(other, X, targets, epochs=2, verbose=0, validation_split=0.2)
    assert_same(one, other, make())
    assert_same_history(expected, history)


class Net(keras.Model):  # type: ignore[misc]
    """A model written as a class, its blocks too; the second is frozen in part."""

    def __init__(self) -> None:
        super().__init__(name="net")
        self.flip = Brighter()
        self.blocks = [Residual(name=f"block{number}") for number in range(3)]
        self.drop, self.head = L.Dropout(0.3), L.Dense(3, activation="softmax", name="head")

    def call(self, images: Any, training: bool | None = None) -> Any:
        h = self.flip(images, training=training)
        for block in self.blocks:
            h = block(h, training=training)
        return self.head(self.drop(keras.ops.mean(h, axis=(1, 2)), training=training))


class Residual(L.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.conv, self.bn = L.Conv2D(4, 3, padding="same", name="conv"), L.BatchNormalization()
        self.skip = L.Conv2D(4, 1, name="skip")
        for layer in (self.conv, self.skip):
            layer.build(shape)
        self.bn.build((*shape[:-1], 4))
        super().build(shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        return keras.ops.relu(self.skip(x) + self.bn(self.conv(x), training=training))


@pytest.mark.parametrize("steps", [False, True])
def test_a_class_of_a_users_own_trains_as_keras_trains_it(steps: bool) -> None:
    """It begins with augmentation; what trains begins inside of a block."""

    class Stepped(Net):
        def train_step(self, *args: Any) -> Any:
            return super().train_step(*args)

    def make() -> Any:
        keras.utils.set_random_seed(1)
        model = Stepped() if steps else Net()
        model(X[:2])
        fl.freeze(model, "block1/skip")
        model.compile(adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    one, other = make(), make()
    given: dict[str, Any] = {"epochs": 3, "batch_size": 16, "verbose": 0}
    keras.utils.set_random_seed(7)
    expected = one.fit(X, Y, validation_data=(XV, YV), **given)
    keras.utils.set_random_seed(7)
    if steps:
        with pytest.warns(
            UserWarning, match="plain model.fit: Stepped has a train_step of its own"
        ):
            history = fl.fit(other, X, Y, validation_data=(XV, YV), **given)
    else:
        history = fl.fit(other, X, Y, validation_data=(XV, YV), views=2, engine="native", **given)
    assert_same(one, other, make())
    assert_same_history(expected, history)


class Spy(keras.callbacks.Callback):  # type: ignore[misc]
    """Uses the whole model in the middle of training, on images."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.models: set[int] = set()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.models.add(id(self.model))
        self.losses.append(self.model.evaluate(XV, YV, verbose=0)[0])
        assert self.model.predict(X[:3], verbose=0).shape == (3, 3)


def test_callbacks_act_on_the_whole_model(tmp_path: Path) -> None:
    model, spy = compiled(adam()), Spy()
    file = tmp_path / "best.keras"
    callbacks = [
        spy,
        keras.callbacks.ModelCheckpoint(file),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10.0),
        keras.callbacks.TensorBoard(tmp_path / "logs") if _has_tensorflow() else spy,
    ]
    history = fl.fit(
        model, X, Y, epochs=2, verbose=0, validation_data=(XV, YV), callbacks=callbacks
    )
    assert spy.models == {id(model)}
    losses = spy.losses[:: len(spy.losses) // 2]
    np.testing.assert_allclose(losses, history.history["val_loss"], rtol=1e-5)
    saved = keras.saving.load_model(file)
    np.testing.assert_allclose(
        saved.predict(XV, verbose=0), model.predict(XV, verbose=0), atol=1e-6
    )
    assert len(saved.optimizer.variables) == len(model.optimizer.variables)
    assert history.history["learning_rate"][0] == pytest.approx(0.01)


def _has_tensorflow() -> bool:
    return keras.backend.backend() == "tensorflow"


def test_early_stopping_stops_and_restores() -> None:
    def stopped(fit: Any) -> tuple[Any, Any]:
        model = compiled(keras.optimizers.SGD(1.0))
        stop = keras.callbacks.EarlyStopping(
            "val_loss", patience=1, restore_best_weights=True, start_from_epoch=0
        )
        keras.utils.set_random_seed(7)
        options = {"epochs": 8, "verbose": 0, "validation_data": (XV, YV), "callbacks": stop}
        return model, fit(model, X, Y, **options)

    one, expected = stopped(plain)
    other, history = stopped(fl.fit)
    assert len(history.epoch) < 8
    assert_same_history(expected, history)
    for mine, theirs in zip(weights(one), weights(other), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def live(optimizer: Any) -> Any:
    """The network with layers that thaw without compiling."""
    # A bias before BN has a gradient of rounding noise, which Adam scales up to whole steps.
    model = fl.convert(network(use_bias=False))
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


OURS: dict[str, Callable[[], list[Any]]] = {
    # In one run: each compiles the network twice on JAX, and none stops another from acting.
    "watch and recalibrate": lambda: [
        fl.callbacks.BatchNormMonitor((XV, YV), batch_size=10),
        fl.callbacks.Recalibrate(X, batch_size=13),
        fl.callbacks.KeepFrozen(every=2),
    ],
    "thaw": lambda: [fl.callbacks.GradualUnfreeze({1: "conv1"}), fl.callbacks.KeepFrozen()],
    "thaw with a ramp": lambda: [fl.callbacks.GradualUnfreeze({1: "bn1", 2: "conv1"}, ramp=3)],
}


@pytest.mark.parametrize("case", OURS)
def test_our_own_callbacks_do_what_they_do_in_plain_fit(case: str) -> None:
    def run(fit: Callable[..., Any]) -> tuple[Any, Any]:
        model = live(adam())
        keras.utils.set_random_seed(7)
        options = {"epochs": 3, "batch_size": 16, "verbose": 0, "validation_data": (XV, YV)}
        return model, fit(model, X, Y, callbacks=OURS[case](), **options)

    one, expected = run(plain)
    other, history = run(fl.fit)
    assert_same(one, other, live(adam()))
    assert_same_history(expected, history)
    flags = [[layer.trainable for layer in model.layers] for model in (one, other)]
    assert flags[0] == flags[1]
    assert other.get_layer("conv1").trainable == case.startswith("thaw")


def test_a_schedule_that_thaws_everything_runs_plain_fit() -> None:
    model, start = live(adam()), live(adam())
    with pytest.warns(UserWarning, match="plain model.fit"):
        fl.fit(model, X, Y, epochs=2, verbose=0, callbacks=[fl.callbacks.GradualUnfreeze({1: 0})])
    for layer in ("conv0", "conv1"):
        kernels = [np.asarray(each.get_layer(layer).kernel) for each in (model, start)]
        assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_the_engine_is_tried_on_more_than_two_batches(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(choice, "SOON_S", 0.0)  # torch would be done before
    x, y = np.tile(X, (2, 1, 1, 1)) + np.arange(104.0).reshape(-1, 1, 1, 1), np.tile(Y, 2)
    trained_by = {}
    for engine in ("native", "auto", "onnxruntime"):
        model = compiled(sgd())
        keras.utils.set_random_seed(7)
        fl.fit(model, x / 104, y, engine=engine, epochs=2, verbose=2)
        trained_by[engine] = model
        told = capfd.readouterr().err
        assert ("onnxruntime" in told) == (engine != "native")
        assert "frozen part, training data: up to" in told
        assert "104 samples, 1,024 bytes each" in told
    for engine in ("auto", "onnxruntime"):
        for mine, theirs in zip(
            weights(trained_by[engine]), weights(trained_by["native"]), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, atol=1e-4)
    with pytest.raises(ModelError, match="engine must be one of"):
        fl.fit(compiled(sgd()), x, y, engine="abacus", verbose=0)


def test_the_second_call_computes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    fl.fit(compiled(adam()), X, Y, verbose=2)
    assert "52 samples, 52 computed" in capfd.readouterr().err
    fl.fit(compiled(sgd()), X, Y, verbose=2)
    assert "52 samples, 0 computed, 52 already there" in capfd.readouterr().err
    model = compiled(sgd())
    model.get_layer("bn0").moving_mean.assign(np.ones(4))
    fl.fit(model, X, Y, verbose=2)
    assert "52 samples, 52 computed" in capfd.readouterr().err


@pytest.mark.parametrize("engine", ["native", "onnxruntime"])
def test_one_pass_serves_this_call_and_the_next(
    engine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if engine != "native":
        pytest.importorskip("onnx")
        pytest.importorskip(engine)

    def schedule(fit: Callable[..., Any], **first: Any) -> tuple[Any, list[Any], list[str]]:
        model, histories, told = network(), [], []
        ways = {"epochs": 2, "batch_size": 16, "validation_data": (XV, YV), "verbose": 2}
        ways |= {"engine": engine} if first else {}
        keras.utils.set_random_seed(7)
        steps = [(fl.freeze, "head", adam(), first), (fl.unfreeze, "conv1", sgd(), {})]
        for edit, boundary, optimizer, more in steps:
            edit(model, boundary)
            model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
            histories.append(fit(model, X, Y, **ways, **more))
            told.append(capfd.readouterr().err)
        return model, histories, told

    one, mine, told = schedule(fl.fit, thaw_later="conv1")
    other, theirs, _ = schedule(plain)
    assert "frozen part of the next call, training data: 52 samples, 52 computed" in told[0]
    assert "frozen part, training data: 52 samples, 52 computed" in told[0]
    assert "computed from the samples" not in told[0]
    assert "frozen part, training data: 52 samples, 0 computed" in told[1]
    assert "frozen part, validation data: 20 samples, 0 computed" in told[1]
    bound = 1e-5 if engine == "native" else 1e-4
    for a, b in zip(weights(one), weights(other), strict=True):
        np.testing.assert_allclose(a, b, atol=bound)
    for a, b in zip(mine, theirs, strict=True):
        assert_same_history(a, b)


def test_what_cannot_be_shared_is_not_and_it_is_said() -> None:
    model = compiled(sgd())
    with pytest.raises(DataError, match="thaw_later computes features from features"):
        fl.fit(model, X, Y, thaw_later="conv2", dtype="float16", verbose=0)
    with pytest.warns(UserWarning, match=r"thaw_later='conv0' is not heeded: nothing is frozen"):
        fl.fit(model, X, Y, thaw_later="conv0", verbose=0)
    fl.fit(model, X, Y, thaw_later="conv2", verbose=0)  # the frontier of this very call
    flags = [layer.trainable for layer in model.layers]
    assert flags == [layer.trainable for layer in network().layers]


def test_epoch_e_trains_on_view_e() -> None:
    """Against plain ``fit``, one epoch at a time, on the views computed by hand."""

    def double(x: Any, seed: int) -> Any:
        factors = np.random.default_rng(seed).uniform(0.5, 2, size=(len(x), 1, 1, 1))
        return (x * factors).astype(np.float32)

    seen: list[Any] = []

    def recorded(x: Any, seed: int) -> Any:
        seen.append(double(x, seed))
        return seen[-1]

    one = compiled(adam())
    keras.utils.set_random_seed(7)
    options = {"verbose": 0, "shuffle": False, "batch_size": 16}
    fl.fit(one, X, Y, epochs=3, views=2, augment=recorded, augment_name="twice", **options)
    assert len(seen) == 4  # the trial's batch is not computed again
    views = [np.concatenate(seen[:2])[:52], np.concatenate(seen[2:])[:52]]
    other = compiled(adam())
    keras.utils.set_random_seed(7)
    for epoch in range(3):
        other.fit(views[epoch % 2], Y, epochs=epoch + 1, initial_epoch=epoch, **options)
    assert_same(one, other, compiled(adam()))


def test_a_keras_layer_augments_reproducibly(cache_folder: Path) -> None:
    prefix = fl.split(network()).prefix
    flip = L.RandomFlip(seed=1)
    state = np.asarray(keras.ops.convert_to_numpy(flip.generator.state))
    one = fl.cache_features(prefix, X, cache_folder / "a", views=2, augment=flip, verbose=0)
    two = fl.cache_features(
        prefix, X, cache_folder / "b", views=2, augment=L.RandomFlip(seed=1), verbose=0
    )
    rows = np.arange(52)
    assert one.keys == two.keys
    for view in range(2):
        np.testing.assert_array_equal(one.rows(rows, view=view)[0], two.rows(rows, view=view)[0])
    assert not np.array_equal(one.rows(rows, view=0)[0], one.rows(rows, view=1)[0])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(flip.generator.state), state)


def test_identity_of_a_prefix() -> None:
    from frostline.adapters.prefix import identity

    def prefix(change: Callable[[Any], None] = lambda model: None) -> str:
        model = network()
        change(model)
        return identity(fl.split(model).prefix)

    base = prefix()
    keras.Sequential([L.Conv2D(1, 1), L.BatchNormalization()])  # moves Keras' counters
    assert prefix() == base
    changes: list[Callable[[Any], None]] = [
        lambda model: model.get_layer("conv0").bias.assign(np.full(4, 1e-6)),
        lambda model: model.get_layer("bn1").moving_variance.assign(np.full(4, 1.0001)),
        lambda model: setattr(model.get_layer("bn1"), "epsilon", 2e-3),
    ]
    found = {base, *(prefix(change) for change in changes)}
    assert len(found) == 4


def test_preprocessing_in_the_model_is_part_of_its_identity() -> None:
    from frostline.adapters.prefix import identity

    def scaled(scale: float, offset: float) -> str:
        keras.utils.set_random_seed(1)
        frozen = L.Dense(2, trainable=False)
        model = keras.Sequential(
            [keras.Input((4,)), L.Rescaling(scale, offset), frozen, L.Dense(1)]
        )
        return identity(fl.split(model).prefix)

    assert scaled(2.0, 0.0) == scaled(2.0, 0.0)
    assert len({scaled(2.0, 0.0), scaled(1.0, 0.0), scaled(2.0, -1.0)}) == 3


def test_the_code_of_a_layer_of_ones_own_is_part_of_the_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from frostline.adapters.prefix import identity

    class Scaled(L.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return self.scaled(x)

        def scaled(self, x: Any) -> Any:
            return (lambda value: 2 * value)(x)  # code inside code

    def prefix() -> str:
        keras.utils.set_random_seed(1)
        frozen = L.Dense(2, trainable=False)
        model = keras.Sequential([keras.Input((4,)), Scaled(trainable=False), frozen, L.Dense(1)])
        return identity(fl.split(model).prefix)

    before = prefix()
    assert prefix() == before
    monkeypatch.setattr(Scaled, "scaled", lambda _, x: (lambda value: 3 * value)(x))
    changed = prefix()
    assert changed != before
    monkeypatch.setattr(keras, "__version__", "99.0")
    assert prefix() not in (before, changed)


# ---------------------------------------------------------------- faults and bad input


class Fails(keras.callbacks.Callback):  # type: ignore[misc]
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 2:
            raise RuntimeError("in the middle")


def test_an_exception_leaves_a_model_that_goes_on() -> None:
    model, start = compiled(adam()), compiled(adam())
    before = {name: vars(model).get(name) for name in ("call", "_assert_input_compatibility")}
    with pytest.raises(RuntimeError, match="in the middle"):
        fl.fit(model, X, Y, batch_size=8, verbose=0, callbacks=[Fails()])
    assert {name: vars(model).get(name) for name in before} == before
    assert any(
        np.abs(a - b).max() > 1e-4 for a, b in zip(weights(model), weights(start), strict=True)
    )
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()
    assert np.isfinite(fl.fit(model, X, Y, verbose=0).history["loss"]).all()


class Thaws(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.model.get_layer("conv1").trainable = epoch > 0


class Moves(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.get_layer("bn0").moving_mean.assign(np.ones(4))


def test_a_callback_that_makes_features_untrue_is_refused() -> None:
    with pytest.raises(ModelError, match="'conv1' was thawed"):
        fl.fit(compiled(adam()), X, Y, epochs=2, verbose=0, callbacks=[Thaws()])
    with pytest.raises(ModelError, match="changed weights or statistics"):
        fl.fit(compiled(adam()), X, Y, epochs=2, verbose=0, callbacks=[Moves()])


def test_plain_fit_where_nothing_is_worth_storing() -> None:
    def masked() -> Any:
        keras.utils.set_random_seed(1)
        layers = [L.Masking(), L.Dense(5), L.BatchNormalization(name="bn"), L.LSTM(4), L.Dense(3)]
        model = keras.Sequential([keras.Input((8, 24)), *layers])
        fl.freeze(model, "bn")
        model.compile(sgd(), "sparse_categorical_crossentropy")
        return model

    x, ours, theirs = X.reshape(-1, 8, 24), masked(), masked()
    keras.utils.set_random_seed(2)
    with pytest.warns(UserWarning, match="plain model.fit: nothing is worth storing"):
        history = fl.fit(ours, x, Y, epochs=2, verbose=0).history
    keras.utils.set_random_seed(2)
    assert history == theirs.fit(x, Y, epochs=2, verbose=0).history
    with pytest.raises(ModelError, match=r"views and augment need a cache.*nothing is worth"):
        fl.fit(ours, x, Y, views=2, augment=lambda x, seed: x, verbose=0)


class Noisy(Batches):
    """Augments inside the data set."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + np.random.default_rng().normal(size=x.shape).astype(np.float32), y


def test_data_that_change_from_epoch_to_epoch_are_refused() -> None:
    model = compiled(adam())
    with pytest.raises(DataError, match=r"change from epoch to epoch.*views="):
        fl.fit(model, Noisy(X, Y), verbose=0)
    assert "call" not in vars(model)


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_plain_fit_where_nothing_can_be_kept() -> None:
    with pytest.warns(UserWarning, match="plain model.fit: nothing in the model is frozen"):
        history = fl.fit(compiled(adam(), frozen=()), X, Y, verbose=0)
    assert len(history.history["loss"]) == 1
    batches = ((X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16))
    with pytest.warns(UserWarning, match="plain model.fit: a generator"):
        fl.fit(compiled(adam()), batches, verbose=0)
    with warnings.catch_warnings(), pytest.raises(ModelError, match="views and augment need"):
        fl.fit(compiled(adam(), frozen=()), X, Y, augment=lambda x, seed: x, verbose=0)


def test_bad_input() -> None:
    with pytest.raises(ModelError, match="not compiled"):
        fl.fit(network(), X, Y)
    model = compiled(adam())
    model.trainable = False
    with pytest.raises(ModelError, match="everything in the model is frozen"):
        fl.fit(model, X, Y)
    with pytest.raises(ModelError, match="not a model"):
        fl.fit("model", X, Y)
    with pytest.raises(DataError, match="Received: epoch=3"):
        fl.fit(compiled(adam()), X, Y, epoch=3)
    batches = ((X, Y) for _ in range(2))
    with pytest.raises(DataError, match="views=2 reads the data more than once"):
        fl.fit(compiled(adam()), batches, views=2, augment=lambda x, seed: x)
    with pytest.raises(DataError, match="validation_split needs arrays"):
        fl.fit(compiled(adam()), Batches(X, Y), validation_split=0.5, verbose=0)
    broken = X.copy()
    broken[13] = np.nan
    with pytest.raises(DataError, match=r"sample\(s\) 13"):
        fl.fit(compiled(adam()), broken, Y, verbose=0)


# --- augmentation in the model --------------------------------------------------------------------


class Brighter(L.Layer):  # type: ignore[misc]
    """An augmentation that does the same to every image, so that each view is the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.generator = keras.random.SeedGenerator(0)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return 1.5 * inputs + 0.25 if training else inputs


def recipe(*augmentation: Any, nested: bool = False) -> Any:
    """The transfer-learning guide of Keras: augmentation, scaling, ``base(x, training=False)``."""
    keras.utils.set_random_seed(1)
    inner = h = keras.Input((8, 8, 3))
    for _ in range(2):
        h = L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3, padding="same")(h)))
    base = keras.Model(inner, h, name="base")
    base.trainable = False
    inputs = h = keras.Input((8, 8, 3))
    if nested:
        h = keras.Sequential([keras.Input((8, 8, 3)), *augmentation], name="data_augmentation")(h)
    else:
        for layer in augmentation:
            h = layer(h)
    h = base(L.Rescaling(0.5, offset=-0.1)(h), training=False)
    h = L.BatchNormalization(name="last")(L.GlobalAveragePooling2D()(h))
    h = L.Dropout(0.3, seed=5)(h)
    model = keras.Model(inputs, L.Dense(3, activation="softmax")(h))
    model.compile(adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.parametrize("nested", [False, True])
def test_cached_views_train_as_the_layers_do_where_they_are_the_same_images(nested: bool) -> None:
    stock, ours = recipe(Brighter(), nested=nested), recipe(Brighter(), nested=nested)
    arguments: dict[str, Any] = {
        "epochs": 3, "batch_size": 16, "verbose": 0, "validation_data": (XV, YV)
    }  # fmt: skip
    layers = [layer.name for layer in ours.layers]
    keras.utils.set_random_seed(7)
    expected = stock.fit(X, Y, **arguments)
    keras.utils.set_random_seed(7)
    history = fl.fit(ours, X, Y, views=2, engine="native", **arguments)
    for one, other in zip(stock.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5)
    for name, values in expected.history.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-4, atol=1e-5)
    # Nothing stays behind: the model answers as one that was never cut.
    assert [layer.name for layer in ours.layers] == layers
    x = X[:4]
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(ours(x, training=False)),
        keras.ops.convert_to_numpy(stock(x, training=False)),
        atol=1e-4,
    )


def test_layers_in_the_model_and_as_augment_draw_the_same_views() -> None:
    inside = recipe(L.RandomFlip(seed=3))
    beside = recipe()
    arguments: dict[str, Any] = {"epochs": 4, "views": 3, "batch_size": 16, "verbose": 0}
    keras.utils.set_random_seed(7)
    one = fl.fit(inside, X, Y, validation_split=0.25, **arguments)
    keras.utils.set_random_seed(7)
    flips = L.RandomFlip(seed=3)
    other = fl.fit(beside, X, Y, validation_split=0.25, augment=flips, **arguments)
    for name, values in one.history.items():
        np.testing.assert_allclose(values, other.history[name], rtol=1e-4, err_msg=name)


def test_without_views_it_says_what_to_write() -> None:
    model = recipe(L.RandomFlip(), L.RandomRotation(0.1), nested=True)
    before = model.get_weights()
    with pytest.raises(ModelError, match=r"'random_flip\S*', 'random_rotation\S*'.*views=8"):
        fl.fit(model, X, Y, verbose=0)
    with pytest.raises(ModelError, match=r"begins with augmentation.*fl\.fit\(model, x, y, views"):
        fl.split(model)
    with pytest.raises(ModelError, match="a second one cannot be put before it"):
        fl.fit(model, X, Y, views=2, augment=L.RandomFlip(), verbose=0)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["batches", "dataset"])
def test_data_that_other_verbs_take(kind: str) -> None:
    data: Any = [(X[s : s + 16], Y[s : s + 16]) for s in range(0, 52, 16)]
    if kind == "dataset":
        torch = pytest.importorskip("torch")
        data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    stock, ours = recipe(), recipe()
    arguments: dict[str, Any] = {"shuffle": False, "epochs": 2, "verbose": 0}
    size = 16 if kind == "batches" else 32
    expected = stock.fit(X, Y, batch_size=size, **arguments).history["loss"]
    history = fl.fit(ours, data, engine="native", **arguments)
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-5)


def test_a_model_with_a_fit_of_its_own() -> None:
    class Prepares(keras.Model):  # type: ignore[misc]
        """As a keras-hub task: what it is given is prepared in its own loops only."""

        preprocessor: Any = None

        def preprocess_samples(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
            x = x if self.preprocessor is None else self.preprocessor(x)
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

        def fit(self, x: Any, y: Any = None, **options: Any) -> Any:
            x, y, _ = keras.utils.unpack_x_y_sample_weight(self.preprocess_samples(np.array(x), y))
            return super().fit(x, y, **options)

        def evaluate(self, x: Any, y: Any = None, **options: Any) -> Any:
            x, y, _ = keras.utils.unpack_x_y_sample_weight(self.preprocess_samples(np.array(x), y))
            return super().evaluate(x, y, **options)

    plain = network()
    model = Prepares(plain.inputs, plain.outputs)
    model.compile(sgd(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    fl.fit(model, X, Y, verbose=0)  # nothing to prepare: through the cache, past its own fit
    object.__setattr__(model, "preprocessor", lambda x: 3 * x - 1)
    own = model.evaluate(X, Y, verbose=0, return_dict=True)
    table = fl.phases(model, (X, Y))
    np.testing.assert_allclose(table["0"].loss, own["loss"], rtol=1e-4)
    np.testing.assert_allclose(table["dynamic"].loss, own["loss"], rtol=1e-4)
    fl.recalibrate(model, X, sites="all", method="batch")
    plain_model = keras.Model(plain.inputs, plain.outputs)
    stored = [np.array(w) for w in model.get_weights()]
    fl.recalibrate(plain_model, 3 * X - 1, sites="all", method="batch")
    for one, other in zip(stored, plain_model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with pytest.warns(UserWarning, match="prepares its data in fit"):
        fl.fit(model, X, Y, verbose=0)


class Cut(keras.optimizers.SGD):  # type: ignore[misc]
    """Fails inside JAX's training step, when the model has given its values away."""

    armed = False

    def stateless_apply(self, *args: Any, **kwargs: Any) -> Any:
        if self.armed:
            raise KeyboardInterrupt
        return super().stateless_apply(*args, **kwargs)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only there values are given away")
def test_a_step_that_is_cut_leaves_every_variable_with_a_value() -> None:
    model = compiled(Cut(0.1))
    before, outputs = weights(model), model.predict(X, verbose=0)
    model.optimizer.armed = True
    with pytest.raises(KeyboardInterrupt):
        fl.fit(model, X, Y, epochs=1, engine="native", verbose=0)
    model.optimizer.armed = False
    np.testing.assert_array_equal(model.predict(X, verbose=0), outputs)
    fl.fit(model, X, Y, epochs=1, engine="native", verbose=0)
    trained = weights(model)
    assert all(np.isfinite(weight).all() for weight in trained)
    assert any((weight != old).any() for weight, old in zip(trained, before, strict=True))
