"""How ``lint`` and ``diagnose`` show a report: printed in one form, written in another."""

from __future__ import annotations

from pathlib import Path

import typer

from frostline.cli.options import ReportFormat, ReportOptions
from frostline.cli.terminal import echo
from frostline.data import files
from frostline.report import github, terminal, text
from frostline.report.files import ENDINGS
from frostline.types.report import Report


def check_output(path: Path | None, *, force: bool) -> None:
    """Refuse an output that cannot be, before the work instead of after it.

    Raises:
        OutputError: Another ending, a file that is there already, or no such folder.
    """
    if path is not None:
        files.check_output(path, ENDINGS, "a report", force=force)


def show(report: Report, options: ReportOptions, model: str) -> int:
    """Write the report where asked, print it, and return the exit code.

    Args:
        report: Of ``lint`` or ``diagnose``.
        options: Where it goes and in which form.
        model: MODEL as it was given, which a code scanning service calls the file.

    Returns:
        0 for a clean report or with ``exit_zero``, else 1.
    """
    if options.output is not None:
        report.save(options.output)
    if options.format is ReportFormat.json:
        typer.echo(report.as_json(), nl=False)
    elif options.format is ReportFormat.html:
        from frostline.report import html

        typer.echo(html.page(report))
    elif options.format is ReportFormat.github:
        typer.echo(github.as_github(report), nl=False)
    elif options.format is ReportFormat.sarif:
        from frostline.report import sarif

        typer.echo(sarif.as_sarif(report, artifact=model_file(model)), nl=False)
    elif options.format is ReportFormat.junit:
        from frostline.report import junit

        typer.echo(junit.as_junit(report), nl=False)
    else:
        out = text.console()
        if out.is_terminal:
            out.print(terminal.as_text(report), crop=False)
        else:  # a file or a pipe: no blanks at the ends of lines
            typer.echo(text.render(terminal.as_text(report), width=out.width), nl=False)
        if options.output is not None:
            echo(f"written: {options.output}", err=True)
    return 0 if report.clean or options.exit_zero else 1


def model_file(model: str) -> str:
    """File of MODEL: of a ``module:function`` the module's, if it lies where it is looked for."""
    source = model.rpartition(":")[0].replace(".", "/") + ".py"
    return source if Path(source).is_file() else model
