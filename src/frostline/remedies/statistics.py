"""Repairs of the stored statistics: exact ones, settled averages, another epsilon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from frostline.causes.averages import OTHER_LAYER
from frostline.numerics.averages import suggest_momentum
from frostline.numerics.mixture import mixture, shares
from frostline.remedies.candidate import Candidate, Workplace
from frostline.remedies.registry import remedy
from frostline.types import Array
from frostline.types.codes import CauseCode, Fix
from frostline.types.measured import Remedy

#: Updates that a new momentum is suggested for where training steps are not known.
_USUAL_STEPS = 200

#: A recalibration's name is this and the group of its sites.
_RECALIBRATE = "recalibrate "


@remedy(Fix.RECALIBRATE, rank=40, verb="recalibrate")
def recalibrate(place: Workplace) -> Iterator[Candidate]:
    """Exact statistics of the data at unfrozen, all and frozen sites.

    ## When to use it
    Statistics lag, are lost, or belong to other weights or data; `fl.phases` is right in
    training mode and wrong at inference. It needs samples without labels, changes no weight,
    and `undo()` goes back bit for bit.

    ## When not to use it
    On a handful of samples, on data unlike those of use, or in front of frozen layers that were
    fitted to the old statistics: look at `fl.phases` before and after.

    ## Example
    ```python
    change = fl.recalibrate(model, x)
    print(change)
    change.undo()
    ```
    """
    unsteady = place.treated(Fix.FREEZE)
    stale = [code for code in place.treated(Fix.RECALIBRATE) if code not in unsteady]
    stale += place.shifted_by_dropout
    frozen = [site.site.stats_frozen for site in place.facts]
    if not frozen or not (stale or unsteady):
        return
    groups = {"unfrozen": not all(frozen), "all": True, "frozen": any(frozen)}
    if not any(frozen):
        groups["all"] = False  # the same as unfrozen
    if all(frozen):
        groups["frozen"] = False  # the same as all
    blamed = {*place.blamed(*stale, *unsteady)}
    other = next((c.evidence[OTHER_LAYER] for c in place.causes if OTHER_LAYER in c.evidence), None)
    for group, there in groups.items():
        sites = {p for p, site in place.sites.items() if _is_in(group, site.site.stats_frozen)}
        treats = tuple(
            code for code in (*stale, *unsteady) if not blamed or sites & {*place.blamed(code)}
        )
        after = place.population(group) if there and treats else None
        if after is None:
            continue
        text = f"{len(sites)} sites" if len(sites) != 1 else "1 site"
        note = None
        if unsteady and group != "unfrozen":
            note = "frozen sites drift away again in training unless they are locked as well"
        elif group != "unfrozen" and any(frozen):
            note = "layers behind frozen sites were fitted to the old statistics: check other data"
        if other is not None:
            note = f"'{other}' and the like would lose the statistics of the data that they are for"
        yield Candidate(
            name=f"{_RECALIBRATE}{group}",
            fix=Fix.RECALIBRATE,
            treats=treats,
            text=f"store the exact statistics of the data at {text}",
            after=after,
            python=f'fl.recalibrate(model, x, sites="{group}")',
            shell=f"frostline recalibrate MODEL DATA --sites {group} --output {place.words.file}",
            note=note,
            harms=other is not None,
        )


def group_of(remedy: Remedy) -> str | None:
    """Return the sites that a recalibration is for; ``None`` for other remedies."""
    return remedy.name.removeprefix(_RECALIBRATE) if remedy.fix == Fix.RECALIBRATE else None


@remedy(Fix.SET_MOMENTUM, rank=60)
def settled_average(place: Workplace) -> Iterator[Candidate]:
    """A momentum with which the average follows: then it holds the mean of the batches' moments.

    ## When to use it
    You train on, and the averages lag (too long) or jump (too short).

    ## When not to use it
    When training is over: it changes no statistics. `fl.recalibrate` does.

    ## Example
    ```python
    print(f"{fl.suggest_momentum(200):.3f}")
    print(fl.set_momentum(model, fl.suggest_momentum(200)))
    ```
    """
    named = place.treated(Fix.SET_MOMENTUM)
    paths = [path for path in place.blamed(*named) if path in place.measurement.sites]
    paths = [path for path in paths if not place.sites[path].site.stats_frozen]
    if not named or not paths:
        return
    site, words = place.sites[paths[0]].site, place.words
    steps = place.measurement.steps or place.facts.steps or _USUAL_STEPS
    decay = 1 - site.decay if CauseCode.MOMENTUM_CONVENTION in named else suggest_momentum(steps)
    decay = float(f"{decay:.3g}")
    if decay == site.decay:
        return
    found = {path: place.measurement.sites[path] for path in paths}
    statistics: dict[str, tuple[Array, Array]] = {
        path: (numbers.batch_mean, numbers.batch_variance) for path, numbers in found.items()
    }
    yield Candidate(
        name=f"momentum {decay:g} and train on",
        fix=Fix.SET_MOMENTUM,
        treats=named,
        text=f"average over {1 / (1 - decay):.3g} batches instead of {_batches(site.decay)}, at "
        f"{len(paths)} sites",
        after=place.bench.probe(f"momentum {decay:g}", statistics=statistics),
        python=f"fl.set_momentum(model, {decay:g})"
        + ("" if words.convention == "kept" else f"  # momentum={words.momentum(decay):.3g}"),
        shell=f"frostline set-momentum MODEL {decay:g} --output {words.file}"
        if words.file_keeps_settings
        else None,
        note="takes effect in training: the effect is that of an average that has settled, with "
        "the weights as they are now",
    )


@remedy(Fix.SET_EPSILON, rank=30)
def match_epsilon(place: Workplace) -> Iterator[Candidate]:
    """The epsilon of the reference, or of most sites: a variance that differs by as much.

    ## When to use it
    A network was converted between frameworks and epsilon was not, or a few layers differ from
    the rest.

    ## When not to use it
    When the network was trained with the epsilon that it has.

    ## Example
    ```python
    for layer in model.layers:
        if layer.name.startswith("bn"):
            layer.epsilon = 1e-5
    print({site.path: site.epsilon for site in fl.sites(model)})
    ```
    """
    wanted = dict(_wanted_epsilons(place)) if CauseCode.EPS_MISMATCH in place.codes else {}
    statistics = {}
    for path, epsilon in wanted.items():
        found = place.measurement.sites.get(path)
        if found is not None:
            variance = found.stored_variance + (epsilon - place.sites[path].site.epsilon)
            statistics[path] = (found.stored_mean, variance)
    if not statistics:
        return
    epsilon = Counter(wanted.values()).most_common(1)[0][0]
    path = next(iter(statistics))
    yield Candidate(
        name=f"epsilon {epsilon:g}",
        fix=Fix.SET_EPSILON,
        treats=(CauseCode.EPS_MISMATCH,),
        text=f"use epsilon {epsilon:g} at {len(statistics)} sites",
        after=place.bench.probe(f"epsilon {epsilon:g}", statistics=statistics),
        python=place.words.epsilon_line.format(
            name=path.rpartition("/")[2], dotted=path.replace("/", "."), epsilon=epsilon
        ),
    )


@remedy(Fix.MERGE_STATISTICS, rank=35)
def merged_replicas(place: Workplace) -> Iterator[Candidate]:
    """The statistics of both replicas together, what lies between them included.

    ## When to use it
    Replicas have the same weights and other statistics, each of its own share of the data, and
    the data are not at hand.

    ## When not to use it
    When their weights differ: merged statistics are those of no network then. When data are at
    hand: `fl.recalibrate` is exact also where each replica's average lags.

    ## Example
    ```python
    other = {name: value + 0.1 for name, value in fl.merge_statistics([model]).items()}
    merged = fl.merge_statistics([fl.merge_statistics([model]), other])
    print(merged.load_into(model))
    ```
    """
    known = place.measurement.difference
    if known is None or CauseCode.RANK_DIVERGENCE not in place.codes:
        return
    statistics = {}
    for path in place.blamed(CauseCode.RANK_DIVERGENCE):
        own = place.sites[path]
        if path in known.stored and own.mean is not None and own.variance is not None:
            means, variances = zip((own.mean, own.variance), known.stored[path], strict=True)
            statistics[path] = mixture(means, variances, shares(None, 2))
    if not statistics:
        return
    yield Candidate(
        name="merge statistics",
        fix=Fix.MERGE_STATISTICS,
        treats=(CauseCode.RANK_DIVERGENCE,),
        text=f"store the merged statistics of both replicas at {len(statistics)} sites",
        after=place.bench.probe("merged", statistics=statistics),
        python="fl.merge_statistics([model, reference]).load_into(model)",
        shell="frostline merge-statistics MODEL REFERENCE --output MERGED",
        note="needs no data; of more than two replicas merge all, with weights= for their samples",
    )


@remedy(Fix.INFERENCE_MODE, rank=80)
def stored_statistics(place: Workplace) -> Iterator[Candidate]:
    """Inference that really is inference, where a site uses the batch.

    ## When to use it
    Predictions depend on the batch: a layer is called with `training=True`, or the module is in
    `train()`.

    ## When not to use it
    When stored statistics were never updated: recalibrate first, or predictions get worse.

    ## Example
    ```python
    import numpy as np
    alone, together = model.predict(x[:1], verbose=0), model.predict(x, verbose=0)[:1]
    print("the batch does not matter:", bool(np.allclose(alone, together, atol=1e-5)))
    ```
    """
    after = place.probe("stored")
    if CauseCode.FORCED_TRAIN not in place.codes or after is None:
        return
    overriding = next(iter(place.overriding), None)
    text = "use the stored statistics at inference, whatever shares the batch"
    note = "a score that falls with this was never that of the model on one sample"
    if overriding is not None:
        phase = place.sites[overriding].words.passed_phase
        text += f": pass the phase on to '{overriding}' ({phase}) in the code that calls it"
        note += f"; {place.words.inference_call} does not reach it"
    yield Candidate(
        name="inference mode",
        fix=Fix.INFERENCE_MODE,
        treats=(CauseCode.FORCED_TRAIN,),
        text=text,
        after=after,
        python=None if overriding is not None else place.words.inference_call,
        note=note,
    )
    exact = place.probe("population")
    if overriding is not None and exact is not None:
        yield Candidate(
            name="inference mode, then recalibrate all",
            fix=Fix.INFERENCE_MODE,
            treats=(CauseCode.FORCED_TRAIN,),
            text=f"{text}; then store the exact statistics of the data",
            after=exact,
            note=note,
        )


def _is_in(group: str, frozen: bool) -> bool:
    return group == "all" or frozen == (group == "frozen")


def _batches(decay: float) -> str:
    return f"{1 / (1 - decay):.3g}" if decay < 1 else "none"


def _wanted_epsilons(place: Workplace) -> Iterator[tuple[str, float]]:
    known = place.measurement.difference
    if known is not None and known.epsilons:
        yield from ((path, theirs) for path, (_, theirs) in known.epsilons.items())
        return
    tried = place.measurement.epsilon
    if tried is not None:
        yield from ((path, tried) for path in place.sites)
        return
    odd = place.facts.odd_epsilons
    yield from ((path, odd[path]) for path in place.blamed(CauseCode.EPS_MISMATCH) if path in odd)
