"""Write an experiment down: ``results.json``, ``history.csv``, the figures. All or nothing.

Every file is written under a temporary name in its folder and renamed. A reader never sees half a
file, and an interrupted run leaves the last complete state.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from frostline.data import files
from frostline.experiments.results import (
    OverfitResult,
    OverfitRow,
    TransferEpoch,
    TransferResult,
    TransferRow,
)
from frostline.experiments.settings import Settings, data_name
from frostline.experiments.transfer_settings import ROWS
from frostline.types import DataError, OutputError, PhaseRow, PhaseTable
from frostline.types.report import Report

AnyResult = OverfitResult | TransferResult

#: Version of the layout of ``results.json``; grows when a reader would have to change.
SCHEMA_VERSION = 1

RESULTS, HISTORY, FIGURES = "results.json", "history.csv", ("figure.png", "figure.svg")

#: Causes and remedies of the diagnoses; each whole report lies beside it under its row's name.
DIAGNOSIS = "diagnosis.json"


def default_folder(settings: Settings, experiment: str = "overfit") -> Path:
    """Return where results go when no folder is named; equal settings share a folder."""
    name = f"{experiment}-{settings.backbone}-{data_name(settings.data)}-seed{settings.seed}"
    return Path("runs") / name


@contextlib.contextmanager
def folder(output: Path | None, *, force: bool) -> Iterator[None]:
    """Check before any work that results can be written; a run without results leaves no folder.

    Raises:
        OutputError: As in :func:`check_folder`.
    """
    made = () if output is None else check_folder(output, force=force)
    try:
        yield
    finally:
        remove_empty(made)


def check_folder(folder: Path, *, force: bool) -> tuple[Path, ...]:
    """Make sure that results can be written, by creating the folder and a file in it.

    Permission bits would not tell of a read-only file system, a full disk or the root user.

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
    """Remove those folders, innermost first, that are empty."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write(result: AnyResult, folder: Path) -> tuple[Path, ...]:
    """Write all files of a result and return their paths."""
    from frostline.experiments import figures

    drawn = [
        files.write(folder / name, figures.draw(result, suffix=Path(name).suffix))
        for name in FIGURES
    ]
    return (*write_numbers(result, folder), *drawn)


def write_numbers(result: AnyResult, folder: Path) -> tuple[Path, ...]:
    """Write all files of a result but the figures, and return their paths."""
    return (
        _write_json(folder / RESULTS, as_json(result)),
        files.write(folder / HISTORY, _history(result).encode()),
        *_write_reports(result, folder),
    )


def as_json(result: AnyResult) -> dict[str, Any]:
    """Return a result as plain data; floats that are not finite become ``null``."""
    return {"schema_version": SCHEMA_VERSION, **_finite(result.as_dict())}


def _write_json(path: Path, plain: Any) -> Path:
    content = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    return files.write(path, content.encode() + b"\n")


def _write_reports(result: AnyResult, folder: Path) -> list[Path]:
    """Write each row's diagnosis, and the causes and remedies of all in one small file."""
    reports = {
        row.row.name: row.report
        for row in result.rows
        if isinstance(row, OverfitRow) and row.report is not None
    }
    if not reports:
        return []
    paths = [
        report.save(folder / f"diagnosis-{name}{ending}")
        for name, report in reports.items()
        for ending in (".html", ".json")
    ]
    plain = {
        "experiment": result.experiment,
        "settings": asdict(result.settings),
        "environment": result.environment,
        "rows": {name: _diagnosis(report) for name, report in reports.items()},
    }
    return [*paths, _write_json(folder / DIAGNOSIS, _finite(plain))]


