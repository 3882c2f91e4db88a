"""The version presets against traces recorded from the real old releases and the author's fork.

``tests/golden`` holds copies of the arrays that are needed; ``manifest.json`` of the recording says
how they were made. Tolerances are those of the issue: losses and trained weights 1e-5, moving
statistics 1e-4 relative, predictions of both phases 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from frostline.layers import BatchNormalization
from frostline.layers.releases import RELEASES

GOLDEN = Path(__file__).parents[2] / "golden"
RECORDED = {
    "k212": "2.1.2",
    "k213": "2.1.3",
    "k215": "2.1.5",
    "k224": "2.2.4",
    "fork": "fork-2.2.4",
    "keras3": "3",
}
MICRO = ["k212", "k213", "k215", "fork", "keras3"]
MICRO_AXIS = {"2d": -1, "3d": -1, "4d_nhwc": -1, "4d_axis1": 1, "5d": -1}
FROZEN = {
    "S0": [],
    "S1": ["c1", "bn1", "r1", "c2", "bn2"],
    "S2": ["c1", "bn1", "r1", "c2", "bn2", "r2", "c3", "bn3", "r3", "gap"],
}
STATISTICS = ("moving_mean", "moving_variance")


def load(name: str) -> Mapping[str, Any]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def forward(model: Any, x: Any, training: bool) -> Any:
    """Forward pass whose updates are thrown away."""
    with keras.StatelessScope():
        return keras.ops.convert_to_numpy(model(x, training=training))


def close(received: Any, expected: Any, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(received), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("case", list(MICRO_AXIS))
@pytest.mark.parametrize("recorded", MICRO)
def test_single_layer(recorded: str, case: str, frozen: bool) -> None:
    trace = load(f"micro_bn_{recorded}")
    key = f"{case}/{'frozen' if frozen else 'trainable'}"
    layer = BatchNormalization(
        axis=MICRO_AXIS[case],
        momentum=float(trace["momentum"]) if "momentum" in trace else 0.9,
        epsilon=float(trace["epsilon"]) if "epsilon" in trace else 1e-3,
        version=RECORDED[recorded],
    )
    shape = trace[f"{key}/x0"].shape
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    layer.trainable = not frozen
    names = ("gamma", "beta", *STATISTICS)
    layer.set_weights([trace[f"{key}/init_{name}"] for name in names])
    for step in range(4):
        x = trace[f"{key}/x{step}"]
        for phase in (0, 1):
            expected = trace[f"{key}/y_phase{phase}_before{step}"]
            close(forward(model, x, bool(phase)), expected, atol=1e-5, rtol=1e-5)
        y = keras.ops.convert_to_numpy(model(x, training=True))
        close(np.mean(y.astype("float64") ** 2), trace[f"{key}/loss{step}"], rtol=1e-5)
        close(layer.moving_mean, trace[f"{key}/mm{step}"], rtol=1e-4, atol=1e-7)
        close(layer.moving_variance, trace[f"{key}/mv{step}"], rtol=1e-4, atol=1e-7)


def scenario_model(version: str, frozen: list[str], init: Mapping[str, Any]) -> keras.Model:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, padding="same", name="c1"),
            BatchNormalization(momentum=0.9, epsilon=1e-3, name="bn1", version=version),
            layers.ReLU(name="r1"),
            layers.Conv2D(8, 3, name="c2"),
            BatchNormalization(name="bn2", version=version),
            layers.ReLU(name="r2"),
            layers.SeparableConv2D(16, 3, name="c3"),
            BatchNormalization(name="bn3", version=version),
            layers.ReLU(name="r3"),
            layers.GlobalAveragePooling2D(name="gap"),
            layers.Dense(2, activation="softmax", name="head"),
        ]
    )
    for name in frozen:
        model.get_layer(name).trainable = False
    for layer in model.layers:
        for weight in layer.weights:
            weight.assign(init[f"init/{layer.name}/{stock_name(weight)}"])
    model.compile(keras.optimizers.SGD(0.05), "categorical_crossentropy", metrics=["accuracy"])
    return model


def stock_name(weight: Any) -> str:
    return weight.name.removeprefix("held_")


def check_epoch(model: keras.Model, trace: Mapping[str, Any], epoch: int, x: Any) -> None:
    for layer in model.layers:
        for weight in layer.weights:
            name = stock_name(weight)
            expected = trace[f"epoch_w/{layer.name}/{name}"][epoch]
            if name in STATISTICS:
                close(weight, expected, rtol=1e-4, atol=1e-6)
            else:
                close(weight, expected, atol=1e-5)
    for phase in (0, 1):
        batches = [forward(model, x[i : i + 16], bool(phase)) for i in range(0, 64, 16)]
        close(np.concatenate(batches), trace[f"epoch_pred_phase{phase}"][epoch], atol=1e-5)


@pytest.mark.parametrize("scenario", list(FROZEN))
@pytest.mark.parametrize("recorded", ["k212", "k215", "k224", "fork", "keras3"])
def test_training_run(recorded: str, scenario: str) -> None:
    """Five epochs of SGD: every step's loss and statistics, every epoch's weights and phases."""
    trace, shared = load(f"{recorded}_{scenario}"), load("shared")
    x, y = shared["x"], shared["y"]
    model = scenario_model(RECORDED[recorded], FROZEN[scenario], shared)
    check_epoch(model, trace, 0, x)
    for step in range(20):
        start = 16 * (step % 4)
        model.reset_metrics()
        loss = model.train_on_batch(x[start : start + 16], y[start : start + 16])[0]
        close(loss, trace["step_loss"][step], atol=1e-5)
        for name in ("bn1", "bn2", "bn3"):
            layer = model.get_layer(name)
            for statistic in STATISTICS:
                expected = trace[f"step_bn/{name}/{statistic}"][step]
                close(getattr(layer, statistic), expected, rtol=1e-4, atol=1e-6)
        if step % 4 == 3:
            check_epoch(model, trace, step // 4 + 1, x)


@pytest.mark.parametrize("version", sorted(RELEASES))
def test_every_release_follows_the_table(version: str) -> None:
    """DESIGN.md section 8, row by row, on one frozen layer and one training layer (4-D)."""
    x = np.random.default_rng(3).normal(2, 3, (4, 5, 5, 3)).astype("float32")
    n, epsilon, m = 100, 1e-3, 0.9
    mean, biased = x.mean((0, 1, 2), dtype="float64"), x.var((0, 1, 2), dtype="float64")
    numbers = tuple(int(part) for part in version.removeprefix("fork-").split("."))
    debiased = (2, 1, 3) <= numbers < (3,)
    factor = 1.0
    if debiased:
        factor = n / (n - 1)
    if (2, 1, 4) <= numbers < (3,):
        factor *= n / (n - 1 - epsilon)
    live = BatchNormalization(momentum=m, epsilon=epsilon, version=version)
    live(x, training=True)
    kept = 0.0 if debiased else m
    close(live.moving_mean, mean * (1 - kept), rtol=1e-5)
    close(live.moving_variance, kept + (1 - kept) * biased * factor, rtol=1e-5)

    frozen = BatchNormalization(momentum=m, epsilon=epsilon, version=version)
    frozen.trainable = False
    y = keras.ops.convert_to_numpy(frozen(x, training=True))
    stored = version.startswith(("fork", "3"))
    expected = x / np.sqrt(1 + epsilon) if stored else (x - mean) / np.sqrt(biased + epsilon)
    close(y, expected, atol=1e-5)
    moves = numbers <= (2, 1, 2)
    close(frozen.moving_mean, mean * (1 - m) if moves else np.zeros(3), rtol=1e-5)
