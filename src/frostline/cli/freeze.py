"""``frostline freeze``: a frozen prefix."""

from __future__ import annotations

from typing import Annotated

import typer

from frostline.cli.options import ModelOptions, OutputOptions, boundary, command


@command
def freeze(
    model: ModelOptions,
    until: Annotated[
        str,
        typer.Option(
            metavar="LAYER",
            help="First layer that still trains: a name or path, an "
            "index, or a share of the layers such as 0.75.",
        ),
    ],
    target: OutputOptions,
    dropout: Annotated[
        bool, typer.Option("--dropout", help="Also set the rates of frozen dropout to 0, for good.")
    ] = False,
) -> int:
    """Freeze all layers before a boundary, parameters and statistics."""
    from frostline.cli import model_files
    from frostline.cli.terminal import echo
    from frostline.verbs import edit

    loaded = model_files.open_to_edit(model, target)
    first = boundary(until)
    change = edit.freeze(loaded, until=first, dropout=dropout)
    more = ", dropout=True" if dropout else ""
    model_files.require_model_file(loaded, "a freeze", f"fl.freeze(model, until={first!r}{more})")
    model_files.save(loaded, target)
    after = model_files.sites_of(loaded)
    frozen = sum(site.stats_frozen for site in after)
    more = f" ({change.text})" if dropout else ""
    echo(f"{target.output}: {frozen} of {len(after)} BN layers frozen, up to {first}{more}")
    return 0
