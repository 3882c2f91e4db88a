"""Tables as text: exact at two widths, complete without colour, numbers never cut."""

from __future__ import annotations

import re
from typing import Any

import pytest

from frostline.report import phases, sites, text
from frostline.types import PhaseRow, PhaseTable, Site


def site(index: int, **changes: Any) -> Site:
    facts: dict[str, Any] = {
        "path": f"backbone/block{index}/bn",
        "name": "bn",
        "kind": "BatchNormalization",
        "index": index,
        "channels": 32,
        "axis": -1,
        "decay": 0.99,
        "epsilon": 1e-3,
        "params_frozen": False,
        "stats_frozen": False,
        "policy": "inference",
    }
    return Site(**{**facts, **changes})


def phase(name: Any, loss: float | None, **metrics: float) -> PhaseRow:
    return PhaseRow(phase=name, loss=loss, metrics=metrics)


SITES = (
    site(0, params_frozen=True, stats_frozen=True),
    site(1, params_frozen=True, stats_frozen=True, policy="batch"),
    site(2, params_frozen=True, channels=None),
    site(3, calls=2),
)

TABLE = PhaseTable(
    rows=(
        phase("dynamic", 0.513, accuracy=0.785, auc=0.951),
        phase("0", 0.513, accuracy=0.785, auc=0.951),
        phase("1", 0.064, accuracy=1.0, auc=1.0),
    ),
    task="binary",
    samples=200,
    sites=49,
    patterns=("accuracy is at chance while AUC is near 1",),
)


def test_sites_at_80_columns() -> None:
    shown = text.render(sites.sites_table(SITES, boundary="backbone/block2/conv", before=2))
    assert shown == (
        "#  site                        chan.  gamma/beta  statistics  decay  in training\n"
        "0  backbone/block0/bn             32  frozen      frozen       0.99  stored\n"
        "1  backbone/block1/bn             32  frozen      frozen       0.99  batch\n"
        "boundary: backbone/block2/conv is the first layer that trains ──────────────────\n"
        "2  backbone/block2/bn              –  frozen      move         0.99  batch\n"
        "3  backbone/block3/bn (used       32  train       move         0.99  batch\n"
        "   2×)\n"
        "4 BN layers: statistics frozen in 2, gamma/beta frozen in 3.\n"
    )


def test_sites_use_a_wider_terminal() -> None:
    shown = text.render(sites.sites_table(SITES, before=4, width=120), width=120)
    lines = shown.splitlines()
    assert lines[4].startswith("3  backbone/block3/bn (used 2×)")
    assert lines[5].startswith("boundary: none, every layer is frozen ───")
    assert len(lines[5]) == 120


@pytest.mark.parametrize("before", [None, 0, 2, 4])
@pytest.mark.parametrize("width", [70, 80, 120])
def test_a_path_is_never_cut(width: int, before: int | None) -> None:
    long = site(7, path="backbone/" + "stage_with_a_long_name/" * 5 + "bn")
    table = sites.sites_table((*SITES, long), boundary="conv", before=before, width=width)
    lines = text.render(table, width=width).splitlines()
    # The path may be folded over several lines, but all of it has to be there to be copied.
    start = lines[0].index("site")
    end = lines[0].index("chan.") - 1
    column = "".join(line[start:end].strip() for line in lines if not line.startswith("boundary"))
    assert long.path in column
    assert all(len(line) <= width for line in lines)
    assert "…" not in "".join(lines)


def test_no_line_where_nothing_is_frozen() -> None:
    assert "boundary" not in text.render(sites.sites_table((site(0), site(1))))


def test_phases_at_80_columns() -> None:
    assert text.render(phases.phases_table(TABLE)) == (
        "binary, 200 samples, 49 BN layers\n"
        "phase                                  loss   accuracy      AUC\n"
        "───────────────────────────────────────────────────────────────\n"
        "dynamic (the model's own evaluate)    0.513      0.785    0.951\n"
        "phase 0 (inference)                   0.513      0.785    0.951\n"
        "phase 1 (training)                    0.064      1.000    1.000\n"
        "\n"
        "gap (phase 1 − phase 0)              -0.449     +0.215   +0.049\n"
        "▶ accuracy is at chance while AUC is near 1\n"
    )


