"""Pictures of a measurement, drawn with matplotlib's objects: no window, no global state.

Each function draws one picture into a given figure, wide (a page) or narrow (a phone). Every
picture is also readable in grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from frostline.report import escaping, excerpts, wording
from frostline.report.palette import BAD, BAND, FROZEN, GOOD, GROUND, INK, QUIET, RULE, TRAINS
from frostline.types import Array
from frostline.types.comparison import Comparison
from frostline.types.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    Canvas = Figure | SubFigure

#: Most rows in a picture; the page's lists have all of them.
MOST_ROWS = 12

#: With more blocks than this, none is shaded: the stripes would hide the data.
MOST_BANDS = 40

#: Mean width of a character of the labels, in points.
_CHARACTER = 6.1

#: Style of all pictures, on top of matplotlib's ``default``: the user's own style is ignored.
STYLE: dict[str, Any] = {
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.7,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 11.0,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 11.0,
    "ytick.labelsize": 11.0,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "xtick.minor.visible": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


def gaps(figure: Canvas, report: Report, *, wide: bool) -> None:
    """Draw every gap in loss with its interval; a filled dot marks a certain sign."""
    measured = _measured(report)
    shown = [gap for gap in measured.gaps.values() if math.isfinite(gap.loss.estimate)]
    ax = _rows(figure, [wording.gap(gap.name) for gap in shown], wide=wide)
    ax.axvline(0, color=QUIET, lw=0.9)
    for row, gap in enumerate(shown):
        low, high = (x if math.isfinite(x) else gap.loss.estimate for x in _ends(gap.loss))
        ax.plot([low, high], [row, row], color=INK, lw=1.6, solid_capstyle="butt")
        fill = INK if gap.loss.excludes_zero else GROUND
        ax.plot([gap.loss.estimate], [row], "o", ms=6.5, color=INK, mfc=fill, mew=1.4)
    ax.grid(axis="x")
    ax.set_xlabel("difference in loss")


def attribution(figure: Canvas, report: Report, *, wide: bool) -> None:
    """Draw each site's share of the BN gap over depth."""
    found = report.attribution
    assert found is not None
    shares = excerpts.relative_shares(found) * 100
    ax = figure.subplots()
    figure.subplots_adjust(**_margins(figure, left=48, right=6, top=18, bottom=70))
    frozen = _frozen(report, found.paths)
    _block_bands(ax, report, found.paths, wide=wide)
    _bars(ax, shares, frozen)
    ax.axhline(0, color=QUIET, lw=0.7, zorder=3)
    for rank, index in enumerate(excerpts.largest(shares), start=1):
        up = shares[index] >= 0
        ax.annotate(str(rank), (index, shares[index]), xytext=(0, 2 if up else -2),
                    textcoords="offset points", ha="center", va="bottom" if up else "top",
                    fontweight="bold", color=INK)  # fmt: skip
    ax.set_ylabel("share of the gap, %")
    _depth_axis(ax, frozen)


def groups(figure: Canvas, report: Report, *, wide: bool) -> None:
    """Draw the blocks with the largest shares, in order of depth."""
    found = report.attribution
    assert found is not None
    shown = excerpts.group_shares(found, MOST_ROWS)
    ax = _rows(figure, [name for name, _ in shown], wide=wide, bottom=4)
    values = [share * 100 for _, share in shown]
    ax.barh(range(len(values)), values, height=0.62 if wide else 0.3, color=QUIET)
    ax.axvline(0, color=QUIET, lw=0.7)
    for row, value in enumerate(values):
        ax.annotate(f"{wording.minus(f'{value:.0f}')}%", (value, row),
                    xytext=(4 if value >= 0 else -4, 0), textcoords="offset points",
                    ha="left" if value >= 0 else "right", va="center")  # fmt: skip
    ax.margins(x=0.14)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)


