"""Repairs that take effect in training: frozen sites that stay frozen, larger batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from frostline.remedies.candidate import Candidate, Workplace
from frostline.remedies.registry import remedy
from frostline.types.codes import CauseCode, Fix

#: Passes over the samples in which the effect of a lock is looked at: the layers behind have to
#: learn the stored statistics anew, which takes about as long as a head does.
TRIAL_EPOCHS = 3


@remedy(Fix.FREEZE, rank=50)
def lock_frozen(place: Workplace) -> Iterator[Candidate]:
    """Frozen sites at their stored statistics, and a short training of what trains.

    ## When to use it
    Layers are meant to be frozen and are not: their statistics move, or training uses those of
    the batch. It takes effect in training; the trial behind its numbers trains a few passes on
    a copy of the state.

    ## When not to use it
    When there is time to train everything: BN that adapts usually ends better. Freezing every
    BN layer of a network that trains can stop the training.

    ## Example
    ```python
    change = fl.freeze(model, until="conv2")
    print(change)
    print([(site.path, site.stats_frozen) for site in fl.sites(model)])
    ```
    """
    named = place.treated(Fix.FREEZE)
    paths = place.blamed(*named)
    trains = any(layer.trains for layer in place.facts.layers)
    trial = getattr(place.bench.adapter, "trial", None)
    if not named or not paths or not trains or trial is None:
        return
    if place.words.own_loop or place.bench.step:
        yield _lock_in_own_loop(place, paths, named)
        return
    tuples = [(batch.x, batch.y) for batch in place.bench.batches]
    with trial(tuples, policy="inference", epochs=TRIAL_EPOCHS):
        bench = replace(place.bench, _probes={}, _populations={})  # nothing known of these weights
        locked = bench.probe("locked")
        thawed = bench.population("unfrozen")
        exact = bench.probe("locked, exact", statistics=thawed) if thawed else None
    lock, freeze = _lines(place, paths)
    note = (
        "it changes training, not the present inference: the numbers are those after "
        f"{TRIAL_EPOCHS} more passes over these samples, from the present weights"
    )
    yield Candidate(
        name="lock frozen sites and train on",
        fix=Fix.FREEZE,
        treats=named,
        text=f"keep {len(paths)} frozen sites at their stored statistics in training",
        after=locked,
        python=lock,
        shell=freeze,
        note=note,
    )
    if exact is not None:
        yield Candidate(
            name="lock frozen sites, train on, recalibrate unfrozen",
            fix=Fix.FREEZE,
            treats=(*named, *[code for code in place.codes if code == CauseCode.EMA_LAG]),
            text=f"keep {len(paths)} frozen sites at their stored statistics in training, then "
            "store exact statistics at the others",
            after=exact,
            python=f'{lock}; ...; fl.recalibrate(model, x, sites="unfrozen")',
            shell=freeze,
            note=note,
        )


def _lock_in_own_loop(
    place: Workplace, paths: tuple[str, ...], named: tuple[str, ...]
) -> Candidate:
    """The lock of a torch module, whose optimizer and loop are the user's."""
    return Candidate(
        name="lock frozen sites and train on",
        fix=Fix.FREEZE,
        treats=named,
        text=f"keep {len(paths)} frozen sites at their stored statistics, whatever train() does",
        python=_freeze(place, paths)[0],
        note="it changes training, not the present inference; not measured: the loop is your own. "
        "In your tests: fl.assert_frozen(model)",
    )


@remedy(Fix.LARGER_BATCH, rank=70)
def larger_batches(place: Workplace) -> Iterator[Candidate]:
    """What training would see in larger batches; inference then needs new statistics.

    ## When to use it
    Batches hold too few values per channel for a variance (SMALL_BATCH).

    ## When not to use it
    When memory forbids it: freeze BN, use group normalisation or synchronised BN. Accumulating
    gradients does not help; each small batch is normalised alone.
    """
    if CauseCode.SMALL_BATCH not in place.codes:
        return
    values = place.measurement.batch_size
    larger = [point for point in place.measurement.sweep if point.batch_size > values]
    text = "; ".join(f"loss {p.batch_loss:.3g} in batches of {p.batch_size}" for p in larger)
    yield Candidate(
        name="larger batches, or no batch statistics",
        fix=Fix.LARGER_BATCH,
        treats=(CauseCode.SMALL_BATCH,),
        text="train in larger batches, with all BN frozen, or with group normalisation",
        note=f"not measurable without training anew{'; now: ' + text if text else ''}",
    )


def _lines(place: Workplace, paths: tuple[str, ...]) -> tuple[str, str | None]:
    """What locks these sites: our layer for another policy, else a freeze."""
    if any(place.sites[path].site.policy != "inference" for path in paths):
        if all(place.sites[path].words.has_policy for path in paths):
            line = f"frostline convert MODEL --policy inference --output {place.words.file}"
            return 'fl.convert(model, policy="inference")', line
        return _freeze(place, paths)[0], None
    line, until = _freeze(place, paths)
    if until is None:
        return line, None
    return line, f"frostline freeze MODEL --until {until} --output {place.words.file}"


def _freeze(place: Workplace, paths: tuple[str, ...]) -> tuple[str, str | None]:
    """What freezes these sites, and nothing that trains; the boundary, where that is one.

    A boundary freezes all before it: where something trains there (an adapter, a student beside
    its teacher), or nothing behind, the sites are named.
    """
    last = max(place.facts.order.get(path, place.sites[path].site.index) for path in paths)
    others = [layer for layer in place.facts.layers if layer.trains and layer.path not in paths]
    until = next((layer.path for layer in others if layer.order > last), None)
    if until is not None and all(layer.order > last for layer in others):
        return f"fl.freeze(model, until={until!r})", until
    frozen = {path for path, facts in place.sites.items() if facts.site.params_frozen}
    if len(paths) == len(place.sites):
        named = "'all'"
    elif set(paths) == frozen and len(paths) > 1:
        named = "[site.path for site in fl.sites(model) if site.params_frozen]"
    else:
        named = repr(list(paths))
    return f"fl.freeze(model, sites={named})", None
