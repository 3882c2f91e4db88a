"""``frostline rule``: the documentation of the rules."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli.options import Format, FormatOption, command

if TYPE_CHECKING:
    from frostline.rules import Rule


@command
def rule(
    reference: Annotated[
        str | None, typer.Argument(metavar="RULE", help="A code or a name; all when left out.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All documentation.")] = False,
    format: FormatOption = Format.text,
) -> int:
    """Explain a rule, or list all of them. Needs no backend."""
    from frostline import rules
    from frostline.cli.terminal import echo

    chosen = rules.all_rules() if reference is None else (rules.get(reference),)
    if format is Format.json:
        echo(json.dumps([_plain(entry) for entry in chosen], indent=2))
    elif reference is None and not every:
        width = max(len(entry.name) for entry in chosen)
        for entry in chosen:
            echo(f"{entry.code}  {entry.severity:7}  {entry.name:{width}}  {entry.summary}")
    else:
        echo("\n\n".join(_page(entry) for entry in chosen))
    return 0


def _page(entry: Rule) -> str:
    fix = "" if entry.fix is None else f", fix: {entry.fix}"
    head = f"# {entry.code} {entry.name}\n\n{entry.severity}, needs: {entry.needs}{fix}"
    return f"{head}\n\n{entry.documentation}"


def _plain(entry: Rule) -> dict[str, object]:
    facts = {name: value for name, value in asdict(entry).items() if name != "check"}
    return {**facts, "options": entry.options, "documentation": entry.documentation}
