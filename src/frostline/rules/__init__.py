"""Rules: what is wrong with a model, one pure function each, with its documentation beside it.

A rule reads :class:`~frostline.types.facts.ModelFacts`, and a
:class:`~frostline.types.measured.Measurement` if it needs data, and yields :class:`Hit` objects. It
knows no framework, opens no file and changes nothing. What several rules need is computed once and
passed by name (:mod:`frostline.rules.fixtures`); what rules and causes both ask of a site has one
answer in :mod:`frostline.rules.predicates`. Codes are public and never reused: ``FL1xx`` is
configuration, ``FL2xx`` stored numbers, ``FL3xx`` needs data, ``FL9xx`` is off unless selected.

Other packages add rules through the entry-point group ``frostline.rules``: each entry point names
a module whose import runs its ``@rule`` decorators.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import logging
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

from frostline.rules.examples import filled
from frostline.rules.fixtures import Fixtures
from frostline.types import Certainty, Finding, FrostlineError, Severity, Skipped
from frostline.types.facts import ModelFacts
from frostline.types.measured import Measurement

log = logging.getLogger("frostline")

Needs = Literal["sites", "statistics", "optimizer", "data"]
Check = Callable[..., Iterator["Hit"]]

#: The last heading of a rule's documentation; one without options says so before it.
_REFERENCES = "\n## References\n"

#: Why a rule was not applied, by what it needs.
_LACKS: Mapping[Needs, str] = {
    "statistics": "no site has stored numbers: the model is not built, call it once",
    "optimizer": "no training steps: the model is not compiled, or has not been trained since",
    "data": "needs data: frostline diagnose",
}


@dataclass(frozen=True, kw_only=True)
class Hit:
    """What a rule yields: a finding without the rule's own name on it.

    Attributes:
        sites: Paths of the sites concerned.
        message: As in :class:`~frostline.types.Finding`.
        evidence: The numbers behind it.
        certainty: ``"is"`` or ``"may"``.
        fix: The repair as a word, where it is another one than the rule's; empty where none is
            advised.
        severity: Where it is another one than the rule's.
    """

    sites: tuple[str, ...]
    message: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    certainty: Certainty = "is"
    fix: str | None = None
    severity: Severity | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule.

    Attributes:
        code: Stable code: ``FL203``.
        name: Kebab-case name that reads as the problem.
        severity: Of its findings, where a :class:`Hit` does not say otherwise.
        needs: ``"sites"``: any model. ``"statistics"``: built layers. ``"optimizer"``: a compiled
            model. ``"data"``: samples.
        fix: The repair as a word, or ``None``.
        check: The function. Its positional parameters name what it needs: ``model``,
            ``measurement`` (with ``needs="data"``) or any of :mod:`frostline.rules.fixtures`; its
            keyword-only parameters are the rule's options.
    """

    code: str
    name: str
    severity: Severity
    needs: Needs
    fix: str | None
    check: Check

    @property
    def summary(self) -> str:
        """First line of the documentation."""
        return self.documentation.partition("\n")[0]

    @property
    def documentation(self) -> str:
        """The function's docstring: Markdown under the headings that every rule has."""
        text = filled(inspect.getdoc(self.check) or "")
        return (
            text
            if self.options
            else text.replace(_REFERENCES, f"\n## Options\nNone.\n{_REFERENCES}")
        )

    @property
    def options(self) -> dict[str, Any]:
        """Name -> default of the rule's thresholds."""
        return {
            parameter.name: parameter.default
            for parameter in inspect.signature(self.check).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }


_REGISTRY: dict[str, Rule] = {}


def rule(
    code: str, name: str, *, severity: Severity, needs: Needs = "sites", fix: str | None = None
) -> Callable[[Check], Check]:
    """Register a function as a rule.

    Args:
        code: Capital letters and three digits, never used before.
        name: Kebab-case name that reads as the problem.
        severity: ``"error"``, ``"warning"`` or ``"info"``.
        needs: What must be there for the rule to be applied.
        fix: The repair as a word.

    Returns:
        A decorator that gives the function back as it is.

    Raises:
        ValueError: A malformed code or name, or one that another rule has.
    """
    if not re.fullmatch(r"[A-Z]{2,8}\d{3}", code):
        raise ValueError(f"a rule's code is capital letters and three digits. Received: {code!r}")
    if not re.fullmatch(r"[a-z]+(-[a-z0-9]+)+", name):
        raise ValueError(f"a rule's name is kebab-case, two words at least. Received: {name!r}")

    def register(check: Check) -> Check:
        for other in _REGISTRY.values():
            if code == other.code or name == other.name:
                raise ValueError(
                    f"rule {code} {name} has a code or name of {other.code} {other.name} "
                    f"({other.check.__module__}). Received: {check.__module__}.{check.__qualname__}"
                )
        _REGISTRY[code] = Rule(
            code=code, name=name, severity=severity, needs=needs, fix=fix, check=check
        )
        return check

    return register


def all_rules() -> tuple[Rule, ...]:
    """Every rule, sorted by code: Frostline's own and those of installed plugins."""
    _load()
    return tuple(_REGISTRY[code] for code in sorted(_REGISTRY))


def get(reference: str) -> Rule:
    """Return the rule of a code or kebab name.

    Raises:
        FrostlineError: There is none; the text has the closest ones.
    """
    for entry in all_rules():
        if reference.upper() == entry.code or reference.lower() == entry.name:
            return entry
    raise FrostlineError(_unknown(reference))


