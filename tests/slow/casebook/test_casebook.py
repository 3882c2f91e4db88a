"""The casebook as a test: the first cause is right, BN is not blamed wrongly, the remedy works.

A miss that is known stands in ``misses.MISSES`` with its reason and is expected to fail, strictly:
when a diagnosis gets better, the line has to go. A third of the cases run on all backends, each of
the others on one; ``python -m tests.slow.casebook`` runs them all. Cases that BN is not, or not
alone, to blame for, and those outside of the book, are in ``test_casebook_others.py``: a
file is run by one process.
"""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn", reason="the casebook's images are scikit-learn's digits")
keras = pytest.importorskip("keras")

from . import runner, unseen  # noqa: E402
from .asking import ask  # noqa: E402
from .bench import BACKENDS, Case  # noqa: E402
from .misses import MISSES  # noqa: E402

BACKEND = keras.backend.backend()
CASES = [
    case
    for case in runner.chosen(backend=BACKEND, lean=True)
    if runner.is_bn(case) and case.number[0] not in "HU"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.number)
def test_bn_case(case: Case) -> None:
    ask(case, BACKEND, runner.run)


@pytest.mark.once
def test_every_case_has_one_number_and_known_codes() -> None:
    from frostline.types.measured import BN_CAUSES, OTHER_CAUSES

    numbers = [case.number for case in runner.CASES]
    assert len(set(numbers)) == len(numbers)
    codes = {code for case in runner.CASES for code in (*case.expected, *case.also)}
    assert codes <= {*BN_CAUSES, *OTHER_CAUSES}
    tests = [case for case in runner.CASES if case.in_suite]
    assert sum(case.everywhere for case in tests) * 3 >= len(tests) - len(unseen.CASES)
    assert {miss.number for miss in MISSES if "native" not in miss.backends} <= set(numbers)
    assert len({(miss.number, miss.question) for miss in MISSES}) == len(MISSES)


@pytest.mark.once
def test_each_case_runs_somewhere() -> None:
    run = [case.number for name in BACKENDS for case in runner.chosen(backend=name, lean=True)]
    assert set(run) == {case.number for case in runner.CASES if case.in_suite}
    everywhere = {case.number for case in runner.CASES if case.everywhere}
    assert all(run.count(number) == (3 if number in everywhere else 1) for number in set(run))


@pytest.mark.once
def test_a_wrong_answer_is_called_wrong() -> None:
    """The harness itself: other codes, missing halves and false blame count against it."""
    from types import SimpleNamespace as Made

    def judge(case: Case, *codes: str) -> runner.Row:
        causes = [
            Made(code=code, share=0.5, sites=("a/bn1",), is_bn=code != "DROPOUT") for code in codes
        ]
        report = Made(causes=causes, remedies=(), verdict="")
        scenario = runner.Scenario(model=None, data=None, closable=True)
        return runner.judged(case, scenario, report, (0.0, 0.0))

    def case(*expected: str) -> Case:
        return Case(
            number="0", title="", expected=expected, build=lambda seed: runner.Scenario,
            sites=frozenset({"bn1", "bn2"}), also=("EMA_NOISE",),
        )  # fmt: skip

    assert judge(case("EMA_LAG"), "EMA_LAG", "DROPOUT").right
    assert judge(case("EMA_LAG"), "EMA_NOISE").right
    assert not judge(case("EMA_LAG"), "DROPOUT", "EMA_LAG").right
    assert not judge(case("EMA_LAG")).right
    assert judge(case("EMA_LAG", "DROPOUT"), "DROPOUT", "EMA_LAG").right
    assert not judge(case("EMA_LAG", "DROPOUT"), "EMA_LAG").right
    assert judge(case("DROPOUT"), "DROPOUT", "EMA_LAG").blamed == ("EMA_LAG",)
    assert judge(case("EMA_LAG"), "EMA_LAG").overlap == 0.5
    assert not judge(case("EMA_LAG"), "EMA_LAG").closes
