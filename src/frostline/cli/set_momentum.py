"""``frostline set-momentum``: how fast the moving averages move."""

from __future__ import annotations

from typing import Annotated

import typer

from frostline.cli.options import ModelOptions, OutputOptions, SitesOption, command


@command
def set_momentum(
    model: ModelOptions,
    momentum: Annotated[
        float, typer.Argument(min=0, max=1, help="Kept share per update, as in Keras: 0.99.")
    ],
    target: OutputOptions,
    sites: SitesOption = "all",
) -> int:
    """Set how much of the old statistics a BN layer keeps per update."""
    from frostline.cli import model_files
    from frostline.cli.terminal import echo
    from frostline.verbs import edit

    loaded = model_files.open_to_edit(model, target)
    change = edit.set_momentum(loaded, momentum, sites=sites)
    model_files.require_model_file(loaded, "a momentum", f"fl.set_momentum(model, {momentum:g})")
    model_files.save(loaded, target)
    echo(f"{target.output}: {change}")
    return 0
