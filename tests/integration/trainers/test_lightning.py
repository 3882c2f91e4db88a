"""The Lightning callbacks in a real ``Trainer``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import frostline as fl

pl = pytest.importorskip("pytorch_lightning")
torch = pytest.importorskip("torch")
frost = pytest.importorskip("frostline.integrations.lightning")

pytestmark = pytest.mark.filterwarnings("ignore")
KEYS = {"bn/gap", "bn/shift_p50", "bn/shift_p90", "bn/shift_max", "bn/ratio_max", "bn/frozen"}


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.validated: list[Any] = []

    def training_step(self, batch: Any, _: int) -> Any:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, *_: Any) -> None:
        self.validated.append([self.net[index].running_mean.clone() for index in (1, 3)])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


def fit(module: Any, samples: Any, callbacks: list[Any], folder: Path, **settings: Any) -> Any:
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*samples), batch_size=16, shuffle=True
    )
    quiet = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=callbacks, default_root_dir=folder,
        num_sanity_val_steps=1, log_every_n_steps=1, **{"logger": False, **quiet, **settings},
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, loader, loader)
    return trainer


def test_validation_sees_exact_statistics_and_training_never_knows(
    network: Any, samples: Any, tmp_path: Path
) -> None:
    plain, watched = Module(copy.deepcopy(network)), Module(network)
    fit(plain, samples, [], tmp_path)
    fit(watched, samples, [frost.Recalibrate()], tmp_path)
    for name, value in plain.net.state_dict().items():
        assert torch.equal(value, watched.net.state_dict()[name]), name
    with torch.no_grad():
        inside = watched.net[0](samples[0])
    np.testing.assert_allclose(watched.validated[-1][0], inside.mean(0), atol=1e-5)
    assert not torch.allclose(plain.validated[-1][0], watched.validated[-1][0], atol=1e-2)


def test_statistics_come_back_where_validation_raises(
    network: Any, samples: Any, tmp_path: Path
) -> None:
    class Broken(Module):
        def validation_step(self, *_: Any) -> None:
            if not self.trainer.sanity_checking:
                raise RuntimeError("in the middle")

    plain, broken = Module(copy.deepcopy(network)), Broken(network)
    fit(plain, samples, [], tmp_path, max_steps=3, limit_val_batches=0)
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(broken, samples, [frost.Recalibrate()], tmp_path)
    for name, value in plain.net.state_dict().items():
        assert torch.equal(value, broken.net.state_dict()[name]), name


def test_numbers_reach_the_logger(network: Any, samples: Any, tmp_path: Path) -> None:
    loss = torch.nn.functional.cross_entropy
    monitor = frost.BatchNormMonitor(samples, loss=loss)
    logger = pl.loggers.CSVLogger(tmp_path)
    module = Module(network)
    trainer = fit(module, samples, [monitor], tmp_path, logger=logger, limit_val_batches=0)
    assert set(trainer.callback_metrics) >= KEYS
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert set(header.split(",")) >= KEYS
    parts = [(samples[0][:32], samples[1][:32]), (samples[0][32:], samples[1][32:])]

    def mean_loss(net: Any) -> float:  # by torch alone
        with torch.no_grad():
            return sum(float(loss(net(x), y)) * len(x) for x, y in parts) / 48

    gap = mean_loss(copy.deepcopy(module.net).train()) - mean_loss(copy.deepcopy(module.net).eval())
    assert float(trainer.callback_metrics["bn/gap"]) == pytest.approx(gap, abs=1e-6)


def test_a_layer_that_is_not_frozen_stops_the_run(
    network: Any, samples: Any, tmp_path: Path
) -> None:
    module = Module(network)
    fl.freeze(module.net, until="2")
    fit(module, samples, [frost.KeepFrozen("2")], tmp_path)
    assert torch.equal(module.net[1].running_mean, torch.zeros(4))
    fl.unfreeze(module.net)
    with pytest.raises(fl.NotFrozenError, match="'1'"):
        fit(module, samples, [frost.KeepFrozen("2")], tmp_path)
    fl.freeze(module.net, until="2")

    class Mover(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            module.net[1].running_mean += 1

    with pytest.raises(fl.NotFrozenError, match=r"'1': statistics drifted by"):
        fit(module, samples, [Mover(), frost.KeepFrozen()], tmp_path)


def test_two_networks_need_a_name(network: Any, samples: Any, tmp_path: Path) -> None:
    module = Module(network)
    module.other = copy.deepcopy(network)
    with pytest.raises(fl.ModelError, match=r"network='\.\.\.'"):
        fit(module, samples, [frost.KeepFrozen("2")], tmp_path)
    fl.freeze(module.net, until="2")
    fit(module, samples, [frost.KeepFrozen("2", network="net")], tmp_path)


class Logging(Module):
    def training_step(self, batch: Any, number: int) -> Any:
        loss = super().training_step(batch, number)
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss, "epoch": float(self.trainer.max_epochs)})
        return loss


def test_a_step_that_logs_is_asked_after_fit(network: Any, samples: Any, tmp_path: Path) -> None:
    """Outside of a loop ``self.log`` raises an error, once there is a trainer."""
    module = Logging(network)
    trainer = fit(module, samples, [], tmp_path)
    before, kept = dict(vars(module)), dict(trainer.callback_metrics)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples), batch_size=16)

    def step(model: Any, batch: Any) -> Any:
        return model.training_step(batch, 0)

    table = fl.phases(module, batches, step=step)
    assert np.isfinite([table["0"].loss, table["1"].loss]).all()
    assert fl.diagnose(module, batches, step=step, verbose=0).causes
    fl.recalibrate(module, batches, step=step).undo()
    assert vars(module).keys() == before.keys()
    assert module.trainer is trainer
    assert dict(trainer.callback_metrics) == kept
