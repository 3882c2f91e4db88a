"""The report as a page: one file without scripts that loads nothing.

This module prepares plain values; ``page.html.jinja`` lays them out. Every text is escaped; only
the pictures and the style sheet are inserted as they are.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from frostline.report import escaping, excerpts, figures, palette, vector, wording
from frostline.types import Array, Finding
from frostline.types.measured import Remedy
from frostline.types.report import Report

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


#: With more sites than this, their table starts folded.
MANY_SITES = 60

#: Histogram in a site's row: number of bins, and range of the shift on a log scale.
_BINS, _FROM, _TO = 20, 0.01, 10.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as SVG, in two widths."""

    name: str
    title: str
    wide: str
    narrow: str


def page(report: Report) -> str:
    """Return the report as a complete HTML document."""
    return environment().get_template("page.html.jinja").render(**_context(report))


def fragment(report: Report) -> str:
    """Return the report for a notebook: one ``<div>`` with its own style sheet."""
    return environment().get_template("body.html.jinja").render(**_context(report))


@functools.cache
def environment() -> Environment:
    """Return what renders the templates of this room."""
    import jinja2

    folder = resources.files("frostline.report")
    names = [template.name for template in folder.iterdir() if template.name.endswith(".jinja")]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(texts),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        wording.number, wording.percent, wording.interval, wording.count, wording.listed,
        wording.sentence, wording.certainty, wording.fact, wording.probe, wording.state,
        wording.alike, excerpts.effects, pasted, filled, coded,
    )  # fmt: skip
    environment.filters |= {filter_.__name__: filter_ for filter_ in filters}
    # autoescape then does for <, > and & what escaping.html does elsewhere.
    environment.finalize = lambda value: escaping.printable(value) if type(value) is str else value
    return environment


def pasted(code: str) -> Markup:
    """Return code to paste: as any text, but its line breaks stay."""
    from markupsafe import Markup, escape

    return Markup(escape(escaping.printable(code, keep="\n")))


