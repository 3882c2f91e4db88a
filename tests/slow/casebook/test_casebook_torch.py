"""Cases of the casebook in native PyTorch."""

from __future__ import annotations

import os

import pytest

if os.environ["KERAS_BACKEND"] != "torch":  # beside TensorFlow its compiler crashes on import
    pytest.skip("torch has a process of its own", allow_module_level=True)
pytest.importorskip("sklearn", reason="the casebook's images are scikit-learn's digits")

from . import torch_runner
from .asking import ask
from .scenario import Case


@pytest.mark.parametrize("case", torch_runner.chosen(), ids=lambda case: case.number)
def test_torch_case(case: Case) -> None:
    ask(case, "native", torch_runner.run)
