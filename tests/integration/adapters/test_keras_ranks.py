"""Keras models whose statistics several processes measure together; here they are threads."""

import threading

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.adapters import adapter_of
from frostline.adapters.together import Together
from frostline.measure.recalibration import recalibrate_adapter


class Threads(Together):
    """Ranks that meet at a barrier."""

    def __init__(self, rank, words, barrier):
        super().__init__()
        self.rank, self.size = rank, len(words)
        self._words, self._barrier = words, barrier

    def _gather(self, word):
        self._words[self.rank] = word
        self._barrier.wait(timeout=60)
        found = list(self._words)
        self._barrier.wait(timeout=60)
        return found


def together(models, shares, **options):
    """Recalibrate all models at once; returns what each rank raised."""
    words, barrier = [b""] * len(models), threading.Barrier(len(models))
    raised = [None] * len(models)

    def run(rank):
        ranks = Threads(rank, words, barrier)
        try:
            with ranks.collective("recalibrate"):
                recalibrate_adapter(
                    adapter_of(models[rank]), shares[rank], ranks=ranks, sites="all",
                    **{"method": "sequential", "batch_size": 16, **options},
                )  # fmt: skip
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(name="one"),
            keras.layers.ReLU(),
            keras.layers.Conv2D(5, 3),
            keras.layers.BatchNormalization(name="two"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )


X = np.random.default_rng(0).normal(2, 3, size=(112, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_uneven_and_empty_shares_give_what_one_process_measures(method):
    alone = network()
    fl.recalibrate(alone, X, sites="all", method=method, batch_size=16)
    models = [network() for _ in range(3)]
    assert together(models, [X[:96], [], X[96:]], method=method) == [None] * 3
    for model in models:
        for one, first, want in zip(
            model.get_weights(), models[0].get_weights(), alone.get_weights(), strict=True
        ):
            np.testing.assert_array_equal(one, first)
            np.testing.assert_allclose(one, want, rtol=1e-6, atol=1e-7)


def test_one_that_raises_lets_all_raise_and_no_model_is_half_changed():
    models = [network() for _ in range(2)]
    before = models[0].get_weights()
    raised = together(models, [X[:32], X[:32, :4]])
    assert isinstance(raised[1], fl.DataError)
    assert isinstance(raised[0], fl.FrostlineError)
    assert "rank 1 of 2 raised DataError" in str(raised[0])
    for model in models:
        for one, want in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(one, want)
