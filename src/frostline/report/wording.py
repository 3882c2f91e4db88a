"""How a report says things, the same in every form: numbers, names, groups, reasons.

Plain text only; each form escapes what is special to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from frostline.types import Finding, Skipped


def printable(name: str) -> str:
    r"""Show what does not print as an escape: a terminal would obey it, a file not hold it.

    >>> printable("bn\x1b[31m"), printable("中文")
    ('bn\\x1b[31m', '中文')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def count(number: int, word: str) -> str:
    """Return a number with its noun.

    >>> count(1, "site"), count(3, "site")
    ('1 site', '3 sites')
    """
    return f"{number} {word}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int | None = None) -> str:
    """Return names on one line, the rest as a number.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = names if most is None or len(names) <= most else names[:most]
    more = len(names) - len(shown)
    return ", ".join(map(printable, shown)) + (f" and {more} more" if more else "")


def sentence(finding: Finding) -> str:
    """Return a finding's message, with a word when it is inferred."""
    text = printable(finding.message)
    return text if finding.certainty == "is" else f"{text} (inferred)"


def by_code(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Group findings of one rule, in the order in which the rules first appear."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.code, []).append(finding)
    return list(groups.values())


def by_reason(skipped: Iterable[Skipped]) -> dict[str, list[str]]:
    """Return reason -> codes of the rules that were not applied for it."""
    reasons: dict[str, list[str]] = {}
    for each in skipped:
        reasons.setdefault(each.reason, []).append(each.code)
    return reasons
