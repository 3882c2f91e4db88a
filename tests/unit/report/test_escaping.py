"""Names are shown and never obeyed, whatever is in them, in every form of every result."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import sample_reports as samples
from hypothesis import given, settings, strategies as st

import frostline.report
from frostline.report import escaping, github, html, phases, terminal, text
from frostline.report.sites import Sites
from frostline.types import PhaseRow, PhaseTable, Skipped
from frostline.types.report import Report

#: What a careless renderer obeys: escape sequences, bells, line ends, marks of direction, markup.
PIECES = st.sampled_from(
    ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\r", "\n", "\t", "\x00", "\x7f", "\u202e", "\u2066",
     "\u200f", "\u2028", "\ufeff", "\ud800", "[red]", "[/]", "[link=x]", ":smile:", "<b>", "</div>",
     "</style>", "&lt;", "{{ 7 * 7 }}", "::error::", "%0A", "$x^2$", "bn", "中文", " "]
)  # fmt: skip
NAMES = st.lists(PIECES, min_size=1, max_size=5).map("".join).filter(str.strip)
NAMES |= st.text(min_size=1, max_size=12).filter(str.strip)


def everywhere(name: str) -> Report:
    """A report with this name wherever a text from outside can stand."""
    report = samples.of_paths([(f"{name}/{index}", 8) for index in "ab"], frozen=1)
    measured = report.measurement
    assert measured is not None
    metric = {name: 0.5}
    return replace(
        report,
        verdict=name,
        origin={name: name, "model": name},
        causes=tuple(
            replace(each, code=name, message=name, settle=name, evidence={name: name},
                    findings=(name,))
            for each in report.causes
        ),
        remedies=tuple(
            replace(each, name=name, text=name, python=name, shell=name, note=name, fix=name,
                    causes=(name,), before={**each.before, **metric},
                    after={**each.after, **metric})
            for each in report.remedies
        ),
        findings=tuple(
            replace(each, code=f"{name}{number}", message=name, name=name, fix=name)
            for number, each in enumerate(report.findings)
        ),
        skipped=(Skipped(code=name, name=name, reason=name),),
        measurement=replace(
            measured,
            probes={**measured.probes, name: replace(measured.probes["batch"], name=name)},
            gaps={**measured.gaps, name: replace(measured.gaps["bn"], name=name, of=name,
                                                 minus=name)},
            skipped={name: name},
        ),
    )  # fmt: skip


def table(name: str) -> PhaseTable:
    rows = tuple(
        PhaseRow(phase=phase, loss=0.5, metrics={name: 0.5}) for phase in ("dynamic", "0", "1")
    )
    return PhaseTable(rows=rows, task="binary", samples=7, sites=2, patterns=(name,))


class Elements(HTMLParser):
    """Counts elements, and collects the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(max_examples=30, deadline=None)
@given(NAMES)
def test_a_terminal_gets_no_command(name: str) -> None:
    report = everywhere(name)
    sites = Sites(report.sites, before=1, boundary=name)
    shown = (
        str(report), text.render(terminal.as_text(report), width=60), github.as_github(report),
        str(sites), text.render(phases.phases_table(table(name))), str(table(name)),
        text.render(text.facts({name: name})),
    )  # fmt: skip
    assert all(c.isprintable() for each in shown for c in each.replace("\n", ""))
    blank = re.sub(r"\s", "", escaping.printable(name))
    for each in shown:
        assert blank.replace("%", "%25") in re.sub(r"\s", "", each) or blank in re.sub(
            r"\s", "", each
        )
    lines = github.as_github(report).splitlines()
    assert len(lines) == len(report.causes) + len(report.findings)
    assert all(line.startswith(("::error ", "::warning ", "::notice ")) for line in lines)


@settings(max_examples=10, deadline=None)
@given(NAMES)
def test_a_page_gets_no_element(name: str) -> None:
    plain = Elements(html.page(replace(everywhere("bn"), measurement=None)))
    page = html.page(replace(everywhere(name), measurement=None))
    read = Elements(page)
    assert read.tags == plain.tags
    assert escaping.printable(name, keep="\n") in read.text
    assert all(c.isprintable() or c == "\n" for c in page)
    page.encode("utf-8")


@settings(max_examples=30, deadline=None)
@given(NAMES)
def test_a_notebook_gets_no_element(name: str) -> None:
    report = everywhere(name)
    assert Elements(Sites(report.sites)._repr_html_()).tags == ["pre"]
    read = Elements(table(name)._repr_html_())
    assert read.tags == Elements(table("bn")._repr_html_()).tags
    assert escaping.printable(name) in read.text


def test_pictures_show_names_as_text() -> None:
    name = "</svg><b>\x1b[31m\u202e$x^2$"
    page = html.page(everywhere(name))
    assert page.count("<svg") == html.page(everywhere("bn")).count("<svg")
    assert "<b>" not in page
    assert not {"\x1b", "\u202e"} & set(page)


def test_only_one_file_makes_rich_texts_and_escapes_html() -> None:
    folder = Path(frostline.report.__file__).parent
    for path in folder.glob("*.py"):
        if path.name != "escaping.py":
            source = path.read_text(encoding="utf-8")
            assert "html.escape" not in source, path
            assert not re.search(r'\bText\([^)"]', source), path
