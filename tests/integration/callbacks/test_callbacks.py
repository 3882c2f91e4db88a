"""Callbacks in ``fit``: numbers against numpy, thawing against recompiling by hand."""

from __future__ import annotations

import csv
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.types import DataError, ModelError

L = keras.layers
BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (64, 5)).astype("float32")
Y = RNG.integers(0, 3, 64)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
#: Keras refuses more under torch.
STEPS = [1] if BACKEND == "torch" else [1, 3]


@keras.saving.register_keras_serializable(package="frostline_tests")
class CountTraces(L.Layer):  # type: ignore[misc]
    traces = 0

    def call(self, inputs: Any) -> Any:
        CountTraces.traces += 1
        return inputs


def build(kind: Any = fl.layers.BatchNormalization, **options: Any) -> Any:
    keras.utils.set_random_seed(5)
    return keras.Sequential(
        [
            keras.Input((5,)),
            L.Dense(6, use_bias=False, name="d1"),
            kind(name="bn1", momentum=0.9, **options),
            L.Activation("tanh"),
            L.Dense(4, use_bias=False, name="d2"),
            kind(name="bn2", momentum=0.9, **options),
            L.Activation("tanh"),
            CountTraces(),
            L.Dense(3, name="head"),
        ]
    )


def compiled(model: Any, optimizer: Any = None, **options: Any) -> Any:
    model.compile(optimizer or keras.optimizers.SGD(0.05), LOSS, **options)
    return model


