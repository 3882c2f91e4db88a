"""A matplotlib picture as SVG inside a page: with the page's fonts and the colours of its theme.

matplotlib draws the picture in the colours of the light theme. Each colour then becomes a CSS
variable of the page; the light colour is the fallback outside of a page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from frostline.report import escaping, figures, palette
from frostline.types.report import Report

_NOTHING = {"Date": None, "Creator": None, "Format": None, "Type": None}


def svg(report: Report, name: str, *, wide: bool, label: str) -> str:
    """Return a picture as an ``<svg>`` element.

    Args:
        report: The report that it shows.
        name: One of :func:`frostline.report.figures.available`.
        wide: For a page, or for a phone.
        label: What a screen reader says.
    """
    kind = "wide" if wide else "narrow"
    return drawn(
        lambda figure: figures.available(report)[name](figure, report, wide=wide),
        figures.size(report, name, wide=wide),
        salt=f"frostline-{name}-{kind}",
        label=label,
    )


def drawn(draw: Callable[[Any], None], size: tuple[float, float], *, salt: str, label: str) -> str:
    """Return what ``draw`` draws into a figure of this size, in points, as an ``<svg>`` element.

    Args:
        draw: Draws into a matplotlib figure.
        size: Width and height.
        salt: Makes ids repeatable, and unique to the picture: a browser cannot resolve an id in a
            picture that is not displayed.
        label: What a screen reader says.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", figures.STYLE, {"svg.hashsalt": salt}]):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=_NOTHING)
    return _embedded(stream.getvalue(), label)


def _embedded(document: str, label: str) -> str:
    body = document[document.index("<svg") :]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    # Text nodes contain no bare < or >, so everything between the two is a tag.
    body = re.sub(r"<[^>]*>", lambda tag: _themed(tag.group()), body)
    body = re.sub(r">\s*\n\s*<", "><", body)
    attributes = f'<svg role="img" aria-label="{escaping.html(label)}"'
    return body.replace("<svg", attributes, 1).strip()


def _themed(tag: str) -> str:
    if tag.startswith("<svg"):
        return re.sub(r' (width|height|xmlns|xmlns:xlink|version)="[^"]*"', "", tag)
    if tag.startswith("<g "):
        tag = re.sub(r' id="[^"]*"', "", tag)
    tag = re.sub(r" font-family: [^;\"]*;", "", tag)
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r"\s*\n\s*", " ", tag)
    tag = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found.group()):.2f}", tag)
    for colour in palette.COLOURS:
        tag = tag.replace(colour.light, f"var({colour.variable}, {colour.light})")
    return tag
