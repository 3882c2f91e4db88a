"""Write the transfer experiment down, and draw it: test accuracy over epochs, one line per row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.data import files
from frostline.experiments import records
from frostline.experiments.records import data_name, finite
from frostline.types import DataError, PhaseRow, PhaseTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from frostline.experiments.transfer import RowResult, TransferResult

#: Colour and dashes of every row; Okabe and Ito's colours, told apart in grey by the dashes.
_STYLES: dict[str, tuple[str, Any]] = {
    "unpatched": ("#D55E00", (0, (6, 1.5))),
    "patched": ("#0072B2", "-"),
    "all-bn-frozen": ("#009E73", (0, (3, 1))),
    "recalibrate": ("#CC79A7", (0, (1, 1))),
    "ramp": ("#E69F00", (0, (5, 1, 1, 1))),
}
_INK = "#333333"


def write(result: TransferResult, folder: Path) -> tuple[Path, ...]:
    """Write all files of a result and return their paths."""
    numbers = write_numbers(result, folder)
    drawn = [
        files.write(folder / name, draw(result, suffix=Path(name).suffix))
        for name in records.FIGURES
    ]
    return (*numbers, *drawn)


def write_numbers(result: TransferResult, folder: Path) -> tuple[Path, ...]:
    """Write ``results.json`` and ``history.csv`` and return their paths."""
    content = json.dumps(as_json(result), indent=2, ensure_ascii=False, allow_nan=False)
    return (
        files.write(folder / records.RESULTS, content.encode() + b"\n"),
        files.write(folder / records.HISTORY, _history(result).encode()),
    )


def as_json(result: TransferResult) -> dict[str, Any]:
    """Return a result as plain data; floats that are not finite become ``null``."""
    plain = {
        "schema_version": records.SCHEMA_VERSION,
        "experiment": "transfer",
        "interrupted": result.interrupted,
        "settings": asdict(result.settings),
        "selection": result.selection,
        "environment": result.environment,
        "rows": [_row(row) for row in result.rows],
    }
    content: dict[str, Any] = finite(plain)
    return content


def continued(result: TransferResult, folder: Path) -> TransferResult:
    """Return ``result`` with the rows that were measured before, those first.

    Args:
        result: Of a run that starts now, without rows.
        folder: May hold ``results.json`` of a run that was interrupted, or that had fewer rows.

    Returns:
        ``settings.rows`` names the rows of the folder, then those that are still to be run.

    Raises:
        DataError: The file is not one of this experiment, or was measured with other settings,
            images, backend or versions, which are named: its rows could not be compared.
    """
    path = folder / records.RESULTS
    if not path.exists():
        return result
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["experiment"], content["schema_version"]) != (
            "transfer", records.SCHEMA_VERSION
        ):  # fmt: skip
            raise ValueError("another experiment or version")
        rows = tuple(_read_row(row) for row in content["rows"])
        had = {name: content[name] for name in ("settings", "selection", "environment")}
        differing = _differing(finite(json.loads(json.dumps(as_json(result)))), had)
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


def _differing(now: Mapping[str, Any], had: Mapping[str, Any]) -> list[str]:
    """What makes rows incomparable, as ``name now (file)``; how many cores do not."""
    pairs = {
        name: (value, had["settings"][name])
        for name, value in now["settings"].items()
        if name != "rows"
    }
    for split in ("train", "test"):
        digests = (now["selection"][split]["digest"], had["selection"][split]["digest"])
        pairs[f"{split} images"] = digests
    for name in ("backend", "versions"):
        pairs[name] = (now["environment"][name], had["environment"][name])
    return [f"{name} {one} (the file: {other})" for name, (one, other) in pairs.items()
            if one != other]  # fmt: skip


def _read_row(content: Mapping[str, Any]) -> RowResult:
    from frostline.experiments.transfer import ROWS, Epoch, RowResult

    number = {None: float("nan")}
    epochs = tuple(
        Epoch(**{f.name: number.get(epoch[f.name], epoch[f.name]) for f in fields(Epoch)})
        for epoch in content["epochs"]
    )
    table = PhaseTable(
        rows=tuple(
            PhaseRow(
                phase=phase,
                loss=values["loss"],
                metrics={name: value for name, value in values.items() if name != "loss"},
            )
            for phase, values in content["phases"].items()
        ),
        task=content["task"],
        samples=content["samples"],
        sites=content["sites"],
    )
    return RowResult(
        row=ROWS[content["name"]],
        epochs=epochs,
        phases=table,
        sites=content["sites"],
        sites_frozen=content["sites_frozen"],
        boundary=content["boundary"],
        seconds=dict(content["seconds"]),
    )


def _row(result: RowResult) -> dict[str, Any]:
    return {
        **asdict(result.row),
        "boundary": result.boundary,
        "sites": result.sites,
        "sites_frozen": result.sites_frozen,
        "seconds": {stage: round(value, 3) for stage, value in result.seconds.items()},
        "test_accuracy": {
            "head": result.accuracy("head"),
            "fine-tuning": result.accuracy("fine-tuning"),
        },
        "samples": result.phases.samples,
        "task": result.phases.task,
        "phases": {
            row.phase: {"loss": row.loss, **{name: float(v) for name, v in row.metrics.items()}}
            for row in result.phases.rows
        },
        "epochs": [asdict(epoch) for epoch in result.epochs],
    }


def _history(result: TransferResult) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["row", "stage", "epoch", "loss", "accuracy", "test_loss", "test_accuracy", "seconds"]
    )
    for row in result.rows:
        for epoch in row.epochs:
            numbers = (epoch.train_loss, epoch.train_accuracy, epoch.test_loss, epoch.test_accuracy)
            writer.writerow(
                [row.row.name, epoch.stage, epoch.number, *(f"{value:.9g}" for value in numbers),
                 f"{epoch.seconds:.3f}"]
            )  # fmt: skip
    return stream.getvalue()


def draw(result: TransferResult, *, suffix: str) -> bytes:
    """Return the figure as the bytes of a ``.png`` or ``.svg`` file; equal results, equal bytes."""
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "frostline", "svg.fonttype": "none", "font.size": 9.0}):
        figure = transfer_figure(result)
        if suffix == ".svg":
            figure.savefig(stream, format="svg", metadata={"Date": None})
        else:
            figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def transfer_figure(result: TransferResult) -> Figure:
    """Return a figure: test accuracy over the epochs of both stages, one line per row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.4), facecolor="white")
    ax = figure.subplots()
    settings = result.settings
    for row in result.rows:
        color, dashes = _STYLES[row.row.name]
        ax.plot([e.number for e in row.epochs], [e.test_accuracy for e in row.epochs],
                color=color, ls=dashes, lw=1.8)  # fmt: skip
    _labels(ax, result)
    last = settings.head_epochs + settings.epochs
    ax.axvline(settings.head_epochs + 0.5, color="#999999", lw=0.8)
    ax.annotate(f"fine-tuned from '{result.rows[0].boundary}' on", (settings.head_epochs + 0.6, 0),
                xycoords=("data", "axes fraction"), xytext=(0, 5), textcoords="offset points",
                color=_INK, fontsize=8)  # fmt: skip
    ax.set_xlim(0.7, last + 0.3 + 0.24 * last)
    ax.set_xticks(range(1, last + 1))
    ax.set_xlabel("epoch", color=_INK)
    ax.set_ylabel("test accuracy (inference)", color=_INK)
    ax.grid(axis="y", color="#e6e6e6", lw=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(colors=_INK, length=2.5)
    figure.suptitle("A new head, then fine-tuning: what each treatment of BN gives",
                    x=0.012, ha="left", y=0.985, va="top", fontsize=11.5, fontweight="bold",
                    color=_INK)  # fmt: skip
    figure.text(0.012, 0.915, _conditions(result), fontsize=8.5, color=_INK, va="top")
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.115, top=0.84)
    return figure


