"""``frostline lint`` and ``frostline rule``: exit codes, forms, and what a person types wrong."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from frostline import rules
from frostline.cli import reports
from frostline.cli.lint import lint
from frostline.cli.options import Format, ReportFormat
from frostline.cli.rule import rule
from frostline.types import FrostlineError, OutputError

keras = pytest.importorskip("keras")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model file with one error: a frozen layer that has never seen data."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(2),
        ]
    )
    model.get_layer("bn").trainable = False
    path = tmp_path_factory.mktemp("lint") / "model.keras"
    model.save(path)
    return str(path)


def test_exit_codes(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(model=source) == 1
    assert "FL204 initial-statistics (1 site)" in capsys.readouterr().out
    assert lint(model=source, ignore=["FL204"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert lint(model=source, select=["FL1"]) == 0


def test_json_and_file(source: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    assert lint(model=source, format=ReportFormat.json, output=output) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(output.read_text())
    assert [each["code"] for each in printed["findings"]] == ["FL204"]
    assert printed["sites"][0]["path"] == "bn"


def test_github(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(model=source, format=ReportFormat.github) == 1
    assert capsys.readouterr().out.startswith("::error title=FL204 initial-statistics::bn: mean 0")
    assert lint(model=source, select=["FL1"], format=ReportFormat.github) == 0
    assert capsys.readouterr().out == ""


def test_a_misspelt_code_is_told_before_the_model_is_read() -> None:
    with pytest.raises(FrostlineError, match="no rule 'FL7'"):
        lint(model="no-such-file.keras", select=["FL7"])
    with pytest.raises(FrostlineError, match="no-such-file"):
        lint(model="no-such-file.keras")


def test_a_file_that_cannot_be_written(source: str, capsys: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.json or \.txt"):
        lint(model=source, output=tmp_path / "report.doc")
    assert capsys.readouterr().out == ""


@pytest.mark.once
def test_rule_pages(capsys: pytest.CaptureFixture[str]) -> None:
    assert rule(reference="FL203") == 0
    page = capsys.readouterr().out
    assert page.startswith("# FL203 stale-running-statistics\n\nwarning, needs: optimizer")
    assert "## Why is this bad?" in page
    assert rule(reference="stale-running-statistics") == 0
    assert capsys.readouterr().out == page
    with pytest.raises(FrostlineError, match="stale-running-statistics"):
        rule(reference="stale-statistics")


@pytest.mark.once
def test_list_of_rules(capsys: pytest.CaptureFixture[str]) -> None:
    every = rules.all_rules()
    assert rule(reference=None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [each.code for each in every]
    assert rule(reference=None, every=True) == 0
    assert capsys.readouterr().out.count("\n## Use instead\n") == len(every)
    assert rule(reference="FL203", format=Format.json) == 0
    (plain,) = json.loads(capsys.readouterr().out)
    assert plain["options"] == {"max_share": 0.1}
    assert plain["documentation"] == rules.get("FL203").documentation


def test_sarif_holds_what_the_format_requires(
    source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lint(model=source, format=ReportFormat.sarif) == 1
    log = json.loads(capsys.readouterr().out)
    check_sarif(log)
    (run,) = log["runs"]
    (result,) = run["results"]
    assert (result["ruleId"], result["level"]) == ("FL204", "error")
    assert result["properties"] == {"fix": "recalibrate"}
    (where,) = result["locations"]
    assert where["physicalLocation"]["artifactLocation"]["uri"] == source
    assert where["logicalLocations"] == [{"fullyQualifiedName": "bn", "kind": "member"}]
    described = {rule["id"]: rule for rule in run["tool"]["driver"]["rules"]}
    assert described["FL204"]["help"]["markdown"] == rules.get("FL204").documentation
    assert lint(model=source, select=["FL1"], format=ReportFormat.sarif) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["results"] == []


#: What sarif-schema-2.1.0.json requires of the objects that are written, and what it allows there.
SARIF = {
    "log": ({"version", "runs"}, {"$schema", "version", "runs"}),
    "run": ({"tool"}, {"tool", "results", "columnKind", "artifacts"}),
    "driver": ({"name"}, {"name", "version", "rules"}),
    "rule": (
        {"id"},
        {"id", "name", "shortDescription", "help", "defaultConfiguration"},
    ),
    "result": ({"message"}, {"ruleId", "level", "message", "locations", "properties"}),
    "location": (set[str](), {"physicalLocation", "logicalLocations"}),
}
SARIF_LEVELS = {"none", "note", "warning", "error"}


def check_sarif(log: Any) -> None:
    def fits(kind: str, value: Any) -> None:
        required, allowed = SARIF[kind]
        assert required <= value.keys() <= allowed, kind

    fits("log", log)
    assert log["version"] == "2.1.0"
    for run in log["runs"]:
        fits("run", run)
        assert run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
        driver = run["tool"]["driver"]
        fits("driver", driver)
        for each in driver["rules"]:
            fits("rule", each)
            assert each["defaultConfiguration"]["level"] in SARIF_LEVELS
            assert each["help"]["text"]
            assert each["shortDescription"]["text"]
        known = [each["id"] for each in driver["rules"]]
        assert len(known) == len(set(known))
        for result in run["results"]:
            fits("result", result)
            assert result["ruleId"] in known
            assert result["level"] in SARIF_LEVELS
            assert isinstance(result["message"]["text"], str)
            for location in result["locations"]:
                fits("location", location)
                region = location["physicalLocation"]["region"]
                assert region["startLine"] >= 1


def test_junit_is_read_back(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(model=source, format=ReportFormat.junit) == 1
    suite = ElementTree.fromstring(capsys.readouterr().out)
    assert (suite.tag, suite.get("name"), suite.get("failures")) == ("testsuite", "frostline", "1")
    cases = suite.findall("testcase")
    assert suite.get("tests") == str(len(cases))
    (failed,) = [case for case in cases if case.find("failure") is not None]
    failure = failed.find("failure")
    assert failed.get("name") == "FL204 initial-statistics"
    assert failure is not None
    assert (failure.text or "").startswith("bn: mean 0")
    skipped = [case for case in cases if case.find("skipped") is not None]
    assert suite.get("skipped") == str(len(skipped))
    assert {(case.get("name") or "")[:3] for case in skipped} >= {"FL3"}
    assert lint(model=source, select=["FL1"], format=ReportFormat.junit) == 0
    assert ElementTree.fromstring(capsys.readouterr().out).get("failures") == "0"


def test_a_function_is_located_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").touch()
    assert reports.model_file("nets:build") == "nets.py"
    assert reports.model_file("installed.package:build") == "installed.package:build"
    assert reports.model_file("folder/model.keras") == "folder/model.keras"