def fit(model: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    return model.fit(
        X,
        Y,
        batch_size=16,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **options,
    )


def weights(model: Any) -> dict[str, Any]:
    return {
        f"{layer.name}/{index}": np.array(keras.ops.convert_to_numpy(weight))
        for layer in model.layers
        for index, weight in enumerate(layer.weights)
    }


class Record(keras.callbacks.Callback):  # type: ignore[misc]
    """Weights at every moment that the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Any]] = {}

    def _note(self, moment: str) -> None:
        self.seen.setdefault(moment, []).append(weights(self.model))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._note("epoch_begin")

    def on_test_begin(self, logs: Any = None) -> None:
        self._note("test_begin")

    def on_test_end(self, logs: Any = None) -> None:
        self._note("test_end")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._note("epoch_end")


# --- numpy --------------------------------------------------------------------------------------


def normed(x: Any, w: dict[str, Any], name: str, mean: Any, variance: Any) -> Any:
    return (x - mean) / np.sqrt(variance + 1e-3) * w[f"{name}/0"] + w[f"{name}/1"]


def by_hand(w: dict[str, Any], x: Any, blend: dict[str, float]) -> tuple[Any, dict[str, Any]]:
    """Logits of one batch and the inputs of both sites, float64."""
    w = {name: value.astype("float64") for name, value in w.items()}
    seen, h = {}, x.astype("float64")
    for dense, name in (("d1", "bn1"), ("d2", "bn2")):
        h = seen[name] = h @ w[f"{dense}/0"]
        pair = [
            (1 - blend[name]) * w[f"{name}/{number}"] + blend[name] * batch
            for number, batch in ((2, h.mean(0)), (3, h.var(0)))
        ]
        h = np.tanh(normed(h, w, name, *pair))
    return h @ w["head/0"] + w["head/1"], seen


def cross_entropy(logits: Any, y: Any) -> Any:
    shifted = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]


def monitored(w: dict[str, Any], blend: dict[str, float]) -> dict[str, float]:
    """The monitor's numbers, two batches of 32."""
    losses: dict[str, list[Any]] = {"train": [], "stored": []}
    seen: dict[str, list[Any]] = {"bn1": [], "bn2": []}
    for part in (slice(0, 32), slice(32, 64)):
        logits, inputs = by_hand(w, X[part], blend)
        losses["train"].append(cross_entropy(logits, Y[part]))
        losses["stored"].append(
            cross_entropy(by_hand(w, X[part], dict.fromkeys(blend, 0.0))[0], Y[part])
        )
        for name, values in inputs.items():
            seen[name].append(values)
    shifts, ratios = [], []
    for name, parts in seen.items():
        whole = np.concatenate(parts)
        stored = w[f"{name}/3"].astype("float64") + 1e-3
        shifts.append(np.abs(whole.mean(0) - w[f"{name}/2"]) / np.sqrt(stored))
        ratio = (whole.var(0) + 1e-3) / stored
        ratios.append(np.maximum(ratio, 1 / ratio))
    shift = np.concatenate(shifts)
    return {
        "bn/gap": np.concatenate(losses["train"]).mean() - np.concatenate(losses["stored"]).mean(),
        "bn/shift_p50": float(np.quantile(shift, 0.5)),
        "bn/shift_p90": float(np.quantile(shift, 0.9)),
        "bn/shift_max": float(shift.max()),
        "bn/ratio_max": float(np.concatenate(ratios).max()),
    }


# --- BatchNormMonitor ---------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_monitor_writes_what_numpy_finds(frozen: bool) -> None:
    model = compiled(build())
    model.get_layer("bn1").trainable = not frozen
    blend = {"bn1": float(not frozen), "bn2": 1.0}
    monitor = fl.callbacks.BatchNormMonitor((X, Y))
    history = fit(model, monitor).history
    wanted = monitored(weights(model), blend)
    for name, value in wanted.items():
        assert history[name][-1] == pytest.approx(value, rel=2e-4, abs=5e-7), name
    assert history["bn/frozen"] == [frozen] * 2
    assert abs(wanted["bn/gap"]) > 1e-4  # there is something to find
    now = weights(model)
    monitor.measure()
    for name, value in weights(model).items():  # to measure changes nothing
        np.testing.assert_array_equal(value, now[name], err_msg=name)


def test_trackers_pick_the_numbers_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CSV, TensorBoard's event files and MLflow's file store, read back from the disk."""
    callbacks = [fl.callbacks.BatchNormMonitor((X, Y))]
    callbacks.append(keras.callbacks.CSVLogger(str(tmp_path / "log.csv")))
    boards = _tensorboard(tmp_path)
    flows = _mlflow(tmp_path, monkeypatch)
    history = fit(compiled(build()), *callbacks, *boards, *flows).history
    names = [name for name in history if name.startswith("bn/")]
    assert len(names) == 6
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in names:
        assert [float(row[name]) for row in rows] == pytest.approx(history[name])
    if boards:
        events = _events(tmp_path / "board")
        for name in names:
            assert events[f"epoch_{name}"] == pytest.approx(history[name])
    if flows:
        for name in names:
            # MLflow now and then begins a second run by itself; timestamp, value, step.
            files = (tmp_path / "flow").glob(f"*/*/metrics/{name}")
            lines = [line.split() for file in files for line in file.read_text().splitlines()]
            lines.sort(key=lambda line: int(line[2]))
            assert [float(line[1]) for line in lines] == pytest.approx(history[name])
    if not (boards and flows):
        pytest.skip("CSV was tested; TensorBoard or MLflow is not installed")


def _tensorboard(folder: Path) -> list[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tensorboard  # noqa: F401
            import tensorflow.summary  # noqa: F401
    except ImportError:
        return []
    return [keras.callbacks.TensorBoard(str(folder / "board"), write_graph=False)]


def _events(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    found = EventAccumulator(str(folder / "train"))
    found.Reload()
    return {
        tag: [float(tensor_util.make_ndarray(e.tensor_proto)) for e in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
        if tag.startswith("epoch_bn")
    }


def _mlflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow
            from mlflow.keras import MlflowCallback
    except ImportError:
        return []
    mlflow.set_tracking_uri((folder / "flow").as_uri())

    class Flow(MlflowCallback):  # type: ignore[misc]
        """Inside a run of its own, and without the model summary, which is no metric."""

        def on_train_begin(self, logs: Any = None) -> None:
            mlflow.start_run()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                super().on_epoch_end(epoch, logs)

        def on_train_end(self, logs: Any = None) -> None:
            self.metrics_logger.flush()
            mlflow.end_run()

    return [Flow(log_every_epoch=True)]


def test_monitor_compares_one_loss_per_batch_as_well() -> None:
    def one_number(y: Any, outputs: Any) -> Any:
        return keras.ops.mean(keras.ops.square(outputs))

    model = build()
    model.compile("sgd", one_number)
    history = fit(model, fl.callbacks.BatchNormMonitor((X, Y)), epochs=1).history

    def mean_square(training: bool) -> float:
        twin = build()
        twin.set_weights(model.get_weights())
        outputs = [twin(X[start : start + 32], training=training) for start in (0, 32)]
        return float(np.mean([keras.ops.convert_to_numpy(part) ** 2 for part in outputs]))

    wanted = mean_square(True) - mean_square(False)
    assert abs(wanted) > 1e-3
    assert history["bn/gap"] == pytest.approx([wanted], rel=1e-4)


def test_mistakes_show_before_the_first_epoch() -> None:
    plain = keras.Sequential([keras.Input((5,)), L.Dense(3)])
    record = Record()
    with pytest.raises(ModelError, match="no BN layer"):
        fit(compiled(plain), fl.callbacks.BatchNormMonitor((X, Y)), record)
    with pytest.raises((DataError, ValueError)):
        fit(compiled(build()), fl.callbacks.BatchNormMonitor((X[:, :3], Y)), record)
    with pytest.raises(ModelError, match="no BN layer has the path or name 'bn9'"):
        fit(compiled(build()), fl.callbacks.Recalibrate(X, sites="bn9"), record)
    assert not record.seen
    with pytest.raises(DataError, match=r"callbacks\.Recalibrate reads the data more than once"):
        fl.callbacks.Recalibrate(iter([X]))
    with pytest.raises(ModelError, match="when must be"):
        fl.callbacks.Recalibrate(X, when="never")
    with pytest.raises(ModelError, match="action must be"):
        fl.callbacks.KeepFrozen("shout")
    with pytest.raises(ModelError, match="every must be"):
        fl.callbacks.KeepFrozen(every=0)


# --- Recalibrate --------------------------------------------------------------------------------


def assert_population(w: dict[str, Any], x: Any = X) -> None:
    _, seen = by_hand(w, x, {"bn1": 0.0, "bn2": 0.0})
    for name, values in seen.items():
        np.testing.assert_allclose(w[f"{name}/2"], values.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(w[f"{name}/3"], values.var(0), rtol=1e-4)


def test_recalibrated_before_every_validation_and_kept() -> None:
    record = Record()
    fit(compiled(build()), fl.callbacks.Recalibrate(X), record, validation_data=(X, Y))
    for moment in ("test_begin", "test_end", "epoch_end"):
        for w in record.seen[moment]:
            assert_population(w)
    last, following = record.seen["epoch_end"][0], record.seen["epoch_begin"][1]
    for name, value in last.items():  # training goes on from there
        np.testing.assert_array_equal(value, following[name], err_msg=name)


def test_recalibrated_once_at_the_end() -> None:
    record = Record()
    model = compiled(build())
    fit(model, fl.callbacks.Recalibrate(X, when="end"), record, validation_data=(X, Y))
    assert_population(weights(model))
    with pytest.raises(AssertionError):
        assert_population(record.seen["epoch_end"][-1])


def test_a_group_may_be_empty_in_some_epochs() -> None:
    model = compiled(build())
    fl.freeze(model, until="head")
    before = weights(model)
    fit(compiled(model), fl.callbacks.Recalibrate(X), fl.callbacks.GradualUnfreeze({1: "bn2"}))
    after = weights(model)
    np.testing.assert_array_equal(after["bn1/2"], before["bn1/2"])
    _, seen = by_hand(after, X, {"bn1": 0.0, "bn2": 0.0})
    np.testing.assert_allclose(after["bn2/2"], seen["bn2"].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_averaged_weights_get_statistics_of_their_own(swap_on_epoch: bool) -> None:
    record, plain = Record(), Record()
    for recorder, extra in ((plain, []), (record, [fl.callbacks.Recalibrate(X)])):
        optimizer = keras.optimizers.SGD(0.2, use_ema=True, ema_momentum=0.9)
        model = compiled(build(), optimizer)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
        fit(model, swap, *extra, recorder, validation_data=(X, Y))
        if extra:
            assert_population(weights(model))  # what is left after fit are averaged weights
    for w in record.seen["test_begin"]:
        assert_population(w)
    moved = np.abs(record.seen["test_begin"][0]["d1/0"] - record.seen["test_end"][0]["d1/0"]).max()
    assert moved > 1e-3  # the weights really were swapped
    # The statistics of the training run are back with its weights.
    np.testing.assert_allclose(
        record.seen["test_end"][0]["bn1/2"], plain.seen["test_end"][0]["bn1/2"], rtol=1e-6
    )
    for w in record.seen["epoch_end"]:
        assert_population(w)


# --- KeepFrozen ---------------------------------------------------------------------------------


def drifting() -> Any:
    model = build(policy="update")
    fl.freeze(model, until="d2")
    return compiled(model)


@pytest.mark.parametrize(("every", "when"), [("epoch", "in epoch 0"), (2, "epoch 0 at batch 1")])
def test_a_frozen_statistic_that_moves_is_named_with_the_number(every: Any, when: str) -> None:
    model = drifting()
    before = weights(model)["bn1/2"]
    record = Record()
    with pytest.raises(ModelError, match="'bn1' is frozen, but its moving_mean moved by") as raised:
        fit(model, fl.callbacks.KeepFrozen(every=every), record)
    assert when in str(raised.value)
    assert not record.seen.get("epoch_end")
    if every == "epoch":
        moved = np.abs(weights(model)["bn1/2"] - before).max()
        assert f"by up to {moved:.3g} " in str(raised.value)


def test_repair_puts_it_back(caplog: pytest.LogCaptureFixture) -> None:
    model, record = drifting(), Record()
    before = weights(model)
    keep = fl.callbacks.KeepFrozen("repair")
    fit(model, keep, record)
    for w in record.seen["epoch_end"]:
        for index in range(4):
            np.testing.assert_array_equal(w[f"bn1/{index}"], before[f"bn1/{index}"])
    assert keep.repaired == 4  # mean and variance, two epochs
    assert "'bn1' is frozen" in caplog.text
    assert not np.array_equal(weights(model)["bn2/2"], before["bn2/2"])


def test_what_is_frozen_and_stays_is_left_in_peace() -> None:
    model = build()
    fl.freeze(model, until="head")
    fit(
        compiled(model),
        fl.callbacks.KeepFrozen(every=1),
        fl.callbacks.GradualUnfreeze({1: "bn2"}),
    )
    with pytest.raises(ModelError):
        fit(drifting(), fl.callbacks.KeepFrozen(parameters=False))
    fit(drifting(), fl.callbacks.KeepFrozen(statistics=False))


def test_a_torch_module_in_a_frozen_wrapper_drifts(backend: str) -> None:
    if backend != "torch":
        pytest.skip("torch modules in Keras models need the torch backend")
    import torch

    wrapper = L.TorchModuleWrapper(torch.nn.BatchNorm1d(5), name="wrapped", output_shape=(None, 5))
    model = keras.Sequential([keras.Input((5,)), wrapper, L.Dense(3)])
    wrapper.trainable = False
    before = wrapper.module.running_mean.clone()
    with pytest.raises(ModelError, match="'wrapped' is frozen, but its running_mean moved"):
        fit(compiled(model), fl.callbacks.KeepFrozen())
    with torch.no_grad():
        wrapper.module.running_mean.copy_(before)
    fit(compiled(model), fl.callbacks.KeepFrozen("repair"))
    assert torch.equal(wrapper.module.running_mean, before)


# --- GradualUnfreeze ----------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(5e-3, weight_decay=0.1),
}


def recompile_keeping_state(model: Any) -> None:
    old = model.optimizer
    slots = {variable.path: keras.ops.convert_to_numpy(variable) for variable in old.variables}
    compiled(model, type(old).from_config(old.get_config()))
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        if variable.path in slots:
            variable.assign(slots[variable.path])


@pytest.mark.parametrize(("name", "steps"), [("momentum", STEPS[0]), ("adamw", STEPS[-1])])
def test_thawing_on_a_schedule_equals_recompiling_by_hand(name: str, steps: int) -> None:
    stock, ours = build(L.BatchNormalization), build()
    ours.set_weights(stock.get_weights())
    fl.freeze(stock, until="head")
    compiled(stock, OPTIMIZERS[name]())
    fit(stock, epochs=1)
    for since in ("bn2", "d1"):
        fl.unfreeze(stock, since=since)
        recompile_keeping_state(stock)
        fit(stock, epochs=1)

    fl.freeze(ours, until="head")
    compiled(ours, OPTIMIZERS[name](), steps_per_execution=steps)
    before, record = weights(ours), Record()
    CountTraces.traces = 0
    fit(ours, record, fl.callbacks.GradualUnfreeze({1: "bn2", 2: "d1"}), epochs=3)
    if BACKEND != "torch":
        # One trace for the step; TensorFlow unrolls several, and both trace a symbolic build.
        assert CountTraces.traces <= steps + 1
    for name_, expected in weights(stock).items():
        np.testing.assert_allclose(
            weights(ours)[name_], expected, atol=2e-6, rtol=1e-5, err_msg=name_
        )
    for epoch, held in enumerate([("d1", "bn1", "d2", "bn2"), ("d1", "bn1", "d2")]):
        for key, value in record.seen["epoch_end"][epoch].items():
            same = np.array_equal(value, before[key])
            assert same == (key.split("/")[0] in held), (epoch, key)
    assert int(ours.optimizer.iterations) == int(stock.optimizer.iterations) == 12


def test_loss_scaling_and_a_nested_model() -> None:
    inner = keras.Sequential(
        [keras.Input((5,)), L.Dense(4, name="d"), fl.layers.BatchNormalization(name="bn")],
        name="inner",
    )
    model = keras.Sequential([keras.Input((5,)), inner, L.Dense(3, name="head")])
    inner.trainable = False
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(1e-2))
    before = inner.get_weights()
    seen: list[Any] = []

    class Note(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model  # noqa: B018 - brings the weights back on JAX
            seen.append(inner.get_weights())

    fit(compiled(model, optimizer), fl.callbacks.GradualUnfreeze({1: "inner"}), Note())
    assert all(np.array_equal(a, b) for a, b in zip(seen[0], before, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(seen[1], before, strict=True))


@pytest.mark.parametrize("steps", STEPS)
def test_ramp_leads_from_stored_to_batch_statistics(steps: int) -> None:
    """Nothing is learnt (rate 0), so that the loss of every step follows from λ alone."""
    model = build()
    fl.freeze(model, until="head")
    compiled(model, keras.optimizers.SGD(0.0), steps_per_execution=steps)
    w = {name: value.astype("float64") for name, value in weights(model).items()}
    schedule = fl.callbacks.GradualUnfreeze({1: "bn2", 2: "bn1"}, ramp=6)
    history = fit(model, schedule, epochs=4).history
    wanted = []
    done = {"bn1": 0, "bn2": 0}
    for epoch in range(4):
        losses = []
        for start in range(0, 64, 16):
            thawed = {"bn1": epoch >= 2, "bn2": epoch >= 1}
            blend = {name: thawed[name] * min(done[name] / 6, 1.0) for name in done}
            logits, seen = by_hand(w, X[start : start + 16], blend)
            losses.append(cross_entropy(logits, Y[start : start + 16]))
            for name, values in seen.items():
                if thawed[name]:
                    done[name] += 1
                    w[f"{name}/2"] = 0.9 * w[f"{name}/2"] + 0.1 * values.mean(0)
                    w[f"{name}/3"] = 0.9 * w[f"{name}/3"] + 0.1 * values.var(0)
        wanted.append(float(np.concatenate(losses).mean()))
    assert history["loss"] == pytest.approx(wanted, rel=1e-5)
    assert len({round(loss, 3) for loss in wanted}) == 4
    for name, value in weights(model).items():
        np.testing.assert_allclose(value, w[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert all(len(model.get_layer(name).variables) == 8 for name in done)  # nothing is left


def test_a_layer_with_room_for_a_ramp_is_the_plain_one_bit_for_bit() -> None:
    pair = []
    for reserved in (False, True):
        model = compiled(build(), OPTIMIZERS["momentum"]())
        if reserved:
            model.get_layer("bn1").reserve_ramp()
        fit(model)
        pair.append(weights(model))
    for name, value in pair[0].items():
        np.testing.assert_array_equal(value, pair[1][name], err_msg=name)


def test_a_schedule_that_training_did_not_reach(tmp_path: Path) -> None:
    model = build()
    fl.freeze(model, until="head")
    compiled(model, OPTIMIZERS["momentum"]())
    file = tmp_path / "saved.keras"
    schedule = fl.callbacks.GradualUnfreeze({1: "bn2", 5: "d1"}, ramp=3)
    fit(model, schedule, keras.callbacks.ModelCheckpoint(str(file)))
    trainable = {layer.name: layer.trainable for layer in model.layers if layer.weights}
    assert trainable == {"d1": False, "bn1": False, "d2": False, "bn2": True, "head": True}
    before = weights(model)
    fit(model, epochs=1)  # without the callback: the flags mean what they say
    for name, value in weights(model).items():
        assert np.array_equal(value, before[name]) == (name[:2] in ("d1", "d2") or "bn1" in name)
    saved = keras.saving.load_model(file)  # written while the gate was in place
    np.testing.assert_array_equal(saved.get_weights()[0], before["d1/0"])


def test_averaged_weights_of_what_was_thawed_and_of_nothing_else() -> None:
    model = build()
    fl.freeze(model, until="head")
    compiled(model, keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5))
    before = weights(model)
    fit(model, fl.callbacks.GradualUnfreeze({1: "bn2", 9: "d1"}))
    moved = {
        name for name, value in weights(model).items() if not np.array_equal(value, before[name])
    }
    assert moved == {*(f"bn2/{index}" for index in range(4)), "head/0", "head/1"}


def test_resuming_thaws_what_was_due_before() -> None:
    model = build()
    fl.freeze(model, until="head")
    compiled(model)
    record = Record()
    fit(
        model,
        record,
        fl.callbacks.GradualUnfreeze({1: "bn2", 3: "d1"}, ramp=4),
        initial_epoch=2,
        epochs=3,
    )
    before, after = record.seen["epoch_begin"][0], weights(model)
    moved = {name.split("/")[0] for name in after if not np.array_equal(after[name], before[name])}
    assert moved == {"bn2", "head"}


def test_an_interrupted_fit_is_closed_by_hand_or_by_the_next_one() -> None:
    class Stop(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise KeyboardInterrupt

    model = build()
    fl.freeze(model, until="head")
    compiled(model, OPTIMIZERS["adamw"]())
    schedule = fl.callbacks.GradualUnfreeze({1: "d2"}, ramp=2)
    with pytest.raises(KeyboardInterrupt):
        fit(model, schedule, Stop())
    schedule.close()
    assert not model.get_layer("d2").trainable
    assert "apply" not in vars(model.optimizer)
    assert len(model.get_layer("bn2").variables) == 8
    before = weights(model)
    fit(model, epochs=1)
    assert np.array_equal(weights(model)["d2/0"], before["d2/0"])
    with pytest.raises(KeyboardInterrupt):
        fit(model, schedule, Stop())
    fit(model, schedule)
    assert not np.array_equal(weights(model)["d2/0"], before["d2/0"])


def test_what_cannot_be_thawed_live_is_refused_and_nothing_changes() -> None:
    model = build(L.BatchNormalization)
    fl.freeze(model, until="head")
    compiled(model)
    flags = [layer.trainable for layer in model.layers]
    with pytest.raises(ModelError, match=r"'bn2' cannot be thawed .* frostline.convert"):
        fit(model, fl.callbacks.GradualUnfreeze({1: "d2"}))
    with pytest.raises(ModelError, match="boundary 'dd' is not a layer"):
        fit(model, fl.callbacks.GradualUnfreeze({1: "dd"}))
    assert [layer.trainable for layer in model.layers] == flags
    with pytest.raises(ModelError, match="epochs, counted from 0"):
        fl.callbacks.GradualUnfreeze({"first": "d2"})  # type: ignore[dict-item]
    with pytest.raises(ModelError, match="ramp must be"):
        fl.callbacks.GradualUnfreeze({0: "d2"}, ramp=-1)


def test_a_failed_start_restores_flags_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    fl.freeze(model, until="head")
    compiled(model)
    fit(model, epochs=1)
    flags, optimizer = [layer.trainable for layer in model.layers], model.optimizer

    def fail(force: bool = False) -> None:
        if force:
            raise KeyboardInterrupt

    monkeypatch.setattr(model, "make_train_function", fail)
    with pytest.raises(KeyboardInterrupt):
        fit(model, fl.callbacks.GradualUnfreeze({1: "d2"}, ramp=2))
    assert [layer.trainable for layer in model.layers] == flags
    assert model.optimizer is optimizer
    assert len(model.get_layer("bn2").variables) == 8


def test_two_replicas() -> None:
    if BACKEND != "tensorflow":
        pytest.skip("tf.distribute is TensorFlow's")
    script = Path(__file__).parent / "distributed_callbacks.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
