"""``sites``, ``phases``, ``freeze``, ``convert``, ...: one model in, a table or a file out."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import typer

from frostline import environment
from frostline.adapters import ModelView
from frostline.cli import modules
from frostline.cli.options import DataOptions
from frostline.data import files
from frostline.report import text
from frostline.report.sites import Sites
from frostline.types import Array, DataError, Policy
from frostline.types.reasons import first_line


def show_sites(source: str, *, as_json: bool, state: str | None = None) -> int:
    """Print the table of BN sites with the line where the frozen prefix ends."""
    model = load(source, state)
    found = _sites(model)
    if as_json:
        plain = {"sites": [asdict(site) for site in found], "boundary": found.boundary}
        typer.echo(json.dumps(plain))
        return 0
    out = text.console()
    out.print(found.table(out.width))
    return 0


def show_phases(
    source: str,
    options: DataOptions,
    *,
    batch_size: int,
    as_json: bool,
    state: str | None = None,
    loss: str | None = None,
) -> int:
    """Print dynamic, phase 0 and phase 1 on the same data; 1 when a pattern or gap is found."""
    from frostline.verbs.diagnose import phases

    model = load(source, state)
    _sites(model)
    x, y = read_data(options, model)
    table = phases(model, (x, y), loss=modules.loss(loss, model), batch_size=batch_size)
    gaps = text.phase_gaps(table["0"], table["1"])
    found = bool(table.patterns)
    if as_json:
        rows = {row.phase: {"loss": row.loss, **row.metrics} for row in table.rows}
        plain = {
            "task": table.task,
            "samples": table.samples,
            "sites": table.sites,
            "phases": rows,
            "gap": gaps,
            "patterns": list(table.patterns),
            "verdict": "gap" if found else "clean",
        }
        typer.echo(json.dumps(plain, indent=2))
    else:
        text.console().print(text.phases_table(table))
    return int(found)


def freeze(
    source: str,
    *,
    until: str | int | float,
    output: Path,
    force: bool,
    dropout: bool = False,
    state: str | None = None,
) -> int:
    """Freeze the prefix of a model and write the result."""
    from frostline.verbs import edit as repair

    model = load(source, state)
    found = _sites(model)
    check_output(output, source, force=force, state=modules.is_state(model))
    change = repair.freeze(model, until=until, dropout=dropout)
    if modules.is_state(model):
        more = ", dropout=True" if dropout else ""
        modules.refuse("a freeze", f"fl.freeze(model, until={until!r}{more})")
    save(model, output, force=force)
    after = _sites(model)
    frozen = sum(site.stats_frozen for site in after)
    more = f" ({change.text})" if dropout else ""
    typer.echo(f"{output}: {frozen} of {len(found)} BN layers frozen, up to {until}{more}")
    return 0


def convert(source: str, *, output: Path, policy: Policy | None, version: str | None,
            debias: bool | None, force: bool) -> int:  # fmt: skip
    """Replace stock BN layers by `frostline.layers.BatchNormalization` and write the result."""
    from frostline.verbs import edit as repair

    model = load(source)
    _sites(model)
    check_output(output, source, force=force)
    converted = repair.convert(model, policy=policy, version=version, debias=debias)
    save(converted, output, force=force)
    after = _sites(converted)
    ways = sorted({site.version or site.policy for site in after})
    typer.echo(
        f"{output}: {len(after)} BN layers converted, policy while frozen: {', '.join(ways)}"
    )
    return 0


def fold(source: str, *, output: Path, force: bool, state: str | None = None) -> int:
    """Fold the BN layers of a model into the layers before them and write the result."""
    from frostline.adapters import view

    model = load(source, state)
    _sites(model)
    check_output(output, source, force=force, state=modules.is_state(model))
    folded = view(model).fold()
    if modules.is_state(model):
        modules.refuse("the folded network's layers", "folded = fl.fold(model)")
    save(folded.model, output, force=force)
    alone = len(folded.replaced)
    typer.echo(
        f"{output}: {len(folded.absorbed)} BN layers folded into the layer before them"
        + (f", {alone} turned into a layer that scales and shifts" if alone else "")
    )
    return 0


def recalibrate(
    source: str,
    options: DataOptions,
    *,
    sites: str,
    method: Literal["sequential", "batch"],
    batch_size: int,
    output: Path,
    force: bool,
    state: str | None = None,
) -> int:
    """Store the statistics of the data in a model's BN layers and write the result."""
    from frostline.verbs import edit as repair

    model = load(source, state)
    _sites(model)
    check_output(output, source, force=force, state=modules.is_state(model))
    x, _ = read_data(options, model)
    change = repair.recalibrate(model, x, sites=sites, method=method, batch_size=batch_size)
    save(model, output, force=force)
    typer.echo(f"{output}: {change}")
    return 0


def set_momentum(
    source: str,
    momentum: float,
    *,
    sites: str,
    output: Path,
    force: bool,
    state: str | None = None,
) -> int:
    """Set the momentum of a model's BN layers and write the result."""
    from frostline.verbs import edit as repair

    model = load(source, state)
    _sites(model)
    check_output(output, source, force=force, state=modules.is_state(model))
    change = repair.set_momentum(model, momentum, sites=sites)
    if modules.is_state(model):
        modules.refuse("a momentum", f"fl.set_momentum(model, {momentum:g})")
    save(model, output, force=force)
    typer.echo(f"{output}: {change}")
    return 0


