"""Situations that users brought, on native torch modules: what must be said, and what not."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)
import torch
from torch import nn
from torch.nn import functional

import frostline as fl

datasets = pytest.importorskip("sklearn.datasets")

diagnose = functools.partial(
    fl.diagnose, loss=functional.cross_entropy, batch_size=50, max_samples=512, verbose=0
)


@functools.cache
def digits() -> tuple[Any, Any]:
    x, y = datasets.load_digits(return_X_y=True)
    images = torch.tensor(x[:800], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return images, torch.tensor(y[:800])


def network(seed: int, norm: Callable[[int], Any] = nn.BatchNorm2d) -> Any:
    torch.manual_seed(seed)

    def block(before: int, after: int, stride: int) -> list[Any]:
        return [nn.Conv2d(before, after, 3, stride, 1, bias=False), norm(after), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 1), *block(16, 16, 2), *block(16, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def sites(model: Any) -> list[Any]:
    return [module for module in model if isinstance(module, nn.BatchNorm2d)]


def fit(
    model: Any, x: Any, *, epochs: int, lr: float = 4e-3, each_step: Callable[[], Any] | None = None
) -> Any:
    """Steps of Adam whose size falls to zero, in shuffled batches."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    y, steps = digits()[1], epochs * (len(x) // 50)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            decay.step()
            if each_step is not None:
                each_step()
    return model


@functools.cache
def trained() -> Any:
    return fit(network(0), digits()[0], epochs=12)


def codes(report: Any) -> list[str]:
    return [cause.code for cause in report.causes]


# --- statistics of other weights ------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_old_statistics_behind_new_weights_are_not_of_batches_of_one_class(seed: int) -> None:
    """The last of three sites looked so by chance; all batches were shuffled."""
    x, y = digits()
    base = fit(network(seed), 1 - 0.6 * x, epochs=10)
    tuned = fit(copy.deepcopy(base), x, epochs=8)
    for mine, old in zip(sites(tuned), sites(base), strict=True):
        mine.running_mean, mine.running_var = old.running_mean, old.running_var
    report = diagnose(tuned, (x, y))
    assert codes(report) == ["STALE_AFTER_WEIGHT_EDIT"]
    assert report.causes[0].sites == ("1", "4", "7")


def test_statistics_of_batches_of_one_class_are_told_by_the_site_that_lacks_what_is_between() -> (
    None
):
    x, y = digits()
    model = copy.deepcopy(trained()).train()
    pure = [rows for label in range(10) for rows in torch.where(y == label)[0].split(40)]
    with torch.no_grad():
        for _ in range(10):
            for index in torch.randperm(len(pure)):
                model(x[pure[index]])
    assert codes(diagnose(model, (x, y))) == ["MIXED_SOURCES"]


# --- averages of everything -----------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.98, 0.99, 0.995])
def test_an_average_of_weights_and_statistics_lags_and_is_not_of_other_data(decay: float) -> None:
    x, y = digits()
    model = network(1)
    average = copy.deepcopy(model)

    def follow() -> None:
        for mine, own in zip(
            average.state_dict().values(), model.state_dict().values(), strict=True
        ):
            mine.lerp_(own, 1 - decay) if mine.is_floating_point() else mine.copy_(own)

    fit(model, x, epochs=10, each_step=follow)
    report = diagnose(average, (x, y), reference=model)
    assert codes(report) == ["EMA_LAG"]
    assert report.causes[0].sites == ("1", "4", "7")
    assert "averaged" in report.causes[0].message


# --- statistics that were converted ---------------------------------------------------------------


def scaled(factor: float) -> Callable[[Any], None]:
    def change(site: Any) -> None:
        site.running_mean.mul_(factor)
        site.running_var.mul_(factor)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scaled(999.98), "times those of the data"),
        (scaled(0.1), "times those of the data"),
        (lambda site: site.running_var.sqrt_(), "square root"),
        (lambda site: site.running_var.rsqrt_(), "inverse"),
        (lambda site: site.running_var.square_(), "square"),
    ],
    ids=["a thousand times", "a tenth", "deviations", "inverse deviations", "squares"],
)
def test_statistics_that_a_conversion_changed_at_every_site(change: Any, words: str) -> None:
    """Inputs reach the first site only: BN behind it takes their scale off again."""
    model = copy.deepcopy(trained())
    for site in sites(model):
        change(site)
    report = diagnose(model, digits())
    assert codes(report) == ["POISONED"]
    assert report.causes[0].sites == ("1", "4", "7")
    assert words in report.causes[0].message


