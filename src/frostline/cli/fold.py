"""``frostline fold``: a network without BN layers, for inference."""

from __future__ import annotations

from frostline.cli.options import ModelOptions, OutputOptions, command


@command
def fold(model: ModelOptions, target: OutputOptions) -> int:
    """Fold BN layers into the layers before them: plain Keras, for inference."""
    from frostline.adapters import adapter_of
    from frostline.cli import model_files
    from frostline.cli.terminal import echo

    loaded = model_files.open_to_edit(model, target)
    folded = adapter_of(loaded).fold()
    model_files.require_model_file(loaded, "the folded network's layers", "folded = fl.fold(model)")
    model_files.save(folded.model, target)
    alone = len(folded.replaced)
    more = f", {alone} turned into a layer that scales and shifts" if alone else ""
    echo(
        f"{target.output}: {len(folded.absorbed)} BN layers folded into the layer before them{more}"
    )
    for note in folded.notes:
        echo(f"note: {note}")
    return 0
