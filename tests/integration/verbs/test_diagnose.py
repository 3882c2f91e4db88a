"""phases() and sites() on real Keras models: right numbers, not one bit of the model changed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline.types import DataError, ModelError
from frostline.verbs import diagnose as diagnosis
from frostline.verbs.diagnose import require_sites

keras = pytest.importorskip("keras")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (70, 5)).astype(np.float32)
Y = (X[:, 0] + RNG.normal(0, 0.5, 70) > 3).astype(np.int32)


def network(*, columns: int = 1, activation: Any = "sigmoid", dropout: float = 0.0) -> Any:
    keras.utils.set_random_seed(7)
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(6)(inputs)
    hidden = keras.layers.BatchNormalization(name="bn")(hidden)
    hidden = keras.layers.Activation("relu")(hidden)
    if dropout:
        hidden = keras.layers.Dropout(dropout)(hidden)
    return keras.Model(inputs, keras.layers.Dense(columns, activation=activation)(hidden))


def trained(**kwargs: Any) -> Any:
    """A model in the middle of its training: optimizer slots, metric states, moved statistics."""
    model = network(**kwargs)
    model.compile("adam", "binary_crossentropy", metrics=["accuracy", "auc"])
    for _ in range(3):
        model.train_on_batch(X[:32], Y[:32, None])
    return model


def everything(model: Any) -> list[Any]:
    """Every number that the model owns, optimizer, metrics and seed generators included."""
    found = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    numbers = [np.array(keras.ops.convert_to_numpy(variable)) for variable in found]
    if keras.backend.backend() == "torch":  # where Keras' dropout draws from the global generator
        import torch

        numbers.append(torch.get_rng_state().numpy().copy())
    return numbers


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_card_products_are_not_rounded(
    monkeypatch: Any, precision: Callable[[], Any], fails: bool
) -> None:
    """TF32 differs by 1e-3 from batch size to batch size, which is no fault of a layer."""
    # Loaded before: a room that is first loaded now would keep the other device for good.
    importlib.import_module("frostline.adapters.keras.prefix")
    monkeypatch.setattr("frostline.adapters.keras.native.device", lambda _: "gpu")
    before, seen = precision(), []
    real = diagnosis.measure.measure

    def measured(*args: Any, **ways: Any) -> Any:
        seen.append(precision())
        if fails:
            raise DataError("no")
        return real(*args, **ways)

    monkeypatch.setattr(diagnosis.measure, "measure", measured)
    with pytest.raises(DataError) if fails else contextlib.nullcontext():
        fl.diagnose(trained(), (X, Y[:, None]), verbose=0)
    assert len(seen) == 1
    assert seen[0] != before
    assert precision() == before


def normalised(model: Any, x: Any) -> Any:
    """Training-mode forward pass of :func:`network` in plain numpy: the oracle of phase 1."""
    first, bn, head = (
        [np.asarray(keras.ops.convert_to_numpy(w), np.float64) for w in layer.weights]
        for layer in model.layers
        if layer.weights
    )
    z = x.astype(np.float64) @ first[0] + first[1]
    z = (z - z.mean(0)) / np.sqrt(z.var(0) + model.get_layer("bn").epsilon) * bn[0] + bn[1]
    return 1 / (1 + np.exp(-(np.maximum(z, 0) @ head[0] + head[1])))


def cross_entropy(y: Any, p: Any) -> float:
    return float(sklearn_metrics.log_loss(y, np.asarray(p, np.float64).reshape(-1)))


def test_three_phases_against_oracles() -> None:
    model = trained()
    table = fl.phases(model, (X, Y[:, None]), batch_size=32)
    inference = keras.ops.convert_to_numpy(model(X, training=False))
    np.testing.assert_allclose(table["0"].outputs, inference, rtol=1e-5, atol=1e-6)
    training = np.concatenate([normalised(model, X[s : s + 32]) for s in range(0, 70, 32)])
    np.testing.assert_allclose(table["1"].outputs, training, rtol=1e-4, atol=1e-5)
    assert np.abs(training - inference).max() > 0.05  # the phases do differ
    for phase, outputs in (("0", inference), ("1", training)):
        row = table[phase]
        assert row.loss == pytest.approx(cross_entropy(Y, outputs), rel=1e-4)
        assert row.metrics["accuracy"] == pytest.approx(
            sklearn_metrics.accuracy_score(Y, outputs[:, 0] > 0.5)
        )
        assert row.metrics["auc"] == pytest.approx(
            sklearn_metrics.roc_auc_score(Y, row.outputs[:, 0]),
            abs=1e-6,  # type: ignore[index]
        )
    expected = model.evaluate(X, Y[:, None], verbose=0, return_dict=True)
    assert table["dynamic"].loss == pytest.approx(expected["loss"], rel=1e-5)
    assert table["dynamic"].metrics["accuracy"] == pytest.approx(expected["accuracy"])
    assert table["dynamic"].loss == pytest.approx(table["0"].loss, rel=1e-4)
    assert (table.task, table.samples, table.sites) == ("binary", 70, 1)


class Interrupted:
    """A data set in which somebody presses Ctrl-C."""

    def __init__(self, passes: int) -> None:
        self.left = passes

    def __iter__(self) -> Iterator[Any]:
        yield X[:32], Y[:32, None]
        yield X[32:64], Y[32:64, None]
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


def generator() -> Iterator[Any]:
    return ((X[s : s + 32], Y[s : s + 32, None]) for s in (0, 32))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (lambda: (X, Y[:, None]), None),
        (generator, None),
        (lambda: Interrupted(0), KeyboardInterrupt),  # while the phases are measured
        (lambda: Interrupted(1), KeyboardInterrupt),  # in the dynamic phase
        (lambda: [(X, Y[:, None]), (X[:, :3], Y[:, None])], Exception),  # wrong second batch
    ],
    ids=["arrays", "generator", "interrupted", "interrupted-in-evaluate", "bad-batch"],
)
def test_the_model_is_left_bit_for_bit(data: Callable[[], Any], error: Any) -> None:
    model, twin = trained(dropout=0.5), trained(dropout=0.5)
    before = everything(model)
    flags = [(layer.name, layer.trainable) for layer in model.layers]
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        fl.phases(model, data(), batch_size=32)
    after = everything(model)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert flags == [(layer.name, layer.trainable) for layer in model.layers]
    # And it goes on exactly as one that was never looked at: dropout masks, Adam, statistics.
    for each in (model, twin):
        keras.utils.set_random_seed(3)
        for _ in range(2):
            each.train_on_batch(X[32:64], Y[32:64, None])
    for old, new in zip(everything(twin), everything(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_phases_are_repeatable_with_dropout() -> None:
    model = trained(dropout=0.5)
    first, second = (fl.phases(model, (X, Y[:, None])) for _ in range(2))
    np.testing.assert_array_equal(first["1"].outputs, second["1"].outputs)
    assert np.abs(first["1"].outputs - first["0"].outputs).max() > 0.05  # type: ignore[operator]


def test_dropout_is_on_in_phase_one_without_bn() -> None:
    """A sum over five ones: 5 at inference, and 2 per unit kept when half are dropped."""
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(1, kernel_initializer="ones"),
        ]
    )
    model.compile("sgd", "mean_squared_error")
    table = fl.phases(model, (np.ones((200, 5), np.float32), np.full(200, 5.0)), batch_size=50)
    assert table.sites == 0
    inference, training = table["0"].outputs, table["1"].outputs
    assert inference is not None
    assert training is not None
    np.testing.assert_array_equal(inference, 5)
    assert {2, 4, 6, 8} <= set(training[:, 0].tolist()) <= {0, 2, 4, 6, 8, 10}
    assert training.mean() == pytest.approx(5, abs=0.7)  # 4 standard errors
    # Every batch has masks of its own, as in training.
    assert len({training[s : s + 50].tobytes() for s in range(0, 200, 50)}) == 4
    assert table.patterns[-1].startswith("The model has no BatchNormalization layer")
    assert fl.sites(model) == ()
    with pytest.raises(ModelError, match=r"^no BatchNormalization layer: BN cannot be the cause$"):
        require_sites(fl.sites(model))
    require_sites(fl.sites(network()))


@pytest.mark.parametrize("from_logits", [False, True])
def test_sparse_softmax_of_two_columns(from_logits: bool) -> None:
    model = network(columns=2, activation=None if from_logits else "softmax")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    model.compile("sgd", loss)
    table = fl.phases(model, (X, Y))
    assert table.task == "binary"
    outputs = table["0"].outputs
    assert outputs is not None
    assert table["0"].metrics["accuracy"] == pytest.approx(
        sklearn_metrics.accuracy_score(Y, outputs.argmax(1))
    )
    assert table["0"].metrics["auc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(Y, outputs[:, 1] - outputs[:, 0]), abs=1e-6
    )
    assert table["dynamic"].loss == pytest.approx(table["0"].loss, rel=1e-4)


def test_binary_logits_within_the_unit_interval() -> None:
    """Only the compiled loss can tell these from probabilities."""
    model = network(columns=1, activation=None)
    head = model.layers[-1]
    head.set_weights([head.get_weights()[0] * 0.01, np.full(1, 0.3, np.float32)])
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    table = fl.phases(model, (X, Y[:, None]))
    outputs = table["0"].outputs
    assert outputs is not None
    assert 0 < outputs.min() < outputs.max() < 0.5
    assert table["0"].metrics["accuracy"] == pytest.approx(Y.mean())


def test_one_hot_multiclass() -> None:
    labels = np.random.default_rng(1).integers(0, 4, 70)
    model = network(columns=4, activation="softmax")
    model.compile("sgd", "categorical_crossentropy", metrics=["accuracy"])
    table = fl.phases(model, (X, np.eye(4)[labels]))
    assert table.task == "multiclass"
    assert set(table["0"].metrics) == {"accuracy"}
    assert table["0"].metrics["accuracy"] == pytest.approx(table["dynamic"].metrics["accuracy"])


def test_regression() -> None:
    model = network(activation=None)
    model.compile("sgd", "mean_squared_error")
    table = fl.phases(model, (X, X[:, :1]))
    assert table.task == "regression"
    assert table["0"].loss == pytest.approx(table["0"].metrics["mse"], rel=1e-4)
    assert set(table["0"].metrics) == {"mse", "spearman"}
    binary_targets = fl.phases(model, (X, Y[:, None]))
    assert binary_targets.task == "regression"  # the loss says so


def test_sample_weight_counts_in_the_loss() -> None:
    model = trained()
    weight = np.linspace(0, 2, 70).astype(np.float32)
    table = fl.phases(model, (X, Y[:, None], weight), batch_size=32)
    p = np.asarray(table["0"].outputs, np.float64)[:, 0]
    losses = -np.where(Y == 1, np.log(p), np.log(1 - p))
    assert table["0"].loss == pytest.approx((losses * weight).mean(), rel=1e-4)
    assert table["dynamic"].loss == pytest.approx(table["0"].loss, rel=1e-4)


def test_several_outputs_compare_the_loss_only() -> None:
    inputs = keras.Input((5,), name="features")
    hidden = keras.layers.BatchNormalization()(inputs)
    model = keras.Model(
        inputs,
        {
            "a": keras.layers.Dense(1, activation="sigmoid", name="a")(hidden),
            "b": keras.layers.Dense(2, name="b")(hidden),
        },
    )
    model.compile("sgd", {"a": "binary_crossentropy", "b": "mean_squared_error"})
    table = fl.phases(model, (X, {"a": Y[:, None], "b": X[:, :2]}))
    assert table.task == "unknown"
    assert table["0"].outputs is None
    assert dict(table["0"].metrics) == {}
    assert table["dynamic"].loss == pytest.approx(table["0"].loss, rel=1e-4)
    assert table["1"].loss != pytest.approx(table["0"].loss, rel=1e-2)


def test_model_without_compile() -> None:
    model = network()
    table = fl.phases(model, (X, Y))
    assert [row.loss for row in table.rows] == [None, None, None]
    assert dict(table["dynamic"].metrics) == {}
    assert set(table["1"].metrics) == {"accuracy", "auc"}


def test_wrong_input() -> None:
    with pytest.raises(DataError, match="need labels"):
        fl.phases(trained(), X)
    with pytest.raises(ModelError, match="Received"):
        fl.phases("model.keras", (X, Y))
    with pytest.raises(ModelError, match="Received"):
        fl.sites(3)


@pytest.mark.parametrize("label", [3, -1, np.nan])
def test_labels_that_are_no_classes(label: float) -> None:
    model = network(columns=3, activation="softmax")
    model.compile("sgd", "sparse_categorical_crossentropy")
    labels = np.where(np.arange(len(X)) == 40, label, Y)
    before = everything(model)
    with pytest.raises(DataError, match=r"class numbers from 0 to 2.*Received: labels from"):
        fl.phases(model, (X, labels))
    with pytest.raises(DataError, match=r"class numbers from 0 to 2.*Received: labels from"):
        fl.diagnose(model, (X, labels))
    for old, new in zip(before, everything(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_losses_that_layers_add_count_as_in_evaluate() -> None:
    """Weight and activity regularizers: phase 0 has the loss that `evaluate` reports."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, kernel_regularizer="l2", activity_regularizer="l2"),
            keras.layers.BatchNormalization(gamma_regularizer="l2"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy")
    for convert in (False, True):
        if convert:
            fl.convert(model)
        table = fl.phases(model, (X[:64], Y[:64, None]), batch_size=32)
        expected = model.evaluate(X[:64], Y[:64, None], batch_size=32, verbose=0)
        assert table["0"].loss == pytest.approx(expected, rel=1e-5)
        outputs = model.predict(X[:64], verbose=0)
        assert expected > cross_entropy(Y[:64], outputs) + 0.05  # the regularizers do add


def test_a_first_look_is_shown_while_the_rest_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fl.diagnose(trained(), (X, Y[:, None]), verbose=2, max_samples=64)
    lines = capsys.readouterr().err.splitlines()
    looks = [number for number, line in enumerate(lines) if line.startswith("first look: loss")]
    assert len(looks) == 1
    assert lines[looks[0] - 1].endswith(" batch")  # after three passes
    assert any(line.endswith("attribution") for line in lines[looks[0] :])
