"""The casebook as a test: the first cause is right, BN is not blamed wrongly, the remedy works.

A miss that is known stands in ``MISSES`` with its reason and is expected to fail, strictly: when a
diagnosis gets better, the line has to go.
"""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("sklearn", reason="the casebook's images are scikit-learn's digits")
keras = pytest.importorskip("keras")

from . import runner  # noqa: E402
from .bench import Case  # noqa: E402

#: (case, question) -> why it is missed.
MISSES: dict[tuple[str, str], str] = {}

BACKEND = keras.backend.backend()
CASES = {case.number: case for case in runner.chosen(backend=BACKEND)}
BY_NUMBER = pytest.mark.parametrize("number", CASES)


@functools.cache
def row(number: str) -> runner.Row:
    return runner.run(CASES[number])


def expected_to_pass(request: pytest.FixtureRequest, number: str, question: str) -> runner.Row:
    reason = MISSES.get((number, question))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    return row(number)


@BY_NUMBER
def test_first_cause(number: str, request: pytest.FixtureRequest) -> None:
    got = expected_to_pass(request, number, "cause")
    assert got.right, (got.expected, got.answers, got.verdict)


@BY_NUMBER
def test_bn_is_not_blamed_for_what_others_did(number: str, request: pytest.FixtureRequest) -> None:
    got = expected_to_pass(request, number, "blame")
    assert got.blamed == (), got.verdict


@BY_NUMBER
def test_layers(number: str, request: pytest.FixtureRequest) -> None:
    got = expected_to_pass(request, number, "layers")
    assert got.overlap is None or got.overlap >= 0.75, (got.overlap, got.verdict)


@BY_NUMBER
def test_first_remedy_closes_the_gap(number: str, request: pytest.FixtureRequest) -> None:
    got = expected_to_pass(request, number, "remedy")
    assert got.closes, (got.remedy, got.before, got.after, got.closed)


@pytest.mark.once
def test_every_case_has_one_number_and_known_codes() -> None:
    from frostline.measurement import BN_CAUSES, OTHER_CAUSES

    numbers = [case.number for case in runner.CASES]
    assert len(set(numbers)) == len(numbers)
    codes = {code for case in runner.CASES for code in (*case.expected, *case.also)}
    assert codes <= {*BN_CAUSES, *OTHER_CAUSES}
    everywhere = [case for case in runner.CASES if case.everywhere]
    assert len(everywhere) * 3 >= len(runner.CASES)
    assert {number for number, _ in MISSES} <= set(numbers)


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
