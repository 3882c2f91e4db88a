"""``frostline phases``: training mode and inference on the same data."""

from __future__ import annotations

import json

from frostline.cli.options import (
    BatchSizeOption,
    DataOptions,
    Format,
    FormatOption,
    LossOption,
    ModelOptions,
    command,
)


@command
def phases(
    model: ModelOptions,
    data: DataOptions,
    batch_size: BatchSizeOption = 32,
    loss: LossOption = None,
    format: FormatOption = Format.text,
) -> int:
    """Compare training mode and inference on the same data; exit code 1 when there is a gap."""
    from frostline.cli import model_files
    from frostline.cli.samples import read_samples
    from frostline.cli.terminal import echo
    from frostline.report import phases as tables, text
    from frostline.verbs.diagnose import phases as measure

    loaded = model_files.open_model(model)
    model_files.sites_of(loaded)
    x, y = read_samples(data, loaded, loss=loss)
    table = measure(loaded, (x, y), loss=model_files.loss_of(loss, loaded), batch_size=batch_size)
    if format is Format.text:
        text.console().print(tables.phases_table(table))
        return int(bool(table.patterns))
    plain = {
        "task": table.task,
        "samples": table.samples,
        "sites": table.sites,
        "phases": {row.phase: {"loss": row.loss, **row.metrics} for row in table.rows},
        "gap": tables.phase_gaps(table["0"], table["1"]),
        "patterns": list(table.patterns),
        "verdict": "gap" if table.patterns else "clean",
    }
    echo(json.dumps(plain, indent=2))
    return int(bool(table.patterns))
