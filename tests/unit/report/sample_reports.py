"""Reports made by hand, of every size and kind a page must be able to show.

The numbers are made up but of the right size; each report is consistent in itself (shares add up
to the gap, a gap is the difference of its probes).
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from frostline.report import html
from frostline.types import Array, Finding, Site, Skipped
from frostline.types.measured import (
    Attribution,
    Behaviour,
    Cause,
    Gap,
    Interval,
    Measurement,
    Probe,
    Remedy,
    SiteMeasurement,
    SweepPoint,
)
from frostline.types.report import Report

ORIGIN = {
    "model": "efficientnet-lite0",
    "backend": "tensorflow",
    "samples": "200",
    "batch size": "32",
    "seed": "0",
    "keras": "3.15.1",
    "frostline": "0.1.0",
}


def lite0_paths() -> list[tuple[str, int]]:
    """Paths and channels of EfficientNet-Lite0's 49 sites."""
    filters = [32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
    found = [("stem_bn", 32), ("block1_depthwise_bn", 32), ("block1_project_bn", 16)]
    for number in range(2, 17):
        wide = 6 * filters[number - 1]
        found += [
            (f"block{number}_expand_bn", wide),
            (f"block{number}_depthwise_bn", wide),
            (f"block{number}_project_bn", filters[number]),
        ]
    return [*found, ("top_bn", 1280)]


def site(path: str, index: int, channels: int, *, frozen: bool) -> Site:
    return Site(
        path=path, name=path.rsplit("/", 1)[-1], kind="BatchNormalization", index=index,
        channels=channels, axis=-1, decay=0.99, epsilon=1e-3, params_frozen=frozen,
        stats_frozen=frozen, policy="batch" if frozen else "inference",
    )  # fmt: skip


def site_measurement(path: str, channels: int, drift: float, seed: int) -> SiteMeasurement:
    rng = np.random.default_rng(seed)
    stored = rng.uniform(0.5, 2.0, channels)
    mean = rng.normal(0, 0.5, channels)
    shift = np.abs(rng.normal(0, drift, channels))
    ratio = np.exp(rng.normal(-drift, drift, channels))
    moved = mean + shift * np.sqrt(stored)
    return SiteMeasurement(
        path=path, stored_mean=mean, stored_variance=stored, mean=moved, variance=stored * ratio,
        batch_mean=moved, batch_variance=stored * ratio, values=64, shift=shift, ratio=ratio,
        noise=0.08,
    )  # fmt: skip


def attribution(paths: list[str], gap: float, curve: tuple[float, ...], seed: int) -> Attribution:
    rng = np.random.default_rng(seed)
    weights = rng.gamma(0.7, 1.0, len(paths)) * np.linspace(0.4, 1.6, len(paths))
    weights *= np.where(rng.random(len(paths)) < 0.12, -0.3, 1.0)
    shares = gap * 0.985 * weights / weights.sum()
    groups: dict[str, float] = {}
    for path, share in zip(paths, shares, strict=True):
        block = path.split("_")[0] if "/" not in path else path.rsplit("/", 1)[0]
        groups[block] = groups.get(block, 0.0) + float(share)
    top = np.argsort(-np.abs(shares))[:3]
    points = tuple((index / (len(curve) - 1), loss) for index, loss in enumerate(curve))
    return Attribution(
        paths=tuple(paths), shares=shares, gap=gap, residual=0.015, complete=True, nodes=10,
        groups=groups, alone={paths[i]: float(shares[i]) * 1.1 for i in sorted(top)}, curve=points,
    )  # fmt: skip


def probe(name: str, loss: float, accuracy: float | None, samples: int) -> Probe:
    rng = np.random.default_rng(len(name))
    losses = rng.gamma(0.5, 1.0, samples)
    hits: Array | None = None
    if accuracy is not None:
        hits = (np.arange(samples) < round(accuracy * samples)).astype(float)
    return Probe(name=name, losses=losses * loss / losses.mean(), hits=hits)


def interval(estimate: float, half: float) -> Interval:
    return Interval(estimate, estimate - half, estimate + half, 0.95)


def measurement(paths: list[tuple[str, int]], *, frozen: int, samples: int = 200) -> Measurement:
    names = [path for path, _ in paths]
    told = {
        "inference": (0.513, 0.785), "training": (0.071, 0.995), "batch": (0.064, 1.0),
        "training blend": (0.064, 1.0), "dropout": (0.531, 0.775),
        "population": (0.341, 0.865), "population unfrozen": (0.382, 0.855),
        "population frozen": (0.420, 0.820), "sorted": (0.092, 0.985),
        "validation inference": (0.701, 0.715), "validation batch": (0.412, 0.835),
    }  # fmt: skip
    probes = {name: probe(name, *values, samples) for name, values in told.items()}
    pairs = {
        "total": ("training", "inference"), "bn": ("training blend", "inference"),
        "dropout": ("dropout", "inference"), "all batch": ("batch", "inference"),
        "lag": ("population unfrozen", "inference"), "population": ("population", "inference"),
        "sorted": ("sorted", "batch"),
    }  # fmt: skip
    gaps = {
        name: Gap(
            name=name, of=of, minus=minus,
            loss=interval(told[of][0] - told[minus][0], 0.021 if name == "dropout" else 0.055),
            accuracy=interval(told[of][1] - told[minus][1], 0.018 if name == "dropout" else 0.05),
        )
        for name, (of, minus) in pairs.items()
    }  # fmt: skip
    drift = [0.05 + (0.5 if i >= frozen else 0.12) * i / max(len(paths), 2) for i in range(10_000)]
    return Measurement(
        samples=samples, batch_size=32, task="binary", classes=2, steps=70, chance=0.5,
        probes=probes, gaps=gaps,
        behaviour={
            name: Behaviour(path=name, training=1.0, inference=0.0, moves=i >= frozen)
            for i, name in enumerate(names)
        },
        sites={
            path: site_measurement(path, channels, drift[i], i)
            for i, (path, channels) in enumerate(paths)
        },
        attribution=attribution(names, -0.449, (0.513, 0.41, 0.3, 0.2, 0.13, 0.09, 0.064), 3),
        sweep=tuple(
            SweepPoint(batch_size=size, batch_loss=0.06 + 0.9 / size, batch_accuracy=1 - 0.3 / size,
                       inference_loss=0.513, inference_change=0.0)
            for size in (2, 4, 8, 16, 32, 64)
        ),
        neighbours=0.0,
        skipped={"round trip": "not asked for", "reference": "no reference model was given"},
    )  # fmt: skip


def causes(frozen: list[str], thawed: list[str]) -> tuple[Cause, ...]:
    return (
        Cause(
            code="FROZEN_BATCH_STATS", share=0.64, sites=tuple(frozen), certainty="is",
            message=f"{len(frozen)} frozen sites use batch statistics in training; at inference "
            "they use stored ones that no weight was trained for: 64% of the gap",
            evidence={"sites": len(frozen), "loss without": 0.2253, "policy": "batch"},
            findings=("FL101",),
        ),
        Cause(
            code="EMA_LAG", share=0.33, sites=tuple(thawed), certainty="may",
            message="70 steps at 0.99 leave 49% of the old value in the moving averages of "
            f"{len(thawed)} thawed sites: 33% of the gap",
            evidence={"steps": 70, "decay": 0.99, "old_value_left": 0.4948},
            settle="train 390 more steps, or give history= of the run", findings=("FL203",),
        ),
    )  # fmt: skip


def remedies() -> tuple[Remedy, ...]:
    before = {"loss": 0.513, "accuracy": 0.785}
    return (
        Remedy(
            name="recalibrate all", fix="recalibrate", causes=("FROZEN_BATCH_STATS", "EMA_LAG"),
            text="Store the exact statistics of these samples at every site.",
            python='fl.recalibrate(model, x, sites="all")',
            shell="frostline recalibrate model.keras data -o fixed.keras --sites all",
            before=before, after={"loss": 0.341, "accuracy": 0.865},
            change=interval(-0.172, 0.04), closed=0.38, recommended=True,
            note="The frozen filters were trained for the old statistics; check on held-out data.",
        ),
        Remedy(
            name="recalibrate unfrozen", fix="recalibrate", causes=("EMA_LAG",),
            text="Store the exact statistics of these samples at the sites that train.",
            python="fl.recalibrate(model, x)",
            shell="frostline recalibrate model.keras data -o fixed.keras",
            before=before, after={"loss": 0.382, "accuracy": 0.855},
            change=interval(-0.131, 0.05), closed=0.29, recommended=True,
        ),
        Remedy(
            name="convert, then train again", fix="convert", causes=("FROZEN_BATCH_STATS",),
            text="Frozen sites use stored statistics in training too; the weights behind them "
            "must be trained again.",
            python='model = fl.convert(model, policy="inference")',
            shell="frostline convert model.keras -o fixed.keras --policy inference",
            before=before, note="Its effect cannot be measured without training.",
        ),
        Remedy(
            name="set momentum to 0.9", fix="set-momentum", causes=("EMA_LAG",),
            text="Moving averages follow ten times faster in the next training run.",
            python="fl.set_momentum(model, 0.9)", before=before,
            after={"loss": 0.52, "accuracy": 0.78}, change=interval(0.007, 0.02), closed=0.0,
        ),
    )  # fmt: skip


def findings(frozen: list[str], thawed: list[str]) -> tuple[Finding, ...]:
    return (
        *(
            Finding(
                code="FL101", name="frozen-uses-batch-statistics", severity="error",
                certainty="is", sites=(path,), evidence={"policy": "batch"}, fix="convert",
                message="frozen, but training uses batch statistics; set policy='inference'",
            )
            for path in frozen
        ),
        *(
            Finding(
                code="FL203", name="stale-running-statistics", severity="warning",
                certainty="may", sites=(path,), evidence={"left": 0.49}, fix="recalibrate",
                message="49% of the statistics are from before training; recalibrate",
            )
            for path in thawed
        ),
        Finding(
            code="FL115", name="duplicate-names", severity="info", certainty="is",
            sites=("stem_bn",), message="reached by path; names need not be unique",
        ),
    )  # fmt: skip


def of_paths(paths: list[tuple[str, int]], *, frozen: int) -> Report:
    names = [path for path, _ in paths]
    return Report(
        verdict="BN is to blame for 97% of the gap: on the same 200 samples the loss is 0.071 in "
        "training mode and 0.513 at inference (−0.442, 95% interval −0.497 to −0.387)",
        origin=ORIGIN,
        causes=causes(names[:frozen], names[frozen:]),
        remedies=remedies(),
        findings=findings(names[:frozen], names[frozen:]),
        sites=tuple(
            site(path, i, channels, frozen=i < frozen) for i, (path, channels) in enumerate(paths)
        ),
        rules=("FL101", "FL115", "FL203"),
        skipped=(Skipped(code="FL107", name="trainable-changed", reason="not compiled"),),
        measurement=measurement(paths, frozen=frozen),
    )


def lite0() -> Report:
    """A fine-tuned EfficientNet-Lite0: 49 sites, 33 of them frozen."""
    return of_paths(lite0_paths(), frozen=33)


def many(number: int = 200) -> Report:
    """A deep net with long paths."""
    paths = [
        (f"backbone/stage{i * 5 // number + 1}/unit{i // 3}/batch_normalization_{i}", 64 + i % 7)
        for i in range(number)
    ]
    return of_paths(paths, frozen=number // 2)


def single() -> Report:
    """One site."""
    return of_paths([("bn", 8)], frozen=1)


def without_bn() -> Report:
    """A model without BN, in which dropout makes the gap."""
    full = measurement([("bn", 8)], frozen=0)
    kept = ("inference", "training", "dropout")
    return Report(
        verdict="no BatchNormalization layer: BN cannot be the cause; dropout explains the gap of "
        "0.018 (95% interval −0.003 to 0.039)",
        origin={**ORIGIN, "model": "vgg-small"},
        causes=(
            Cause(code="DROPOUT", share=1.0, sites=(), certainty="is",
                  message="2 dropout layers act in training mode only"),
        ),
        measurement=replace(
            full, sites={}, behaviour={}, attribution=None, sweep=(), neighbours=None,
            probes={name: full.probes[name] for name in kept},
            gaps={name: full.gaps[name] for name in ("total", "dropout")},
            noise_layers={"dropout": "dropout", "dropout_1": "dropout"},
        ),
    )  # fmt: skip


def linted() -> Report:
    """Rules alone: nothing was measured."""
    return replace(lite0(), verdict="33 errors and 16 warnings at 49 of 49 BN layers; first: FL101",
                   causes=(), remedies=(), measurement=None)  # fmt: skip


def healthy() -> Report:
    """Everything is fine."""
    full = lite0()
    measured = full.measurement
    assert measured is not None
    gap = replace(measured.gaps["dropout"], name="total", of="training")
    return replace(
        full, verdict="no gap: 49 BN layers, training mode and inference agree to 0.004",
        causes=(), remedies=(), findings=(), skipped=(),
        measurement=replace(measured, attribution=None, gaps={"total": gap}, sweep=()),
    )  # fmt: skip


#: Names that a careless page would obey.
HOSTILE = "<script>alert(1)</script>\"&'$x^2$ {{ 7 * 7 }} </style><img src=x onerror=alert(1)>"


def hostile() -> Report:
    """The same name wherever a name or text can stand."""
    report = of_paths([(f"{HOSTILE}/{name}", 8) for name in ("a", "b", "c")], frozen=1)
    measured = report.measurement
    assert measured is not None
    return replace(
        report,
        verdict=HOSTILE,
        origin={HOSTILE: HOSTILE},
        causes=tuple(
            replace(each, message=HOSTILE, settle=HOSTILE, evidence={HOSTILE: HOSTILE})
            for each in report.causes
        ),
        remedies=tuple(
            replace(each, name=HOSTILE, text=HOSTILE, python=HOSTILE, shell=HOSTILE, note=HOSTILE)
            for each in report.remedies
        ),
        findings=tuple(replace(each, message=HOSTILE, name=HOSTILE) for each in report.findings),
        skipped=(Skipped(code=HOSTILE, name=HOSTILE, reason=HOSTILE),),
        measurement=replace(
            measured,
            probes={**measured.probes, HOSTILE: replace(measured.probes["batch"], name=HOSTILE)},
            skipped={HOSTILE: HOSTILE},
        ),
    )


def broken() -> Report:
    """NaN and infinities wherever a number can stand: a network that has blown up."""
    report = of_paths([(name, 8) for name in ("a", "b", "c")], frozen=1)
    measured = report.measurement
    assert measured is not None
    assert measured.attribution is not None
    nan, inf = np.nan, np.inf
    nothing = Interval(nan, -inf, inf, 0.95)
    return replace(
        report,
        causes=tuple(replace(each, share=nan, evidence={"loss": inf}) for each in report.causes),
        remedies=tuple(
            replace(each, before={"loss": nan}, after={"loss": inf}, change=nothing, closed=nan)
            for each in report.remedies
        ),
        measurement=replace(
            measured,
            probes={
                name: replace(each, losses=each.losses * inf, hits=None, broken=200)
                for name, each in measured.probes.items()
            },
            gaps={name: replace(each, loss=nothing) for name, each in measured.gaps.items()},
            sites={
                name: replace(each, shift=each.shift * nan, ratio=each.ratio * inf)
                for name, each in measured.sites.items()
            },
            attribution=replace(
                measured.attribution, shares=measured.attribution.shares * nan, gap=nan,
                residual=inf, complete=False, curve=((0.0, nan), (1.0, inf)),
            ),
            sweep=tuple(
                replace(each, batch_loss=nan, inference_loss=inf) for each in measured.sweep
            ),
        ),
    )  # fmt: skip


EVERY = {
    each.__name__: each
    for each in (broken, lite0, many, single, without_bn, linted, healthy, hostile)
}


@functools.cache
def page(name: str) -> str:
    """The page of one of these, made once."""
    return html.page(EVERY[name]())
