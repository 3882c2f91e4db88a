"""The page: whole, self-contained, in order, and never obeying a name."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_reports as samples
from matplotlib import colors

from frostline.report import figures, html, palette, vector, wording
from frostline.types import OutputError

VOID = {"meta", "link", "br"}


class Reader(HTMLParser):
    """Collects what a browser would see: tags, attributes, and text by the tag it is in."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))


@pytest.mark.parametrize("name", samples.EVERY)
def test_every_page_is_one_closed_document_that_loads_nothing(name: str) -> None:
    read = Reader(samples.page(name))
    assert read.open == []
    assert samples.page(name).startswith("<!DOCTYPE html>")
    assert not {"script", "img", "iframe", "object", "embed", "form"} & set(read.tags)
    for _, attribute, value in read.attributes:
        assert not attribute.startswith("on")
        if attribute in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:,"))
    style = "".join(text for tag, text in read.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert "://" not in re.sub(r"<svg.*?</svg>", "", samples.page(name), flags=re.DOTALL)
    ids = [value for _, attribute, value in read.attributes if attribute == "id"]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^")]+)', samples.page(name))
    assert set(used) <= set(ids)


def test_names_are_text_wherever_they_stand() -> None:
    read = Reader(samples.page("hostile"))
    shown = [tag for tag, text in read.texts if samples.HOSTILE in text]
    assert {"h1", "dt", "dd", "p", "code", "th", "h3"} <= set(shown)
    pictured = [text for tag, text in read.texts if tag == "text" and "<script>" in text]
    assert len(pictured) >= 4  # names of blocks and remedies, wide and narrow
    assert len([tag for tag in read.tags if tag == "style"]) == 1


def test_what_does_not_print_is_shown_as_an_escape() -> None:
    report = samples.of_paths([("bn\x00\x1b\u202e\ud800", 8), ("other", 8)], frozen=1)
    page = html.page(replace(report, measurement=None))
    assert r"bn\x00\x1b\u202e\ud800" in page
    page.encode("utf-8")
    assert not set("\x00\x1b\u202e") & set(page)


HEADINGS = {
    "lite0": ["What to do", "Why", "The same samples in every mode", "Where", "Findings",
              "49 BN layers", "What the codes mean", "Not checked", "How to read the numbers"],
    "without_bn": ["Why", "The same samples in every mode", "What the codes mean", "Not checked",
                   "How to read the numbers"],
    "linted": ["Findings", "49 BN layers", "What the codes mean", "Not checked",
               "How to read the numbers"],
    "single": ["What to do", "Why", "The same samples in every mode", "Where", "Findings",
               "1 BN layer", "What the codes mean", "Not checked", "How to read the numbers"],
}  # fmt: skip


@pytest.mark.parametrize("name", HEADINGS)
def test_parts_come_in_order_and_only_where_there_are_numbers(name: str) -> None:
    texts = Reader(samples.page(name)).texts
    assert [text for tag, text in texts if tag == "h2"] == HEADINGS[name]
    assert [text for tag, text in texts if tag == "h1"] == [samples.EVERY[name]().verdict]


def test_the_numbers_are_those_of_the_report() -> None:
    text = " ".join(text for _, text in Reader(samples.page("lite0")).texts)
    for told in (
        "training mode, nothing updated 0.071 0.995 −0.442 (−0.497 to −0.387)",
        "inference with dropout on 0.531 0.775 +0.018 (−0.003 to +0.039) may be 0",
        "64% of the gap FROZEN_BATCH_STATS BN measured",
        "3% of the gap is not explained",
        "old value left 0.495",
        "loss 0.513 → 0.341 accuracy 0.785 → 0.865 change in loss −0.172 (−0.212 to −0.132)",
        "Python fl.recalibrate(model, x)",
        "Shell frostline convert model.keras -o fixed.keras --policy inference",
        "✗ error FL101 frozen-uses-batch-statistics 33 sites",
        "Why frostline rule FL203",
        "reference no reference model was given",
    ):  # fmt: skip
        assert told in text
    shift = samples.lite0().measurement.sites["stem_bn"].shift  # type: ignore[union-attr]
    middle, high, top = np.median(shift), np.quantile(shift, 0.9), shift.max()
    assert f"stem_bn 32 frozen 0.99 0.001 {middle:.3f} / {high:.3f} / {top:.3f}" in text


def test_a_repair_is_the_one_for_this_finding() -> None:
    text = " ".join(text for _, text in Reader(samples.page("lite0")).texts)
    assert 'Repair model = fl.convert(model, policy="inference") Why frostline rule FL101' in text
    assert "Repair fl.recalibrate(model, x) Why frostline rule FL203" in text


def test_no_remedy_helps_is_said() -> None:
    report = samples.without_bn()
    useless = tuple(each for each in samples.remedies() if not each.recommended)
    page = html.page(replace(report, remedies=useless))
    assert "None of the remedies that were tried helps on these samples." in page


def test_the_same_report_gives_the_same_page() -> None:
    assert html.page(samples.single()) == samples.page("single")


def test_a_notebook_gets_one_block_whose_style_stays_in_it() -> None:
    block = samples.without_bn()._repr_html_()
    read = Reader(block)
    assert read.tags[0] == "div"
    assert not {"html", "head", "body", "meta", "title"} & set(read.tags)
    style = next(text for tag, text in read.texts if tag == "style")
    flat = re.sub(r"@(media|container)[^{]*\{", "", style)
    for selectors in re.findall(r"([^{}]+)\{[^{}]*\}", flat):
        for selector in selectors.split(","):
            assert selector.strip().startswith(".frostline"), selector


def test_the_outline_counts_channels() -> None:
    shift = np.array([0.0001, 0.02, 0.02, 50.0, np.nan])
    heights = [float(each) for each in re.findall(r"V([\d.]+)h4", html.outline(shift))]
    assert len(heights) == 20
    # 20 bins on three decades: 0.02 is 6 · log10(2) / 0.9 = bin 2 of 0..19
    assert [i for i, height in enumerate(heights) if height < 18] == [0, 2, 19]
    assert heights[2] == 1
    assert heights[0] == heights[19] == 9.5
    assert html.outline(np.array([np.nan])) == "M0 18H80"


def test_save(tmp_path: Path) -> None:
    report = samples.without_bn()
    path = report.save(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == samples.page("without_bn")
    with pytest.raises(OutputError, match=r"\.html, \.json or \.txt"):
        report.save(tmp_path / "report.pdf")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_the_templates_are_part_of_the_package() -> None:
    folder = resources.files("frostline.report")
    for name in ("page.html.jinja", "body.html.jinja", "parts.html.jinja", "page.css"):
        assert folder.joinpath(name).is_file()


# Pictures


def test_only_pictures_that_have_numbers() -> None:
    every = ["gaps", "attribution", "groups", "drift", "path", "sweep", "remedies"]
    assert list(figures.available(samples.lite0())) == every
    assert list(figures.available(samples.without_bn())) == ["gaps"]
    assert list(figures.available(samples.linted())) == []
    assert list(figures.available(samples.broken())) == []
    one = ["gaps", "drift", "path", "sweep", "remedies"]
    assert list(figures.available(samples.single())) == one


def test_bars_are_the_shares() -> None:
    from matplotlib.figure import Figure

    report = samples.lite0()
    found = report.attribution
    assert found is not None
    figure = Figure(figsize=(10, 3))
    figures.attribution(figure, report, wide=True)
    tops = {}
    for patch in figure.axes[0].patches:
        if colors.to_hex(patch.get_facecolor()) not in (palette.FROZEN, palette.TRAINS):
            continue
        for bar in patch.get_path().to_polygons(closed_only=False):
            x = round(float(bar[:, 0].mean()))
            far = bar[np.argmax(np.abs(bar[:, 1])), 1]
            tops[x] = (far, colors.to_hex(patch.get_facecolor()))
    assert sorted(tops) == list(range(49))
    for index, share in enumerate(found.shares):
        assert tops[index][0] == pytest.approx(100 * share / found.gap)
        assert tops[index][1] == (palette.FROZEN if index < 33 else palette.TRAINS)


def test_a_hollow_dot_where_the_interval_contains_0() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    figures.gaps(figure, samples.lite0(), wide=True)
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    hollow = [dot.get_markerfacecolor() == palette.GROUND for dot in dots]
    assert hollow == [False, False, True, False, False, False, True]


def test_colours_of_a_picture_are_variables_of_the_page() -> None:
    drawn = vector.svg(samples.lite0(), "attribution", wide=True, label="a <b>")
    assert drawn.startswith('<svg role="img" aria-label="a &lt;b&gt;" viewBox="0 0 840 250"')
    plain = re.sub(r"var\(--fl-\w+, #[0-9a-f]{6}\)", "", drawn)
    assert re.findall(r"#[0-9a-f]{6}\b(?!\w)", plain.replace("url(#", "")) == []
    texts = Reader(samples.page("single")).texts
    style = next(text for tag, text in texts if tag == "style")
    for colour in palette.COLOURS:
        assert f"{colour.variable}: {colour.light};" in style
        assert style.count(f"{colour.variable}: ") == 3  # light, dark, print
    css = resources.files("frostline.report").joinpath("page.css").read_text(encoding="utf-8")
    assert set(re.findall(r"--fl-\w+", css)) == {each.variable for each in palette.COLOURS}
    assert "#" not in css


SUMMARIES = {
    "lite0": "The model performs worse in use than in training mode: accuracy 78.5% instead of "
    "99.5% on the same 200 samples.",
    "healthy": "On these 200 samples the model performs in use as it does in training mode, "
    "within the margin of error.",
    "linted": "The check of the model's BN layers found 33 errors and 16 warnings.",
    "broken": "The model's output is not a number for 200 of 200 samples.",
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_the_page_opens_with_a_sentence_for_everyone(name: str) -> None:
    texts = [text for tag, text in Reader(samples.page(name)).texts if tag in ("p", "h1")]
    assert texts[:2] == [SUMMARIES[name], samples.EVERY[name]().verdict]


def test_the_sentence_for_everyone_in_other_cases() -> None:
    report = samples.lite0()
    clean = replace(report, measurement=None, findings=())
    assert wording.summary(clean) == "No problem was found in the model's BN layers."
    measured = report.measurement
    assert measured is not None
    total = replace(measured.gaps["total"], loss=samples.interval(0.3, 0.1))
    probes = {name: replace(each, hits=None) for name, each in measured.probes.items()}
    other = replace(measured, gaps={"total": total}, probes=probes)
    assert wording.summary(replace(report, measurement=other)) == (
        "The model performs better in use than in training mode: loss 0.513 instead of 0.071 on "
        "the same 200 samples."
    )


def test_plot_touches_nothing_of_the_user() -> None:
    code = (
        "import matplotlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "matplotlib.rcParams['font.size'] = 31.0\n"
        "before = dict(matplotlib.rcParams)\n"
        "import sample_reports\n"
        "figure = sample_reports.single().plot()\n"
        "figure.canvas.draw()\n"
        "sample_reports.linted().plot()\n"
        "assert len(figure.get_suptitle()) == 0\n"
        "assert dict(matplotlib.rcParams) == before\n"
        "print('pyplot', 'matplotlib.pyplot' in sys.modules)\n"
    )
    folder = str(Path(__file__).parent)
    done: Any = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    assert done.stdout == "pyplot False\n"


@pytest.mark.parametrize("name", samples.EVERY)
def test_the_page_can_be_read_by_a_screen_reader(name: str) -> None:
    read = Reader(samples.page(name))
    levels = [int(tag[1]) for tag in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert [read.tags.count(tag) for tag in ("main", "header", "title")] == [1, 1, 1]
    assert ("html", "lang", "en") in read.attributes
    headings = re.findall(r"<th\b[^>]*>", samples.page(name))
    assert all("scope=" in tag for tag in headings)
    for svg in re.findall(r"<svg\b[^>]*>", samples.page(name)):
        assert re.search(r'role="img" aria-label="[^"]+', svg) or 'aria-hidden="true"' in svg


def test_each_code_leads_to_what_it_means() -> None:
    report, text = samples.EVERY["lite0"](), samples.page("lite0")
    codes = {cause.code for cause in report.causes} | {each.code for each in report.findings}
    assert codes
    for code in codes:
        assert f'href="#about-{code}"' in text
        about = text[text.index(f'id="about-{code}"') :].partition("</article>")[0]
        assert re.search("When (not to use it|it is something else)", about)
    assert "`" not in re.sub(r"<pre.*?</pre>", "", text.partition('id="about-')[2], flags=re.DOTALL)
