"""Batches that the user made: mixed anew, they are not those that training saw."""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import frostline as fl

Batches = list[tuple[Any, Any]]
LOSS = nn.CrossEntropyLoss()


def sources(*, seed: int = 0) -> tuple[Any, Any]:
    """Two sources of 128 samples; in the second one the inputs are shifted and weaker."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (256,), generator=generator)
    centers = 1.5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(9))
    x = centers[y] + torch.randn(256, 8, generator=generator)
    x[128:] = 0.3 * x[128:] + 2
    return x, y


def pure(x: Any, y: Any) -> Batches:
    """Batches of one source each, in turns."""
    parts = [slice(s + k, s + k + 16) for k in range(0, 128, 16) for s in (0, 128)]
    return [(x[part], y[part]) for part in parts]


def mixed(x: Any, y: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=generator)


def trained(data: Any, *, epochs: int = 30, momentum: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(),
        nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
    return model


def codes(report: fl.Report) -> list[str]:
    return [cause.code for cause in report.causes]


def as_dict(items: Any) -> dict[str, Any]:
    return {"x": torch.stack([x for x, _ in items]), "y": torch.stack([y for _, y in items])}


def step(model: Any, batch: Any) -> Any:
    return LOSS(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("given", ["list", "generator", "loader", "mappings"])
def test_a_network_trained_on_pure_batches_mixes_sources(given: str) -> None:
    """Mixed anew, training mode looked nearly as bad as inference, and an edit was blamed."""
    x, y = sources()
    model = trained(pure(x, y))
    data: Any = pure(x, y)
    how: dict[str, Any] = {"loss": LOSS}
    order = [[s + k + i for i in range(16)] for k in range(0, 128, 16) for s in (0, 128)]
    if given == "generator":
        data = iter(data)
    elif given == "loader":
        data = DataLoader(TensorDataset(x, y), batch_sampler=order)
    elif given == "mappings":
        data = DataLoader(TensorDataset(x, y), batch_sampler=order, collate_fn=as_dict)
        how = {"step": step}
    report = fl.diagnose(model, data, verbose=0, **how)
    first = report.causes[0]
    assert first.code == "MIXED_SOURCES"
    assert first.share is not None
    assert first.share > 0.9
    assert "the batches as they come are of different sources" in first.message
    assert codes(report) == ["MIXED_SOURCES"]
    with torch.no_grad():  # what training saw
        seen = torch.stack([LOSS(model.train()(x), y) for x, y in pure(x, y)]).mean()
    assert report.measurement is not None
    assert report.measurement.probes["given"].loss == pytest.approx(float(seen), rel=1e-3)
    assert "batches as they come" in str(report)


def test_an_average_that_lags_beside_them_keeps_its_part() -> None:
    x, y = sources()
    model = trained(pure(x, y), epochs=8, momentum=0.003)
    report = fl.diagnose(model, pure(x, y), loss=LOSS, verbose=0)
    assert set(codes(report)) == {"EMA_LAG", "MIXED_SOURCES"}


def test_a_network_trained_on_mixed_batches_is_not_blamed_for_pure_ones() -> None:
    x, y = sources()
    model = trained(mixed(x, y))
    report = fl.diagnose(model, pure(x, y), loss=LOSS, verbose=0)
    assert "MIXED_SOURCES" not in codes(report)
    assert report.measurement is not None
    probes = report.measurement.probes
    assert probes["given"].loss > probes["given inference"].loss
    assert any("not alike" in note for note in report.measurement.notes)


def test_shuffled_batches_cost_a_pass_and_change_nothing() -> None:
    x, y = sources()
    model = trained(mixed(x, y))
    apart = fl.diagnose(model, mixed(x, y), loss=LOSS, batch_size=16, verbose=0)
    assert codes(apart) == ["NONE"]
    assert apart.measurement is not None
    assert apart.measurement.cost["given (passes)"] <= 1
    assert "given" not in apart.measurement.probes
    assert "given inference (passes)" not in apart.measurement.cost
    arrays = fl.diagnose(model, (x, y), loss=LOSS, batch_size=16, verbose=0)
    assert arrays.measurement is not None
    assert "given (passes)" not in arrays.measurement.cost
