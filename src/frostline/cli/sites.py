"""``frostline sites``: the BN layers of a model."""

from __future__ import annotations

import json
from dataclasses import asdict

from frostline.cli.options import Format, FormatOption, ModelOptions, command


@command
def sites(model: ModelOptions, format: FormatOption = Format.text) -> int:
    """List the BN layers of a model and where its frozen prefix ends."""
    from frostline.cli import model_files
    from frostline.cli.terminal import echo
    from frostline.report import text

    found = model_files.sites_of(model_files.open_model(model))
    if format is Format.json:
        plain = {"sites": [asdict(site) for site in found], "boundary": found.boundary}
        echo(json.dumps(plain))
        return 0
    out = text.console()
    out.print(found.table(out.width))
    return 0
