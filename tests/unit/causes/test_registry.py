"""The registries of causes and remedies, and the enums that they are written with."""

from __future__ import annotations

import pytest
from written_cases import facts, measurement

from frostline.causes.case import Case
from frostline.causes.registry import all_causes, cause, treated_by
from frostline.remedies.registry import all_repairs, remedy, verb_of
from frostline.types.codes import BN_CAUSES, OTHER_CAUSES, CauseCode, Fix, probe_name


def test_every_code_has_one_explanation_and_every_treatment_one_repair() -> None:
    entries = all_causes()
    assert {entry.code for entry in entries} == {*CauseCode} - {CauseCode.NONE}
    assert [entry.rank for entry in entries] == sorted({entry.rank for entry in entries})
    assert all(entry.summary.endswith(".") for entry in (*entries, *all_repairs()))
    treatments = {fix for entry in entries for fix in entry.treated_by}
    assert treatments == {repair.fix for repair in all_repairs()}
    assert CauseCode.EMA_LAG in treated_by(Fix.RECALIBRATE)
    assert treated_by(Fix.RENAME) == ()


def test_causes_are_bn_or_not() -> None:
    assert len(BN_CAUSES) == 18
    assert {*BN_CAUSES} | {*OTHER_CAUSES} == {*CauseCode}
    assert [str(code) for code in CauseCode] == [code.name for code in CauseCode]


def test_only_what_changes_the_model_now_has_a_verb() -> None:
    assert {repair.fix: repair.verb for repair in all_repairs() if repair.verb} == {
        Fix.RECALIBRATE: "recalibrate"
    }
    assert verb_of("recalibrate") == "recalibrate"
    assert verb_of("freeze") is None
    assert verb_of("no such repair") is None


def test_a_typo_is_an_error() -> None:
    with pytest.raises(ValueError, match="EMA_LAGG"):
        cause("EMA_LAGG", rank=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recalibrat"):
        remedy("recalibrat", rank=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has rank"):
        cause(CauseCode.EMA_LAG, rank=1)(lambda case, assigned: iter(()))
    with pytest.raises(ValueError, match="has rank"):
        remedy(Fix.RECALIBRATE, rank=1)(lambda place: iter(()))
    with pytest.raises(ValueError, match="populatoin"):
        Case(facts(), measurement({"inference": 1.0})).loss("populatoin")
    assert probe_name("input x/255") == "input x/255"