def drift(figure: Canvas, report: Report, *, wide: bool) -> None:  # noqa: ARG001
    """Draw how far each site's stored statistics are from those of the data."""
    paths = list(_measured(report).sites)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(**_margins(figure, left=48, right=6, top=22, bottom=70), hspace=0.3)
    frozen = _frozen(report, paths)
    shift, ratio = excerpts.drift_quantiles(_measured(report))
    shift = np.clip(shift, 1e-3, 1e4)
    ratio = np.clip(ratio, 1e-4, 1e4)
    upper.set_title("shift of the mean, standard deviations", loc="left", fontsize=11, color=INK)
    lower.set_title("variance of the data / stored variance", loc="left", fontsize=11, color=INK)
    lower.axhline(1, color=QUIET, lw=0.8, ls=(0, (3, 3)), zorder=1)
    for ax, (low, middle, high) in ((upper, shift), (lower, ratio)):
        ax.set_yscale("log")
        _block_bands(ax, report, tuple(paths), wide=False)
        _ranges(ax, low, middle, high, frozen)
        _plain_log_axis(ax)
    upper.tick_params(labelbottom=False)
    _depth_axis(lower, frozen)


def path(figure: Canvas, report: Report, *, wide: bool) -> None:  # noqa: ARG001
    """Draw the loss from stored statistics (λ = 0) to those that training uses."""
    found = report.attribution
    assert found is not None
    t, losses = np.array(found.curve, dtype=np.float64).T
    ax = figure.subplots()
    figure.subplots_adjust(**_margins(figure, left=48, right=16, top=12, bottom=40))
    ax.plot(t, losses, "o-", color=INK, lw=1.8, ms=4.5)
    ax.grid(axis="y")
    ax.set_xlim(-0.04, 1.04)
    ax.margins(y=0.16)
    ax.set_xticks([0, 0.5, 1], ["0\ninference", "0.5", "1\ntraining"])
    ax.set_ylabel("loss")
    for index in (0, len(t) - 1):
        ax.annotate(wording.number(losses[index]), (t[index], losses[index]), xytext=(0, 6),
                    textcoords="offset points", ha="center", fontweight="bold")  # fmt: skip


def sweep(figure: Canvas, report: Report, *, wide: bool) -> None:  # noqa: ARG001
    """Draw the loss over batch sizes, with batch statistics and at inference."""
    points = _measured(report).sweep
    sizes = [point.batch_size for point in points]
    ax = figure.subplots()
    figure.subplots_adjust(**_margins(figure, left=48, right=16, top=12, bottom=40))
    batch = [point.batch_loss for point in points]
    inference = [point.inference_loss for point in points]
    ax.plot(sizes, inference, "s--", color=QUIET, lw=1.6, ms=4.5, label="inference")
    ax.plot(sizes, batch, "o-", color=INK, lw=1.8, ms=4.5, label="batch statistics")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.grid(axis="y")
    ax.margins(x=0.06, y=0.2)
    ax.set_xlabel("samples per batch")
    ax.set_ylabel("loss")
    ax.legend(loc="best", frameon=False, fontsize=11, labelcolor=INK, handlelength=2.4)


def remedies(figure: Canvas, report: Report, *, wide: bool) -> None:
    """Draw each remedy as a line from before (hollow) to after (filled)."""
    metric = excerpts.remedy_metric(report.remedies)
    shown = excerpts.measured_remedies(report.remedies, metric)[:MOST_ROWS]
    best = excerpts.first_choice(report.remedies)
    names = [("★ " if remedy is best else "") + remedy.name for remedy in shown]
    ax = _rows(figure, names, wide=wide, right=64)
    for row, remedy in enumerate(shown):
        before, after = remedy.before[metric], remedy.after[metric]
        better = after > before if metric == "accuracy" else after < before
        colour = GOOD if better else BAD
        ax.plot([before, after], [row, row], color=colour, lw=2.4, solid_capstyle="butt", zorder=2)
        ax.plot([before], [row], "o", ms=7, color=QUIET, mfc=GROUND, mew=1.5, zorder=3)
        ax.plot([after], [row], "o", ms=7.5, color=colour, zorder=4)
        ax.annotate(wording.number(after), (1, row), xycoords=("axes fraction", "data"),
                    xytext=(10, 0), textcoords="offset points", va="center",
                    fontweight="bold" if remedy is best else "normal")  # fmt: skip
    _training_line(ax, report, metric)
    ax.grid(axis="x")
    ax.margins(x=0.06)
    ax.set_xlabel(f"{metric}: before ○, after ●")


