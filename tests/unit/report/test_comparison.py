"""A comparison as text, page, JSON and picture: what was computed, escaped, nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from frostline.types import OutputError
from frostline.types.comparison import Comparison, TreatmentRow
from frostline.types.measured import Interval


def row(name: str, value: float, behind: Interval | None, **more: object) -> TreatmentRow:
    given = {
        "name": name, "meaning": f"What {name} does", "line": f"fl.do({name!r})",
        "value": Interval(value, value - 0.1, value + 0.1, 0.95), "loss": 1 - value,
        "behind": behind, "curve": (0.25, value), "seconds": 1.5, "seeds": 2,
        "values": np.full((2, 4), value),
    }  # fmt: skip
    return TreatmentRow(**{**given, **more})  # type: ignore[arg-type]


@pytest.fixture
def result() -> Comparison:
    return Comparison(
        verdict="'a' is best",
        winner="a",
        tied=(),
        metric="accuracy",
        rows=(
            row("a", 0.75, None),
            row("<b>\x1b[31m", 0.5, Interval(0.25, 0.125, 0.375, 0.975), stopped=1),
            row("c", 0.5, Interval(0.25, -np.inf, np.inf, 0.975)),
        ),
        skipped={"ramp": "no ramp here"},
        samples=4,
        epochs=3,
        cache_seconds=2.0,
        settings={"backend": "torch"},
        notes=("a note",),
    )


def test_the_text_has_every_row_what_is_certain_and_what_to_paste(result: Comparison) -> None:
    lines = str(result).splitlines()
    assert lines[0] == "'a' is best"
    assert any("0.7500 ± 0.1000" in line and line.startswith("a ") for line in lines)
    given_up = next(line for line in lines if "<b>" in line)
    assert "1 of 3, given up" in given_up
    assert "0.2500 ± 0.1250 *" in given_up
    assert any("0.2500 (no interval)" in line for line in lines)
    assert "\x1b" not in str(result)
    assert "ramp: no ramp here" in lines
    assert lines[-1] == "fl.do('a')"


def test_an_interval_that_is_wider_on_one_side_is_shown_by_its_ends() -> None:
    wide = replace(row("w", 0.9, None), value=Interval(0.9, 0.5, 0.95, 0.95))
    result = Comparison(
        verdict="", winner=None, tied=(), metric="accuracy", rows=(wide,), skipped={}, samples=9,
        epochs=1, cache_seconds=0.0,
    )  # fmt: skip
    assert "0.9000 [0.5000, 0.9500]" in str(result)


def test_json_reads_back_with_what_json_cannot_say_in_words(result: Comparison) -> None:
    plain = json.loads(result.to_json())
    assert plain["winner"] == "a"
    assert plain["line"] == "fl.do('a')"
    assert plain["rows"][2]["behind"]["high"] == "Infinity"
    assert "values" not in plain["rows"][0]
    assert plain == result.as_dict()


def test_names_are_escaped_on_the_page_and_it_loads_nothing(
    result: Comparison, tmp_path: Path
) -> None:
    page = result.save(tmp_path / "found.html").read_text()
    assert "<b>\x1b" not in page
    assert "&lt;b&gt;" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "page" in result._repr_html_()


@pytest.mark.parametrize(("ending", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_pictures(result: Comparison, tmp_path: Path, ending: str, begins: bytes) -> None:
    assert result.save(tmp_path / f"found{ending}").read_bytes().startswith(begins)


def test_other_endings_and_names_are_refused(result: Comparison, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.pdf"):
        result.save(tmp_path / "found.pdf")
    with pytest.raises(KeyError, match="there are a, "):
        result["d"]
