"""Every public function refuses arguments of a wrong type by their names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.types.arguments import _DOORS, checked, shown
from frostline.verbs.fit import _KERAS_ARGUMENTS, arguments_of

#: Public functions, and how many arguments they cannot do without.
FIRST: dict[str, int] = {
    "assert_frozen": 1, "cache_features": 2, "cached": 2, "compare": 2, "diagnose": 2, "fit": 1,
    "freeze": 1, "lint": 1, "merge_statistics": 1, "phases": 2, "recalibrate": 2,
    "recalibrated": 2, "split": 1, "suggest_momentum": 1, "unfreeze": 1, "watch": 1,
}  # fmt: skip
WRONG: dict[str, Any] = {"history": "a\0b", "path": b"folder", "cache": b"folder"}
SCALARS = ("dtype", "engine", "method", "sample", "samples", "verbose")


def cases() -> list[tuple[str, str]]:
    found = []
    for name in sorted(FIRST):
        parameters = list(inspect.signature(getattr(fl, name)).parameters)
        parameters += [each for each in _KERAS_ARGUMENTS if name == "fit"]
        found += [(name, each) for each in parameters if each in _DOORS]
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])


@pytest.mark.parametrize(("verb", "argument"), cases(), ids="-".join)
def test_a_wrong_type_is_refused_by_name(verb: str, argument: str, model: Any) -> None:
    wrong = np.array(["a", "b"]) if argument in SCALARS else WRONG.get(argument, object())
    function = getattr(fl, verb)
    names = list(inspect.signature(function).parameters)[: FIRST[verb]]
    given = dict(zip(names, [model, (np.zeros((4, 3)), np.zeros(4))], strict=False))
    if verb == "compare":
        given["validation"] = (np.zeros((4, 3)), np.zeros(4))
    if verb == "cached":
        given["loader"] = []
    if verb == "merge_statistics":
        given["models_or_states"] = [model, model]
    given[argument] = wrong
    with pytest.raises(fl.FrostlineError, match=rf"^{argument} must be .*Received: {argument}="):
        function(**given)


def test_every_argument_of_the_table_belongs_to_a_public_function() -> None:
    assert {argument for _, argument in cases()} == set(_DOORS)


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [("epochs", -1), ("epochs", 2.5), ("initial_epoch", "3"), ("validation_split", 1.0),
     ("validation_split", float("nan")), ("steps_per_epoch", 0), ("batch_size", True),
     ("shuffle", "yes"), ("callbacks", [object()]), ("callbacks", keras.callbacks.Callback),
     ("class_weight", {"a": 1.0}), ("validation_freq", [0]), ("verbose", 3)],
)  # fmt: skip
def test_what_fit_hands_on_is_refused_by_name(argument: str, wrong: Any) -> None:
    with pytest.raises(fl.DataError, match=rf"^{argument} must be .*Received: {argument}="):
        arguments_of(**{argument: wrong})


@pytest.fixture
def frozen() -> Any:
    made = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(trainable=False)])
    made.add(keras.layers.Dense(1))
    made.compile("sgd", "mse")
    return made


def test_labels_that_are_not_there(frozen: Any, tmp_path: Any) -> None:
    with pytest.raises(fl.DataError, match=r"^y must be the labels .*Received: y=None"):
        fl.fit(frozen, np.zeros((4, 3), "float32"), cache=tmp_path, verbose=0)


def test_labels_beside_a_generator(frozen: Any, tmp_path: Any) -> None:
    batches = (np.zeros((4, 3), "float32") for _ in range(1))
    with pytest.raises(fl.DataError, match=r"^y must be None where x is a generator"):
        fl.fit(frozen, batches, np.zeros((4, 1)), cache=tmp_path, verbose=0)


@pytest.mark.parametrize("weight", ["3", 2.5, [1.0], np.float32(1), np.array(["a"] * 4)])
def test_weights_of_samples_that_are_no_array(weight: Any) -> None:
    with pytest.raises(fl.DataError, match=r"^sample_weight must be .*Received: sample_weight="):
        arguments_of(sample_weight=weight)


@pytest.mark.filterwarnings("ignore:fl.fit runs plain")
@pytest.mark.parametrize("argument", ["x", "validation_data"])
def test_a_generator_that_raises_in_fit(argument: str, frozen: Any, tmp_path: Any) -> None:
    def broken() -> Iterator[Any]:
        yield np.zeros((2, 3), "float32"), np.zeros((2, 1), "float32")
        raise RuntimeError("the disk is gone")

    x, y = np.zeros((4, 3), "float32"), np.zeros((4, 1), "float32")
    given = {"x": x, "y": y} if argument == "validation_data" else {}
    with pytest.raises(
        fl.DataError, match=f"^{argument} cannot be read .*the disk is gone"
    ) as error:
        fl.fit(frozen, cache=tmp_path, verbose=0, **given, **{argument: broken()})
    assert str(error.value.__cause__) == "the disk is gone"


def test_what_keras_takes_is_handed_on() -> None:
    callback = keras.callbacks.Callback()
    for given in (
        {"epochs": 0}, {"epochs": np.int64(2)}, {"batch_size": None}, {"steps_per_epoch": None},
        {"callbacks": callback}, {"callbacks": (callback, [callback])}, {"shuffle": "batch"},
        {"callbacks": keras.callbacks.CallbackList()}, {"verbose": False}, {"validation_freq": [1]},
        {"class_weight": {0: 1, np.int64(1): np.float32(2)}}, {"validation_split": 0},
    ):  # fmt: skip
        ((name, value),) = given.items()
        assert arguments_of(**given)[name] is value


@pytest.mark.parametrize(
    "sample",
    ["3", 3, None, b"abc", {1, 2}, {"a": 1}, object(), np.array(["a", "b", "c"])],
    ids=lambda sample: type(sample).__name__,
)
def test_a_sample_that_is_no_batch(sample: Any) -> None:
    layers = [keras.layers.Dense(3, trainable=False), keras.layers.Dense(2)]
    made = keras.Sequential([keras.Input((3,)), *layers])
    given = [sample] if sample is None else sample
    with pytest.raises(fl.FrostlineError, match=r"^sample must be .*Received: sample="):
        fl.split(made, sample=given)


@pytest.mark.parametrize("data", [[1, "a"], np.zeros((2, 3, 4)), np.array(["a", "b"])])
def test_data_that_a_model_without_a_loss_does_not_take(data: Any, model: Any) -> None:
    with pytest.raises(fl.FrostlineError), fl.watch(model, data):
        pass


def test_what_is_a_number_to_numpy_is_one_here() -> None:
    @checked
    def verb(batch_size: int = 1, params: bool = True, path: str | None = None) -> Any:
        return batch_size, params, path

    assert verb(np.int64(3), params=np.bool_(True))[0] == 3
    assert verb(path=None)[0] == 1
    for wrong in (True, 2.0, "3", np.array([3]), 0, -1, 10**30):
        with pytest.raises(fl.DataError, match="batch_size must be"):
            verb(wrong)
    with pytest.raises(TypeError, match="unexpected keyword"):
        verb(batches=3)


def test_a_value_that_cannot_show_itself() -> None:
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown(Silent()) == "<Silent>"
    assert len(shown("x" * 1000)) < 100


def test_a_generator_that_raises_is_said_to_be_the_data() -> None:
    def broken() -> Iterator[Any]:
        yield np.zeros((2, 3), "float32")
        raise RuntimeError("the disk is gone")

    made = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    before = made.get_weights()
    with pytest.raises(fl.DataError, match="the disk is gone"):
        fl.recalibrate(made, broken(), method="batch")
    assert all(np.array_equal(a, b) for a, b in zip(before, made.get_weights(), strict=True))


@pytest.mark.parametrize("argument", ["sites", "history", "model_or_layers"])
def test_a_list_that_cannot_be_read_to_its_end_is_named(argument: str, model: Any) -> None:
    def broken() -> Iterator[Any]:
        yield from ()
        raise RuntimeError("the disk is gone")

    data = (np.zeros((4, 3), "float32"), np.zeros((4, 3), "float32"))
    calls = {
        "sites": lambda: fl.set_momentum(model, 0.5, sites=broken()),
        "history": lambda: fl.diagnose(model, data, loss="mse", history=broken()),
        "model_or_layers": lambda: fl.frozen(broken()).__enter__(),
    }
    with pytest.raises(fl.DataError, match=rf"^{argument} cannot be read .*the disk is gone"):
        calls[argument]()


def test_an_augmentation_that_returns_nothing(tmp_path: Any) -> None:
    class Prefix:
        identity = "0" * 64

        def __call__(self, x: Any) -> list[Any]:
            return [x]

    with pytest.raises(fl.DataError, match="augment must return"):
        fl.cache_features(
            Prefix(), np.zeros((4, 3)), tmp_path, augment=lambda _x, _seed: None, views=2
        )