def read_data(options: DataOptions, model: Any) -> tuple[Array, Array]:
    """Return inputs and targets of DATA as the model wants them.

    An ``.npz`` with ``x`` and ``y``, and no option that only images know, is handed to the model
    as it is, unless the model takes its ``x`` with the channels on axis 1 only, which is then said;
    everything else is images, and these get the channels where the model wants them.
    """
    plain = not (options.classes or options.per_class or options.image_size or options.preprocess)
    if plain and Path(options.source).suffix == ".npz":
        arrays = _read_arrays(Path(options.source))
        if arrays is not None:
            return _channels_moved(arrays[0], model, options.source), arrays[1]
    from frostline.adapters import view
    from frostline.experiments import datasets

    images = datasets.load(
        options.source,
        split=options.split,
        classes=options.classes or None,
        per_class=options.per_class,
        image_size=options.image_size or _input_size(model),
        seed=options.seed,
    )
    x = _preprocessed(images.images, options.preprocess)
    if view(model).channel_axis == 1:
        x = _channels_first(x)
    return x, _targets(images.labels, model)


def _channels_first(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def _channels_moved(x: Array, model: Any, source: str) -> Array:
    """Return images of an ``.npz`` as the model takes them, and say so if an axis had to move.

    Nothing is guessed from the shape alone: the model must refuse it as it is and take it moved.
    """
    from frostline.adapters import view

    channels = (1, 3, 4)
    if x.ndim != 4 or x.shape[-1] not in channels or x.shape[1] in channels:
        return x
    seen, moved = view(model), _channels_first(x[:1])
    if seen.channel_axis != 1 or _takes(seen, x[:1]) or not _takes(seen, moved):
        return x
    height, width, count = x.shape[1:]
    typer.echo(
        f"note: {source}: x has the channels last, {x.shape}, and the model takes them on axis 1: "
        f"read as (samples, {count}, {height}, {width})",
        err=True,
    )
    return _channels_first(x)


def _takes(seen: ModelView, x: Array) -> bool:
    try:
        seen.forward(x, training=False)
    except Exception:  # whatever a forward function of a user raises
        return False
    return True


def load(source: str, state: str | None = None) -> Any:
    """Load MODEL; Keras' file code may start TensorFlow on any backend, which is noisy."""
    with environment.native_noise_held_back():
        if modules.is_module(source, state):
            return modules.load(source, state)
        from frostline.adapters.keras.files import load_model

        return load_model(source)


def save(model: Any, path: Path, *, force: bool) -> None:
    """Write a model, whole or not at all."""
    with environment.native_noise_held_back():
        if modules.is_state(model):
            from frostline.adapters.torch.files import save_state

            save_state(model, path, overwrite=force)
            return
        from frostline.adapters.keras.files import save_model

        save_model(model, path, overwrite=force)


def _sites(model: Any) -> Sites:
    from frostline.verbs.diagnose import require_sites, sites

    found = sites(model)
    require_sites(found)
    return found


def check_output(path: Path, source: str, *, force: bool, state: bool = False) -> None:
    """Refuse an output that cannot be, before the work instead of after it."""
    suffixes, noun = (
        ((".pt", ".pth"), "the state of a torch module")
        if state
        else ((".keras", ".h5"), "a model")
    )
    files.check_output(path, suffixes, noun, force=force, source=source)


def _read_arrays(path: Path) -> tuple[Array, Array] | None:
    """Return ``x`` and ``y`` of a plain ``.npz``; ``None`` when it has other names in it."""
    try:
        # Opened here: numpy leaves a file open that turns out to be broken.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if "x" not in archive.files or "y" not in archive.files:
                return None
            x, y = archive["x"], archive["y"]
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = first_line(error)
        raise DataError(f"{path}: not a readable .npz of number arrays ({reason})") from None
    if x.dtype.kind not in "uifb" or y.dtype.kind not in "uifb":
        return None
    if len(x) != len(y) or not len(x):
        raise DataError(f"{path}: x and y must be equally many, at least 1. "
                        f"Received: {len(x)} and {len(y)}")  # fmt: skip
    return x, y


def _input_size(model: Any) -> int | None:
    """Return the side of the images that the model takes; ``None`` when it takes any."""
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4:
        return None
    height, width = (shape[1], shape[2]) if shape[3] in (1, 3) else (shape[2], shape[3])
    return height if height is not None and height == width else None


def _preprocessed(images: Array, how: str | None) -> Array:
    if how in (None, "none"):
        return images.astype(np.float32)
    if how == "unit":
        return images.astype(np.float32) / 255
    from frostline.experiments import backbones

    prepared: Array = np.asarray(backbones.preprocess(str(how), images), dtype=np.float32)
    return prepared


def _targets(labels: Array, model: Any) -> Array:
    """Return labels as the model's loss wants them: indices, one-hot rows, or one column."""
    loss = getattr(model, "loss", None)
    name = loss if isinstance(loss, str) else getattr(loss, "name", type(loss).__name__)
    width = (getattr(model, "output_shape", None) or (None,))[-1]
    if width == 1:
        return labels.reshape(-1, 1).astype(np.float32)
    if str(name) == "categorical_crossentropy" and isinstance(width, int):
        if labels.max(initial=0) >= width:
            raise DataError(f"the data has {labels.max() + 1} classes, the model {width}; "
                            "choose some with --classes")  # fmt: skip
        return np.eye(width, dtype=np.float32)[labels]
    return labels.astype(np.int32)