def _conditions(result: TransferResult) -> str:
    settings, test = result.settings, result.rows[0].phases.samples
    classes = len(result.selection["train"]["classes"])
    per_class = settings.train_per_class
    images = (
        "all training images" if per_class is None else f"{per_class * classes} training images"
    )
    return (
        f"{settings.backbone}, {data_name(settings.data)} ({classes} classes) at "
        f"{settings.image_size}², {images}, {test} test images; head RMSprop "
        f"{settings.head_learning_rate:g}, then SGD {settings.learning_rate:g}; "
        f"seed {settings.seed}"
    )


def _labels(ax: Axes, result: TransferResult) -> None:
    """Name every line where it ends, moved apart where labels would touch."""
    low, high = ax.get_ylim()
    room = 0.062 * (high - low)
    ends = sorted(
        (row.epochs[-1].test_accuracy, row.row.name, row.epochs[-1].number) for row in result.rows
    )
    heights: list[float] = []
    for value, _, _ in ends:
        heights.append(max(value, heights[-1] + room) if heights else value)
    shift = (heights[-1] - ends[-1][0]) / 2
    for (value, name, number), height in zip(ends, heights, strict=True):
        ax.annotate(f"{value:.3f} {name}", (number, height - shift), xytext=(6, 0),
                    textcoords="offset points", va="center", color=_STYLES[name][0], fontsize=9,
                    fontweight="bold", annotation_clip=False)  # fmt: skip