Draw = Callable[..., None]


def available(report: Report) -> dict[str, Draw]:
    """Return name -> function of the pictures that this report has numbers for."""
    measured = report.measurement
    if measured is None:
        return {}
    found = report.attribution
    metric = excerpts.remedy_metric(report.remedies)
    has = {
        gaps: any(math.isfinite(gap.loss.estimate) for gap in measured.gaps.values()),
        attribution: found is not None and len(found.paths) > 1 and _finite(found.shares),
        groups: found is not None and len(found.groups) > 1 and _finite(found.shares),
        drift: any(np.isfinite(quantile).any() for quantile in excerpts.drift_quantiles(measured)),
        path: found is not None and len(found.curve) > 1 and _finite(found.curve),
        sweep: sum(math.isfinite(point.batch_loss) for point in measured.sweep) > 1,
        remedies: bool(excerpts.measured_remedies(report.remedies, metric)),
    }
    return {draw.__name__: draw for draw, is_there in has.items() if is_there}


def size(report: Report, name: str, *, wide: bool) -> tuple[float, float]:
    """Return width and height of a picture in points (CSS pixels of the page)."""
    width = 840.0 if wide else 340.0
    row = 26.0 if wide else 42.0
    if name == "gaps":
        return width, 58 + row * len(_measured(report).gaps)
    if name == "groups":
        found = report.attribution
        return width, 22 + row * min(len(found.groups) if found else 0, MOST_ROWS)
    if name == "remedies":
        metric = excerpts.remedy_metric(report.remedies)
        shown = excerpts.measured_remedies(report.remedies, metric)
        return width, 58 + row * min(len(shown), MOST_ROWS)
    if name in ("path", "sweep"):
        return (410.0 if wide else width), 220.0
    return width, {"attribution": 250.0, "drift": 340.0}[name]