def test_regression_shows_its_own_metrics_and_no_loss_where_there_is_none() -> None:
    rows = tuple(phase(name, None, mse=2500.0, spearman=0.99) for name in ("dynamic", "0", "1"))
    table = PhaseTable(rows=rows, task="regression", samples=10, sites=1)
    shown = text.render(phases.phases_table(table))
    assert re.search(r"loss +MSE +Spearman", shown)
    assert re.search(r"phase 0 \(inference\) +– +2\.500e\+03 +0\.990", shown)
    assert re.search(r"gap .* – +\+0\.000 +\+0\.000", shown)
    assert "1 BN layer\n" in shown


def test_comparison_fits_80_columns_and_cuts_no_number() -> None:
    names = ("update", "inference+debias", "all-bn-frozen")
    table = phases.comparison_table(dict.fromkeys(names, TABLE))
    assert text.render(table) == (
        "row                       dynamic          phase 0          phase 1     gap\n"
        "                   loss  acc  AUC   loss  acc  AUC   loss  acc  AUC     acc\n"
        "───────────────────────────────────────────────────────────────────────────\n"
        "update             .513 .785 .951   .513 .785 .951   .064 1.00 1.00   +.215\n"
        "inference+debias   .513 .785 .951   .513 .785 .951   .064 1.00 1.00   +.215\n"
        "all-bn-frozen      .513 .785 .951   .513 .785 .951   .064 1.00 1.00   +.215\n"
    )


def test_comparison_leaves_out_a_metric_that_nobody_has() -> None:
    rows = tuple(phase(name, 12.345, accuracy=0.9996) for name in ("0", "1"))
    table = PhaseTable(rows=rows, task="binary", samples=10, sites=1)
    shown = text.render(phases.comparison_table({"batch": table}))
    assert "AUC" not in shown
    assert "12.3 1.00" in shown
    assert " – " in shown  # the dynamic phase was not measured


@pytest.mark.parametrize("renderable", [
    sites.sites_table(SITES, boundary="conv", before=2),
    phases.phases_table(TABLE),
])  # fmt: skip
def test_colour_adds_nothing_but_colour(renderable: Any) -> None:
    plain, colored = text.render(renderable), text.render(renderable, color=True)
    assert "\x1b" not in plain
    assert "\x1b[" in colored
    bare = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert [line.rstrip() for line in bare.splitlines()] == plain.splitlines()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = text.console(width=80)
    with out.capture() as colored:
        out.print(sites.sites_table(SITES, before=2))
    assert "\x1b[36m" in colored.get()
    monkeypatch.setenv("NO_COLOR", "1")
    out = text.console(width=80)
    with out.capture() as plain:
        out.print(sites.sites_table(SITES, before=2))
    assert "\x1b[36m" not in plain.get()


def test_names_from_a_model_are_not_markup() -> None:
    name = "[red]x[/red]/bn[0]"
    assert name in text.render(sites.sites_table((site(0, path=name),), before=1, boundary="x"))
    assert f"boundary: {name}" in text.render(sites.sites_table(SITES, before=1, boundary=name))
    assert name in text.render(text.facts({"name": name}))


def test_gap_is_training_minus_inference_of_common_numbers() -> None:
    low, high = phase("0", 0.5, accuracy=0.75, mse=1.0), phase("1", 0.25, accuracy=1.0)
    assert phases.phase_gaps(low, high) == {"loss": -0.25, "accuracy": 0.25}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0005, "0.001"), (999.9, "999.900"), (12345.6, "1.235e+04"),
     (float("nan"), "nan"), (float("inf"), "inf")],
)  # fmt: skip
def test_numbers(value: float | None, shown: str) -> None:
    assert text.number(value) == shown


def test_in_a_notebook_text_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert "backbone/block0/bn" in text.render(sites.sites_table(SITES, boundary=None))
    assert not text.console().is_jupyter
