"""The page in a browser: quiet, offline, legible; at phone and desktop width, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
import sample_reports as samples

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium is installed"),
]

NAMES = ("lite0", "hostile")

#: Contrast of every text with what is behind it (WCAG 2.1, section 1.4.3), the worst one first.
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const pixel = colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3) };
  const light = rgb => { const [r, g, b] = rgb.map(c => { c /= 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4 });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = element => { for (let e = element; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(', 0)')) return c }
    return 'white' };
  let worst = [99, ''];
  for (const element of document.body.querySelectorAll('*')) {
    if (element.tagName === 'STYLE' || !element.getClientRects().length) continue;
    if (![...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(element);
    const ink = light(pixel(element.ownerSVGElement ? style.fill : style.color));
    const ground = light(pixel(behind(element)));
    const ratio = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 120)];
  }
  return worst })()"""

#: Texts of pictures, and boxes, that stick out of the window.
OUTSIDE = """[...document.querySelectorAll('.page *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.left < -0.5 || box.right > innerWidth + 0.5) }
).map(e => e.outerHTML.slice(0, 100))"""

#: Smallest type in the pictures that are shown, in CSS pixels.
TYPE = """Math.min(...[...document.querySelectorAll('svg text')].filter(
  e => e.getClientRects().length).map(e => parseFloat(getComputedStyle(e).fontSize) *
  Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b)), 99)"""

#: What has the focus: its place in the document, its name, whether a ring and itself are seen.
FOCUS = """(() => {
  const e = document.activeElement;
  if (!e || e === document.body) return null;
  const style = getComputedStyle(e), box = e.getBoundingClientRect();
  return [[...document.querySelectorAll('*')].indexOf(e), e.outerHTML.slice(0, 80),
    style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1,
    box.width > 0 && box.bottom > 0 && box.top < innerHeight] })()"""

#: Places in the document of all that a keyboard must reach.
REACHED = """(() => {
  const all = [...document.querySelectorAll('*')];
  return all.filter(e => e.matches('a[href], summary, [tabindex="0"]') && e.checkVisibility())
    .map(e => all.indexOf(e)) })()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    with chromium.Browser() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name in NAMES:
        (folder / f"{name}.html").write_text(samples.page(name), encoding="utf-8")
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_quiet_offline_and_legible(
    name: str, width: int, dark: bool, browser: chromium.Browser, folder: Path
) -> None:
    path = folder / f"{name}.html"
    visit = browser.open(path, width=width, dark=dark)

    def ask(expression: str) -> Any:
        return browser.evaluate(visit, expression)

    assert ask("document.documentElement.scrollWidth") <= width
    assert ask(OUTSIDE) == []
    assert ask("document.scripts.length") == 0
    assert ask(f"matchMedia('(prefers-color-scheme: {'dark' if dark else 'light'})').matches")
    ground = ask("getComputedStyle(document.querySelector('.frostline')).backgroundColor")
    assert ground == ("rgb(16, 23, 30)" if dark else "rgb(254, 254, 254)")
    assert ask("parseFloat(getComputedStyle(document.querySelector('h1')).fontSize)") >= 20
    worst, where = ask(CONTRAST)
    assert worst >= 4.5, where
    assert ask(TYPE) >= 9
    shown = ask("[...document.querySelectorAll('figure svg')].filter(e => e.clientWidth).length")
    assert shown == ask("document.querySelectorAll('figure').length") > 0
    if name == "hostile":
        assert ask("document.querySelector('h1').innerText") == samples.HOSTILE
        assert ask("[...document.querySelectorAll('svg text')].some("
                   "e => e.textContent.startsWith('<script>alert'))")  # fmt: skip
    assert visit.errors == []
    assert visit.requests == [path.resolve().as_uri()]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_keyboard_reaches_everything_in_order_and_is_seen(
    width: int, browser: chromium.Browser, folder: Path
) -> None:
    visit = browser.open(folder / "lite0.html", width=width)

    def press(key: str, code: int, **more: Any) -> Any:
        given = {"key": key, "code": key, "windowsVirtualKeyCode": code, **more}
        for kind in ("keyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", visit.session, type=kind, **given)
        return browser.evaluate(visit, FOCUS)

    walked = []
    while (at := press("Tab", 9)) is not None and len(walked) < 300:
        walked.append(at)
    assert all(ring for _, _, ring, _ in walked), [e for _, e, ring, _ in walked if not ring]
    assert all(seen for *_, seen in walked), [e for _, e, _, seen in walked if not seen]
    places = [place for place, *_ in walked]
    assert places == sorted(set(places))
    reached = browser.evaluate(visit, REACHED)
    assert len(reached) > 3
    assert set(reached) <= set(places)

    closed = "[...document.querySelectorAll('details')].filter(e => !e.open).length"
    before = browser.evaluate(visit, closed)
    browser.evaluate(visit, "document.querySelector('details:not([open]) summary').focus()")
    press("Enter", 13, text="\r")
    assert browser.evaluate(visit, closed) == before - 1


def test_the_client_sees_errors_and_requests(browser: chromium.Browser, tmp_path: Path) -> None:
    """Without this the tests above could pass because nothing is listened to."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<style>body { width: 2000px }</style><img src='missing.png'>"
        "<script>console.log('hello'); nonsense()</script>"
    )
    visit = browser.open(page, width=390)
    assert browser.evaluate(visit, "document.documentElement.scrollWidth") >= 2000
    assert any("nonsense" in error for error in visit.errors)
    assert any("hello" in error for error in visit.errors)
    assert [Path(url).name for url in visit.requests] == ["bad.html", "missing.png"]


def test_all_of_it_is_printed(browser: chromium.Browser, folder: Path) -> None:
    visit = browser.open(folder / "lite0.html", width=1280, dark=True)
    browser.send("Emulation.setEmulatedMedia", visit.session, media="print", features=[])
    ground = "getComputedStyle(document.querySelector('.frostline')).backgroundColor"
    assert browser.evaluate(visit, ground) == "rgb(255, 255, 255)"
    hidden = "[...document.querySelectorAll('details code')].some(e => !e.checkVisibility())"
    assert not browser.evaluate(visit, hidden)
