"""One Keras backend per process, chosen by KERAS_BACKEND before Keras is imported.

``make test`` runs the suite once per backend; ``pytest`` alone runs it on the backend that is set.
The rooms: ``unit`` loads no framework, ``contract`` asks every adapter the same, ``integration``
runs verbs on real networks, ``slow`` holds what takes long. A test outside of ``slow`` that takes
over two seconds is named at the end of the run.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("MPLBACKEND", "Agg")
if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    # One folder for each process: JAX writes a program in place, and half a file warns its reader.
    os.environ["JAX_COMPILATION_CACHE_DIR"] += os.sep + os.environ.get("PYTEST_XDIST_WORKER", "")

# The same examples in every run: a failure in CI can be repeated. HYPOTHESIS_PROFILE=explore
# looks for new ones. No deadline: a first call compiles.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


SLOW = Path(__file__).parent / "slow"
UNIT = Path(__file__).parent / "unit"
#: Seconds that a test outside of ``tests/slow`` may take before the summary names it.
LONG = 2.0
_durations: dict[str, float] = {}


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in ``tests/slow``, and in ``tests/unit``, which loads no framework."""
    for item in items:
        if SLOW in item.path.parents:
            item.add_marker(pytest.mark.slow)
        if UNIT in item.path.parents:
            item.add_marker(pytest.mark.once)


def pytest_collection_finish() -> None:
    """Leave what the frameworks made at import out of every later collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note that the run is alive, and how long a test took."""
    progress = os.environ.get("FROSTLINE_TEST_PROGRESS")
    if progress and "PYTEST_XDIST_WORKER" not in os.environ:
        Path(progress).touch()
    if report.when == "call" and "slow" not in report.keywords:
        _durations[report.nodeid] = report.duration


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name tests that take long and are not in ``tests/slow``."""
    long = sorted((t, name) for name, t in _durations.items() if t > LONG)
    if not long:
        return
    terminalreporter.section(f"{len(long)} tests outside of tests/slow took over {LONG:g} s")
    for seconds, name in reversed(long[-15:]):
        terminalreporter.write_line(f"{seconds:6.1f} s  {name}")


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
