"""The command line: ``frostline COMMAND``. Parses, chooses the backend, turns errors into words.

Exit codes: 0 clean, 1 a gap or findings, 2 could not run, 130 interrupted. Nothing here imports a
framework; a command does, after the backend is settled. What the commands do is in
`frostline.cli`.
"""

from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, TextIO

import typer

from frostline.cli.cache import app as cache
from frostline.cli.compare import compare
from frostline.cli.convert import convert
from frostline.cli.demo import demo
from frostline.cli.diagnose import diagnose
from frostline.cli.env import env
from frostline.cli.fit import fit
from frostline.cli.fold import fold
from frostline.cli.freeze import freeze
from frostline.cli.lint import lint
from frostline.cli.merge_statistics import merge_statistics
from frostline.cli.overfit import overfit
from frostline.cli.phases import phases
from frostline.cli.recalibrate import recalibrate
from frostline.cli.report import app as report
from frostline.cli.rule import rule
from frostline.cli.set_momentum import set_momentum
from frostline.cli.sites import sites
from frostline.cli.transfer import transfer
from frostline.types import FrostlineError

log = logging.getLogger("frostline")

#: Options that take several values after one name: ``--classes cat dog``.
_SEVERAL = ("--classes", "--rows", "--select", "--ignore", "--treatments", "--boundaries")

#: What a file system says that takes no more, of standard output.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Frozen Batch Normalization that is really frozen: detect, explain and repair gaps "
    "between training and inference. Exit codes: 0 clean, 1 a gap or findings, 2 could not run.",
)
experiments = typer.Typer(no_args_is_help=True, help="Repeat the essay's experiments.")
for _command in (sites, phases, lint, diagnose, rule, freeze, convert, recalibrate,
                 merge_statistics, set_momentum, fold, fit, compare, demo, env):  # fmt: skip
    app.command()(_command)
for _command in (overfit, transfer):
    experiments.command()(_command)
app.add_typer(experiments, name="experiment")
app.add_typer(report, name="report")
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
        with _own_warnings_in_one_line(), _signals_end_tidily():
            code = app(args=words, prog_name="frostline", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", code=130)
    except _Terminated as signalled:
        return _fail(f"ended by {signalled}", code=128 + signalled.number)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # as click takes it
            _give_up_stdout()
            return 141
        return _fail("code that the command called ended the program with sys.exit()")
    except BrokenPipeError:  # The reader has gone (`| head`).
        _give_up_stdout()
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


class _Terminated(BaseException):
    """A signal asked the program to end; blocks that clean up behind themselves still do."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def _signals_end_tidily() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise _Terminated(number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, names)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run() -> int:
    """Run the command line as the program of this process, on whatever streams it was given."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened would be taken for standard output
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # ASCII: nothing is lost
    code = main()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _give_up_stdout()
    return code


def _give_up_stdout() -> None:
    """Give the interpreter's last flush a place to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def spread_values(words: list[str]) -> list[str]:
    """Rewrite ``--classes cat dog`` as ``--classes cat --classes dog``.

    A list ends at the next option. A first value with a comma, or one joined by ``=``, is the
    whole list, so that positional arguments may follow it.

    >>> spread_values(["--classes", "cat", "dog", "--seed", "1"])
    ['--classes', 'cat', '--classes', 'dog', '--seed', '1']
    >>> spread_values(["--ray", "--export", "f.parquet"])
    ['--ray', 'local', '--export', 'f.parquet']
    >>> spread_values(["--classes", "cat,dog", "model.keras"])
    ['--classes', 'cat,dog', 'model.keras']
    """
    spread: list[str] = []
    current: str | None = None
    values = 0
    for word, following in itertools.zip_longest(words, words[1:], fillvalue="-"):
        if word == "--ray" and following.startswith("-"):  # its address may be left out
            spread += [word, "local"]
            current = None
            continue
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
    from frostline.cli.terminal import echo

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
            echo(f"warning: {message}", err=True)
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
    if isinstance(error, MemoryError):
        return "there is not enough memory for this model and these data"
    if isinstance(error, OSError) and error.errno in _NO_ROOM and not error.filename:
        _give_up_stdout()
        return f"cannot print the result ({error.strerror})"
    return f"{type(error).__name__}: {error} (unexpected; --traceback shows where)"