def test_inputs_of_another_scale_are_no_conversion() -> None:
    x, y = digits()
    assert codes(diagnose(trained(), (255 * x, y)))[0] == "PREPROCESS"


# --- frozen layers that training used as they are -------------------------------------------------


class Frozen(nn.Module):
    """Gamma 1, beta 0, mean 0 and variance 1, all of them buffers, as detectors have it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
            self.register_buffer(name, torch.full((count,), value))
        self.register_buffer("running_var", torch.ones(count))

    def forward(self, x: Any) -> Any:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def test_frozen_layers_at_0_and_1_that_training_used_so_are_right() -> None:
    model = fit(network(0, Frozen), digits()[0], epochs=10)
    report = diagnose(model, digits())
    assert codes(report) == ["NONE"]
    noted = {(finding.severity, finding.fix) for finding in fl.lint(model).findings}
    assert noted == {("info", None)}


def test_stock_layers_that_were_frozen_when_new_are_right_where_training_used_them_so() -> None:
    model = network(0)
    fl.freeze(model, sites="all")
    fit(model, digits()[0], epochs=10)
    assert codes(diagnose(model, digits())) == ["NONE"]
    (finding,) = {finding.code: finding for finding in fl.lint(model).findings}.values()
    assert finding.message.endswith("recalibrate, unless it was trained so")


# --- state of its own -----------------------------------------------------------------------------


def test_observers_of_quantisation_that_move_at_inference_are_named() -> None:
    import warnings

    from torch.ao import quantization

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.stub = copy.deepcopy(trained()), quantization.QuantStub()

        def forward(self, x: Any) -> Any:
            return self.inner(self.stub(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Quantised().train()
        model.qconfig = quantization.get_default_qat_qconfig("x86")
        names = [[f"inner.{i + j}" for j in range(3)] for i in (0, 3, 6)]
        quantization.fuse_modules_qat(model, names, inplace=True)
        quantization.prepare_qat(model, inplace=True)
        fit(model, digits()[0], epochs=4, lr=1e-3)
        report = diagnose(model, digits())
        assert codes(report) == ["NONE"]
        assert "disable_observer" in report.verdict
        assert "fake_quant' (FusedMovingAvgObsFakeQuantize: " in report.verdict
        model.apply(quantization.disable_observer)
        assert "observer" not in diagnose(model, digits()).verdict


class Tracked(nn.Module):
    """Divides by an average of the largest value of each batch, at inference too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        self.largest.mul_(0.5).add_(0.5 * x.detach().abs().max())
        return 10 * x / self.largest


def test_a_module_that_moves_its_own_state_at_inference_is_named() -> None:
    model = nn.Sequential(*copy.deepcopy(trained())[:-1], Tracked(), nn.Linear(32, 10))
    fit(model, digits()[0], epochs=6)
    report = diagnose(model, digits())
    assert "KERNEL_BUG" not in codes(report)
    assert "'11' (Tracked) moves state of its own" in report.verdict


def test_a_step_that_calls_train_is_told_of() -> None:
    """It is asked in the mode of the phase, as a training step must be, and that is said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x, y = torch.randn(64, 8), torch.arange(64) % 2
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]

    def plain(asked: Any, batch: Any) -> Any:
        return functional.cross_entropy(asked(batch[0]), batch[1])

    def trains(asked: Any, batch: Any) -> Any:
        asked.train()
        return plain(asked, batch)

    for step, wanted in ((plain, 0), (trains, 1)):
        table = fl.phases(model, batches, step=step)
        assert sum("train()" in text for text in str(table).splitlines()) == wanted
        report = fl.diagnose(model, batches, step=step, verbose=0)
        assert sum("calls train()" in note for note in report.measurement.notes) == wanted
        assert model.training
