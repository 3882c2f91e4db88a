"""``frostline convert``: Keras' BN layers replaced by Frostline's."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from frostline.cli.options import BackendOption, ModelArgument, ModelOptions, OutputOptions, command


class FrozenPolicy(StrEnum):
    """What a frozen BN layer does in training."""

    inference = "inference"
    batch = "batch"
    update = "update"


@command
def convert(
    model: ModelArgument,
    target: OutputOptions,
    policy: Annotated[
        FrozenPolicy | None, typer.Option(help="What frozen BN does in training.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Behave as this Keras release, for example 2.2.4.")
    ] = None,
    debias: Annotated[
        bool | None, typer.Option("--debias/--no-debias", help="Correct young moving averages.")
    ] = None,
    backend: BackendOption = None,
) -> int:
    """Replace BN layers by frostline.layers.BatchNormalization, keeping all weights."""
    from frostline.cli import model_files
    from frostline.cli.terminal import echo
    from frostline.verbs import edit

    loaded = model_files.open_to_edit(ModelOptions(model=model, backend=backend), target)
    converted = edit.convert(
        loaded, policy=None if policy is None else policy.value, version=version, debias=debias
    )
    model_files.save(converted, target)
    after = model_files.sites_of(converted)
    ways = ", ".join(sorted({site.version or site.policy for site in after}))
    echo(f"{target.output}: {len(after)} BN layers converted, policy while frozen: {ways}")
    return 0
