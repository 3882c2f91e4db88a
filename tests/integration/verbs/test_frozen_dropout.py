"""``freeze(dropout=True)``: a frozen part computes in training what it computes at inference.

The oracle is the part itself at inference; for files, plain Keras and torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline import cli
from frostline.adapters import adapter_of
from frostline.types import ModelError

L = keras.layers
X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


def mlp() -> Any:
    return keras.Sequential(
        [keras.Input((4,)), L.Dense(16, name="d1"), L.BatchNormalization(name="bn"),
         L.Dropout(0.5, seed=3, name="drop1"), L.Dense(16, name="d2"),
         L.Dropout(0.25, name="drop2"), L.Dense(2, name="head")]
    )  # fmt: skip


def sequences(layer: Any) -> Any:
    return keras.Sequential([keras.Input((4, 1)), L.Dense(4), layer, L.Dense(2, name="head")])


class DropPath(L.Layer):  # type: ignore[misc]
    """The usual layer of many repositories."""

    def __init__(self, drop_prob: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.drop_prob = drop_prob

    def call(self, x: Any, training: Any = None) -> Any:
        if not training or self.drop_prob == 0:
            return x
        return keras.random.dropout(x, self.drop_prob, noise_shape=(None, 1, 1), seed=1)


class SecretDropout(L.Layer):  # type: ignore[misc]
    def call(self, x: Any, training: Any = None) -> Any:
        return keras.random.dropout(x, 0.5, seed=1) if training else x


class Attending(L.Layer):  # type: ignore[misc]
    """Attention calls itself with one tensor here."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.attention = L.MultiHeadAttention(2, 3, dropout=0.5)

    def build(self, shape: Any) -> None:
        self.attention.build(shape, shape)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.attention(x, x, training=training)


def phases(model: Any, x: Any = X) -> tuple[Any, Any]:
    """Outputs before the head in training and at inference."""
    part = keras.Sequential([keras.Input(x.shape[1:]), *model.layers[:-1]])
    return tuple(
        keras.ops.convert_to_numpy(part(x, training=training)) for training in (True, False)
    )


def test_the_frozen_part_computes_what_it_computes_at_inference() -> None:
    model = mlp()
    fl.freeze(model, "head")
    training, inference = phases(model)
    assert not np.allclose(training, inference)  # frozen, and dropout goes on acting
    change = fl.freeze(model, "head", dropout=True)
    np.testing.assert_array_equal(*phases(model))
    assert "the dropout of 2 layers before 'head'" in change.text
    assert "unfreeze before saving" in change.notes[-1]


def test_only_the_frozen_part() -> None:
    model = mlp()
    fl.freeze(model, "d2", dropout=True)
    assert (model.get_layer("drop1").rate, model.get_layer("drop2").rate) == (0, 0.25)


