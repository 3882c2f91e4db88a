"""A build of features that is interrupted, even twice, leaves the process as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import keras
import torch
from filelock import FileLock

from frostline.cache import cache_features

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


class Interrupted(BaseException):
    """As Ctrl-C, at one place."""


def test_a_second_interruption_while_the_lock_is_released_leaves_gradients_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []

    class Entered(torch.no_grad):  # type: ignore[misc]
        def __exit__(self, *_: Any) -> None:
            left.append("gradients")
            raise Interrupted  # before they are on again

    release = FileLock.release

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        left.append("lock")
        if left.count("lock") == 1:
            raise Interrupted
        release(self, *args, **kwargs)

    inputs = keras.Input((6,))
    prefix = keras.Model(inputs, keras.layers.BatchNormalization()(inputs))
    # Modules that are imported in a build must not keep the class that is lent below.
    cache_features(prefix, X, tmp_path / "before", engine="native", batch_size=4, verbose=0)
    keras.Model(inputs, prefix(inputs)).compile("sgd", "mse")
    monkeypatch.setattr(torch, "no_grad", Entered)
    monkeypatch.setattr(FileLock, "release", interrupted)
    with pytest.raises(Interrupted):
        cache_features(prefix, X, tmp_path / "now", engine="native", batch_size=4, verbose=0)
    assert left[:2] == ["gradients", "lock"]
    assert torch.is_grad_enabled()