def _context(report: Report) -> dict[str, Any]:
    from markupsafe import Markup

    style = (resources.files("frostline.report") / "page.css").read_text(encoding="utf-8")
    measured, found = report.measurement, report.attribution
    probes = [] if measured is None else excerpts.probes(measured)
    groups = wording.by_code(report.findings)
    return {
        "style": Markup(palette.stylesheet() + style),
        "report": report,
        "measured": measured,
        "summary": wording.summary(report),
        "status": wording.status(report),
        "origin": wording.origin(report),
        "tiles": wording.tiles(report),
        "remedies": report.remedies,
        "best": excerpts.first_choice(report.remedies),
        "causes": [cause for cause in report.causes if cause.code != "NONE"],
        "rule_names": {finding.code: finding.name for finding in report.findings},
        "explained": explained(report),
        "unexplained": excerpts.unexplained(report),
        "probes": probes,
        "pictures": pictures(report),
        "top_sites": [] if found is None else excerpts.top_sites(found),
        "completeness": "" if found is None else wording.completeness(found),
        "symbols": wording.SEVERITIES,
        "findings": [(group, remedy_of(report, group[0])) for group in groups],
        "site_rows": site_rows(report),
        "many_sites": len(report.sites) > MANY_SITES,
        "unchecked": wording.unchecked(report),
        "readings": wording.readings(report),
    }


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What a code means: its first sentence, and the parts for somebody who meets it."""

    code: str
    name: str
    summary: str
    parts: tuple[tuple[str, str], ...]


#: Headings of a rule's or cause's documentation that the page repeats; the rest is in the docs.
_REPEATED = (
    "Why is this bad?", "When not to use it",
    "What it looks like", "What helps", "When it is something else",
)  # fmt: skip


def explained(report: Report) -> list[Explained]:
    """Return what each code on the page means; codes of plugins that are missing are left out."""
    from frostline.causes.registry import all_causes
    from frostline.rules import all_rules

    known = {str(entry.code): ("", entry.documentation) for entry in all_causes()}
    known |= {entry.code: (entry.name, entry.documentation) for entry in all_rules()}
    codes = dict.fromkeys(
        [*(cause.code for cause in report.causes), *(finding.code for finding in report.findings)]
    )
    found = []
    for code in codes:
        name, documentation = known.get(code, ("", ""))
        if documentation:
            sections = re.split(r"^## (.+)$", documentation, flags=re.MULTILINE)
            parts = dict(zip(sections[1::2], map(str.strip, sections[2::2]), strict=True))
            kept = tuple((title, parts[title]) for title in _REPEATED if title in parts)
            found.append(Explained(code=code, name=name, summary=sections[0].strip(), parts=kept))
    return found


def coded(text: str) -> Markup:
    """Return text in which what stands between backticks is code."""
    from markupsafe import Markup, escape

    pieces = [escape(escaping.printable(piece, keep="\n")) for piece in text.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if number % 2 else piece
        for number, piece in enumerate(pieces)
    )


def pictures(report: Report) -> dict[str, Picture]:
    """Return name -> picture, for each that the report has numbers for."""
    from markupsafe import Markup

    found: dict[str, Picture] = {}
    for name in figures.available(report):
        label = wording.PICTURES[name]
        wide, narrow = (
            Markup(vector.svg(report, name, wide=wide, label=label)) for wide in (True, False)
        )
        found[name] = Picture(name=name, title=label, wide=wide, narrow=narrow)
    return found


def remedy_of(report: Report, finding: Finding) -> Remedy | None:
    """Return the remedy for a finding: has the same fix, and causes that match it best."""
    codes = {cause.code for cause in report.causes if finding.code in cause.findings}
    if not codes:  # no cause cites it: take causes at the same layers
        codes = {cause.code for cause in report.causes if set(cause.sites) & set(finding.sites)}
    fitting = [remedy for remedy in report.remedies if remedy.fix == finding.fix]
    return min(fitting, key=lambda remedy: len(set(remedy.causes) ^ codes), default=None)


def site_rows(report: Report) -> list[dict[str, Any]]:
    """Return the rows of the table of sites; numbers are ``None`` where nothing was measured."""
    sites = {} if report.measurement is None else report.measurement.sites
    found = report.attribution
    shares = {} if found is None else dict(
        zip(found.paths, excerpts.relative_shares(found).tolist(), strict=True)
    )  # fmt: skip
    rows = []
    for site in report.sites:
        measured = sites.get(site.path)
        rows.append(
            {
                "site": site,
                "share": shares.get(site.path),
                "shift": None if measured is None else excerpts.quantiles(measured.shift),
                "ratio": None
                if measured is None
                else excerpts.quantiles(measured.ratio, (0.5,))[0],
                "outline": None if measured is None else outline(measured.shift),
            }
        )
    return rows


def outline(shift: Array) -> str:
    """Return the histogram of a site's shift as an SVG path of 80 by 18 units.

    Every site has the same 20 bins, so that rows compare: on a log scale from 0.01 to 10 standard
    deviations. Values outside count in the first or the last bin.
    """
    finite = shift[np.isfinite(shift)]
    if not finite.size:
        return "M0 18H80"
    edges = np.geomspace(_FROM, _TO, _BINS + 1)
    counts, _ = np.histogram(np.clip(finite, _FROM, _TO), edges)
    heights = 18 - np.round(17 * counts / counts.max(), 1)
    step = 80 // _BINS
    steps = " ".join(f"V{height:g}h{step}" for height in heights)
    return f"M0 18{steps}V18Z"


def filled(share: float | None) -> float:
    """Return the filled part of a bar in percent."""
    if share is None or not math.isfinite(share):
        return 0.0
    return round(100 * min(max(share, 0.0), 1.0), 1)
