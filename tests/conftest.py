"""One Keras backend per process, chosen by KERAS_BACKEND before Keras is imported.

``make test`` runs the suite once per backend; ``pytest`` alone runs it on the backend that is set.
Tests that need no framework must not import Keras: they are what tells that Frostline works
without one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("MPLBACKEND", "Agg")

# The same examples in every run: a failure in CI can be repeated. HYPOTHESIS_PROFILE=explore
# looks for new ones. No deadline: a first call compiles.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def backend() -> str:
    """The Keras backend of this process."""
    import keras

    return keras.backend.backend()


@pytest.fixture
def precision(backend: str) -> Callable[[], Any]:
    """A function that tells what the backend lets a card do to products of float32 numbers."""

    def found() -> Any:
        if backend == "jax":
            import jax

            return jax.config.jax_default_matmul_precision
        if backend == "torch":
            import torch

            return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        import tensorflow as tf

        return tf.config.experimental.tensor_float_32_execution_enabled()

    return found
