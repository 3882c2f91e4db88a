"""``lint`` and ``rule``: findings of a model file, and the documentation of the rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import typer

from frostline import rules
from frostline.cli import showing
from frostline.cli.showing import Form


def run(
    source: str,
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    format: Form = "text",
    output: Path | None = None,
    force: bool = False,
    exit_zero: bool = False,
    state: str | None = None,
) -> int:
    """Apply the rules that need no data to a model; 1 when an error or a warning is found.

    Args:
        source: MODEL, as typed.
        select: Codes, prefixes or names; empty for the default set.
        ignore: The same.
        format: How to print.
        output: Also write the report to this ``.html``, ``.json`` or ``.txt`` file.
        force: Overwrite it.
        exit_zero: Return 0 whatever is found.
        state: File with the ``state_dict`` of a torch module.
    """
    showing.check_output(output, force=force)
    rules.select(select or None, ignore or None)  # a misspelt code is told before the model loads
    from frostline.cli.models import load
    from frostline.verbs.diagnose import lint

    report = lint(load(source, state), select=select or None, ignore=ignore or None)
    return showing.show(report, format=format, output=output, exit_zero=exit_zero)


def show_rules(
    reference: str | None, *, every: bool = False, format: Literal["text", "json"] = "text"
) -> int:
    """Print the documentation of one rule, or the list of all; needs no backend.

    Args:
        reference: Code or name; ``None`` prints the list.
        every: With no reference: print all the documentation, not one line for each.
        format: ``"text"`` (the documentation is Markdown) or ``"json"``.
    """
    chosen = rules.all_rules() if reference is None else (rules.get(reference),)
    if format == "json":
        typer.echo(json.dumps([_plain(each) for each in chosen], indent=2))
    elif reference is None and not every:
        width = max(len(each.name) for each in chosen)
        for each in chosen:
            typer.echo(f"{each.code}  {each.severity:7}  {each.name:{width}}  {each.summary}")
    else:
        typer.echo("\n\n".join(_page(each) for each in chosen))
    return 0


def _page(each: rules.Rule) -> str:
    fix = "" if each.fix is None else f", fix: {each.fix}"
    head = f"# {each.code} {each.name}\n\n{each.severity}, needs: {each.needs}{fix}"
    return f"{head}\n\n{each.documentation}"


def _plain(each: rules.Rule) -> dict[str, object]:
    facts = {name: value for name, value in asdict(each).items() if name != "check"}
    return {**facts, "options": each.options, "documentation": each.documentation}
