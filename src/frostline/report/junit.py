"""The report as JUnit XML, which CI services show as a table of tests: one test for each rule."""

from __future__ import annotations

from xml.etree import ElementTree

from frostline.report import wording
from frostline.report.escaping import printable
from frostline.types.findings import Finding
from frostline.types.report import Report


def as_junit(report: Report) -> str:
    """Return a test suite: causes and rules are tests, errors and warnings are failures.

    Notes do not fail a rule; they stand in its ``system-out``. Rules that could not be applied are
    skipped tests, each with its reason.
    """
    from frostline.rules import all_rules

    suite = ElementTree.Element("testsuite", name="frostline")
    names = {entry.code: entry.name for entry in all_rules()}
    for cause in report.causes:
        if cause.code != "NONE":
            text = cause.message
            if cause.sites:
                text = f"{wording.listed(cause.sites, 5)}: {text}"
            _fail(_case(suite, "cause", cause.code), cause.code, text)
    found: dict[str, list[Finding]] = {}
    for finding in report.findings:
        found.setdefault(finding.code, []).append(finding)
    for code in report.rules:
        case = _case(suite, "rule", f"{code} {names.get(code, '')}".rstrip())
        lines = [f"{wording.listed(f.sites)}: {wording.sentence(f)}" for f in found.get(code, ())]
        if lines and found[code][0].severity != "info":
            _fail(case, code, "\n".join(lines))
        elif lines:
            ElementTree.SubElement(case, "system-out").text = _plain("\n".join(lines))
    for skipped in report.skipped:
        case = _case(suite, "rule", f"{skipped.code} {skipped.name}")
        ElementTree.SubElement(case, "skipped", message=_plain(skipped.reason))
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(name, str(sum(1 for _ in suite.iter(tag))))
    suite.set("errors", "0")
    ElementTree.indent(suite)
    text = ElementTree.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(suite: ElementTree.Element, kind: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=f"frostline.{kind}", name=_plain(name)
    )


def _fail(case: ElementTree.Element, kind: str, text: str) -> None:
    plain = _plain(text)
    message = plain.partition("\n")[0]
    ElementTree.SubElement(case, "failure", type=kind, message=message).text = plain


def _plain(text: str) -> str:
    return printable(text, keep="\n")
