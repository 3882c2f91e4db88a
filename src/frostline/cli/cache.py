"""``cache build|ls|verify|rm``: fill the feature cache, look into it, check it, empty it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frostline.cli.options import (
    BatchSizeOption,
    CacheOption,
    DataOptions,
    ForceOption,
    Format,
    FormatOption,
    ModelOptions,
    Precision,
    PrecisionOption,
    boundary,
    command,
)
from frostline.cli.terminal import echo
from frostline.types import DataError

if TYPE_CHECKING:
    from frostline.cache.folder import Entry

app = typer.Typer(
    no_args_is_help=True, help="Features that fit keeps on disk: build, list, check, remove."
)

IdArgument = Annotated[
    list[str] | None, typer.Argument(metavar="ID...", help="First letters of an id, as ls shows.")
]


@app.command()
@command
def build(
    options: ModelOptions,
    data: DataOptions,
    at: Annotated[
        str | None,
        typer.Option(help="Where to cut: layer, index or share; else where freezing ends."),
    ] = None,
    engine: Annotated[str, typer.Option(help="What runs the frozen part.")] = "auto",
    precision: PrecisionOption = Precision.float32,
    cache: CacheOption = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Compute on Ray: HOST:PORT of a cluster, auto for the one on this machine, or "
            "nothing to start Ray here. DATA and the cache must be where all nodes find them.",
        ),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Workers of Ray; else as many as there is room for.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Also write the features: a .parquet or .arrow file.")
    ] = None,
    force: ForceOption = False,
    batch_size: BatchSizeOption = 32,
) -> int:
    """Compute the features of the frozen part of MODEL, here or on a Ray cluster."""
    from frostline.cache import cache_features, export as tables
    from frostline.cache.progress import in_bytes
    from frostline.cli import model_files, samples
    from frostline.verbs.split import split

    if export is not None:
        tables.require_writable(export, force=force)
    if ray is not None and precision is not Precision.float32:
        raise DataError(
            "nodes of a cluster may have other processors, so features in bfloat16 are computed "
            f"here only: leave --ray or --precision out. Received: --precision {precision.value}"
        )
    library = None if ray is None else _connected(ray)
    loaded = model_files.open_model(options)
    place = None if at is None else boundary(at)
    kept: dict[str, Any] = {"engine": engine, "batch_size": batch_size}
    if library is None:
        x, labels = samples.read_samples(data, loaded, labelled=False)
        kept["precision"] = precision.value
        made = cache_features(split(loaded, place, sample=x[:2]).prefix, x, cache, **kept)
        found = getattr(made, "cache", made)  # a torch data set has it inside
    else:
        from frostline import scale

        first, dataset, labels = samples.read_with_ray(data, loaded)
        prefix = split(loaded, place, sample=first).prefix
        found = scale.cache_features(prefix, dataset, cache, actors=actors, **kept)
    lower = precision is not Precision.float32
    how = f" in {found.precision} ({found.error:.1e} from float32)" if lower else ""
    echo(
        f"{found.path}: {len(found)} samples, {in_bytes(found.nbytes)}, computed by "
        f"{found.engine}{how}, id {found.keys[0][:12]}"
    )
    if export is not None:
        found.to_parquet(export, labels, overwrite=force)
        echo(f"{export}: {len(found)} rows")
    return 0


def _connected(address: str) -> Any:
    """Ray, with its own bars off: the cache shows how far it is."""
    from frostline import scale

    library = scale.connect(None if address == "local" else address)
    library.data.DataContext.get_current().enable_progress_bars = False
    return library


@app.command()
def ls(cache: CacheOption = None, format: FormatOption = Format.text) -> int:
    """List what is in the cache, last used first."""
    from frostline.cache import folder
    from frostline.cache.progress import in_bytes

    root = folder.resolve(cache)
    found = folder.entries(root)
    if format is Format.json:
        echo(json.dumps({"folder": str(root), "caches": [_plain(entry) for entry in found]}))
        return 0
    for entry in found:
        echo(_line(entry))
    total = sum(entry.nbytes for entry in found)
    echo(f"{root}: {len(found)} cache(s), {in_bytes(total)}")
    return 0


@app.command()
def verify(ids: IdArgument = None, cache: CacheOption = None) -> int:
    """Compare every byte with its checksum; exit code 1 when something is damaged."""
    from frostline.cache import folder

    damaged = 0
    for path in _chosen(folder.resolve(cache), ids):
        problems = folder.verify(path)
        damaged += bool(problems)
        echo(f"{path.name[:12]}: {'damaged' if problems else 'whole'}")
        for problem in problems:
            echo(f"  {problem}")
    if damaged:
        echo("what is damaged is computed again when it is next used")
    return int(damaged > 0)


@app.command()
def rm(
    ids: IdArgument = None,
    cache: CacheOption = None,
    every: Annotated[bool, typer.Option("--all", help="Remove all of them.")] = False,
) -> int:
    """Remove features from the disk; they are computed again when they are needed."""
    from frostline.cache import folder
    from frostline.cache.progress import Progress, in_bytes

    root = folder.resolve(cache)
    if bool(ids) == every:
        raise typer.BadParameter("say which: ids as 'frostline cache ls' shows them, or --all")
    freed = 0
    chosen = _chosen(root, ids)
    for path in chosen:
        freed += folder.size(path)
        folder.remove(path, Progress("", None, 0))
    echo(f"{root}: {len(chosen)} cache(s) removed, {in_bytes(freed)} freed")
    return 0


def _chosen(root: Path, ids: list[str] | None) -> list[Path]:
    """Folders that the ids mean; all where none is given."""
    from frostline.cache import folder

    there = folder.collections(root)
    if not ids:
        return there
    chosen = []
    for start in ids:
        matching = [path for path in there if start and path.name.startswith(start)]
        if len(matching) != 1:
            what = "no cache" if not matching else f"{len(matching)} caches"
            raise DataError(f"{what} in {root} begin(s) with {start!r}; see: frostline cache ls")
        chosen += [path for path in matching if path not in chosen]
    return chosen


def _line(entry: Entry) -> str:
    from frostline.cache.progress import in_bytes

    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    head = f"{entry.folder.name[:12]}  {in_bytes(entry.nbytes):>8}  {used}"
    if entry.collection is None:
        return f"{head}  {entry.problem}"
    about = entry.collection.about
    view = f", view {about.get('view')}" if about.get("augmented") else ""
    if "precision" in about:
        view = f" in {about['precision']}{view}"
    sets = f"{entry.data_sets} complete data set(s)" if entry.data_sets else "incomplete"
    return (
        f"{head}  {about.get('model')}, {about.get('dtype')}, {entry.collection.engine}{view}: "
        f"{entry.samples} samples, {sets}"
    )


def _plain(entry: Entry) -> dict[str, object]:
    about = {} if entry.collection is None else dict(entry.collection.about)
    return {
        "id": entry.folder.name,
        "bytes": entry.nbytes,
        "used": entry.used,
        "samples": entry.samples,
        "data_sets": entry.data_sets,
        "problem": entry.problem,
        **about,
    }
