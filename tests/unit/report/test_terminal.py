"""The report in a terminal: the same order as the page, 80 columns, words beside colours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sample_reports as samples

from frostline.report import github, terminal, text


def test_order_and_numbers() -> None:
    shown = str(samples.lite0())
    told = (
        "BN is to blame for 97% of the gap",
        "samples 200 · batch size 32 ·",
        "training mode, nothing updated        0.071     0.995  −0.442 (−0.497 to −0.387)\n",
        "✗ cause FROZEN_BATCH_STATS (64% of the gap, measured)\n",
        "✗ cause EMA_LAG (33% of the gap, inferred)\n",
        "  to settle it: train 390 more steps, or give history= of the run\n",
        "3% of the gap is not explained\n",
        "  1. block14_expand_bn: 14%; alone: loss −0.068\n",
        "★ remedy recalibrate all: loss 0.513 → 0.341, accuracy 0.785 → 0.865\n",
        "  frostline recalibrate model.keras data -o fixed.keras --sites all\n",
        "  remedy convert, then train again: not measured\n",
        "✗ error FL101 frozen-uses-batch-statistics (33 sites)\n",
        "not checked: FL107: not compiled\n",
        "not checked: reference: no reference model was given\n",
    )
    places = [shown.index(each) for each in told]
    assert places == sorted(places)


def test_one_remedy_is_the_first_choice() -> None:
    report = samples.lite0()
    best = report.remedies[0]
    shown = str(replace(report, remedies=(best, replace(best, name="another that helps"))))
    assert "★ remedy recalibrate all:" in shown
    assert "✓ remedy another that helps:" in shown


@pytest.mark.parametrize("name", samples.EVERY)
def test_80_columns_but_for_what_is_pasted(name: str) -> None:
    report = samples.EVERY[name]()
    pasted = {line for each in report.remedies for line in (each.python, each.shell)}
    for line in str(report).splitlines():
        assert len(line) <= 80 or line.strip() in pasted


def test_a_command_is_not_broken_into_lines() -> None:
    report = samples.lite0()
    long = "frostline recalibrate " + "very-long-name/" * 8 + "model.keras data -o fixed.keras"
    remedy = replace(report.remedies[0], shell=long)
    assert f"  {long}\n" in str(replace(report, remedies=(remedy,)))


@pytest.mark.parametrize("digits", range(8))
def test_an_interval_stays_on_one_line(digits: int) -> None:
    report = samples.lite0()
    told = "−0.442 (−0.497 to −0.387)"
    verdict = "x" * (70 + digits) + f": {told}"
    lines = str(replace(report, verdict=verdict)).splitlines()
    assert told.partition(" ")[2] in lines[1]
    measured = report.measurement
    assert measured is not None
    wide = replace(measured.gaps["total"].loss, low=-1234567.5, high=123456.75, estimate=-98765.5)
    gaps = {name: replace(each, loss=wide) for name, each in measured.gaps.items()}
    shown = str(replace(report, measurement=replace(measured, gaps=gaps)))
    assert shown.count("−98766 (−1.2e+06 to +123457)") == 7


def test_the_strip_of_shares() -> None:
    lines = str(samples.lite0()).splitlines()
    start = lines.index("shares of the gap over depth")
    assert lines[start + 2] == "  " + "=" * 33 + "-" * 16
    strip = lines[start + 1].removeprefix("  ").ljust(49)
    found = samples.lite0().attribution
    assert found is not None
    shares = found.shares / found.gap
    assert strip.index("█") == shares.argmax()
    assert strip.count("▾") == (shares < -shares.max() / 50).sum()


def test_without_numbers_only_what_there_is() -> None:
    assert "the same samples" not in str(samples.linted())
    shown = str(samples.without_bn())
    assert "shares of the gap" not in shown
    assert "✗ cause DROPOUT (100% of the gap, measured)\n" in shown
    useless = tuple(each for each in samples.lite0().remedies if not each.recommended)
    shown = str(replace(samples.lite0(), remedies=useless))
    assert "\nnone of the remedies that were tried helps on these samples\n" in shown


def test_colour_only_where_it_is_asked_for() -> None:
    drawn = terminal.as_text(samples.lite0())
    plain, coloured = text.render(drawn), text.render(drawn, color=True)
    assert "\x1b[" not in plain
    assert "\x1b[" in coloured


def test_annotations_name_causes_first() -> None:
    lines = github.as_github(samples.lite0()).splitlines()
    assert lines[0].startswith(
        "::error title=FROZEN_BATCH_STATS 64%25 of the gap::stem_bn, block1_depthwise_bn, "
    )
    assert lines[1].startswith("::warning title=EMA_LAG 33%25 of the gap::block12_expand_bn, ")
    assert len(lines) == 2 + 33 + 16 + 1
    hostile = github.as_github(samples.hostile()).splitlines()
    assert all(line.startswith(("::error ", "::warning ", "::notice ")) for line in hostile)
    none = replace(samples.lite0().causes[0], code="NONE")
    assert github.as_github(replace(samples.lite0(), causes=(none,), findings=())) == ""


def test_clean() -> None:
    assert samples.healthy().clean
    assert not samples.without_bn().clean
    assert not replace(samples.lite0(), findings=()).clean
    none = replace(samples.lite0().causes[0], code="NONE")
    assert replace(samples.lite0(), causes=(none,), findings=()).clean
