"""`with fl.recalibrated`: exact inside, bit for bit as before outside, in a training as well."""

from __future__ import annotations

import os
import random
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl


def keras_net() -> Any:
    keras.utils.set_random_seed(3)
    return keras.Sequential([
        keras.Input((6,)), keras.layers.Dense(8), keras.layers.BatchNormalization(momentum=0.9),
        keras.layers.Activation("relu"), keras.layers.Dropout(0.3), keras.layers.Dense(2),
    ])  # fmt: skip


X = np.random.default_rng(0).normal(1, 2, (192, 6)).astype("float32")
Y = (X.sum(1) > 6).astype("int32")


def keras_training(evaluate: bool) -> list[Any]:
    """Weights after two epochs; where asked, with evaluations on exact statistics in between."""
    model = keras_net()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    seen = []

    def between(*_: Any) -> None:
        with fl.recalibrated(model, X):
            seen.append(float(model.evaluate(X, Y, verbose=0)))
            keras.random.uniform((3,))  # moves Keras' global generator
            np.random.rand()  # noqa: NPY002

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=between)] if evaluate else []
    model.fit(X, Y, batch_size=32, epochs=2, verbose=0, callbacks=callbacks)
    assert len(seen) == 2 * evaluate
    return [np.array(v) for v in model.get_weights()]


def test_a_keras_training_goes_on_as_without_it() -> None:
    for with_it, without in zip(keras_training(True), keras_training(False), strict=True):
        np.testing.assert_array_equal(with_it, without)


def test_keras_statistics_are_exact_inside_and_back_outside() -> None:
    model = keras_net()
    before = [np.array(w) for w in model.get_weights()]
    with pytest.raises(RuntimeError, match="inside"), fl.recalibrated(model, X) as done:  # noqa: PT012
        inner = X.astype("float64") @ before[0].astype("float64") + before[1]
        np.testing.assert_allclose(model.get_weights()[4], inner.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.get_weights()[5], inner.var(0), rtol=1e-4)
        assert done.samples == 192
        assert "recalibrated 1 site" in str(done)
        raise RuntimeError("inside")
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("samples", [0, -1, 1.5, "all"])
def test_samples_that_mean_nothing(samples: Any) -> None:
    with (
        pytest.raises(fl.DataError, match="samples must be"),
        fl.recalibrated(keras_net(), X, samples=samples),
    ):
        pass


def test_no_more_samples_than_asked_for() -> None:
    with fl.recalibrated(keras_net(), X, samples=50) as done:
        assert done.samples == 50
        assert done.curve == ()


if os.environ["KERAS_BACKEND"] == "torch":
    import torch
    from torch import nn
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def net() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
        )

    def loader(generator: Any = None) -> Any:
        pairs = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y).long())
        return torch.utils.data.DataLoader(pairs, 32, shuffle=True, generator=generator)

    @pytest.mark.parametrize("kind", ["plain", "ema", "swapped"])
    @pytest.mark.parametrize("own_generator", [False, True])
    def test_a_torch_training_goes_on_as_without_it(kind: str, own_generator: bool) -> None:
        def train(evaluate: bool) -> tuple[Any, ...]:
            model = net()
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
            batches = loader(torch.Generator().manual_seed(5) if own_generator else None)
            optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            for _ in range(2):
                for x, y in batches:
                    model.train()
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    average.update_parameters(model)
                if evaluate:
                    look(model, average, batches, kind)
            return model, average, torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002

        with_it, without = train(True), train(False)
        assert with_it[3:] == without[3:]
        assert torch.equal(with_it[2], without[2])
        for ours, theirs in zip(with_it[:2], without[:2], strict=True):
            for name, value in theirs.state_dict().items():
                assert torch.equal(ours.state_dict()[name], value), name

    def look(model: Any, average: Any, batches: Any, kind: str) -> None:
        """Evaluate one of them, with all that an evaluation may draw."""
        kept = [p.detach().clone() for p in model.parameters()]
        if kind == "swapped":  # as the optimizer of Schedule-Free does
            for p, q in zip(model.parameters(), average.parameters(), strict=True):
                p.data.copy_(q.data)
        chosen = average if kind == "ema" else model
        with fl.recalibrated(chosen, batches):
            chosen.eval()
            exact = fl.recalibrate(chosen, batches)  # changes nothing any more
            assert "standard deviations" in exact.text
            for x, _ in batches:
                chosen(x)
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(1)
            if kind == "swapped":  # back inside the block: weights are none of its business
                for p, value in zip(model.parameters(), kept, strict=True):
                    p.data.copy_(value)

    def test_auto_reads_until_the_statistics_stand() -> None:
        torch.manual_seed(1)
        x = torch.randn(20_000, 6)
        model = net()
        with fl.recalibrated(model, x.numpy(), samples="auto", batch_size=64) as done:
            moved = [change for _, change in done.curve]
            counts = [count for count, _ in done.curve]
            assert counts == [128 * 2**i for i in range(len(counts))]
            assert moved[-1] <= 0.1 < min(moved[:-1])
            assert done.samples == counts[-1] < 20_000
            with torch.no_grad():
                inner = model[0](x[: done.samples]).double()
            torch.testing.assert_close(
                model[1].running_mean.double(), inner.mean(0), rtol=1e-5, atol=1e-6
            )
        assert torch.equal(model[1].running_mean, torch.zeros(8))

    def test_auto_says_where_the_data_end_too_early() -> None:
        with fl.recalibrated(net(), X, samples="auto") as done:
            assert done.samples == 192
            assert [count for count, _ in done.curve] == [128, 192]
            assert "the data end at 192 samples" in done.notes[-1]
        with fl.recalibrated(net(), X[:20], samples="auto") as done:
            assert (done.samples, done.curve) == (20, ())

    def test_auto_needs_data_that_can_be_read_again() -> None:
        model = net()
        with (
            pytest.raises(fl.DataError, match="samples='auto' reads the data more than once"),
            fl.recalibrated(model, iter([X]), samples="auto"),
        ):
            pass
        assert torch.equal(model[1].running_mean, torch.zeros(8))


@pytest.mark.parametrize("given", ["list", "tuple", "with labels"])
def test_inputs_of_a_keras_model_as_keras_itself_takes_them(given: str) -> None:
    """``predict([a, b])``: as many arrays as the model has inputs are its inputs."""
    inputs = [keras.Input((4,)), keras.Input((3,))]
    joined = keras.layers.BatchNormalization()(keras.layers.Concatenate()(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(joined))
    a, b = X[:, :4], 1 - X[:, 3:]
    data = {"list": [a, b], "tuple": ([a, b],), "with labels": (a, b, Y)}[given]
    fl.recalibrate(model, data)
    wanted = np.concatenate([a, b], 1).astype("float64")
    np.testing.assert_allclose(model.get_weights()[2], wanted.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.get_weights()[3], wanted.var(0), rtol=1e-5)
