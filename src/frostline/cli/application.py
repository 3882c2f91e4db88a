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

from frostline.cli import (
    cache as cache_commands,
    fit as fit_command,
    looking,
    transfer as transfer_command,
)
from frostline.cli.modules import is_module
from frostline.cli.options import (
    DATA_HELP,
    BackendOption,
    BatchSizeOption,
    ClassesOption,
    DataArgument,
    ForceOption,
    Format,
    FormatOption,
    FrozenPolicy,
    ImageSizeOption,
    Method,
    ModelArgument,
    OutputOption,
    PerClassOption,
    PreprocessOption,
    SeedOption,
    Solver,
    Split,
    SplitOption,
    StateOption,
    Weights,
    boundary as read_boundary,
    names,
    read_as,
)
from frostline.cli.starting import start
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
looking.register(app)
app.add_typer(experiments, name="experiment")
app.add_typer(cache_commands.app, name="cache")


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


@app.command()
def freeze(
    model: ModelArgument,
    until: Annotated[
        str,
        typer.Option(
            metavar="LAYER",
            help="First layer that still trains: a name or path, an "
            "index, or a share of the layers such as 0.75.",
        ),
    ],
    output: OutputOption,
    dropout: Annotated[
        bool,
        typer.Option("--dropout", help="Also set the rates of frozen dropout to 0, for good."),
    ] = False,
    force: ForceOption = False,
    backend: BackendOption = None,
    state: StateOption = None,
) -> int:
    """Freeze all layers before a boundary, parameters and statistics."""
    start(backend, keras=not is_module(model, state))
    from frostline.cli import models

    return models.freeze(
        model,
        until=read_boundary(until),
        dropout=dropout,
        output=output,
        force=force,
        state=state,
    )


@app.command()
def convert(
    model: ModelArgument,
    output: OutputOption,
    policy: Annotated[
        FrozenPolicy | None, typer.Option(help="What frozen BN does in training.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Behave as this Keras release, for example 2.2.4.")
    ] = None,
    debias: Annotated[
        bool | None, typer.Option("--debias/--no-debias", help="Correct young moving averages.")
    ] = None,
    force: ForceOption = False,
    backend: BackendOption = None,
) -> int:
    """Replace BN layers by frostline.layers.BatchNormalization, keeping all weights."""
    start(backend)
    from frostline.cli import models

    return models.convert(
        model,
        output=output,
        policy=None if policy is None else policy.value,
        version=version,
        debias=debias,
        force=force,
    )


@app.command()
def recalibrate(
    model: ModelArgument,
    data: DataArgument,
    output: OutputOption,
    sites: Annotated[
        str, typer.Option(help="unfrozen, frozen, all, a path, a name, or a pattern.")
    ] = "unfrozen",
    method: Annotated[Method, typer.Option(help="How the sites are measured.")] = Method.sequential,
    classes: ClassesOption = None,
    per_class: PerClassOption = None,
    image_size: ImageSizeOption = None,
    preprocess: PreprocessOption = None,
    split: SplitOption = Split.train,
    batch_size: BatchSizeOption = 32,
    seed: SeedOption = 0,
    force: ForceOption = False,
    backend: BackendOption = None,
    state: StateOption = None,
) -> int:
    """Store the exact statistics of the data in BN layers."""
    start(backend, keras=not is_module(model, state))
    from frostline.cli import models

    options = read_as(data, classes, per_class, image_size, preprocess, split, seed)
    return models.recalibrate(
        model,
        options,
        sites=sites,
        method=method.value,
        batch_size=batch_size,
        output=output,
        force=force,
        state=state,
    )


@app.command()
def set_momentum(
    model: ModelArgument,
    momentum: Annotated[
        float, typer.Argument(min=0, max=1, help="Kept share per update, as in Keras: 0.99.")
    ],
    output: OutputOption,
    sites: Annotated[
        str, typer.Option(help="all, unfrozen, frozen, a path, a name, or a pattern.")
    ] = "all",
    force: ForceOption = False,
    backend: BackendOption = None,
    state: StateOption = None,
) -> int:
    """Set how much of the old statistics a BN layer keeps per update."""
    start(backend, keras=not is_module(model, state))
    from frostline.cli import models

    return models.set_momentum(
        model, momentum, sites=sites, output=output, force=force, state=state
    )


