"""Write an experiment down: ``results.json``, ``history.csv``, the figure. All or nothing.

Every file is written under a temporary name in its folder and renamed, so that a reader never
sees half of one and an interrupted run leaves the last complete state.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.data import files
from frostline.types import OutputError, PhaseRow

if TYPE_CHECKING:
    from frostline.experiments.overfit import OverfitResult, OverfitSettings, RowResult
    from frostline.experiments.transfer import TransferSettings
    from frostline.types.report import Report

#: Version of the layout of ``results.json``; grows when a reader would have to change.
SCHEMA_VERSION = 1

RESULTS, HISTORY, FIGURES = "results.json", "history.csv", ("figure.png", "figure.svg")

#: What the diagnoses blame; each whole report lies beside it under its row's name.
DIAGNOSIS = "diagnosis.json"


def data_name(data: str) -> str:
    """Return a short name for a data source: a path's last part without its suffix."""
    path = Path(data)
    if path.suffix or len(path.parts) > 1 or path.is_dir():
        return path.resolve().stem
    return data


def default_folder(
    settings: OverfitSettings | TransferSettings, experiment: str = "overfit"
) -> Path:
    """Return where results go when no folder is named; equal settings share a folder."""
    name = f"{experiment}-{settings.backbone}-{data_name(settings.data)}-seed{settings.seed}"
    return Path("runs") / name


def check_folder(folder: Path, *, force: bool) -> tuple[Path, ...]:
    """Make sure, before any work, that results can be written here.

    A file is really created and removed: permission bits say nothing about a read-only file
    system, a full disk or the root user.

    Args:
        folder: Where results will go; created with its parents when missing.
        force: Accept a folder that holds results already.

    Returns:
        The folders that were created, innermost first.

    Raises:
        OutputError: If results are there already, or nothing can be written.
    """
    made = _missing_parents(folder)
    try:
        existing = [
            name for name in (RESULTS, HISTORY, DIAGNOSIS, *FIGURES) if (folder / name).exists()
        ]
        if existing and not force:
            raise OutputError(
                f"{folder} already holds {existing[0]}; choose another folder, or overwrite it "
                "with --force"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OutputError:
        raise
    except OSError as error:
        remove_empty(made)
        raise OutputError(f"cannot write into {folder}: {error.strerror or error}") from None
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those folders, innermost first, that hold nothing: a failed run leaves no trace."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write(result: OverfitResult, folder: Path) -> tuple[Path, ...]:
    """Write all files of a result and return their paths."""
    from frostline.experiments import figures

    numbers = write_numbers(result, folder)
    drawn = []
    for name in FIGURES:
        content = figures.draw(result, suffix=Path(name).suffix)
        drawn.append(files.write(folder / name, content))
    return (*numbers, *drawn)


def write_numbers(result: OverfitResult, folder: Path) -> tuple[Path, ...]:
    """Write ``results.json`` and ``history.csv`` and return their paths."""
    content = json.dumps(as_json(result), indent=2, ensure_ascii=False, allow_nan=False)
    return (
        files.write(folder / RESULTS, content.encode() + b"\n"),
        files.write(folder / HISTORY, _history(result).encode()),
        *_write_reports(result, folder),
    )


def _write_reports(result: OverfitResult, folder: Path) -> list[Path]:
    """Write the report of each row that was diagnosed, and what they blame in one small file."""
    reports = {row.row.name: row.report for row in result.rows if row.report is not None}
    if not reports:
        return []
    paths = [
        report.save(folder / f"diagnosis-{name}{ending}")
        for name, report in reports.items()
        for ending in (".html", ".json")
    ]
    plain = finite(
        {
            "experiment": "overfit",
            "settings": asdict(result.settings),
            "environment": result.environment,
            "rows": {name: blamed(report) for name, report in reports.items()},
        }
    )
    content = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    return [*paths, files.write(folder / DIAGNOSIS, content.encode() + b"\n")]


def blamed(report: Report) -> dict[str, Any]:
    """Return verdict, gap, causes and remedies of a report as plain data."""
    gap, seen = report.gap, report.measurement
    return {
        "verdict": report.verdict,
        "gap_in_loss": None if gap is None else asdict(gap.loss),
        "inference_accuracy": None if seen is None else seen.probes["inference"].accuracy,
        "causes": [
            {
                "code": each.code,
                "share": each.share,
                "certainty": each.certainty,
                "sites": len(each.sites),
                "message": each.message,
            }
            for each in report.causes
        ],
        "remedies": [
            {
                "name": each.name,
                "before": dict(each.before),
                "after": dict(each.after),
                "recommended": each.recommended,
            }
            for each in report.remedies
        ],
    }


def as_json(result: OverfitResult) -> dict[str, Any]:
    """Return a result as plain data; floats that are not finite become ``null``."""
    plain = {
        "schema_version": SCHEMA_VERSION,
        "experiment": "overfit",
        "interrupted": result.interrupted,
        "settings": asdict(result.settings),
        "selection": result.selection,
        "environment": result.environment,
        "rows": [_row_as_json(row) for row in result.rows],
    }
    content: dict[str, Any] = finite(plain)
    return content


def _missing_parents(folder: Path) -> tuple[Path, ...]:
    """Return the folders that creating ``folder`` would create, innermost first."""
    missing = []
    try:
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
    except OSError:
        return ()
    return tuple(missing)


def _history(result: OverfitResult) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["policy", "epoch", "loss", "accuracy", "val_loss", "val_accuracy",
         "phase1_loss", "phase1_accuracy", "seconds"]
    )  # fmt: skip
    writer.writerows(_history_rows(result))
    return stream.getvalue()


def _history_rows(result: OverfitResult) -> Iterator[list[Any]]:
    for row in result.rows:
        for epoch in row.epochs:
            values = (epoch.train_loss, epoch.train_accuracy, epoch.phase0_loss,
                      epoch.phase0_accuracy, epoch.phase1_loss, epoch.phase1_accuracy)  # fmt: skip
            yield [
                row.row.name,
                epoch.number,
                *[f"{value:.9g}" for value in values],
                f"{epoch.seconds:.3f}",
            ]


def _row_as_json(result: RowResult) -> dict[str, Any]:
    return {
        **asdict(result.row),
        "boundary": result.boundary,
        "sites": result.sites,
        "sites_frozen": result.sites_frozen,
        "seconds": round(result.seconds, 3),
        "phases": {row.phase: _phase_as_json(row) for row in result.phases.rows},
        "patterns": list(result.phases.patterns),
        "epochs": [asdict(epoch) for epoch in result.epochs],
    }


def _phase_as_json(row: PhaseRow) -> dict[str, Any]:
    return {"loss": row.loss, **{name: float(value) for name, value in row.metrics.items()}}


def finite(value: Any) -> Any:
    """Plain data for JSON: numbers that are not finite become ``None``, paths text."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Path):
        return str(value)
    item = getattr(value, "item", None)
    return finite(item()) if callable(item) else value
