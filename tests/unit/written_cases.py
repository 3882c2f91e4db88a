"""Facts and measurements written by hand: a network with four sites, and what is changed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from frostline.numerics.stats import paired_bootstrap
from frostline.types import Finding, Site
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts
from frostline.types.measured import (
    Attribution,
    Behaviour,
    Gap,
    Measurement,
    Probe,
    SiteMeasurement,
)

PATHS = ("bn1", "bn2", "bn3", "bn4")
SAMPLES = 200
CHANNELS = 8


def probe(name: str, loss: float, accuracy: float | None = None) -> Probe:
    """A probe with this mean loss; a missed sample costs log 2 at least, as in a cross-entropy."""
    losses, hits = np.full(SAMPLES, float(loss)), None
    if accuracy is not None:
        hits = (np.arange(SAMPLES) < round(accuracy * SAMPLES)).astype(float)
        missed = hits == 0
        losses[missed] = max(0.8, loss)
        if not missed.all():
            losses[~missed] = (loss * SAMPLES - losses[missed].sum()) / hits.sum()
        assert losses.min() >= 0, "such a loss needs a higher accuracy"
    noise = np.random.default_rng(sum(map(ord, name))).normal(size=SAMPLES)
    return Probe(name=name, losses=losses + 0.02 * loss * (noise - noise.mean()), hits=hits)


def site_facts(path: str, **changes: Any) -> SiteFacts:
    """A thawed stock site; keywords of ``Site`` and of ``SiteFacts``."""
    own: dict[str, Any] = {
        "mean": np.linspace(-1, 1, CHANNELS),
        "variance": np.linspace(0.5, 2, CHANNELS),
        "gamma": np.linspace(0.9, 1.1, CHANNELS),
        "beta": np.linspace(-0.1, 0.1, CHANNELS),
        "values": 64,
    }
    flags: dict[str, Any] = {
        "kind": "BatchNormalization",
        "index": PATHS.index(path) if path in PATHS else 0,
        "channels": CHANNELS,
        "axis": -1,
        "decay": 0.99,
        "epsilon": 1e-3,
        "params_frozen": False,
        "stats_frozen": False,
        "policy": "inference",
    }
    for name, value in changes.items():
        (own if name in SiteFacts.__dataclass_fields__ else flags)[name] = value
    return SiteFacts(site=Site(path=path, name=path, **flags), **own)


def site_measurement(
    path: str,
    *,
    shift: Any = 0.02,
    ratio: Any = 1.0,
    stored: tuple[Any, Any] | None = None,
    **changes: Any,
) -> SiteMeasurement:
    """Stored statistics and those of the data, ``shift`` and ``ratio`` away."""
    mean, variance = stored or (np.linspace(-1, 1, CHANNELS), np.linspace(0.5, 2, CHANNELS))
    mean, variance = np.broadcast_arrays(np.asarray(mean, float), np.asarray(variance, float))
    shift = np.broadcast_to(np.asarray(shift, float), mean.shape)
    ratio = np.broadcast_to(np.asarray(ratio, float), mean.shape)
    data_mean, data_variance = mean + shift * np.sqrt(variance), variance * ratio
    return SiteMeasurement(
        **{
            "path": path,
            "stored_mean": mean,
            "stored_variance": variance,
            "mean": data_mean,
            "variance": data_variance,
            "batch_mean": data_mean,
            "batch_variance": data_variance,
            "values": 64,
            "shift": np.abs(shift),
            "ratio": ratio,
            "noise": 0.05,
            **changes,
        }
    )


def facts(
    sites: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    trains: Mapping[str, bool] | None = None,
    **changes: Any,
) -> ModelFacts:
    """conv1, bn1, ..., conv4, bn4, head; ``sites``: path -> changes, all four when left out."""
    chosen = {path: {} for path in PATHS} if sites is None else sites
    flags = trains or {}
    layers = [f"conv{i + 1}" for i in range(len(PATHS))] + ["head"]
    return ModelFacts(
        sites=tuple(site_facts(path, **dict(more)) for path, more in chosen.items()),
        layers=tuple(
            LayerFacts(path=name, order=2 * i, trains=flags.get(name, True))
            for i, name in enumerate(layers)
        ),
        order={path: 2 * i + 1 for i, path in enumerate(PATHS) if path in chosen},
        **changes,
    )


GAPS = {
    "total": ("training", "inference"),
    "bn": ("training blend", "inference"),
    "dropout": ("dropout", "inference"),
    "population": ("population", "inference"),
}


def measurement(
    probes: Mapping[str, tuple[float, float] | float],
    *,
    shares: Sequence[float] | None = None,
    paths: Sequence[str] = PATHS,
    sites: Mapping[str, SiteMeasurement] | None = None,
    behaviour: Mapping[str, tuple[float | None, float | None, bool | None]] | None = None,
    **changes: Any,
) -> Measurement:
    """Probes by name -> loss, or loss and accuracy; shares of the sites, of the BN gap."""
    made = {
        name: probe(name, *(value if isinstance(value, tuple) else (value,)))
        for name, value in probes.items()
    }
    gaps = {
        name: Gap(
            name=name,
            of=of,
            minus=minus,
            loss=paired_bootstrap(made[of].losses, made[minus].losses, seed=0),
        )
        for name, (of, minus) in GAPS.items()
        if of in made and minus in made
    }
    attribution = None
    if shares is not None:
        gap = made["training blend"].loss - made["inference"].loss
        attribution = Attribution(
            paths=tuple(paths),
            shares=gap * np.asarray(shares),
            gap=gap,
            residual=abs(1 - float(np.sum(shares))),
            complete=True,
            nodes=5,
        )
    classification = any(isinstance(value, tuple) for value in probes.values())
    return Measurement(
        **{
            "samples": SAMPLES,
            "batch_size": 32,
            "task": "multiclass" if classification else "unknown",
            "classes": 10 if classification else None,
            "chance": 0.1 if classification else None,
            "probes": made,
            "gaps": gaps,
            "behaviour": {
                path: Behaviour(path=path, training=seen[0], inference=seen[1], moves=seen[2])
                for path, seen in (behaviour or {}).items()
            },
            "sites": {path: site_measurement(path) for path in paths} if sites is None else sites,
            "attribution": attribution,
            **changes,
        }
    )


def finding(code: str, *sites: str, **evidence: float | str) -> Finding:
    """A finding of a rule, with as much text as is needed."""
    return Finding(
        code=code,
        name="a-rule",
        severity="error",
        certainty="is",
        sites=sites,
        message="what is wrong",
        evidence=evidence,
    )
