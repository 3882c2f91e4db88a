"""fl.diagnose on real Keras models: what must be blamed, what must not, and nothing is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline.measure import Bench
from frostline.measure.samples import draw
from frostline.types import DataError, FrostlineError, ModelError
from frostline.types.measured import BN_CAUSES

keras = pytest.importorskip("keras")
datasets = pytest.importorskip("sklearn.datasets")
L = keras.layers

diagnose = functools.partial(fl.diagnose, verbose=0, max_samples=256)


@functools.cache
def digits() -> tuple[Any, Any]:
    x, y = datasets.load_digits(return_X_y=True)
    return (x / 16).astype("float32")[:1000], y[:1000]


def network(
    norm: Any = L.BatchNormalization, *, dropout: float = 0.0, units: int = 24, **settings: Any
) -> Any:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((64,))
    x = inputs
    for index in range(2):
        x = L.Dense(units, name=f"dense{index}")(x)
        x = norm(name=f"bn{index}", **settings)(x) if norm is not None else x
        x = L.Activation("relu")(x)
    if dropout:
        x = L.Dropout(dropout)(x)
    model = keras.Model(inputs, L.Dense(10, activation="softmax", name="head")(x))
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    return model


def trained(*args: Any, epochs: int, data: Any = None, **settings: Any) -> Any:
    model = network(*args, **settings)
    model.fit(*(data or digits()), epochs=epochs, batch_size=32, verbose=0)
    return model


@functools.cache
def healthy() -> Any:
    model = trained(epochs=12)
    model.optimizer.learning_rate = 1e-6  # the averages settle
    model.fit(*digits(), epochs=10, batch_size=32, verbose=0)
    return model


def codes(report: Any) -> set[str]:
    return {cause.code for cause in report.causes if cause.share is None or cause.share > 0.1}


def everything(model: Any) -> list[Any]:
    found = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    numbers = [np.array(keras.ops.convert_to_numpy(variable)) for variable in found]
    if keras.backend.backend() == "torch":
        import torch

        numbers.append(torch.get_rng_state().numpy().copy())
    flags = [np.array([layer.trainable for layer in model.layers])]
    return [*numbers, *flags, np.array(sorted(str(vars(x).keys()) for x in model.layers))]


# --- what is blamed -------------------------------------------------------------------------------


def test_a_healthy_model_has_no_bn_cause() -> None:
    model = healthy()
    report = diagnose(model, digits())
    assert not codes(report) & {*BN_CAUSES}
    assert report.verdict.startswith("no cause found: ")
    assert report.remedies == ()
    probes = report.measurement.probes
    assert abs(probes["training"].loss - probes["inference"].loss) < 0.05
    # The probe is the model's own answer: Keras' evaluate is the oracle.
    samples = draw(digits(), max_samples=256).whole
    oracle = model.evaluate(samples.x, samples.y, verbose=0)
    assert probes["inference"].loss == pytest.approx(oracle, rel=1e-4)


def test_lagging_averages_are_blamed_and_recalibration_is_measured_before_it_is_done() -> None:
    model = trained(epochs=2, units=32)
    report = diagnose(model, digits())
    measured = report.measurement
    assert report.causes[0].code == "EMA_LAG"
    assert report.verdict.startswith("BN: EMA_LAG")
    gap = measured.gaps["bn"].loss
    assert gap.excludes_zero
    attribution = report.attribution
    assert attribution is not None
    assert attribution.residual <= 0.05
    assert attribution.shares.sum() == pytest.approx(attribution.gap, rel=0.05)
    # The promise is what the repair does: recalibrate on the same samples, and evaluate.
    samples = draw(digits(), max_samples=256).whole
    best = next(remedy for remedy in report.remedies if remedy.name == "recalibrate unfrozen")
    assert best.recommended
    fl.recalibrate(model, samples.x)
    assert model.evaluate(samples.x, samples.y, verbose=0) == pytest.approx(
        best.after["loss"], rel=1e-3
    )


@functools.cache
def frozen_on_batches() -> tuple[Any, Any]:
    """Trained, then the first block frozen as in Keras 2.1.3 to 2.2.4, on data of less contrast."""
    model = trained(fl.layers.BatchNormalization, epochs=6, policy="batch")
    fl.freeze(model, until="dense1")
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    x, y = digits()
    shifted = (0.4 * x + 0.5, y)
    model.fit(*shifted, epochs=8, batch_size=32, verbose=0)
    return model, shifted


def test_frozen_sites_on_batch_statistics_are_blamed() -> None:
    model, data = frozen_on_batches()
    report = diagnose(model, data)
    assert report.causes[0].code == "FROZEN_BATCH_STATS"
    assert report.causes[0].sites == ("bn0",)
    behaviour = report.measurement.behaviour["bn0"]
    assert behaviour.training == pytest.approx(1, abs=0.01)
    assert behaviour.moves is not True


@pytest.mark.parametrize("policy", ["batch", "inference"])
def test_canary_own_predictions_as_labels(policy: str) -> None:
    """Frozen as a whole: a training-mode pass must repeat the predictions, or BN is not frozen."""
    model, (x, _) = frozen_on_batches()
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    fl.convert(twin, policy=policy)
    twin.trainable = False
    twin.compile("sgd", "kl_divergence")
    report = diagnose(twin, (x, twin.predict(x, verbose=0)))
    loss = report.measurement.probes["training"].losses
    if policy == "inference":
        assert np.abs(loss).max() < 1e-6
        assert not codes(report) & {*BN_CAUSES}
        assert report.verdict.startswith("no cause found")
    else:
        assert loss.mean() > 0.1
        assert report.causes[0].code == "FROZEN_BATCH_STATS"


def test_no_bn_layer() -> None:
    report = diagnose(trained(None, epochs=3), digits())
    assert not codes(report) & {*BN_CAUSES}
    assert report.verdict.startswith("not BN: the model has no BatchNormalization layer; training")
    assert report.gap.loss.estimate == 0
    assert report.sites == ()


def test_dropout_alone() -> None:
    report = diagnose(trained(None, epochs=12, dropout=0.6), digits())
    assert report.causes[0].code == "DROPOUT"
    assert report.verdict.startswith("not BN: DROPOUT")
    assert report.gap.loss.low > 0
    measured = report.measurement
    np.testing.assert_array_equal(
        measured.probes["dropout"].losses, measured.probes["training"].losses
    )


def test_16_samples_say_how_little_they_tell() -> None:
    x, y = digits()
    # With dropout every sample has its part in the gap.
    reports = [diagnose(lagging(), (x[:n], y[:n])) for n in (16, 800)]
    few, many = (report.gap.loss for report in reports)
    assert few.high - few.low > 2 * (many.high - many.low)
    assert "16 samples" in reports[0].verdict
    assert "samples tell little" not in reports[1].verdict


# --- nothing is changed ---------------------------------------------------------------------------


def interrupted(owner: Any, name: str, at: int, patch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the n-th call."""
    plain, calls = getattr(owner, name), [0]

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    patch.setattr(owner, name, stop)


