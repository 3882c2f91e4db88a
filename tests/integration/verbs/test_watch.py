"""Watching a loop: plain torch, Lightning, and what a Keras model's flags and behaviour say."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline.types import ModelError

ON_TORCH = os.environ["KERAS_BACKEND"] == "torch"
native = pytest.mark.skipif(not ON_TORCH, reason="torch has a process of its own")
RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (48, 3, 6, 6)).astype("float32")
Y = RNG.integers(0, 3, 48)


def network(seed: int = 0) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


def train(model: Any, steps: int = 4) -> None:
    """A plain loop as people write it: ``train()`` at the start of each epoch."""
    import torch

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    model.train()
    for start in range(0, 12 * steps, 12):
        part = slice(start % 48, start % 48 + 12)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(torch.as_tensor(X[part])), torch.as_tensor(Y[part])
        )
        loss.backward()
        optimizer.step()


@native
def test_a_layer_that_is_replaced_meanwhile() -> None:
    from torch import nn

    model = network()
    with fl.watch(model) as watch:
        train(model)
        model[4] = nn.Identity()
        assert watch.check().drift.keys() == {"1"}


@native
def test_requires_grad_alone_is_seen_to_move() -> None:
    import torch

    model = network()
    for parameter in model[:3].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(fl.NotFrozenError, match=r"'1': its statistics move"):
        fl.assert_frozen(model, "3")
    before = model[1].running_mean.clone()
    with fl.watch(model, (X, Y), loss=torch.nn.CrossEntropyLoss()) as seen:
        train(model)
    (check,) = seen.checks
    # 0.1 of the data's mean is taken at each step, in units of the first deviation, which is 1.
    moved = float((model[1].running_mean - before).abs().max())
    assert check.drift["1"] >= moved * 0.99
    assert check.moved == ()  # nothing was frozen but gamma and beta, and those did not move
    assert check.gap is not None
    assert abs(check.gap) > 0.01
    assert set(check.scalars()) == {"bn/drift_max", "bn/frozen_moved", "bn/gap"}


@native
def test_locked_layers_pass_and_stay() -> None:
    import torch

    model = network()
    fl.freeze(model, until="3")
    fl.assert_frozen(model, "3", data=(X, Y))
    with pytest.raises(fl.NotFrozenError, match=r"1 of 2 BN layers are not frozen \('4'"):
        fl.assert_frozen(model)
    with fl.watch(model) as seen:
        for _ in range(2):
            train(model)
            assert seen.check().drift["1"] == 0
    assert seen.checks[-1].drift["4"] > 0.1
    assert seen.checks[-1].moved == ()
    with torch.no_grad():
        model[1].running_mean += 1  # behind Frostline's back
        model[1].weight += 1
    assert "frozen, but moved: '1'" in str(_checked(seen))


def _checked(seen: Any) -> Any:
    seen.check()
    return seen


@native
def test_eval_that_the_next_train_undoes_is_not_frozen() -> None:
    model = network().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model[1].eval()
    model[4].eval()
    with pytest.raises(fl.NotFrozenError, match="2 of 2 BN layers"):
        fl.assert_frozen(model)
    assert not model[1].training  # and asking changed nothing


@native
def test_a_boundary_may_have_no_weights() -> None:
    for until in ("2", 2, "3", "5"):
        model = network()
        fl.freeze(model, until=until)
        fl.assert_frozen(model, until=until)
        with pytest.raises(fl.NotFrozenError):
            fl.assert_frozen(network(), until=until)


@native
@pytest.mark.filterwarnings("ignore")
def test_lightning_loop(tmp_path: Any) -> None:
    """The recipe of the README: freeze before `fit`, recalibrate in one hook."""
    lightning = pytest.importorskip("pytorch_lightning")
    import torch

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 0.05, weight_decay=0.1)

        def on_train_end(self) -> None:
            fl.recalibrate(self.net, X)

    module = Module()
    fl.freeze(module.net, until="3")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.as_tensor(X), torch.as_tensor(Y)), batch_size=12
    )
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    kept = {name: value.clone() for name, value in module.net[:3].state_dict().items()}
    with fl.watch(module.net) as seen:
        trainer.fit(module, loader)
    assert seen.checks[-1].moved == ()
    for name, value in module.net[:3].state_dict().items():
        assert torch.equal(value, kept[name]), name
    with torch.no_grad():
        inside = module.net.eval()[:4](torch.as_tensor(X)).double()
    np.testing.assert_allclose(module.net[4].running_mean, inside.mean((0, 2, 3)), rtol=1e-4)


def test_keras_flags_and_behaviour(backend: str) -> None:
    import keras

    L = keras.layers
    x = RNG.normal(2, 1, (16, 4)).astype("float32")
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(3), L.BatchNormalization(name="bn"), L.Dense(2)]
    )
    with pytest.raises(fl.NotFrozenError, match="'bn': gamma and beta train"):
        fl.assert_frozen(model)
    fl.freeze(model, until=2)
    fl.assert_frozen(model, data=x)
    fl.convert(model, policy="batch")
    with pytest.raises(fl.NotFrozenError, match="'bn': training uses batch statistics"):
        fl.assert_frozen(model)
    with pytest.raises(ModelError, match="no BN layer before the boundary"):
        fl.assert_frozen(model, until=0)


def test_nothing_to_watch(backend: str) -> None:
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ModelError, match="nothing to watch"), fl.watch(model):
        pass


def fitted(**options: Any) -> Any:
    """A Keras model that has trained; ``options`` are those of ``compile``, or of its BN layer."""
    import keras

    affine = {name: options.pop(name) for name in ("center", "scale") if name in options}
    bn = keras.layers.BatchNormalization(name="bn", **affine)
    model = keras.Sequential([keras.Input((6,)), bn, keras.layers.Dense(1, name="head")])
    model.compile("sgd", "mse", **options)
    model.fit(*ROWS, verbose=0)
    return model


ROWS = X.reshape(-1, 6)[:64], np.ones((64, 1), "float32")


@pytest.mark.parametrize("affine", [True, False])
def test_flags_that_a_compiled_step_does_not_heed_are_not_frozen(affine: bool) -> None:
    model = fitted(center=affine, scale=affine)
    mean = np.array(model.get_layer("bn").get_weights()[-2])
    model.get_layer("bn").trainable = False
    heeded = os.environ["KERAS_BACKEND"] != "tensorflow"  # JAX raises at the next step
    for data in (None, ROWS):
        if heeded:
            fl.assert_frozen(model, "head", data=data)
            continue
        with pytest.raises(fl.NotFrozenError, match=r"'bn': frozen after .* model.compile\("):
            fl.assert_frozen(model, "head", data=data)
    if not heeded:
        assert "call compile() again" in str(fl.freeze(model, "head"))
        model.fit(*ROWS, verbose=0)
        assert not np.array_equal(mean, model.get_layer("bn").get_weights()[-2])
    model.compile("sgd", "mse")
    fl.assert_frozen(model, "head")
    assert fl.freeze(model, "head").notes == ()


#: What makes the step another one; Keras on torch takes one step at a time.
STEPS = [{}, {"run_eagerly": True}, *([] if ON_TORCH else [{"steps_per_execution": 2}])]


@pytest.mark.parametrize("options", STEPS)
def test_flags_that_the_next_step_heeds_are_frozen(options: dict[str, Any]) -> None:
    model = fitted(**options)
    model.get_layer("bn").trainable = False
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        model.compile("sgd", "mse", **options)
    elif not options.get("run_eagerly"):
        model.compile(model.optimizer, "mse", **options)  # which knows gamma still
    before = model.get_layer("bn").get_weights()
    for _ in range(2):
        fl.assert_frozen(model, "head")
        assert fl.lint(model, select="FL107").clean
        model.fit(*ROWS, verbose=0)
    for old, new in zip(before, model.get_layer("bn").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
