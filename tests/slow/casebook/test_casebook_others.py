"""Cases of the casebook that BN is not, or not alone, to blame for, and those outside of it.

Of the unseen ones (U) those that were missed at first are tests.
"""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn", reason="the casebook's images are scikit-learn's digits")
keras = pytest.importorskip("keras")

from . import runner  # noqa: E402
from .asking import ask  # noqa: E402
from .bench import Case  # noqa: E402

BACKEND = keras.backend.backend()
CASES = [
    case
    for case in runner.chosen(backend=BACKEND, lean=True)
    if not runner.is_bn(case) or case.number[0] in "HU"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.number)
def test_other_case(case: Case) -> None:
    ask(case, BACKEND, runner.run)
