"""``frostline recalibrate``: exact statistics stored."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from frostline.cli.options import (
    BatchSizeOption,
    DataOptions,
    ModelOptions,
    OutputOptions,
    SitesOption,
    command,
)


class Method(StrEnum):
    """How recalibration measures: site by site, or all sites in one pass."""

    sequential = "sequential"
    batch = "batch"


@command
def recalibrate(
    model: ModelOptions,
    data: DataOptions,
    target: OutputOptions,
    sites: SitesOption = "unfrozen",
    method: Annotated[Method, typer.Option(help="How the sites are measured.")] = Method.sequential,
    batch_size: BatchSizeOption = 32,
) -> int:
    """Store the exact statistics of the data in BN layers."""
    from frostline.cli import model_files
    from frostline.cli.samples import read_samples
    from frostline.cli.terminal import echo
    from frostline.verbs import edit

    loaded = model_files.open_to_edit(model, target)
    x, _ = read_samples(data, loaded, labelled=False)
    change = edit.recalibrate(loaded, x, sites=sites, method=method.value, batch_size=batch_size)
    model_files.save(loaded, target)
    echo(f"{target.output}: {change}")
    return 0