@functools.cache
def lagging() -> Any:
    """For tests after which it is as it was."""
    return trained(epochs=1, dropout=0.3)


@pytest.mark.parametrize(
    ("name", "at"), [(None, 0), ("passes", 2), ("passes", 6), ("population", 1), ("probe", 8)]
)
def test_the_model_is_left_bit_for_bit(name: Any, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lagging()
    x, y = digits()
    data = (x[:128], y[:128])
    before = everything(model)
    if name is None:
        diagnose(model, data)
    else:
        interrupted(Bench, name, at, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            diagnose(model, data)
    for old, new in zip(before, everything(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_interrupted_while_statistics_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from frostline.adapters.keras.moments import MomentRecorder

    model = lagging()
    before = everything(model)
    interrupted(MomentRecorder, "store", 2, monkeypatch)
    x, y = digits()
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, (x[:128], y[:128]))
    for old, new in zip(before, everything(model), strict=True):
        np.testing.assert_array_equal(old, new)


# --- other models and data ------------------------------------------------------------------------


def regression() -> tuple[Any, Any]:
    x, _ = digits()
    inputs = keras.Input((64,))
    sums = L.Dense(1, kernel_initializer=keras.initializers.Constant(0.5))
    model = keras.Model(inputs, sums(L.BatchNormalization(name="bn")(inputs)))
    model.compile("adam", "mean_squared_error")
    return model, (x, 0.5 * x.sum(axis=1, keepdims=True))


def several_outputs() -> tuple[Any, Any]:
    x, y = digits()
    inputs = keras.Input((64,))
    hidden = L.BatchNormalization(name="bn")(inputs)
    heads = {"a": L.Dense(10, activation="softmax", name="a")(hidden), "b": L.Dense(2)(hidden)}
    model = keras.Model(inputs, heads)
    model.compile("adam", {"a": "sparse_categorical_crossentropy", "b": "mse"})
    return model, (x, {"a": y, "b": x[:, :2]})


def logits_without_compile() -> tuple[Any, Any]:
    inputs = keras.Input((64,))
    model = keras.Model(inputs, L.Dense(10)(L.BatchNormalization(name="bn")(inputs)))
    return model, digits()


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (regression, "regression"),
        (several_outputs, "unknown"),
        (logits_without_compile, "multiclass"),
    ],
    ids=["regression", "several-outputs", "logits-without-compile"],
)
def test_other_tasks(make: Callable[[], tuple[Any, Any]], task: str) -> None:
    model, (x, y) = make()
    data = (
        x[:96],
        {key: value[:96] for key, value in y.items()} if isinstance(y, dict) else y[:96],
    )
    measured = diagnose(model, data).measurement
    assert measured.task == task
    assert measured.gaps["bn"].loss.excludes_zero  # statistics at 0 and 1, pixels between 0 and 1
    assert measured.neighbours is not None
    assert measured.neighbours < 1e-5
    probe = measured.probes["inference"]
    assert (probe.accuracy is None) == (task != "multiclass")
    assert ("spearman" in probe.metrics) == (task == "regression")
    told = any("SparseCategoricalCrossentropy(from_logits=True)" in n for n in measured.notes)
    assert told == (make is logits_without_compile)


def test_words_for_bad_input() -> None:
    model, (x, y) = regression()
    with pytest.raises(DataError, match="need labels"):
        diagnose(model, x)
    with pytest.raises(ModelError, match="Received"):
        diagnose("model.keras", (x, y))
    with pytest.raises(FrostlineError, match="no rule 'FL777'"):
        diagnose(model, (x, y), select="FL777")
    with pytest.raises(FrostlineError, match="verbose must be 'auto', 0, 1 or 2"):
        fl.diagnose(model, (x, y), verbose=3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="history must be"):
        diagnose(model, (x, y), history=7)


def wrong_shape(x: Any, y: Any) -> Any:
    return x, np.stack([y, y], axis=1)


def broken_stream(x: Any, y: Any) -> Any:
    yield x[:16], y[:16]
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (wrong_shape, DataError, r"does not take these labels.*Received: label shapes"),
        (lambda x, y: (x, y + 5), DataError, "from 0 to 9.*Received: labels from 5 to 14"),
        (lambda x, y: (x, y.astype("U")), DataError, "numbers. Received: dtype <U"),
        (broken_stream, OSError, "the disk is gone"),
        (lambda x, y: iter(()), DataError, "Received"),
    ],
    ids=["wrong-shape", "unknown-classes", "words", "stream-that-breaks", "empty-iterator"],
)
def test_bad_data_leave_the_model_as_it_was(data: Any, error: Any, words: str) -> None:
    model = lagging()
    before = everything(model)
    x, y = digits()
    with pytest.raises(error, match=words):
        diagnose(model, data(x[:64], y[:64]))
    for old, new in zip(before, everything(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_iterator_that_can_be_read_once_is_enough() -> None:
    x, y = digits()
    stream = ((x[at : at + 16], y[at : at + 16]) for at in range(0, 64, 16))
    report = diagnose(lagging(), stream)
    assert report.measurement.samples == 64
    assert next(stream, None) is None


def test_images_that_are_not_numbers_are_counted_not_believed() -> None:
    model = lagging()
    before = everything(model)
    x, y = digits()
    report = diagnose(model, (np.full_like(x[:64], np.nan), y[:64]))
    assert report.measurement.probes["inference"].broken == 64
    assert not any(each.recommended for each in report.remedies)
    assert report.verdict == (
        "no verdict: training mode and inference could not be compared: 64 of 64 samples come out "
        "as NaN or infinite (64 of 64 samples hold NaN or infinite inputs)"
    )
    for old, new in zip(before, everything(model), strict=True):
        np.testing.assert_array_equal(old, new)


class FailsInTraining(L.Layer):
    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            raise NotImplementedError("no training mode here")
        return x


def test_a_layer_that_fails_in_training_mode() -> None:
    inputs = keras.Input((64,))
    x = FailsInTraining()(L.BatchNormalization(name="bn")(inputs), training=None)
    model = keras.Model(inputs, L.Dense(10, activation="softmax")(x))
    model.compile("sgd", "sparse_categorical_crossentropy")
    before = everything(model)
    x, y = digits()
    words = (
        r"fails in training mode.*Received: NotImplementedError: FailsInTraining\.call.*no train"
    )
    with pytest.raises(ModelError, match=words):
        diagnose(model, (x[:64], y[:64]))
    for old, new in zip(before, everything(model), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_progress_is_on_stderr(verbose: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, (x, y) = regression()
    fl.diagnose(model, (x[:32], y[:32]), verbose=verbose, max_samples=32)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("% training" in err) == (verbose == 2)
    assert ("first look: loss" in err) == (verbose > 0)
    assert verbose != 0 or err == ""


def test_no_encoding_of_images_repairs_statistics_that_are_nan() -> None:
    x, y = digits()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            L.BatchNormalization(name="bn"),
            L.GlobalAveragePooling2D(),
            L.Dense(10, activation="softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.get_layer("bn").moving_variance.assign(np.full(1, np.nan, "float32"))
    skipped = diagnose(model, (x[:32].reshape(-1, 8, 8, 1), y[:32])).measurement.skipped
    assert skipped["input trials"] == "no encoding of the inputs gives a finite loss"


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only there values are given away")
def test_averages_that_keras_has_lost_do_not_stop_a_look() -> None:
    x, y = np.random.default_rng(0).normal(size=(64, 10)).astype("float32"), np.arange(64) % 4
    model = keras.Sequential(
        [
            keras.Input((10,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(4, activation="softmax"),
        ]
    )
    optimizer = keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.98)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(x, y, epochs=3, verbose=0)
    model.evaluate(x, y, verbose=0)
    report = fl.diagnose(model, (x, y), verbose=0)
    assert "inference" in report.measurement.probes
