"""The callbacks of the Hugging Face ``Trainer``, on a small ResNet of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import frostline as fl

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
torch = pytest.importorskip("torch")
frost = pytest.importorskip("frostline.integrations.transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
FIRST = "resnet/embedder/embedder/normalization"
KEYS = {"bn/gap", "bn/shift_p50", "bn/shift_p90", "bn/shift_max", "bn/ratio_max", "bn/frozen"}


@pytest.fixture
def images() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(16, 3, 16, 16, generator=generator) + 1
    return [
        {"pixel_values": image, "labels": torch.tensor(number % 2)}
        for number, image in enumerate(x)
    ]


def build() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=2, layer_type="basic"
        )
        return transformers.ResNetForImageClassification(config)


def trainer_of(model: Any, images: Any, folder: Path, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=8,
        eval_strategy="epoch", save_strategy="no", logging_strategy="epoch", disable_tqdm=True,
        use_cpu=True, seed=1, **{"report_to": "none", **settings},
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=images, eval_dataset=images)


def test_evaluation_sees_exact_statistics_and_training_never_knows(
    images: Any, tmp_path: Path
) -> None:
    plain = trainer_of(build(), images, tmp_path)
    plain.train()
    watched = trainer_of(build(), images, tmp_path)
    watched.add_callback(frost.Recalibrate(watched))
    watched.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    losses = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (plain, watched)
    ]
    assert losses[0][0] != pytest.approx(losses[1][0], abs=1e-4)
    # Once more by hand: what evaluate() says is what a network with exact statistics says.
    fl.recalibrate(plain.model, images_of(images))
    assert plain.evaluate()["eval_loss"] == pytest.approx(losses[1][-1], abs=1e-5)


def images_of(images: Any) -> Any:
    return torch.stack([image["pixel_values"] for image in images])


def test_statistics_come_back_where_evaluation_raises(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(build(), images, tmp_path)
    trainer.add_callback(frost.Recalibrate(trainer))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    changed: list[str] = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        now = trainer.model.state_dict()
        changed.extend(name for name in before if not torch.equal(now[name], before[name]))
        raise RuntimeError("in the middle")

    monkeypatch.setattr(trainer, "evaluation_loop", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.evaluate()
    assert len(changed) == 12  # mean and variance of six layers
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_numbers_reach_the_reports(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = trainer_of(build(), images, tmp_path, report_to="tensorboard")
    trainer.add_callback(frost.BatchNormMonitor(trainer, torch.utils.data.DataLoader(images, 8)))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "bn/gap" in entry]
    assert len(logged) == 2
    assert set(logged[0]) >= KEYS
    found = events.EventAccumulator(str(tmp_path / "logs"))
    found.Reload()
    assert {f"train/{key}" for key in KEYS} <= set(found.Tags()["scalars"])
    assert [e.value for e in found.Scalars("train/bn/gap")] == pytest.approx(
        [entry["bn/gap"] for entry in logged]
    )


def test_a_layer_that_moves_stops_the_training(images: Any, tmp_path: Path) -> None:
    model = build()
    fl.freeze(model, until="resnet.encoder.stages.1")
    trainer = trainer_of(model, images, tmp_path)
    trainer.add_callback(frost.KeepFrozen(until="resnet.encoder.stages.1"))
    trainer.train()
    assert float(model.resnet.embedder.embedder.normalization.running_mean.abs().max()) == 0.0

    model = build()
    model.resnet.requires_grad_(False)  # what people call frozen
    trainer = trainer_of(model, images, tmp_path)
    trainer.add_callback(frost.KeepFrozen(until="resnet.encoder.stages.1"))
    with pytest.raises(fl.NotFrozenError, match=FIRST):
        trainer.train()


def test_the_recipe_of_the_documentation(images: Any, recipe: Any, tmp_path: Path) -> None:
    trainer = trainer_of(build(), images, tmp_path)
    held = torch.utils.data.DataLoader(images, 8)
    exec(recipe("## Hugging Face"), {"fl": fl, "trainer": trainer, "held_batches": held})
    trainer.train()
    (last,) = [entry for entry in trainer.state.log_history if "bn/gap" in entry][-1:]
    assert last["bn/frozen"] == 3.0
