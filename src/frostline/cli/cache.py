"""``cache ls|verify|rm``: what is in the feature cache, is it whole, away with it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli.options import CacheOption, Format, FormatOption
from frostline.cli.terminal import echo
from frostline.types import DataError

if TYPE_CHECKING:
    from frostline.cache.folder import Entry

app = typer.Typer(
    no_args_is_help=True, help="Features that fit keeps on disk: list, check, remove."
)

IdArgument = Annotated[
    list[str] | None, typer.Argument(metavar="ID...", help="First letters of an id, as ls shows.")
]


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
