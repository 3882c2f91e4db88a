"""The Ultralytics callbacks in a real training of a very small classifier."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import frostline as fl

torch = pytest.importorskip("torch")
image = pytest.importorskip("PIL.Image")
frost = pytest.importorskip("frostline.integrations.ultralytics")

pytestmark = pytest.mark.filterwarnings("ignore")
NETWORK = """
nc: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""


@pytest.fixture
def yolo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.chdir(tmp_path)
    ultralytics = pytest.importorskip("ultralytics")
    if importlib.util.find_spec("polars") is None:  # it reads the results back for checkpoints
        from ultralytics.engine.trainer import BaseTrainer

        monkeypatch.setattr(BaseTrainer, "read_results_csv", lambda self: {})
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "net-cls.yaml").write_text(NETWORK)
    return ultralytics.YOLO(str(tmp_path / "net-cls.yaml"), task="classify")


def settings_of(folder: Path) -> dict[str, Any]:
    return {
        "data": str(folder / "data"), "epochs": 2, "imgsz": 32, "batch": 4, "workers": 0,
        "device": "cpu", "plots": False, "verbose": False, "project": str(folder / "runs"),
        "amp": False,
    }  # fmt: skip


def train(model: Any, folder: Path, **settings: Any) -> Any:
    model.train(**settings_of(folder), **settings)
    return model.trainer


def test_the_three_callbacks(yolo: Any, tmp_path: Path) -> None:
    x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    means: dict[str, list[Any]] = {"before": [], "during": [], "exact": [], "after": []}

    def note(when: str) -> Any:
        def noted(trainer: Any) -> None:
            network = trainer.ema.ema
            means[when].append(network.model[0].bn.running_mean.clone())
            if when == "during":
                with torch.no_grad():
                    means["exact"].append(network.model[0].conv(x).mean((0, 2, 3)))

        return noted

    frost.BatchNormMonitor(x).add_to(yolo)
    frost.KeepFrozen(until="model.1").add_to(yolo)
    yolo.add_callback("on_train_epoch_end", note("before"))
    frost.Recalibrate(x).add_to(yolo)
    yolo.add_callback("on_train_epoch_end", note("during"))
    yolo.add_callback("on_fit_epoch_end", note("after"))
    trainer = train(yolo, tmp_path, freeze=1)
    for before, during, exact, after in zip(*map(means.get, means), strict=False):
        torch.testing.assert_close(during, exact, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(before, during, atol=1e-3)
        assert torch.equal(before, after)
    assert len(means["during"]) == 2
    header = (Path(trainer.save_dir) / "results.csv").read_text().splitlines()[0]
    assert {"bn/shift_max", "bn/ratio_max", "bn/frozen"} <= {k.strip() for k in header.split(",")}


def test_a_layer_that_is_only_said_to_be_frozen_stops_the_training(
    yolo: Any, tmp_path: Path
) -> None:
    frost.KeepFrozen(until="model.1").add_to(yolo)
    with pytest.raises(fl.NotFrozenError, match="drifted"):
        train(yolo, tmp_path)  # nothing is frozen


def test_the_recipe_of_the_documentation(yolo: Any, recipe: Any, tmp_path: Path) -> None:
    x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exec(recipe("## Ultralytics"), {"yolo": yolo, "images": x, "settings": settings_of(tmp_path)})
    assert "bn/frozen" in (Path(yolo.trainer.save_dir) / "results.csv").read_text()
