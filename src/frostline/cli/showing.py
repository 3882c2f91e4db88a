"""How ``lint`` and ``diagnose`` show a report: printed in one form, written in another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from frostline.data import files
from frostline.report import github, terminal, text
from frostline.report.files import ENDINGS
from frostline.types.report import Report

Form = Literal["text", "json", "html", "github"]


def check_output(path: Path | None, *, force: bool) -> None:
    """Refuse an output that cannot be, before the work instead of after it.

    Raises:
        OutputError: Another ending, a file that is there already, or no such folder.
    """
    if path is not None:
        files.check_output(path, ENDINGS, "a report", force=force)


def show(report: Report, *, format: Form, output: Path | None, exit_zero: bool) -> int:
    """Write the report where asked, print it, and return the exit code.

    Args:
        report: What was found.
        format: How to print; ``"html"`` prints the page.
        output: Also write it to this file, complete or not at all.
        exit_zero: Return 0 whatever is found.

    Returns:
        0 for a clean report, else 1.
    """
    if output is not None:
        report.save(output)
    if format == "json":
        typer.echo(report.as_json(), nl=False)
    elif format == "html":
        from frostline.report import html

        typer.echo(html.page(report))
    elif format == "github":
        typer.echo(github.as_github(report), nl=False)
    else:
        out = text.console()
        if out.is_terminal:
            out.print(terminal.as_text(report), crop=False)
        else:  # a file or a pipe: no blanks at the ends of lines
            typer.echo(text.render(terminal.as_text(report), width=out.width), nl=False)
        if output is not None:
            typer.echo(f"written: {output}", err=True)
    return 0 if report.clean or exit_zero else 1
