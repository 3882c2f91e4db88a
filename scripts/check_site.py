"""Check a built site: internal links and anchors lead somewhere, nothing comes from outside.

Usage: ``python scripts/check_site.py build/site``. A link to another site is allowed; a script,
style, font or picture from one is not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Elements whose address the browser loads by itself.
_LOADS = {"script", "img", "iframe", "source", "video", "audio", "embed", "object", "use", "input"}
#: What a ``<link>`` is, when nothing is loaded for it.
_QUIET_LINKS = {"canonical", "prev", "next", "alternate", "author", "license"}
_STYLE_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


@dataclass
class Page(HTMLParser):
    """Names that a page defines, links that it has, and addresses that it loads."""

    names: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element defines, links to and loads."""
        values = {name: value or "" for name, value in attrs}
        self.names |= {values[key] for key in ("id", "name") if key in values}
        self._in_style = tag == "style"
        loads = tag in _LOADS
        if tag == "link":
            loads = not set(values.get("rel", "").split()) & _QUIET_LINKS
        for key in ("src", "href", "data", "poster"):
            if values.get(key):
                (self.loaded if loads else self.links).append(values[key])
        if "style" in values:
            self.loaded += _style_urls(values["style"])

    def handle_data(self, data: str) -> None:
        """Note what a style sheet in the page loads."""
        if self._in_style:
            self.loaded += _style_urls(data)


def problems(site: Path) -> Iterator[str]:
    """Yield what is wrong with a site, one line each.

    Args:
        site: Folder of the built site.
    """
    pages: dict[Path, Page] = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    if not pages:
        yield f"{site}: no page"
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for address in page.loaded:
            if urlsplit(address).netloc:
                yield f"{name}: loads {address}"
        for address in [*page.links, *page.loaded]:
            if problem := _broken(site, path, address, pages):
                yield f"{name}: {problem}"
    for path in sorted(site.rglob("*.css")):
        for address in _style_urls(path.read_text(encoding="utf-8")):
            if urlsplit(address).netloc:
                yield f"{path.relative_to(site).as_posix()}: loads {address}"


def _style_urls(text: str) -> list[str]:
    return [first or second for first, second in _STYLE_URL.findall(text)]


def _broken(site: Path, path: Path, address: str, pages: dict[Path, Page]) -> str | None:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    target = path
    if parts.path:
        folder = site if parts.path.startswith("/") else path.parent
        target = (folder / unquote(parts.path).lstrip("/")).resolve()
        if target.is_dir():
            target /= "index.html"
        if not target.is_file():
            return f"{address} leads nowhere"
    if parts.fragment and parts.fragment != "__skip" and target in pages:
        names = pages[target].names
        if not {parts.fragment, unquote(parts.fragment)} & names:
            return f"{address}: no such anchor"
    return None


def main(arguments: Sequence[str]) -> int:
    """Check the site in the folder that is given; returns the exit code."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    site = Path(arguments[0]).resolve()
    found = list(problems(site))
    print("\n".join(found) or f"{site.name}: links lead somewhere, nothing comes from outside")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