def overview(report: Report) -> Figure:
    """Draw all pictures that the report has the numbers for, one below the other."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        drawn = available(report)
        if not drawn:
            figure = Figure(figsize=(7, 1.2), facecolor="white")
            figure.text(0.5, 0.5, "nothing was measured: rules alone", ha="center", va="center")
            return figure
        heights = [size(report, name, wide=True)[1] + 30 for name in drawn]
        figure = Figure(figsize=(840 / 72, sum(heights) / 72), facecolor="white")
        parts = figure.subfigures(len(drawn), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, high, (name, draw) in zip(parts, heights, drawn.items(), strict=True):
            part.set_facecolor("none")
            heading, picture = part.subfigures(2, 1, height_ratios=[24, high - 24])
            heading.set_facecolor("none")
            picture.set_facecolor("none")
            heading.text(0.008, 0.25, wording.PICTURES[name], fontweight="bold", va="bottom")
            draw(picture, report, wide=True)
    return figure


def comparison(figure: Canvas, result: Comparison) -> None:
    """Draw each treatment's lag behind the best with its interval, and its metric over the epochs.

    A filled dot marks a lag that is certain; the best one stands at zero.
    """
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1], squeeze=False)[0]
    for part in (left, right):
        part.set_facecolor("none")
    ax = _rows(left, [row.name for row in result.rows], wide=True)
    left.subplots_adjust(left=ax.get_position().x0 + 0.05)
    ax.axvline(0, color=QUIET, lw=0.9)
    curves = right.subplots()
    right.subplots_adjust(**_margins(right, left=48, right=10, top=16, bottom=42))
    for place, row in enumerate(result.rows):
        best = place == 0
        if row.behind is not None and math.isfinite(row.behind.estimate):
            middle = row.behind.estimate
            ends = [-x if math.isfinite(x) else -middle for x in _ends(row.behind)]
            ax.plot(ends, [place, place], color=INK, lw=1.6, solid_capstyle="butt")
            fill = INK if row.behind.low > 0 else GROUND
            ax.plot([-middle], [place], "o", ms=6.5, color=INK, mfc=fill, mew=1.4)
        elif best:
            ax.plot([0], [place], "o", ms=7.5, color=GOOD)
        style = {"color": GOOD, "lw": 2.2} if best else {"color": QUIET, "lw": 1.2}
        mark = "o" if best else "sD^v<>pPX*"[(place - 1) % 10]
        curves.plot(range(len(row.curve)), row.curve, marker=mark, ms=4, **style)
    ax.grid(axis="x")
    ax.margins(x=0.06)
    ax.set_xlabel(f"{result.metric}, behind the best: the further left, the worse")
    curves.grid(axis="y")
    curves.set_xticks(range(max(len(row.curve) for row in result.rows)))
    curves.set_xlabel("epoch")
    curves.set_ylabel(f"validation {result.metric}")


def size_of_comparison(result: Comparison) -> tuple[float, float]:
    """Return width and height of :func:`comparison`, in points."""
    return 840.0, max(220.0, 66 + 26.0 * len(result.rows))


def compared(result: Comparison) -> Figure:
    """Return :func:`comparison` as a figure of its own, on a white ground."""
    import matplotlib.style
    from matplotlib.figure import Figure

    width, height = size_of_comparison(result)
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
        comparison(figure, result)
    return figure


def _measured(report: Report) -> Any:
    return report.measurement


def _ends(interval: Any) -> tuple[float, float]:
    return interval.low, interval.high


def _finite(values: Any) -> bool:
    return bool(np.isfinite(np.asarray(values, dtype=np.float64)).all())


def _margins(canvas: Canvas, **points: float) -> dict[str, float]:
    """Convert margins from points to matplotlib's fractions."""
    box = canvas.bbox
    scale = 72 / canvas.figure.dpi
    width, height = box.width * scale, box.height * scale
    return {
        "left": points["left"] / width,
        "right": 1 - points["right"] / width,
        "bottom": points["bottom"] / height,
        "top": 1 - points["top"] / height,
    }


def _rows(
    canvas: Canvas, names: Sequence[str], *, wide: bool, right: float = 14, bottom: float = 42
) -> Axes:
    """Return axes with one row per name: names at the left, or above the row on a phone."""
    ax: Axes = canvas.subplots()
    rows = max(len(names), 1)
    fits = 56 if wide else 54
    labels = [wording.shortened(escaping.printable(name), fits) for name in names]
    left = 12 + _CHARACTER * max((len(label) for label in labels), default=0) if wide else 8
    canvas.subplots_adjust(**_margins(canvas, left=left, right=right, top=16, bottom=bottom))
    ax.set_ylim(rows - 0.4, -0.65 if wide else -0.85)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    if wide:
        ax.set_yticks(range(len(labels)), labels, color=INK)
    else:
        ax.set_yticks([])
        for row, label in enumerate(labels):
            ax.annotate(label, (0, row), xycoords=("axes fraction", "data"), xytext=(-6, 9),
                        textcoords="offset points", va="bottom", color=INK)  # fmt: skip
    return ax


def _frozen(report: Report, paths: Sequence[str]) -> list[bool]:
    frozen = excerpts.frozen_paths(report)
    return [path in frozen for path in paths]


def _kinds(frozen: Sequence[bool]) -> list[tuple[Array, str, str]]:
    """Return (positions, marker, colour) of frozen sites and of sites that train."""
    is_frozen = np.array(frozen, dtype=bool)
    return [(np.flatnonzero(is_frozen), "o", FROZEN), (np.flatnonzero(~is_frozen), "s", TRAINS)]