@pytest.mark.parametrize("back", ["undo", "unfreeze", "exception"])
def test_all_comes_back(back: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = model.get_config(), [dict(vars(layer)) for layer in model.layers]
    if back == "exception":
        from frostline.adapters.keras import edit as keras_edit

        def fails(*_: Any) -> bool:
            assert model.get_layer("drop1").rate == 0
            raise KeyboardInterrupt

        monkeypatch.setattr(keras_edit, "set_place", fails)
        with pytest.raises(KeyboardInterrupt):
            fl.freeze(model, "head", dropout=True)
    else:
        first = fl.freeze(model, "head", dropout=True)
        again = fl.freeze(model, dropout=True)  # nothing is left to turn off, nothing is forgotten
        assert "the dropout of 0 layers" in again.text
        if back == "undo":
            again.undo()
            first.undo()
        else:
            assert "the dropout of 2 layers" in fl.unfreeze(model).text
    assert model.get_config() == before[0]
    now = [set(vars(layer)) for layer in model.layers]
    assert now == [set(attributes) for attributes in before[1]]
    training, inference = phases(model)
    assert not np.allclose(training, inference)


def test_thawed_from_a_boundary_on_and_by_hand() -> None:
    model = mlp()
    fl.freeze(model, dropout=True)
    fl.unfreeze(model, "d2", dropout=False)
    assert model.get_layer("drop2").rate == 0
    change = fl.unfreeze(model, "d2")
    assert (model.get_layer("drop1").rate, model.get_layer("drop2").rate) == (0, 0.25)
    change.undo()
    assert model.get_layer("drop2").rate == 0
    model.get_layer("drop2").rate = 0.125  # by the user, meanwhile
    fl.unfreeze(model)
    assert (model.get_layer("drop1").rate, model.get_layer("drop2").rate) == (0.5, 0.125)


def test_dropout_alone() -> None:
    model = mlp()
    change = fl.freeze(model, params=False, statistics=False, dropout=True)
    assert change.text == "froze the dropout of 2 layers of the whole model"
    assert all(layer.trainable for layer in model.layers)


@pytest.mark.once
@pytest.mark.parametrize(
    "make",
    [
        lambda: L.LSTM(5, return_sequences=True, dropout=0.5),
        lambda: L.GRU(5, return_sequences=True, recurrent_dropout=0.5),
        lambda: L.Bidirectional(L.SimpleRNN(5, return_sequences=True, dropout=0.5)),
        lambda: Attending(),
        lambda: L.SpatialDropout1D(0.5),
        lambda: L.GaussianDropout(0.5),
        lambda: L.AlphaDropout(0.5),
        lambda: DropPath(0.5),
    ],
    ids=["lstm", "gru", "bidirectional", "attention", "spatial", "gaussian", "alpha", "own"],
)
def test_kinds_of_layers(make: Callable[[], Any]) -> None:
    x = X[..., None]
    model = sequences(make())
    config = model.layers[1].get_config()
    fl.freeze(model, "head", dropout=True)
    np.testing.assert_allclose(*phases(model, x), rtol=1e-5, atol=1e-6)
    assert adapter_of(model).noise_layers() == {}
    fl.unfreeze(model)
    assert model.layers[1].get_config() == config
    assert len(adapter_of(model).noise_layers()) > 0


@pytest.mark.once
def test_a_rate_that_cannot_be_told_is_refused_and_nothing_changes() -> None:
    model = keras.Sequential(
        [keras.Input((4,)), L.Dropout(0.5), SecretDropout(name="secret"), L.Dense(2, name="head")]
    )
    with pytest.raises(ModelError, match=r"'secret' drops values.*SecretDropout"):
        fl.freeze(model, "head", dropout=True)
    assert model.layers[0].rate == 0.5
    assert model.layers[0].trainable


@pytest.mark.once
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:.*HDF5 file")
def test_a_file_has_dropout_off_and_loads_in_plain_keras(suffix: str, tmp_path: Path) -> None:
    model = mlp()
    fl.freeze(model, "head", dropout=True)
    model.save(tmp_path / f"model{suffix}")
    loaded = keras.saving.load_model(tmp_path / f"model{suffix}")
    assert [layer.rate for layer in loaded.layers if isinstance(layer, L.Dropout)] == [0, 0]
    np.testing.assert_array_equal(*phases(loaded))
    np.testing.assert_array_equal(phases(loaded)[0], phases(model)[0])
    assert "dropout" not in fl.unfreeze(loaded).text  # the file does not know the rates


@pytest.mark.once
def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.keras", tmp_path / "out.keras"
    mlp().save(source)
    words = ["freeze", str(source), "--until", "d2", "--dropout", "-o", str(target)]
    assert cli.main(words) == 0
    assert "the dropout of 1 layers before 'd2'" in capsys.readouterr().out
    loaded = keras.saving.load_model(target)
    assert (loaded.get_layer("drop1").rate, loaded.get_layer("drop2").rate) == (0, 0.25)


def test_frozen_dropout_no_longer_ends_the_prefix() -> None:
    model = mlp()
    fl.freeze(model, "head")
    assert fl.split(model).frontier[0].path == "bn"
    fl.freeze(model, "head", dropout=True)
    assert fl.split(model).frontier[0].path in ("d2", "drop2")  # the same values


def test_a_compiled_step_follows_when_compiled_again() -> None:
    model = mlp()
    model.compile("sgd", "mse")
    change = fl.freeze(model, dropout=True)
    assert "change of flags and rates" in change.notes[0]
    model.compile("sgd", "mse")
    y = model.predict(X, verbose=0)
    assert model.train_on_batch(X, y) == pytest.approx(0, abs=1e-12)  # the canary of a true freeze


# --- torch ----------------------------------------------------------------------------------------


@pytest.fixture
def torch(backend: str) -> Any:
    if backend != "torch":
        pytest.skip("torch has a process of its own")
    return pytest.importorskip("torch")


def network(torch: Any) -> Any:
    nn = torch.nn

    class Network(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(nn.Conv1d(1, 4, 1), nn.BatchNorm1d(4), nn.Dropout1d(0.5))
            self.rnn = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
            self.last = nn.Dropout(0.25)
            self.head = nn.Linear(4, 2)

        def part(self, x: Any) -> Any:
            x = self.conv(x.unsqueeze(1)).transpose(1, 2)
            return self.last(self.encoder(self.rnn(x)[0]))

        def forward(self, x: Any) -> Any:
            return self.head(self.part(x))

    return Network()


def test_torch_survives_train_and_copies(torch: Any) -> None:
    model, x = network(torch), torch.tensor(X)
    shown = repr(model)
    change = fl.freeze(model, "head", dropout=True)
    for each in (model, copy.deepcopy(model)):
        inference = each.eval().part(x)
        torch.testing.assert_close(each.train().part(x), inference)
    assert "the dropout of 7 layers before 'head'" in change.text
    assert adapter_of(model).noise_layers() == {}
    fl.unfreeze(model)
    assert repr(model) == shown
    fl.freeze(model, dropout=True).undo()
    change.undo()
    assert repr(model) == shown
    assert not any("_frostline_rates" in vars(module) for module in model.modules())


def test_torch_refuses_what_it_cannot_tell(torch: Any) -> None:
    class SecretDropout(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return torch.nn.functional.dropout(x, 0.5, self.training)

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), SecretDropout(), torch.nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"'1' drops values.*SecretDropout"):
        fl.freeze(model, dropout=True)
    assert model[0].weight.requires_grad


def test_torch_modules_in_a_keras_model(torch: Any) -> None:
    wrapped = L.TorchModuleWrapper(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    )
    model = keras.Sequential([keras.Input((4,)), wrapped, L.Dense(2, name="head")])
    fl.freeze(model, "head", dropout=True)
    np.testing.assert_array_equal(*phases(model))
    fl.unfreeze(model)
    assert wrapped.module[1].p == 0.5
