"""What rules find, and which rules were not applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "info"]
Certainty = Literal["is", "may"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rule found at one site, or at the sites that it concerns together.

    Attributes:
        code: Stable code of the rule: ``FL203``.
        name: The rule's kebab-case name; it reads as the problem.
        severity: ``"error"``: the model computes something else than intended. ``"warning"``: it
            is likely to. ``"info"``: worth knowing, often intended.
        certainty: ``"is"`` follows from what was read; ``"may"`` is inferred.
        sites: Paths of the sites, in execution order.
        message: What is wrong, the number that shows it, what to do. At most 120 characters, and
            without paths, so that equal findings of many sites are shown once.
        evidence: The numbers behind the message, by name.
        fix: The repair in one word, for example ``"freeze"``; ``None`` without a single one.
    """

    code: str
    name: str
    severity: Severity
    certainty: Certainty
    sites: tuple[str, ...]
    message: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A rule that was not applied, and why.

    Attributes:
        code: The rule's code.
        name: Its kebab-case name.
        reason: Why, in words.
    """

    code: str
    name: str
    reason: str
