"""Two reports side by side: what went, what came, in text and JSON, and by the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sample_reports as samples

from frostline.cli import report as command
from frostline.cli.options import Format
from frostline.report import before_after
from frostline.types import DataError


def test_a_report_and_itself() -> None:
    report = samples.EVERY["lite0"]()
    found = before_after.compare(report, report)
    assert (found.gone, found.new, found.notes) == ((), (), ())
    assert found.clean
    assert all(first == second for first, second in found.numbers.values())


def test_what_went_and_what_came() -> None:
    before = samples.EVERY["lite0"]()
    after = replace(before, causes=(), findings=before.findings[:1], measurement=None)
    found = before_after.compare(before, after)
    assert found.clean
    assert any(text.startswith(before.causes[0].code) for text in found.gone)
    assert found.notes[-1].startswith("one report is a diagnosis")
    assert {second for _, second in found.numbers.values()} == {"–"}
    back = before_after.compare(after, before)
    assert (back.new, back.gone) == (found.gone, ())
    assert not back.clean
    text = str(back)
    assert text.startswith("Causes, errors and warnings: 0 gone, ")
    assert "\n✗ new\n" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = samples.EVERY["lite0"]()
    first = report.save(tmp_path / "before.json")
    second = replace(report, causes=(), findings=()).save(tmp_path / "after.json")
    assert command.compare(before=first, after=second) == 0
    assert "0 new" in capsys.readouterr().out
    assert command.compare(before=second, after=first, format=Format.json) == 1
    plain = json.loads(capsys.readouterr().out)
    assert plain["clean"] is False
    assert plain["new"]


@pytest.mark.parametrize("text", ["", "[1]", '{"schema_version": 0}', "[" * 100_000])
def test_a_file_that_is_no_report(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"report\.json is no report"):
        command.compare(before=path, after=path)
    with pytest.raises(DataError, match=r"none\.json"):
        command.compare(before=tmp_path / "none.json", after=path)
