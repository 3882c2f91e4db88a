"""Draw the experiments: overfit as one small panel per row, transfer as one line per row.

The colours are Okabe and Ito's, told apart with any colour vision. Every curve is named where it
ends and has dashes of its own, so the pictures also read in grey.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from frostline.experiments.results import OverfitResult, OverfitRow, TransferResult
from frostline.experiments.settings import data_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASE1, _PHASE0, _TRAIN, _INK = "#0072B2", "#D55E00", "#767676", "#333333"
_GRID, _EDGE = "#e6e6e6", "#999999"

#: Colour and dashes of every row; Okabe and Ito's colours, told apart in grey by the dashes.
_STYLES: dict[str, tuple[str, Any]] = {
    "unpatched": ("#D55E00", (0, (6, 1.5))),
    "patched": ("#0072B2", "-"),
    "all-bn-frozen": ("#009E73", (0, (3, 1))),
    "recalibrate": ("#CC79A7", (0, (1, 1))),
    "ramp": ("#E69F00", (0, (5, 1, 1, 1))),
}
#: Vertical distance, in axis units of accuracy, below which two end labels would touch.
_LABEL_DISTANCE = 0.085


def draw(result: OverfitResult | TransferResult, *, suffix: str) -> bytes:
    """Return the figure as the bytes of a ``.png`` or ``.svg`` file.

    The bytes depend on the numbers only (no date, fixed SVG ids), so that a figure under version
    control changes only with its result.
    """
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "frostline", "svg.fonttype": "none", "font.size": 9.0}):
        figure = (
            overfit_figure(result) if isinstance(result, OverfitResult) else transfer_figure(result)
        )
        if suffix == ".svg":
            figure.savefig(stream, format="svg", metadata={"Date": None})
        else:
            figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def overfit_figure(result: OverfitResult) -> Figure:
    """Return a figure with one panel per row: accuracy over epochs in both phases."""
    from matplotlib.figure import Figure

    columns = min(3 if len(result.rows) <= 6 else 4, len(result.rows))
    lines = math.ceil(len(result.rows) / columns)
    wide = max(7.0, 3.5 * columns)  # narrower, and the words above would not fit
    figure = Figure(figsize=(wide, 2.55 * lines + 0.95), facecolor="white")
    axes = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    floor = _floor(result)
    for position, (ax, row) in enumerate(zip(axes, result.rows, strict=False)):
        _panel(ax, row, floor=floor, named=position == 0)
        if position % columns == 0:
            ax.set_ylabel("accuracy", color=_INK)
        if position + columns >= len(result.rows):
            ax.set_xlabel("epoch", color=_INK)
            ax.tick_params(labelbottom=True)
    for ax in axes[len(result.rows) :]:
        ax.set_visible(False)
    _words(figure, result)
    return figure


def _panel(ax: Axes, row: OverfitRow, *, floor: float, named: bool) -> None:
    epochs = [epoch.number for epoch in row.epochs]
    training = [epoch.phase1_accuracy for epoch in row.epochs]
    inference = [epoch.phase0_accuracy for epoch in row.epochs]
    mark = "o" if len(epochs) == 1 else None
    ax.fill_between(epochs, inference, training, color=_PHASE0, alpha=0.16, linewidth=0)
    ax.plot(epochs, [e.train_accuracy for e in row.epochs], color=_TRAIN, lw=1.0, ls=(0, (2, 2)),
            marker=mark, label="while training (as fit reports it)")  # fmt: skip
    ax.plot(epochs, training, color=_PHASE1, lw=1.8, marker=mark, label="phase 1: training mode")
    ax.plot(epochs, inference, color=_PHASE0, lw=1.8, ls=(0, (6, 1.5)), marker=mark,
            label="phase 0: inference (validation)")  # fmt: skip
    shown = inference[-1]
    if row.row.recalibrate:  # the curve ends before the statistics were measured anew
        shown = row.phases["0"].metrics["accuracy"]
        ax.plot([epochs[-1]] * 2, [inference[-1], shown], color=_PHASE0, lw=1.0)
        ax.plot([epochs[-1]], [shown], color=_PHASE0, marker="o", markersize=6)
    _end_labels(ax, epochs[-1], training[-1], shown, floor=floor, named=named)
    ax.set_title(row.row.name, loc="left", fontsize=10, fontweight="bold", color=_INK)
    ax.set_ylim(floor, 1.03)
    ax.set_xlim(epochs[0] - 0.2, epochs[-1] + 0.3 + 0.26 * (epochs[-1] - epochs[0] + 1))
    ax.set_xticks(_ticks(epochs))
    _frame(ax)


def _end_labels(
    ax: Axes, last: int, training: float, inference: float, *, floor: float, named: bool
) -> None:
    """Write the last values beside the curves, moved apart where they would touch."""
    room = _LABEL_DISTANCE * (1.03 - floor) / 0.55
    upper, lower = max(training, inference), min(training, inference)
    middle = (upper + lower) / 2
    if upper - lower < room:
        upper, lower = middle + room / 2, middle - room / 2
    heights = (upper, lower) if training >= inference else (lower, upper)
    for value, height, color, phase in (
        (training, heights[0], _PHASE1, "phase 1"),
        (inference, heights[1], _PHASE0, "phase 0"),
    ):
        text = f"{value:.3f}" + (f"\n{phase}" if named and abs(upper - lower) > 2 * room else "")
        if not named:
            text = f"{value:.3f}"
        ax.annotate(text, (last, height), xytext=(5, 0), textcoords="offset points",
                    annotation_clip=False, va="center", color=color, fontsize=9,
                    fontweight="bold")  # fmt: skip


def _words(figure: Figure, result: OverfitResult) -> None:
    """Write title, conditions and the legend of the three curves."""
    settings = result.settings
    classes = ", ".join(str(name) for name in settings.classes) or "all classes"
    count = result.rows[0].phases.samples
    recalibrated = any(row.row.recalibrate for row in result.rows)
    _heading(
        figure,
        "Same weights, same images, two learning phases",
        f"{settings.backbone}, {count} images of {data_name(settings.data)} ({classes}) at "
        f"{settings.image_size}², {settings.optimizer.upper()}, seed {settings.seed}. "
        "Shaded: the gap." + (" Dot: after recalibrating." if recalibrated else ""),
        0.27 / figure.get_figheight(),
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order: list[Any] = [1, 2, 0]
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="lower left", ncols=3,
        frameon=False, fontsize=8.5, bbox_to_anchor=(0.004, 0.0), labelcolor=_INK,
    )  # fmt: skip
    high = figure.get_figheight()
    figure.subplots_adjust(
        left=0.6 / figure.get_figwidth(), right=0.99, bottom=0.78 / high, top=1 - 0.86 / high,
        wspace=0.08, hspace=0.3,
    )  # fmt: skip


def _floor(result: OverfitResult) -> float:
    """Return the lower end of the accuracy axis: a multiple of 0.1 below every curve."""
    least = min(
        min(epoch.phase0_accuracy, epoch.phase1_accuracy, epoch.train_accuracy)
        for row in result.rows
        for epoch in row.epochs
    )
    return max(0.0, math.floor(least * 10 - 0.2) / 10)


def _ticks(epochs: list[int]) -> list[int]:
    step = max(1, math.ceil(len(epochs) / 5))
    return epochs[step - 1 :: step] if len(epochs) > 1 else epochs


def _frame(ax: Axes) -> None:
    """Give axes their grid, and only the two lines that carry ticks."""
    ax.grid(axis="y", color=_GRID, lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(_EDGE)
    ax.tick_params(colors=_INK, length=2.5)


def _heading(figure: Figure, title: str, conditions: str, distance: float) -> None:
    """Write the title, and below it how the numbers were made."""
    figure.suptitle(title, x=0.012, ha="left", y=0.985, va="top", fontsize=11.5,
                    fontweight="bold", color=_INK)  # fmt: skip
    figure.text(0.012, 0.985 - distance, conditions, fontsize=8.5, color=_INK, va="top")


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
    _line_labels(ax, result)
    last = settings.head_epochs + settings.epochs
    ax.axvline(settings.head_epochs + 0.5, color=_EDGE, lw=0.8)
    ax.annotate(f"fine-tuned from '{result.rows[0].boundary}' on", (settings.head_epochs + 0.6, 0),
                xycoords=("data", "axes fraction"), xytext=(0, 5), textcoords="offset points",
                color=_INK, fontsize=8)  # fmt: skip
    ax.set_xlim(0.7, last + 0.3 + 0.24 * last)
    ax.set_xticks(range(1, last + 1))
    ax.set_xlabel("epoch", color=_INK)
    ax.set_ylabel("test accuracy (inference)", color=_INK)
    _frame(ax)
    _heading(figure, "A new head, then fine-tuning: test accuracy by treatment of BN",
             _conditions(result), 0.07)  # fmt: skip
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


def _line_labels(ax: Axes, result: TransferResult) -> None:
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
