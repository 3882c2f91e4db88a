"""The recipe of docs/integrations.md for trackers: what is written is what was measured."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

import frostline as fl

pytestmark = pytest.mark.skipif(
    os.environ["KERAS_BACKEND"] != "torch", reason="torch has a process of its own"
)
DOCS = Path(__file__).parents[2] / "docs" / "integrations.md"


class Recorded:
    """What Weights & Biases is given; it gets it as well, without an account, where it is there."""

    def __init__(self, folder: Path) -> None:
        self.given: list[tuple[int, dict[str, float]]] = []
        self.run: Any = None
        if importlib.util.find_spec("wandb") is not None:
            wandb = importlib.import_module("wandb")
            settings = wandb.Settings(silent=True)
            self.run = wandb.init(mode="offline", dir=str(folder), settings=settings)

    def log(self, numbers: dict[str, float], *, step: int) -> None:
        self.given.append((step, numbers))
        if self.run is not None:
            self.run.log(numbers, step=step)

    def require_written(self, folder: Path) -> None:
        """Every number stands in the file of the run."""
        if self.run is None:
            return
        self.run.finish()
        importlib.import_module("wandb").teardown()  # ends the process that writes
        (written,) = (path.read_bytes() for path in folder.rglob("run-*.wandb"))
        for _, numbers in self.given:
            for name, value in numbers.items():
                assert name.encode() in written
                assert json.dumps(value).encode() in written, (name, value)


def test_a_loop_of_ones_own_logs_to_every_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    pytest.importorskip("tensorboard")
    # TensorBoard then takes its own file access instead of importing TensorFlow.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow = pytest.importorskip("mlflow")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

    torch.manual_seed(0)
    x = torch.randn(48, 5) * 2 + 1
    y = (x.mean(dim=1) > 1).long()
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))

    def train(net: Any, loader: Any) -> None:
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for part, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net.train()(part), labels).backward()
            optimizer.step()

    found = re.search(r"```python\n(.*?)```", DOCS.read_text().partition("## TensorBoard")[2], re.S)
    assert found is not None
    wandb, writer = Recorded(tmp_path), SummaryWriter(str(tmp_path / "board"))
    while mlflow.active_run() is not None:  # one that another test of this process began
        mlflow.end_run()
    mlflow.set_tracking_uri((tmp_path / "flow").as_uri())
    names: dict[str, Any] = {
        "fl": fl, "net": net, "x": x, "y": y, "loss": torch.nn.functional.cross_entropy,
        "loader": [(x[:24], y[:24]), (x[24:], y[24:])], "train": train, "epochs": 3,
        "wandb": wandb, "mlflow": mlflow, "writer": writer,
    }  # fmt: skip
    with warnings.catch_warnings(), mlflow.start_run():
        warnings.simplefilter("ignore")
        exec(found[1], names)
    writer.close()
    wandb.require_written(tmp_path)
    assert [step for step, _ in wandb.given] == [0, 1, 2]
    measured = {name: [given[name] for _, given in wandb.given] for name in wandb.given[0][1]}
    assert "bn/gap" in measured
    assert len(set(measured["bn/gap"])) == 3
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    folder = next((tmp_path / "flow").glob("*/*/metrics"))
    for name, values in measured.items():
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values)
        lines = (folder / name).read_text().splitlines()
        assert [float(line.split()[1]) for line in lines] == pytest.approx(values)