def _diagnosis(report: Report) -> dict[str, Any]:
    """Return verdict, gap, causes and remedies of a report as plain data."""
    gap, measured = report.gap, report.measurement
    return {
        "verdict": report.verdict,
        "gap_in_loss": None if gap is None else asdict(gap.loss),
        "inference_accuracy": None if measured is None else measured.probes["inference"].accuracy,
        "causes": [
            {
                "code": cause.code,
                "share": cause.share,
                "certainty": cause.certainty,
                "sites": len(cause.sites),
                "message": cause.message,
            }
            for cause in report.causes
        ],
        "remedies": [
            {
                "name": remedy.name,
                "before": dict(remedy.before),
                "after": dict(remedy.after),
                "recommended": remedy.recommended,
            }
            for remedy in report.remedies
        ],
    }


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


def _history(result: AnyResult) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(result.history)
    for row in result.rows:
        for epoch in row.epochs:
            values = {"row": row.row.name, **asdict(epoch), "seconds": f"{epoch.seconds:.3f}"}
            writer.writerow(
                f"{value:.9g}" if isinstance(value, float) else value
                for value in (values[name] for name in result.history.values())
            )
    return stream.getvalue()


def _finite(value: Any) -> Any:
    """Return plain data for JSON: numbers that are not finite become ``None``, paths text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Path):
        return str(value)
    item = getattr(value, "item", None)
    return _finite(item()) if callable(item) else value


def continued(result: TransferResult, folder: Path) -> TransferResult:
    """Return ``result`` with the rows that were measured before, those first.

    Args:
        result: Of a run that starts now, without rows.
        folder: May hold ``results.json`` of a run that was interrupted, or that had fewer rows.

    Returns:
        ``settings.rows`` names the rows of the folder, then those that are still to be run.

    Raises:
        DataError: The file is no result of this experiment, or was measured with other settings,
            images, backend or versions, which are named: its rows could not be compared.
    """
    path = folder / RESULTS
    if not path.exists():
        return result
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["experiment"], content["schema_version"]) != (
            result.experiment, SCHEMA_VERSION
        ):  # fmt: skip
            raise ValueError("another experiment or version")
        rows = tuple(_read_row(row) for row in content["rows"])
        differing = _differing(json.loads(json.dumps(as_json(result))), content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise DataError(
            f"{path} cannot be continued: it is not a result of this experiment "
            f"({type(problem).__name__}: {problem})"
        ) from problem
    if differing:
        raise DataError(
            f"{path} was measured on something else and cannot be continued; choose another "
            f"folder, or start anew with force. Received: {'; '.join(differing)}"
        )
    order = dict.fromkeys([*(row.row.name for row in rows), *result.settings.rows])
    return replace(result, settings=replace(result.settings, rows=tuple(order)), rows=rows)


def _differing(now: Mapping[str, Any], file: Mapping[str, Any]) -> list[str]:
    """Return what makes rows incomparable, as ``name now (file)``; the number of cores does not."""
    pairs = {
        name: (value, file["settings"][name])
        for name, value in now["settings"].items()
        if name != "rows"
    }
    for split in ("train", "test"):
        digests = (now["selection"][split]["digest"], file["selection"][split]["digest"])
        pairs[f"{split} images"] = digests
    for name in ("backend", "versions"):
        pairs[name] = (now["environment"][name], file["environment"][name])
    return [f"{name} {one} (the file: {other})" for name, (one, other) in pairs.items()
            if one != other]  # fmt: skip


def _read_row(content: Mapping[str, Any]) -> TransferRow:
    number = {None: float("nan")}
    names = [field.name for field in fields(TransferEpoch)]
    return TransferRow(
        row=ROWS[content["name"]],
        epochs=tuple(
            TransferEpoch(**{name: number.get(epoch[name], epoch[name]) for name in names})
            for epoch in content["epochs"]
        ),
        phases=PhaseTable(
            rows=tuple(
                PhaseRow(phase=phase, loss=values.pop("loss"), metrics=values)
                for phase, values in ((phase, dict(v)) for phase, v in content["phases"].items())
            ),
            task=content["task"],
            samples=content["samples"],
            sites=content["sites"],
        ),
        sites=content["sites"],
        sites_frozen=content["sites_frozen"],
        boundary=content["boundary"],
        seconds=dict(content["seconds"]),
    )
