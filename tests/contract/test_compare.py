"""``fl.compare`` in both frameworks: against full trainings without a cache, and atomic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline.types import DataError, ModelError

LAYOUT = {"d0": "dense", "bn0": "norm", "a0": "tanh", "d1": "dense", "bn1": "norm", "a1": "tanh",
          "d2": "dense", "bn2": "norm", "head": "dense"}  # fmt: skip
#: What every layer of these networks takes and gives.
WIDTH = 4
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (40, WIDTH))
Y = (X[:, 0] > X[:, 1]).astype(np.int64) + (X[:, 2] > 1)
XV = RNG.normal(1, 2, (24, WIDTH))
YV = (XV[:, 0] > XV[:, 1]).astype(np.int64) + (XV[:, 2] > 1)
RATE, EPOCHS, SIZE = 0.05, 2, 8


class KerasTraining:
    """Trained by ``fit`` with SGD."""

    tolerance = 2e-5  # float32
    #: After an epoch, which all tests of a process share: each would compile it anew.
    weights: Any = None

    def made(self, framework: Any) -> Any:
        """A model with a frozen part, compiled."""
        model = framework.build(LAYOUT)
        if KerasTraining.weights is None:
            model.compile("sgd", framework.cross_entropy())
            model.fit(X.astype(np.float32), Y, epochs=1, verbose=0)
            KerasTraining.weights = model.get_weights()
        model.set_weights(KerasTraining.weights)
        fl.freeze(model, "d1")
        return self.ready(framework, model)

    def ready(self, framework: Any, model: Any) -> Any:
        """The model, compiled."""
        import keras

        model.compile(keras.optimizers.SGD(RATE, momentum=0.9), framework.cross_entropy())
        return model

    def ways(self) -> dict[str, Any]:
        """Arguments of ``compare`` that are the framework's."""
        return {}

    def by_hand(self, model: Any, seed: int, line: str) -> Any:
        """Losses of the validation samples after a training without a cache."""
        import keras

        spaces: dict[str, Any] = {"fl": fl, "model": model, "data": (X, Y)}
        exec(line, spaces)
        callbacks = [spaces["ramp"]] if "ramp" in spaces else []
        model.compile(model.optimizer, model.loss)
        keras.utils.set_random_seed(seed)
        model.fit(X.astype(np.float32), Y, epochs=EPOCHS, batch_size=SIZE, verbose=0,
                  callbacks=callbacks)  # fmt: skip
        outputs = keras.ops.convert_to_numpy(model(XV.astype(np.float32), training=False))
        return cross_entropy(outputs)

    def twin(self, model: Any) -> Any:
        """A model that is the same and shares nothing."""
        import keras

        twin = keras.models.clone_model(model)
        twin.set_weights(model.get_weights())
        for mine, theirs in zip(twin.layers, model.layers, strict=True):
            mine.trainable = theirs.trainable
        twin.compile(keras.optimizers.SGD(RATE, momentum=0.9), model.loss)
        return twin


class TorchTraining:
    """Trained by a loop, float64."""

    tolerance = 1e-10

    def made(self, framework: Any) -> Any:
        """See :meth:`KerasTraining.made`."""
        import torch

        model = self.ready(framework, framework.build(LAYOUT))
        with torch.no_grad():
            for rows in range(0, 40, 8):
                model(torch.as_tensor(X[rows : rows + 8]))
        fl.freeze(model, "d1")
        return model

    def ready(self, framework: Any, model: Any) -> Any:
        """The module in float64, in training."""
        del framework
        return model.double().train()

    def ways(self) -> dict[str, Any]:
        """See :meth:`KerasTraining.ways`."""
        import torch

        def sgd(parameters: Any) -> Any:
            return torch.optim.SGD(parameters, RATE, momentum=0.9)

        return {"loss": torch.nn.CrossEntropyLoss(), "optimizer": sgd}

    def by_hand(self, model: Any, seed: int, line: str) -> Any:
        """See :meth:`KerasTraining.by_hand`."""
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        line, _, each_step = line.partition("# before each step, counted from 1:\n")
        spaces: dict[str, Any] = {"fl": fl, "model": model, "data": (X, Y)}
        exec(line, spaces)
        model.train()
        rows = TensorDataset(torch.as_tensor(X), torch.as_tensor(Y))
        optimizer = self.ways()["optimizer"]([p for p in model.parameters() if p.requires_grad])
        torch.manual_seed(seed)
        loader, step = DataLoader(rows, SIZE, shuffle=True), 0
        for _ in range(EPOCHS):
            for x, y in loader:
                step += 1
                exec(each_step, {**spaces, "step": step})
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        with torch.no_grad():
            return cross_entropy(model.eval()(torch.as_tensor(XV)).numpy())

    def twin(self, model: Any) -> Any:
        """See :meth:`KerasTraining.twin`."""
        return copy.deepcopy(model)


def cross_entropy(logits: Any) -> Any:
    from scipy.special import log_softmax

    return -log_softmax(np.asarray(logits, np.float64), axis=1)[np.arange(len(YV)), YV]


@pytest.fixture
def training(framework: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path))
    return {"keras": KerasTraining, "torch": TorchTraining}[framework.name]()


def compared(model: Any, training: Any, **ways: Any) -> Any:
    options = {"epochs": EPOCHS, "batch_size": SIZE, "metric": "loss", "verbose": 0, "seeds": 1,
               "stop_early": False, **training.ways(), **ways}  # fmt: skip
    return fl.compare(model, (X, Y), validation=(XV, YV), **options)


