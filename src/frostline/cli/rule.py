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
        echo(json.dumps([_plain(each) for each in chosen], indent=2))
    elif reference is None and not every:
        width = max(len(each.name) for each in chosen)
        for each in chosen:
            echo(f"{each.code}  {each.severity:7}  {each.name:{width}}  {each.summary}")
    else:
        echo("\n\n".join(_page(each) for each in chosen))
    return 0


def _page(each: Rule) -> str:
    fix = "" if each.fix is None else f", fix: {each.fix}"
    head = f"# {each.code} {each.name}\n\n{each.severity}, needs: {each.needs}{fix}"
    return f"{head}\n\n{each.documentation}"


def _plain(each: Rule) -> dict[str, object]:
    facts = {name: value for name, value in asdict(each).items() if name != "check"}
    return {**facts, "options": each.options, "documentation": each.documentation}
