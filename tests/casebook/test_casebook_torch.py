"""Cases of the casebook in native PyTorch."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn", reason="the casebook's images are scikit-learn's digits")
pytest.importorskip("torch")

from . import torch_runner
from .asking import ask
from .scenario import Case

pytestmark = pytest.mark.once


@pytest.mark.parametrize("case", torch_runner.chosen(), ids=lambda case: case.number)
def test_torch_case(case: Case) -> None:
    ask(case, "native", torch_runner.run)
