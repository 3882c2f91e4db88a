"""``frostline report``: what can be done with reports that were saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli.options import Format, FormatOption, command

if TYPE_CHECKING:
    from frostline.types.report import Report


app = typer.Typer(no_args_is_help=True, help="Reports that were saved: compare two.")


@app.command()
@command
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A report, saved as .json.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="A later one, saved as .json.")],
    format: FormatOption = Format.text,
) -> int:
    """Compare two reports; exit code 1 when a cause, an error or a warning is new."""
    from frostline.cli.terminal import echo
    from frostline.report import before_after

    found = before_after.compare(_read(before), _read(after))
    if format is Format.json:
        echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        echo(str(found))
    return 0 if found.clean else 1


def _read(path: Path) -> Report:
    """Read a report.

    Raises:
        DataError: Not a file, not JSON, or not a report.
    """
    from frostline.data.reading import require_file, require_memory
    from frostline.types import DataError
    from frostline.types.report import Report

    require_file(path)
    require_memory(8 * path.stat().st_size, f"the objects in {path}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict):
            raise DataError("it holds no report")
        return Report.from_dict(plain)
    except (OSError, ValueError, RecursionError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path} is no report saved as .json (report.save, or -o report.json): {reason}"
        ) from None