def _bars(ax: Axes, heights: Array, frozen: Sequence[bool]) -> None:
    """Draw all bars of a colour as one path, which keeps the file small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    half = 0.45 if len(heights) > 100 else 0.36 * min(1.0, len(heights) / 8)
    for chosen, _, colour in _kinds(frozen):
        if not len(chosen):
            continue
        left, right, top, zero = chosen - half, chosen + half, heights[chosen], 0 * chosen
        corners = np.stack([left, zero, left, top, right, top, right, zero], axis=1)
        outline = Path.make_compound_path_from_polys(corners.reshape(-1, 4, 2))
        ax.add_patch(PathPatch(outline, facecolor=colour, edgecolor="none", zorder=2))
    low, high = min(0.0, float(heights.min())), max(0.0, float(heights.max()))
    room = 0.14 * ((high - low) or 1.0)
    ax.set_ylim(low - (room if low else 0), high + room)


def _ranges(ax: Axes, low: Array, middle: Array, high: Array, frozen: Sequence[bool]) -> None:
    """Draw median and range per site: round where frozen, square where it trains."""
    many = len(middle) > 100
    for chosen, mark, colour in _kinds(frozen):
        gaps_between = np.full(len(chosen), np.nan)
        x = np.stack([chosen, chosen, gaps_between], axis=1).ravel()
        y = np.stack([low[chosen], high[chosen], gaps_between], axis=1).ravel()
        ax.plot(x, y, color=colour, lw=1.0 if many else 1.8, alpha=0.55, zorder=2)
        size = 2.2 if many else 4.0
        ax.plot(chosen, middle[chosen], mark, ms=size, color=colour, zorder=3)


def _plain_log_axis(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    steps = (1.0,) if high / low > 30 else (1.0, 2.0, 5.0)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=8))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _training_line(ax: Axes, report: Report, metric: str) -> None:
    """Mark the value in training mode, which a complete repair would reach."""
    found = _measured(report).probes.get("training blend") if report.measurement else None
    value = None if found is None else getattr(found, metric)
    if value is None or not math.isfinite(value):
        return
    ax.axvline(value, color=QUIET, lw=1.0, ls=(0, (3, 3)), zorder=1)
    ax.annotate("training mode", (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                textcoords="offset points", ha="center", va="bottom", color=QUIET,
                fontsize=10)  # fmt: skip


def _block_bands(ax: Axes, report: Report, paths: tuple[str, ...], *, wide: bool) -> None:
    """Shade every other block, and name blocks that are wide enough."""
    runs = excerpts.runs(excerpts.block_of(report, paths))
    if not 2 <= len(runs) <= MOST_BANDS:
        return
    for number, (name, start, stop) in enumerate(runs):
        if number % 2:
            ax.axvspan(start - 0.5, stop - 0.5, color=BAND, lw=0, zorder=0)
        room = (stop - start) * 780 / max(len(paths), 1)
        if wide and name and len(name) * _CHARACTER < room:
            ax.annotate(escaping.printable(name), ((start + stop - 1) / 2, 1),
                        xycoords=("data", "axes fraction"), xytext=(0, 2),
                        textcoords="offset points", ha="center", va="bottom", fontsize=10,
                        color=QUIET)  # fmt: skip


def _depth_axis(ax: Axes, frozen: Sequence[bool]) -> None:
    """Number the sites, and label the frozen stretches."""
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import offset_copy

    number = len(frozen)
    ax.set_xlim(-0.7, number - 0.3)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.set_xlabel("site, in execution order", labelpad=27)
    strip = offset_copy(ax.get_xaxis_transform(), ax.figure.figure, y=-24, units="points")
    width = ax.get_window_extent().width * 72 / ax.figure.dpi
    for name, start, stop in excerpts.runs(["frozen" if locked else "trains" for locked in frozen]):
        colour = FROZEN if name == "frozen" else TRAINS
        ax.plot([start - 0.4, stop - 0.6], [0, 0], color=colour, lw=3.2, clip_on=False,
                transform=strip, solid_capstyle="butt")  # fmt: skip
        if (stop - start) / number * width > len(name) * _CHARACTER:
            ax.annotate(name, ((start + stop - 1) / 2, 0), ha="center", va="top", xycoords=strip,
                        xytext=(0, -3), textcoords="offset points", color=colour,
                        annotation_clip=False)  # fmt: skip
