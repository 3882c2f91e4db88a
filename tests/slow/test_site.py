"""The site builds without a warning and a network, and the guides print what they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import check_site
import fill_examples
import pytest
import site_pages

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
pytest.importorskip("mkdocs")
torch_only = pytest.mark.skipif(
    os.environ["KERAS_BACKEND"] != "torch", reason="outputs are those of the torch backend"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of MkDocs ends the build."""
    folder = tmp_path_factory.mktemp("site")
    code = "import mkdocs.__main__ as m; m.cli()"
    done = subprocess.run(
        [sys.executable, "-c", code, "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "torch", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WARNING -" not in done.stderr
    return folder


@pytest.mark.once
@pytest.mark.timeout(1200)  # the first of these builds the site
def test_every_link_leads_somewhere_and_nothing_comes_from_outside(site: Path) -> None:
    assert list(check_site.problems(site)) == []


@pytest.mark.once
@pytest.mark.timeout(1200)  # the first of these builds the site
def test_every_rule_cause_and_remedy_has_a_page_with_what_was_measured(site: Path) -> None:
    pages = site_pages.code_pages()
    assert len(pages) > 70
    for code, uri in pages.items():
        text = (site / uri).with_suffix(".html").read_text()
        assert f">{code}" in text
        assert "When not to use it" in text or "When it is something else" in text
    said = (site / "rules" / "FL204.html").read_text()
    assert re.search(r"FL204.{0,80} at .*bn", said)
    assert "nothing found" in said  # of the second example
    assert "recalibrated 2 sites" in (site / "remedies" / "recalibrate.html").read_text()


@pytest.mark.once
@pytest.mark.timeout(1200)  # the first of these builds the site
def test_the_overview_names_all_that_is_public(site: Path) -> None:
    import frostline as fl

    text = (site / "all.html").read_text()
    names = [name for name in site_pages._public() if f"fl.{name}<" not in text]
    assert names == []
    assert set(fl.__all__) - set(site_pages._public()) == {"__version__", "callbacks", "layers"}
    assert all(code in text for code in site_pages.code_pages())


@pytest.mark.once
def test_what_is_wrong_with_a_site_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="here">A</h1><a href="b.html#there">1</a><a href="c.html">2</a>'
        '<a href="#here">3</a>'
        '<script src="https://cdn.example/x.js"></script><img src="/picture.png">'
        '<a href="https://example.org">fine</a><div style="background: url(//x.example/y.png)">'
    )
    (tmp_path / "b.html").write_text("<p>B</p>")
    (tmp_path / "s.css").write_text("@font-face { src: url('https://fonts.example/f.woff2') }")
    assert list(check_site.problems(tmp_path)) == [
        "a.html: loads https://cdn.example/x.js",
        "a.html: loads //x.example/y.png",
        "a.html: b.html#there: no such anchor",
        "a.html: c.html leads nowhere",
        "a.html: /picture.png leads nowhere",
        "s.css: loads https://fonts.example/f.woff2",
    ]


@pytest.mark.once
def test_links_and_codes_of_a_page() -> None:
    text = (
        "# FL204 here\n[gan](../examples/gan.py) `EMA_LAG` FL101 [a `b`\nc](faq.md#x) `x\ny` "
        "[out](https://x.example) [tests](../tests/conftest.py)\n```\nFL101 [a](b.md)\n```\n"
    )
    assert site_pages.linked(text, "docs/guide.md", "guide.md") == (
        "# FL204 here\n[gan](examples/gan.md) [`EMA_LAG`](causes/EMA_LAG.md) "
        "[FL101](rules/FL101.md) [a `b`\nc](faq.md#x) `x\ny` "
        "[out](https://x.example) tests\n```\nFL101 [a](b.md)\n```\n"
    )
    assert site_pages.linked("FL204 and FL101", "docs/rules/FL204.md", "rules/FL204.md") == (
        "FL204 and [FL101](FL101.md)"
    )


@torch_only
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guides_print_what_they_show(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path))
    text = page.read_text()
    found = list(fill_examples.examples(text))
    assert text.count("```python") == len(found) >= 2
    assert all(example.shown.strip() for example in found)
    assert fill_examples.filled(text) == text
