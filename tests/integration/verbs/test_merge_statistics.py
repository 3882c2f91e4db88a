"""Statistics of replicas merged: against the pooled data, in every kind of file, and refusals."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline import cli


def state(mean: Any, variance: Any, **more: Any) -> dict[str, Any]:
    return {"bn.running_mean": np.asarray(mean), "bn.running_var": np.asarray(variance), **more}


A, B = state([0.0, 1.0], [1.0, 2.0]), state([2.0, 1.0], [1.0, 4.0])


@pytest.mark.once
def test_the_variance_between_replicas_is_in_it() -> None:
    merged = fl.merge_statistics([A, B])
    assert merged["bn.running_mean"].tolist() == [1.0, 1.0]
    assert merged["bn.running_var"].tolist() == [2.0, 3.0]
    weighted = fl.merge_statistics([A, B], [3, 1])
    assert weighted["bn.running_mean"].tolist() == [0.5, 1.0]
    assert weighted["bn.running_var"].tolist() == [1.75, 2.5]
    assert weighted.shares == (0.75, 0.25)


@pytest.mark.once
@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "a list of models"),
        ("a.pt", "a list of models"),
        ([A, {"weight": np.ones(2)}], "number 2 of 2 holds no BN statistics"),
        ([A, {**B, "head.running_mean": 0, "head.running_var": 0}], "number 2 has .* of 'head'"),
        ([A, state(np.zeros(3), np.ones(3))], r"'bn' has shape \(2,\) in number 1 and \(3,\)"),
        ([A, state([0, np.nan], [1, 1])], "'bn.running_mean' of number 2 has NaN"),
        ([A, state([0, 0], [1, -1])], "'bn' of number 2 has a negative variance"),
        ([A, Path("b.ckpt")], r"read from \.pt"),
        ([A, Path("b.pt")], "b.pt"),
    ],
)
def test_what_cannot_be_merged_is_named(states: Any, message: str) -> None:
    with pytest.raises(fl.ModelError, match=message):
        fl.merge_statistics(states)


def test_a_diagnosis_offers_the_merge_and_knows_its_effect() -> None:
    import keras

    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(128, 4)).astype("float32")
    x[64:] = 2 * x[64:] + 3  # what the other replica saw
    layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(name="bn")]
    layers += [keras.layers.ReLU(), keras.layers.Dense(3, activation="softmax")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.layers[-1].set_weights([10 * each for each in model.layers[-1].get_weights()])
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    fl.recalibrate(model, x)
    y = np.argmax(model.predict(x, verbose=0), axis=-1)  # right with the statistics of all data
    fl.recalibrate(model, x[:64])
    fl.recalibrate(other, x[64:])
    model.compile("sgd", "sparse_categorical_crossentropy")
    report = fl.diagnose(model, (x, y), reference=other, verbose=0)
    assert "RANK_DIVERGENCE" in [cause.code for cause in report.causes], report
    found = next(each for each in report.remedies if each.fix == "merge statistics")
    assert found.python == "fl.merge_statistics([model, reference]).load_into(model)"
    assert found.recommended, report
    change = fl.merge_statistics([model, other]).load_into(model)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(found.after["loss"], rel=1e-4)
    change.undo()
    assert model.evaluate(x, y, verbose=0) == pytest.approx(found.before["loss"], rel=1e-4)


def test_keras_models_and_their_files(tmp_path: Path, capsys: Any) -> None:
    import keras

    def build(seed: int) -> Any:
        model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn")])
        rng = np.random.default_rng(seed)
        ones = [np.ones(3), np.zeros(3)]
        model.layers[0].set_weights([*ones, rng.normal(size=3), rng.uniform(1, 2, 3)])
        return model

    models = [build(0), build(1)]
    means, variances = (
        np.stack([np.asarray(m.layers[0].get_weights()[i], "float64") for m in models])
        for i in (2, 3)
    )
    mean = means.mean(0)
    variance = (variances + (means - mean) ** 2).mean(0)
    target = build(2)
    before = [w.copy() for w in target.get_weights()]
    change = fl.merge_statistics(models).load_into(target)
    np.testing.assert_allclose(target.layers[0].get_weights()[2], mean, rtol=1e-6)
    np.testing.assert_allclose(target.layers[0].get_weights()[3], variance, rtol=1e-6)
    change.undo()
    for old, new in zip(before, target.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    files = [tmp_path / f"{i}.keras" for i in range(2)]
    for model, file in zip(models, files, strict=True):
        model.save(file)
    read = fl.merge_statistics(files)
    np.testing.assert_allclose(read["bn/moving_mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(read["bn/moving_variance"], variance, rtol=1e-6)
    out = tmp_path / "merged.keras"
    assert cli.main(["merge-statistics", *map(str, files), "-o", str(out)]) == 0
    assert "1 site from 2 replicas" in capsys.readouterr().out
    written = keras.saving.load_model(out).layers[0].get_weights()
    np.testing.assert_allclose(written[2], mean, rtol=1e-6)
    np.testing.assert_allclose(written[3], variance, rtol=1e-6)


if os.environ["KERAS_BACKEND"] == "torch":
    import torch
    from torch import nn

    def net() -> Any:
        return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))

    def replicas() -> list[Any]:
        """The same network after batches of its own, with a cumulative average."""
        torch.manual_seed(0)
        made = []
        for rank in range(3):
            model = net()
            if made:
                model.load_state_dict(made[0].state_dict())
                model[1].reset_running_stats()
            model[1].momentum = None
            model(torch.randn(4 * (rank + 1), 2, 5, 5) + rank)
            made.append(model)
        return made

    def test_replicas_that_saw_a_batch_each_merge_to_all_their_data() -> None:
        models = replicas()
        torch.manual_seed(0)
        net()
        seen: list[Any] = []
        torch.manual_seed(0)
        for rank in range(3):  # the same draws again
            net()
            seen.append(torch.randn(4 * (rank + 1), 2, 5, 5) + rank)
        with torch.no_grad():
            pooled = models[0][0](torch.cat(seen)).double().transpose(0, 1).reshape(3, -1)
        for count, model in zip((100, 200, 300), models, strict=True):
            model[1].running_var.mul_((count - 1) / count)  # biased, as pooled ones are
        merged = fl.merge_statistics(models, [1, 2, 3])
        assert merged["1.running_mean"].dtype == torch.float32
        torch.testing.assert_close(merged["1.running_mean"].double(), pooled.mean(1))
        torch.testing.assert_close(
            merged["1.running_var"].double(), pooled.var(1, unbiased=False), rtol=1e-5, atol=1e-6
        )
        target = net()
        missing = target.load_state_dict(merged, strict=False)
        assert not missing.unexpected_keys
        assert int(target[1].num_batches_tracked) == 1
        again = net()
        fl.merge_statistics([nn.DataParallel(m) for m in models], [1, 2, 3]).load_into(again)
        assert torch.equal(again[1].running_var, target[1].running_var)
        assert torch.equal(again[1].running_mean, target[1].running_mean)

    def test_states_of_ddp_and_half_precision_keep_their_type() -> None:
        first, second = (m.half().state_dict() for m in replicas()[:2])
        merged = fl.merge_statistics([first, {f"module.{k}": v for k, v in second.items()}])
        assert merged["1.running_var"].dtype == torch.float16

    def test_one_layer_that_is_the_whole_model() -> None:
        layer, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        layer.running_mean.fill_(2.0)
        fl.merge_statistics([layer, other]).load_into(other)
        assert other.running_mean.tolist() == [1.0, 1.0]
        assert other.running_var.tolist() == [2.0, 2.0]

    def test_another_model_is_refused_unchanged() -> None:
        other = nn.Sequential(nn.Identity(), nn.BatchNorm2d(4))
        with pytest.raises(fl.ModelError, match=r"'1' has 4 channels.*3 channels"):
            fl.merge_statistics(replicas()).load_into(other)
        with pytest.raises(fl.ModelError, match="'1' is not in this model"):
            fl.merge_statistics(replicas()).load_into(nn.Sequential(nn.BatchNorm2d(3)))
        assert torch.equal(other[1].running_mean, torch.zeros(4))

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_command_writes_the_first_state_with_merged_statistics(
        suffix: str, tmp_path: Path, capsys: Any
    ) -> None:
        models = replicas()
        files = [tmp_path / f"{i}{suffix}" for i in range(3)]
        out = tmp_path / f"out{suffix}"
        if suffix == ".pt":
            load: Any = torch.load
            for model, file in zip(models, files, strict=True):
                torch.save(model.state_dict(), file)
        else:
            library = pytest.importorskip("safetensors.torch")
            load = library.load_file
            for model, file in zip(models, files, strict=True):
                library.save_file(model.state_dict(), file)
        words = ["merge-statistics", *map(str, files), "--weights", "1,2,3", "-o", str(out)]
        assert cli.main(words) == 0
        shown = capsys.readouterr()
        assert "1 site from 3 replicas" in shown.out
        assert "note" not in shown.out
        written = load(out)
        assert torch.equal(written["0.weight"], models[0][0].weight)
        wanted = fl.merge_statistics(models, [1, 2, 3])
        read = fl.merge_statistics(files, [1, 2, 3])
        assert torch.equal(read["1.running_var"], wanted["1.running_var"])
        assert torch.equal(written["1.running_var"], wanted["1.running_var"])
        assert cli.main(words) == 2
        assert "exists" in capsys.readouterr().err
        assert cli.main(["merge-statistics", str(files[0]), "-o", str(tmp_path / "x.pt")]) == 2
        assert "two or more" in capsys.readouterr().err

    def test_command_says_where_parameters_differ(tmp_path: Path, capsys: Any) -> None:
        files = [str(tmp_path / f"{i}.pt") for i in range(2)]
        for file in files:
            torch.save(net().state_dict(), file)
        assert cli.main(["merge-statistics", *files, "-o", str(tmp_path / "out.pt")]) == 0
        assert "'0.weight' and 1 more are not the same" in capsys.readouterr().out

    def test_safetensors_without_its_package_names_the_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "a.safetensors"
        file.write_bytes(b"")
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(fl.ModelError, match="pip install safetensors"):
            fl.merge_statistics([file, file])


def test_what_interrupts_it_leaves_numpy_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(_: Any) -> Any:
        np.seterr(divide="raise")  # a block of np.errstate whose exit was never called
        raise KeyboardInterrupt

    monkeypatch.setattr("frostline.verbs.merge_statistics.read_state", cut)
    before = np.geterr()
    with pytest.raises(KeyboardInterrupt):
        fl.merge_statistics([state([0.0], [1.0])])
    assert np.geterr() == before
