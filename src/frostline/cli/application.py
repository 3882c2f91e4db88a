"""The command line: ``frostline COMMAND``. Parses, chooses the backend, turns errors into words.

Exit codes: 0 clean, 1 a gap or findings, 2 could not run, 130 interrupted. Nothing here imports a
framework; a command does, after the backend is settled. What the commands do is in
`frostline.cli`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer

from frostline.cli.cache import app as cache
from frostline.cli.convert import convert
from frostline.cli.demo import demo
from frostline.cli.diagnose import diagnose
from frostline.cli.env import env
from frostline.cli.fit import fit
from frostline.cli.fold import fold
from frostline.cli.freeze import freeze
from frostline.cli.lint import lint
from frostline.cli.overfit import overfit
from frostline.cli.phases import phases
from frostline.cli.recalibrate import recalibrate
from frostline.cli.rule import rule
from frostline.cli.set_momentum import set_momentum
from frostline.cli.sites import sites
from frostline.cli.transfer import transfer
from frostline.types import FrostlineError

log = logging.getLogger("frostline")

#: Options that take several values after one name: ``--classes cat dog``.
_SEVERAL = ("--classes", "--rows", "--select", "--ignore")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Frozen Batch Normalization that is really frozen: detect, explain and repair gaps "
    "between training and inference. Exit codes: 0 clean, 1 a gap or findings, 2 could not run.",
)
experiments = typer.Typer(no_args_is_help=True, help="Repeat the essay's experiments.")
for _command in (sites, phases, lint, diagnose, rule, freeze, convert, recalibrate, set_momentum,
                 fold, fit, demo, env):  # fmt: skip
    app.command()(_command)
for _command in (overfit, transfer):
    experiments.command()(_command)
app.add_typer(experiments, name="experiment")
app.add_typer(cache, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        from frostline import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(  # what they do is done elsewhere; they are here for the help page
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
) -> None:
    del version, traceback


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; no error leaves as a traceback.

    Args:
        argv: Arguments without the program's name; default is ``sys.argv[1:]``.
    """
    words = spread_values(list(sys.argv[1:] if argv is None else argv))
    traceback = "--traceback" in words or os.environ.get("FROSTLINE_LOG_LEVEL") == "debug"
    words = [word for word in words if word != "--traceback"]
    try:
        _set_log_level()
        with _own_warnings_in_one_line():
            code = app(args=words, prog_name="frostline", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", code=130)
    except BrokenPipeError:
        # The reader has gone (`| head`): give the interpreter's last flush a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help page is already printed
            return 2
        if traceback:
            import traceback as printer

            printer.print_exc()
        return _fail(_explained(error))
    if code == 130:  # newer releases of typer turn KeyboardInterrupt into this
        return _fail("interrupted", code=130)
    return code if isinstance(code, int) else 0


def spread_values(words: list[str]) -> list[str]:
    """Rewrite ``--classes cat dog`` as ``--classes cat --classes dog``.

    A list ends at the next option. A first value with a comma, or one joined by ``=``, is the
    whole list, so that positional arguments may follow it.

    >>> spread_values(["--classes", "cat", "dog", "--seed", "1"])
    ['--classes', 'cat', '--classes', 'dog', '--seed', '1']
    >>> spread_values(["--classes", "cat,dog", "model.keras"])
    ['--classes', 'cat,dog', 'model.keras']
    """
    spread: list[str] = []
    current: str | None = None
    values = 0
    for word in words:
        if word in _SEVERAL:
            current, values = word, 0
        elif word.startswith("-") and word != "-":
            current = None
        elif current is not None:
            if values:
                spread.append(current)
            values += 1
            if values == 1 and "," in word:
                current = None
        spread.append(word)
    return spread


def _set_log_level() -> None:
    name = os.environ.get("FROSTLINE_LOG_LEVEL", "warning").upper()
    level = logging.getLevelNamesMapping().get(name)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if level is not None:
        log.setLevel(level)


@contextmanager
def _own_warnings_in_one_line() -> Iterator[None]:
    """Show what Frostline warns of as it shows errors; what others warn of is left to Python."""
    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent):
            typer.echo(f"warning: {message}", err=True)
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


def _fail(message: str, *, code: int = 2) -> int:
    from frostline.cli.terminal import one_line

    typer.echo(f"error: {one_line(message)}", err=True)
    return code


def _explained(error: Exception) -> str:
    """Return what an error says, with a hint where it was not foreseen."""
    explain = getattr(error, "format_message", None)  # typer's own: a wrong option or argument
    if callable(explain):
        name = getattr(getattr(error, "ctx", None), "command_path", "frostline")
        return f"{explain()} (see: {name} --help)"
    if isinstance(error, FrostlineError):
        return str(error)
    return f"{type(error).__name__}: {error} (unexpected; --traceback shows where)"