@app.command()
def fold(
    model: ModelArgument,
    output: OutputOption,
    force: ForceOption = False,
    backend: BackendOption = None,
    state: StateOption = None,
) -> int:
    """Fold BN layers into the layers before them: plain Keras, for inference."""
    start(backend, keras=not is_module(model, state))
    from frostline.cli import models

    return models.fold(model, output=output, force=force, state=state)


fit_command.register(app)


@experiments.command()
def overfit(
    backbone: Annotated[
        str, typer.Option(help="efficientnet-lite0|1|2, or a keras.applications name.")
    ] = "efficientnet-lite0",
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "digits",
    classes: ClassesOption = None,
    per_class: Annotated[int, typer.Option(min=1, help="Images per class.")] = 100,
    image_size: Annotated[int, typer.Option(min=8, help="Side in pixels.")] = 128,
    boundary: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="First layer that trains: name, path, index, or share; "
            "else the backbone's usual one.",
        ),
    ] = None,
    weights: Annotated[Weights, typer.Option(help="Weights of the backbone.")] = Weights.pretrained,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="Rows to run: update batch inference inference+debias "
            "inference+recalibrate none-frozen all-bn-frozen. All when not given.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 10,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 32,
    optimizer: Annotated[Solver, typer.Option(help="Optimizer.")] = Solver.sgd,
    learning_rate: Annotated[
        float | None, typer.Option(help="Step size; sgd 0.01, rmsprop and adam 0.0001.")
    ] = None,
    momentum: Annotated[float, typer.Option(min=0.0, help="Momentum of SGD.")] = 0.9,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the results.")
    ] = None,
    force: ForceOption = False,
    diagnosed: Annotated[
        bool,
        typer.Option("--diagnose", help="Also diagnose each trained network; reports go along."),
    ] = False,
    backend: BackendOption = None,
) -> int:
    """Fine-tune on a few images under every BN policy, then look at the same images (§2.4)."""
    start(backend)
    from frostline.cli import overfit as command
    from frostline.experiments.overfit import ROWS, OverfitSettings

    settings = OverfitSettings(
        backbone=backbone,
        data=data,
        classes=names(classes),
        per_class=per_class,
        image_size=image_size,
        boundary=None if boundary is None else read_boundary(boundary),
        rows=names(rows) or tuple(ROWS),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer.value,
        learning_rate=learning_rate,
        momentum=momentum,
        weights=None if weights is Weights.none else weights.value,
        seed=seed,
    )
    return command.run(settings, output=output, force=force, diagnosed=diagnosed)


transfer_command.register(experiments)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the results; overwritten.")
    ] = Path("runs/demo"),
    backend: BackendOption = None,
) -> int:
    """See a frozen BN layer break a fine-tuned network, and Frostline fix it (minutes)."""
    start(backend)
    from frostline.cli import demo as command

    return command.run(output=output)


@app.command()
def env(format: FormatOption = Format.text) -> int:
    """Show versions, backends and how one is chosen, cores, folders. Needs no backend."""
    from frostline.cli import env as command

    return command.run(as_json=format is Format.json)


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
        return _fail(_in_one_line(error))
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
    typer.echo(f"error: {message}", err=True)
    return code


def _in_one_line(error: Exception) -> str:
    """Return what an error says, on one line, with a hint where it was not foreseen."""
    explain = getattr(error, "format_message", None)  # typer's own: a wrong option or argument
    if callable(explain):
        command = getattr(getattr(error, "ctx", None), "command_path", "frostline")
        return f"{_joined(str(explain()))} (see: {command} --help)"
    if isinstance(error, FrostlineError):
        return _joined(str(error))
    return f"{type(error).__name__}: {_joined(str(error))} (unexpected; --traceback shows where)"


def _joined(text: str) -> str:
    return " ".join(text.split())