def select(
    select: str | Iterable[str] | None = None, ignore: str | Iterable[str] | None = None
) -> tuple[Rule, ...]:
    """Choose rules by code, prefix of a code, or kebab name.

    The longer of two prefixes decides, so ``select="FL203", ignore="FL2"`` leaves FL203. Without
    ``select`` all rules apply but the FL9xx.

    Args:
        select: ``"FL2"``, ``"FL203"``, ``"stale-running-statistics"``; several in a list, or
            separated by commas.
        ignore: The same; a mapping may give the reason of each.

    Returns:
        Rules sorted by code.

    Raises:
        FrostlineError: A word that fits no rule.
    """
    return _choose(select, ignore)


def ignored(
    select: str | Iterable[str] | None = None, ignore: str | Iterable[str] | None = None
) -> tuple[Skipped, ...]:
    """The rules that ``ignore`` takes out of ``select``, each with the reason when one is given."""
    kept = {entry.code for entry in _choose(select, ignore)}
    return tuple(
        Skipped(code=entry.code, name=entry.name, reason=_reason(entry, ignore))
        for entry in _choose(select, None)
        if entry.code not in kept
    )


def check(
    facts: ModelFacts,
    rules: Iterable[Rule],
    *,
    measurement: Measurement | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[tuple[Finding, ...], tuple[Skipped, ...]]:
    """Apply rules to the facts of a model.

    Args:
        facts: From :func:`frostline.adapters.read_facts`, or written by hand.
        rules: From :func:`select`.
        measurement: Of the same model on data; without it rules that need data are skipped.
        options: Code -> thresholds that replace the rule's defaults.

    Returns:
        Findings, errors first and then by code and execution order; and the rules that could not
        be applied to this model, with the reason. Both are empty for a model without BN.

    Raises:
        FrostlineError: An option that the rule does not have.
    """
    found: list[Finding] = []
    skipped: list[Skipped] = []
    if not facts.sites:
        return (), ()
    present, given = _present(facts), Fixtures(facts, measurement)
    if measurement is not None:
        present.add("data")
    for entry in rules:
        if entry.needs not in present:
            skipped.append(Skipped(code=entry.code, name=entry.name, reason=_LACKS[entry.needs]))
            continue
        thresholds = dict((options or {}).get(entry.code, {}))
        strange = sorted(thresholds.keys() - entry.options.keys())
        if strange:
            raise FrostlineError(
                f"{entry.code} has no option {strange[0]!r}; its options are "
                f"{', '.join(entry.options) or 'none'}. Received: {thresholds!r}"
            )
        arguments = given.arguments(entry.check)
        found.extend(_finding(entry, hit) for hit in entry.check(*arguments, **thresholds))
    ranks: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
    found.sort(key=lambda finding: (ranks[finding.severity], finding.code))  # stable: keeps order
    return tuple(found), tuple(skipped)


def _choose(
    wanted: str | Iterable[str] | None, unwanted: str | Iterable[str] | None
) -> tuple[Rule, ...]:
    rules = all_rules()
    for_it = None if wanted is None else _words("select", wanted, rules)
    against = () if unwanted is None else _words("ignore", unwanted, rules)
    return tuple(entry for entry in rules if _rank(entry, for_it) > _rank(entry, against))


def _finding(origin: Rule, hit: Hit) -> Finding:
    return Finding(
        code=origin.code,
        name=origin.name,
        severity=hit.severity or origin.severity,
        certainty=hit.certainty,
        sites=hit.sites,
        message=hit.message,
        evidence=hit.evidence,
        fix=origin.fix if hit.fix is None else hit.fix or None,
    )


def _present(facts: ModelFacts) -> set[Needs]:
    present: set[Needs] = {"sites"}
    if any(site.variance is not None for site in facts):
        present.add("statistics")
    if facts.steps:
        present.add("optimizer")
    return present


@functools.cache
def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for point in metadata.entry_points(group="frostline.rules"):
        try:
            point.load()
        except Exception as error:  # a broken plugin must not take the other rules with it
            log.warning("plugin %s gives no rules: %s: %s", point, type(error).__name__, error)


def _words(name: str, given: str | Iterable[str], rules: tuple[Rule, ...]) -> tuple[str, ...]:
    parts = given.split(",") if isinstance(given, str) else [w for g in given for w in g.split(",")]
    words = tuple(part.strip() for part in parts if part.strip())
    for word in words:
        if not any(_fits(word, entry) for entry in rules):
            raise FrostlineError(_unknown(word, f"{name}="))
    return words


def _fits(word: str, entry: Rule) -> int:
    """How precisely a word names a rule: 0 when it does not."""
    if word.lower() == entry.name:
        return len(entry.code)
    return len(word) if entry.code.startswith(word.upper()) else 0


def _rank(entry: Rule, words: tuple[str, ...] | None) -> float:
    if words is None:
        return 0 if re.fullmatch(r"[A-Z]+9\d\d", entry.code) else 0.5
    return max((_fits(word, entry) for word in words), default=0)


def _reason(entry: Rule, ignore: str | Iterable[str] | None) -> str:
    if isinstance(ignore, Mapping):
        for words, reason in ignore.items():
            if any(_fits(word.strip(), entry) for word in words.split(",")):
                return f"ignored: {reason}"
    return "ignored"


def _unknown(word: str, argument: str = "") -> str:
    known = [text for entry in all_rules() for text in (entry.code, entry.name)]
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    hint = f"Closest: {', '.join(close)}. " if close else "frostline rule --all lists them. "
    return f"no rule {word!r}. {hint}Received: {argument}{word!r}"
