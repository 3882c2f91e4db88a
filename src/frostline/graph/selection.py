"""Choose sites by group, path, name or pattern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from frostline.graph.addresses import closest
from frostline.types import ModelError, Site
from frostline.types.arguments import listed

GROUPS = ("all", "unfrozen", "frozen")


def select(sites: Sequence[Site], wanted: Any) -> tuple[Site, ...]:
    """Choose sites.

    Args:
        sites: All sites of a model, in execution order.
        wanted: ``"all"``, ``"unfrozen"`` (those whose statistics move in training), ``"frozen"``; a
            path, a layer name or a pattern (``block3/*``), a :class:`Site`, or a list of these.

    Returns:
        The chosen sites in execution order, each once.

    Raises:
        ModelError: The model has no site, nothing is chosen, or a name or pattern fits no site.
        DataError: Reading the list raised an error.
    """
    if not sites:
        raise ModelError("the model has no BN layer.")
    if isinstance(wanted, str) and wanted in GROUPS:
        chosen = [
            site for site in sites if wanted == "all" or site.stats_frozen == (wanted == "frozen")
        ]
        if not chosen:
            other = "unfrozen" if wanted == "frozen" else "frozen"
            raise ModelError(
                f"no BN layer is {wanted}: all {len(sites)} are {other}; pass sites='all' or "
                f"sites='{other}' to change those. Received: sites={wanted!r}"
            )
        return tuple(chosen)
    entries = [wanted] if isinstance(wanted, (str, Site)) else wanted
    if not isinstance(entries, Iterable):
        raise ModelError(_kinds(wanted))
    found: set[str] = set()
    entries = listed(entries, "sites")
    for entry in entries:
        found.update(_fitting(sites, entry))
    if not found:
        raise ModelError(f"sites names no BN layer. Received: sites={wanted!r}")
    return tuple(site for site in sites if site.path in found)


def _kinds(received: Any) -> str:
    return (
        "sites must be 'all', 'unfrozen', 'frozen', a path, a layer name, a pattern such as "
        f"'block3/*', or a list of those. Received: {received!r}"
    )


def _fitting(sites: Sequence[Site], entry: Any) -> list[str]:
    if isinstance(entry, Site):
        entry = entry.path
    if not isinstance(entry, str):
        raise ModelError(_kinds(entry))
    if entry in GROUPS:
        return [site.path for site in select(sites, entry)]
    exact = [site.path for site in sites if site.path == entry]
    if exact:
        return exact
    found = [
        site.path
        for site in sites
        if site.name == entry or fnmatchcase(site.path, entry) or fnmatchcase(site.name, entry)
    ]
    if not found:
        hint = closest(entry, [site.path for site in sites])
        raise ModelError(
            f"no BN layer has the path or name {entry!r}, nor fits it as a pattern. {hint}"
            f"Received: sites={entry!r}"
        )
    return found