@contextmanager
def unchanged(framework: Any, model: Any) -> Iterator[None]:
    """State, flags and classes are those of before, bit for bit."""
    before, kinds = framework.state(model), list(map(type, framework.top(model)))
    sites = fl.sites(model)
    yield
    after = framework.state(model)
    assert list(before) == list(after)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert kinds == list(map(type, framework.top(model)))
    assert tuple(sites) == tuple(fl.sites(model))


@pytest.mark.parametrize(
    ("names", "boundaries"),
    [
        (["all-bn-frozen", "statistics-frozen"], []),
        (["debiased", "recalibrated"], []),
        (["ramp", "momentum-by-steps"], []),
        (["thawed"], ["d2", "d0"]),
    ],
    ids=["frozen", "measured", "slow", "boundaries"],
)
def test_every_treatment_is_the_full_training_of_its_line(
    framework: Any, training: Any, names: Any, boundaries: Any
) -> None:
    model = training.made(framework)
    twins = training.twin(model)
    with unchanged(framework, model):
        found = compared(model, training, treatments=names, boundaries=boundaries)
    wanted = {"now", *names, *(f"from {each}" for each in boundaries)}
    assert {row.name for row in found.rows} | set(found.skipped) == wanted
    missing = {"thawed": "the same as 'now' here"} if "thawed" in names else {}
    if "ramp" in names and framework.name == "torch":
        missing["ramp"] = "a ramp is Frostline's Keras layer's; a torch module has none"
    assert found.skipped == missing
    assert found.samples == len(XV)
    assert found.cache_seconds > 0
    for row in found.rows:
        theirs = training.by_hand(training.twin(twins), 0, row.line)
        np.testing.assert_allclose(
            row.values[0], theirs, rtol=training.tolerance, atol=training.tolerance,
            err_msg=row.name,
        )  # fmt: skip
        assert row.loss == pytest.approx(row.values.mean())
    assert len({row.values.tobytes() for row in found.rows}) == len(found.rows)


def test_what_is_cached_is_trained_with_three_seeds(framework: Any, training: Any) -> None:
    model = training.made(framework)
    found = compared(model, training, treatments=["all-bn-frozen"], seeds=None, epochs=1)
    assert [row.values.shape for row in found.rows] == [(3, len(XV))] * 2  # cached: three seeds
    assert len({row.values[seed].tobytes() for row in found.rows for seed in range(3)}) == 6
    assert found.notes == ()


def test_a_treatment_with_nothing_to_cache_is_trained_all_the_same(
    framework: Any, training: Any, tmp_path: Path
) -> None:
    """Where a first BN trains, a frozen one behind it is nothing that could be stored."""
    layout = {"bn": "norm", **LAYOUT}
    model = training.ready(framework, framework.build(layout))
    names = ["all-bn-frozen", "statistics-frozen"]
    with unchanged(framework, model):
        found = compared(model, training, treatments=names, epochs=1, cache=tmp_path)
    assert {row.name for row in found.rows} == {"now", *names}


def test_the_model_is_as_it_was_after_any_exception(
    framework: Any, training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.verbs import treatments

    model = training.made(framework)

    def broken(setting: Any) -> Any:
        treatments.TREATMENTS["debiased"].prepare(setting)
        raise KeyboardInterrupt

    broken.__doc__ = "Broken."
    monkeypatch.setattr(treatments, "TREATMENTS", dict(treatments.TREATMENTS))
    treatments.treatment("broken")(broken)
    with unchanged(framework, model), pytest.raises(KeyboardInterrupt):
        compared(model, training, treatments=["broken"])
    with unchanged(framework, model), pytest.raises(DataError, match="metric"):
        compared(model, training, metric="kappa")


def test_what_cannot_win_any_more_is_given_up_and_said_so(
    framework: Any, training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.verbs import treatments

    model = training.made(framework)

    def spoilt(setting: Any) -> Any:
        """A frozen BN layer that is far off, and nothing behind it that could make up for it."""
        fl.freeze(setting.model, sites="all")
        framework.spoil(setting.model, "bn2", 1e3)
        for name in ("d2", "head"):
            layer = framework.child(setting.model, name)
            if framework.name == "keras":
                layer.trainable = False
            else:
                layer.requires_grad_(False)
        return treatments.Treated(line="# spoilt", state="spoilt")

    monkeypatch.setattr(treatments, "TREATMENTS", dict(treatments.TREATMENTS))
    treatments.treatment("spoilt")(spoilt)
    found = compared(model, training, treatments=["spoilt"], stop_early=True, epochs=3)
    row = found["spoilt"]
    assert row.stopped is not None
    assert row.stopped < 3
    assert row.seeds == 1
    assert len(row.curve) == row.stopped + 1
    assert "given up" in found.verdict
    assert "given up" in str(found)


WRONG: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "epochs": (lambda m, t: compared(m, t, epochs=0), DataError, "epochs=0"),
    "seeds": (lambda m, t: compared(m, t, seeds=10**11), DataError, "at most 1000"),
    "name": (lambda m, t: compared(m, t, treatments=["thaw"]), ModelError, "momentum-by-steps"),
    "generator": (
        lambda m, t: fl.compare(m, iter([(X, Y)]), validation=(XV, YV), **t.ways()),
        DataError, "more than once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_said_first(framework: Any, training: Any, case: str) -> None:
    run, kind, text = WRONG[case]
    model = training.made(framework)
    with unchanged(framework, model), pytest.raises(kind, match=text):
        run(model, training)


def test_everything_frozen_has_nothing_to_train(framework: Any, training: Any) -> None:
    model = training.made(framework)
    fl.freeze(model)
    with pytest.raises(ModelError, match="nothing to train"):
        compared(model, training)
