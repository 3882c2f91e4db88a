"""The report of rules: text, JSON, annotations; whole files or none; names are only names."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from frostline.report import github, schema, terminal, text
from frostline.types import DataError, Finding, OutputError, Site, Skipped
from frostline.types.report import Report


def finding(code: str = "FL101", **changes: Any) -> Finding:
    facts: dict[str, Any] = {
        "code": code,
        "name": "frozen-uses-batch-statistics",
        "severity": "error",
        "certainty": "is",
        "sites": ("backbone/bn1",),
        "message": "frozen, but training uses batch statistics; set policy='inference'",
        "evidence": {"policy": "batch", "share": 0.25},
        "fix": "convert",
    }
    return Finding(**{**facts, **changes})


SITE = Site(
    path="backbone/bn1",
    name="bn1",
    kind="BatchNormalization",
    index=0,
    channels=8,
    axis=-1,
    decay=0.99,
    epsilon=1e-3,
    params_frozen=True,
    stats_frozen=True,
    policy="batch",
)
STALE = finding(
    "FL203", name="stale-running-statistics", severity="warning", certainty="may", fix=None,
    sites=("head/bn",), message="62% of the statistics are from before; recalibrate",
)  # fmt: skip
REPORT = Report(
    verdict="1 error and 1 warning at 2 of 3 BN layers; first: FL101",
    findings=(finding(), STALE),
    sites=(SITE,),
    rules=("FL101", "FL203"),
    skipped=(
        Skipped(code="FL107", name="trainable-changed-since-compile", reason="no training steps"),
        Skipped(code="FL204", name="initial-statistics", reason="no training steps"),
    ),
    origin={"model": "net", "backend": "jax"},
)

TEXT = """\
1 error and 1 warning at 2 of 3 BN layers; first: FL101
model net · backend jax

✗ error FL101 frozen-uses-batch-statistics (1 site)
  frozen, but training uses batch statistics; set policy='inference'
  at backbone/bn1
  fix: convert; why: frostline rule FL101

! warning FL203 stale-running-statistics (1 site)
  62% of the statistics are from before; recalibrate (inferred)
  at head/bn
  why: frostline rule FL203

not checked: FL107, FL204: no training steps
"""


def test_text() -> None:
    assert str(REPORT) == TEXT


def test_many_sites_are_told_once() -> None:
    many = tuple(finding(sites=(f"bn{index}",)) for index in range(53))
    shown = str(replace(REPORT, findings=many))
    assert shown.count("frozen, but training") == 1
    assert "(53 sites)" in shown
    assert "at bn0, bn1, bn2, bn3, bn4 and 48 more" in shown
    different = tuple(replace(each, message=f"{i} steps") for i, each in enumerate(many))
    shown = str(replace(REPORT, findings=different))
    assert "  bn4: 4 steps\n  and 48 more\n" in shown


NAMES = ("[red]bn[/red]", "<script>alert(1)</script>", "bn\x1b[31m", "a\nb", ":smile:", "中文")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_never_markup_nor_commands(name: str) -> None:
    report = replace(REPORT, findings=(finding(sites=(name,)),), origin={"model": name})
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    lines = str(report).splitlines()
    assert f"  at {shown}" in lines
    assert f"model {shown}" in lines
    assert "\x1b" not in text.render(terminal.as_text(report), width=60)
    assert len(github.as_github(report).splitlines()) == 1


def test_github_annotations() -> None:
    odd = finding(sites=("a%b", "c"), severity="info", message="100% off: look")
    assert github.as_github(replace(REPORT, findings=(odd, STALE))).splitlines() == [
        "::notice title=FL101 frozen-uses-batch-statistics::a%25b, c: 100%25 off: look",
        (
            "::warning title=FL203 stale-running-statistics::head/bn: "
            "62%25 of the statistics are from before; recalibrate (inferred)"
        ),
    ]


def test_json_round_trip(tmp_path: Path) -> None:
    path = REPORT.save(tmp_path / "report.json")
    plain = json.loads(path.read_text())
    assert plain == REPORT.as_dict()
    assert plain["schema_version"] == schema.SCHEMA_VERSION
    assert Report.from_dict(plain) == REPORT


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    report = replace(REPORT, findings=(finding(evidence={"gain": math.inf, "lowest": math.nan}),))
    plain = json.loads(report.save(tmp_path / "r.json").read_text())
    assert plain["findings"][0]["evidence"] == {"gain": "Infinity", "lowest": "NaN"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 99}, "schema_version=99"),
        ({"findings": [{"code": "FL101"}]}, "not a report"),
        ({"sites": None}, "not a report"),
    ],
)
def test_json_that_is_no_report(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Report.from_dict({**REPORT.as_dict(), **change})


def test_save_text(tmp_path: Path) -> None:
    assert REPORT.save(str(tmp_path / "report.txt")).read_text() == TEXT


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.txt"
    path.write_text("old")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        REPORT.save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["report.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["report.doc", "report", "no-such-folder/report.json"])
def test_outputs_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="report"):
        REPORT.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_notes_are_clean() -> None:
    assert not REPORT.clean
    assert replace(REPORT, findings=(finding(severity="info"),)).clean
    assert replace(REPORT, findings=()).clean
