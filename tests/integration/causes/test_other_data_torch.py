"""Data or validation data that are not those of training, to networks of torch that are right."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import frostline as fl

datasets = pytest.importorskip("sklearn.datasets")

diagnose = functools.partial(fl.diagnose, verbose=0, batch_size=50, max_samples=500)


@functools.cache
def digits() -> tuple[Any, Any, Any, Any]:
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    x, y = x[order], torch.tensor(labels)[order]
    return x[:800], y[:800], x[800:1300], y[800:1300]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x).mean((2, 3)))


class Mapped(Net):
    """Takes labels, gives its own loss: no accuracy is known."""

    def forward(self, pixels: Any, labels: Any) -> Any:  # type: ignore[override]
        logits = super().forward(pixels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@functools.cache
def weights(size: int = 8, count: int = 800) -> dict[str, Any]:
    torch.manual_seed(2)
    net, epochs = Net(), 14
    x, y = (values[:count] for values in digits()[:2])
    x = resized(x, size)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, epochs * (count // 50))
    for _ in range(epochs):
        for rows in torch.randperm(count).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            rate.step()
    return net.state_dict()


def trained(kind: Any = Net, **settings: Any) -> Any:
    net = kind()
    net.load_state_dict(weights(**settings))
    return net


def resized(x: Any, size: int) -> Any:
    if size == x.shape[-1]:
        return x
    return F.interpolate(x, size=size, mode="bilinear", antialias=True)


def mapped(x: Any, y: Any) -> Any:
    return DataLoader(
        [{"pixels": one, "labels": other} for one, other in zip(x, y, strict=True)],  # type: ignore[arg-type]
        batch_size=50,
    )


def asked(x: Any, y: Any, **settings: Any) -> Any:
    return diagnose(trained(), (x, y), loss=F.cross_entropy, **settings)


# --- validation data ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [[3, 4, 5, 6, 7, 8, 9, 0, 1, 2], [0, 1, 9, 2, 3, 4, 5, 6, 8, 7]])
def test_validation_labels_in_another_order_are_no_overfitting(names: list[int]) -> None:
    x, y, other, truth = digits()
    first = asked(x, y, validation=(other, torch.tensor(names)[truth])).causes[0]
    assert (first.code, first.certainty) == ("LABEL_ORDER", "is")
    assert "validation" in first.message


@pytest.mark.parametrize("size", [12, 16, 6])
def test_validation_images_of_another_size_are_no_overfitting(size: int) -> None:
    x, y, other, truth = digits()
    first = asked(x, y, validation=(resized(other, size), truth)).causes[0]
    assert (first.code, first.certainty) == ("PREPROCESS", "is")
    assert f"{size}×{size}" in first.message


def test_labels_learned_by_heart_are_overfitting_still() -> None:
    x, _, other, truth = digits()
    torch.manual_seed(0)
    net, few = Net(), 60
    names = torch.randint(0, 10, (few,))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for epoch in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - epoch / 150)
        for rows in torch.randperm(few).split(20):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), names[rows]).backward()
            optimizer.step()
    report = diagnose(net, (x[:few], names), loss=F.cross_entropy, validation=(other, truth))
    assert report.causes[0].code == "OVERFIT", report
    assert report.causes[0].certainty == "may"  # at chance: or labels of other samples


def test_right_validation_data_are_not_blamed() -> None:
    x, y, other, truth = digits()
    (first,) = asked(x, y, validation=(other, truth)).causes
    assert (first.code, first.certainty) == ("NONE", "is")


@pytest.mark.parametrize("kind", ["mapping", "loss"])
def test_statistics_that_do_not_suit_validation_data_are_named_without_accuracy(kind: str) -> None:
    x, y, other, truth = digits()
    other = other * 0.4 + 0.3
    if kind == "mapping":
        report = diagnose(trained(Mapped), mapped(x, y), validation=mapped(other, truth))
    else:  # two inputs, whose moments nobody takes

        def step(net: Any, batch: Any) -> Any:
            return F.cross_entropy(net(batch["pixels"]), batch["labels"], reduction="none")

        given = {"data": mapped(x, y), "validation": mapped(other, truth)}
        report = diagnose(trained(), given["data"], step=step, validation=given["validation"])
    first = report.causes[0]
    assert (first.code, first.certainty) == ("DOMAIN_STATS", "may"), report
    assert "validation" in first.message
    assert "fl.recalibrate" in first.message
    assert not any(remedy.recommended for remedy in report.remedies)


def test_validation_that_loses_for_another_reason_is_named_without_accuracy() -> None:
    x, y, other, truth = digits()
    data, net = mapped(x, y), trained(Mapped)
    wrong = diagnose(net, data, validation=mapped(other, (truth + 1) % 10))
    assert [cause.code for cause in wrong.causes] == ["NONE"]
    assert "validation" in wrong.verdict
    assert "a loss alone cannot tell" in wrong.verdict
    assert wrong.causes[0].settle is not None
    right = diagnose(net, data, validation=mapped(x, y))
    assert "validation" not in right.verdict


def test_what_recalibrating_on_validation_data_restores_is_said() -> None:
    x, y, other, truth = digits()
    first = asked(x, y, validation=(other * 0.4 + 0.3, truth)).causes[0]
    assert first.code == "PREPROCESS"
    assert "fl.recalibrate" in first.message


# --- the data themselves --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turned", "name"),
    [
        (lambda x: 1 - x, "1-x"),
        (lambda x: 255 - 255 * x, "255-x"),
        (lambda x: -x, "-x"),
    ],
    ids=["1-x", "255-x", "-x"],
)
def test_inverted_images(turned: Callable[[Any], Any], name: str) -> None:
    x, y, *_ = digits()
    first_layer = {"1-x": 1.0, "255-x": 1 / 255, "-x": 1.0}[name]
    net = trained()
    with torch.no_grad():
        net.body[0].weight *= first_layer
    report = diagnose(net, (turned(x), y), loss=F.cross_entropy)
    first = report.causes[0]
    assert (first.code, first.evidence["trial"]) == ("PREPROCESS", name), report


@pytest.mark.parametrize(("own", "given"), [(8, 12), (8, 16), (8, 24), (16, 12), (24, 8), (8, 10)])
def test_images_of_another_size(own: int, given: int) -> None:
    x, y, *_ = digits()
    net = trained(size=own)
    report = diagnose(net, (resized(resized(x, own), given), y), loss=F.cross_entropy)
    if report.measurement.probes["inference"].accuracy > 0.9:
        pytest.skip("the network does well at this size")
    first = report.causes[0]
    assert first.code == "PREPROCESS", report
    assert "the size" in str(first.evidence["trial"])


def test_a_renaming_that_repairs_nothing_is_not_recommended() -> None:
    x, y, *_ = digits()
    torch.manual_seed(0)
    blocks = x[:, :, torch.randperm(8)][:, :, :, torch.randperm(8)]  # of other samples, to the net
    report = asked(blocks, y)
    assert not any(remedy.recommended and remedy.fix == "relabel" for remedy in report.remedies)


# --- the healthy ----------------------------------------------------------------------------------


def test_what_batch_statistics_lose_to_inference_is_no_alarm_without_accuracy() -> None:
    x, y, *_ = digits()
    (none,) = diagnose(trained(Mapped), mapped(x, y)).causes
    assert (none.code, none.certainty) == ("NONE", "is"), none
    assert "nothing that is known" not in none.message


def test_a_step_that_crops_in_training_is_not_said_to_be_bn() -> None:
    x, y, *_ = digits()
    x = resized(x, 12)

    def step(net: Any, batch: Any) -> Any:
        pixels, labels = batch
        if net.training:
            pixels = pixels[..., 2:10, 2:10]
        return F.cross_entropy(net(pixels), labels)

    torch.manual_seed(1)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    for epoch in range(10):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - epoch / 10)
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            step(net, (x[rows], y[rows])).backward()
            optimizer.step()
    data = DataLoader(torch.utils.data.TensorDataset(x[:400], y[:400]), batch_size=50)
    report = diagnose(net, data, step=step)
    assert "BN does something of its own" not in str(report)
