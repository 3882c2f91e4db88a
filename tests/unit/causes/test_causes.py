"""Causes of measurements written by hand: each code, its traps, and cases that are just not it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from written_cases import (
    CHANNELS,
    PATHS,
    SAMPLES,
    facts,
    finding,
    measurement,
    probe,
    site_facts,
    site_measurement,
)

from frostline import rules
from frostline.causes import causes
from frostline.causes.case import Case
from frostline.data.batch import Batch
from frostline.measure.inputs import moments as of_inputs
from frostline.types.facts import LayerFacts, ModelFacts, Vocabulary
from frostline.types.measured import BN_CAUSES, Cause, Difference, InputMoments, SweepPoint

GAP = {
    "inference": (1.0, 0.7),
    "training": (0.1, 0.97),
    "training blend": (0.1, 0.97),
    "batch": (0.1, 0.97),
    "population": (0.1, 0.97),
    "population unfrozen": (0.1, 0.97),
}
NO_GAP = dict.fromkeys(GAP, (0.1, 0.97))
FROZEN = {"params_frozen": True, "stats_frozen": True}
BATCH_POLICY = {path: {**FROZEN, "policy": "batch"} for path in PATHS[:3]} | {"bn4": {}}

# Ratios that no single map of the input gives: each channel has its own.
SCATTERED = np.geomspace(0.3, 4.0, CHANNELS)
FAR = {path: site_measurement(path, shift=0.8, ratio=SCATTERED) for path in PATHS}


def far(*paths: str, first: float = 0.8) -> dict[str, Any]:
    """Sites far off in their own way each; all others agree."""
    return {
        path: site_measurement(path, shift=first, ratio=SCATTERED)
        if path in paths
        else site_measurement(path)
        for path in PATHS
    }


def codes(found: tuple[Cause, ...]) -> list[str]:
    return [cause.code for cause in found]


def bn(found: tuple[Cause, ...]) -> list[str]:
    return [cause.code for cause in found if cause.is_bn]


# --- frozen sites ---------------------------------------------------------------------------------


def test_frozen_sites_on_batch_statistics():
    found = causes(
        facts(BATCH_POLICY, steps=5000),
        measurement(GAP, shares=[0.5, 0.3, 0.2, 0.0], sites=FAR),
        [finding("FL101", "bn1")],
    )
    assert codes(found) == ["FROZEN_BATCH_STATS"]
    assert found[0].sites == PATHS[:3]
    assert found[0].share == pytest.approx(1.0)
    assert found[0].certainty == "is"
    assert found[0].findings == ("FL101",)


def test_what_a_site_did_counts_more_than_its_flags():
    flags = dict.fromkeys(PATHS, FROZEN)  # they say: locked
    seen = dict.fromkeys(PATHS, (1.0, 0.0, False))
    found = causes(facts(flags), measurement(GAP, shares=[0.25] * 4, behaviour=seen, sites=FAR), [])
    assert codes(found) == ["FROZEN_BATCH_STATS"]
    flags = {path: {**FROZEN, "policy": "batch"} for path in PATHS}
    seen = dict.fromkeys(PATHS, (0.0, 0.0, False))
    assert bn(causes(facts(flags), measurement(NO_GAP, behaviour=seen), [])) == []


def test_canary_frozen_sites_are_told_although_training_mode_is_the_worse_one():
    everything = {path: {**FROZEN, "policy": "batch"} for path in PATHS}
    probes = {"inference": 1e-12, "training": 0.004, "training blend": 0.004, "population": 0.004}
    found = causes(facts(everything), measurement(probes, shares=[0.25] * 4, sites=FAR), [])
    assert codes(found)[0] == "FROZEN_BATCH_STATS"
    assert found[0].share == pytest.approx(1.0)


def test_compound_frozen_batch_statistics_and_lag_of_the_thawed_sites():
    found = causes(
        facts(BATCH_POLICY, steps=70),
        measurement(GAP, shares=[0.3, 0.2, 0.1, 0.4], sites=FAR, steps=70),
        [],
    )
    assert codes(found) == ["FROZEN_BATCH_STATS", "EMA_LAG"]
    assert [cause.share for cause in found] == [pytest.approx(0.6), pytest.approx(0.4)]
    assert found[1].sites == ("bn4",)
    assert found[1].evidence["old_share"] == pytest.approx(0.99**70)
    assert "49" in found[1].message


def test_frozen_statistics_that_move():
    moving = {path: {"params_frozen": True, "policy": "update"} for path in PATHS[:3]} | {"bn4": {}}
    found = causes(
        facts(moving, steps=50), measurement(GAP, shares=[0.5, 0.3, 0.2, 0.0], sites=FAR), []
    )
    assert codes(found)[0] == "FROZEN_DRIFT"
    assert found[0].sites == PATHS[:3]
    assert found[0].settle is not None


def test_a_module_that_is_only_served_does_not_drift():
    """Nothing trains, all of it in inference mode; where a head trains, a step will come."""
    frozen = {path: {"params_frozen": True, "policy": "update", "mode": False} for path in PATHS}
    nothing = dict.fromkeys(("conv1", "conv2", "conv3", "conv4", "head"), False)
    of_small_gap = measurement(NO_GAP, sites=FAR)
    head = {**nothing, "head": True}
    for trains, wanted in ((nothing, []), (head, ["FROZEN_DRIFT"])):
        found = causes(facts(frozen, trains=trains, mode=False), of_small_gap, [])
        assert [code for code in codes(found) if code == "FROZEN_DRIFT"] == wanted


def test_statistics_of_a_served_module_are_judged_as_those_that_move():
    """No gradients are no freeze where nothing trains: the gap had no cause before."""
    frozen = {path: {"params_frozen": True, "policy": "update", "mode": False} for path in PATHS}
    nothing = dict.fromkeys(("conv1", "conv2", "conv3", "conv4", "head"), False)
    of_gap = measurement(GAP, shares=[0.25] * 4, sites=FAR)
    found = causes(facts(frozen, trains=nothing, mode=False), of_gap, [])
    thawed = causes(facts({path: {"mode": False} for path in PATHS}, mode=False), of_gap, [])
    assert codes(found) == codes(thawed) != ["NONE"]
    assert found[0].share == pytest.approx(thawed[0].share)
    drift = Difference(params={}, statistics=dict.fromkeys(PATHS, 0.3))
    known = measurement(GAP, shares=[0.25] * 4, sites=FAR, difference=drift)
    found = causes(facts(frozen, trains=nothing, mode=False), known, [])
    assert codes(found) == ["FROZEN_DRIFT"]


def test_sites_that_no_pass_comes_to_are_not_blamed():
    """An encoder whose last stages the decoder does not take: "0 values per channel" before."""
    new = {"mean": np.zeros(CHANNELS), "variance": np.ones(CHANNELS)}
    known = facts({path: new if path == "bn4" else {} for path in PATHS}, steps=64)
    seen = dict.fromkeys(PATHS[:3], (1.0, 0.0, True)) | {"bn4": (None, None, False)}
    small = {**GAP, "population": (0.9, 0.75), "population unfrozen": (0.9, 0.75)}
    here = {path: site_measurement(path, values=16) for path in PATHS[:3]}
    measured = measurement(small, sites=here, behaviour=seen, batch_size=1)
    found = causes(known, measured, [])
    assert found[0].code == "SMALL_BATCH"
    assert found[0].sites == PATHS[:3]
    assert found[0].evidence["values"] == 16
    told = rules.check(known, rules.select(), measurement=measured)[0]
    assert not [f.code for f in told if "bn4" in f.sites and f.code in ("FL203", "FL204")]
    assert "FL204" in {f.code for f in rules.check(known, rules.select())[0]}


def test_a_reference_shows_drift_without_any_gap():
    moving = {path: {"params_frozen": True, "decay": 0.9} for path in PATHS}
    drift = Difference(params={}, statistics=dict.fromkeys(PATHS, 0.3))
    found = causes(facts(moving), measurement(NO_GAP, difference=drift), [])
    assert codes(found) == ["FROZEN_DRIFT"]
    assert found[0].evidence["drift_from_reference"] == 0.3
    assert found[0].settle is None


def test_thawed_bn_among_frozen_layers_drifts_by_design():
    trains = {f"conv{i}": False for i in range(1, 5)}
    changed = Difference(params=dict.fromkeys(PATHS, 0.05) | {"conv1": 0.0, "head": 1.0})
    found = causes(
        facts(trains=trains, steps=50),
        measurement(GAP, shares=[0.25] * 4, sites=FAR, difference=changed),
        [],
    )
    assert codes(found)[0] == "FROZEN_DRIFT"
    assert found[0].sites == PATHS
    assert found[0].certainty == "is"
    without = causes(
        facts(trains=trains, steps=50), measurement(GAP, shares=[0.25] * 4, sites=FAR), []
    )
    assert (without[0].code, without[0].certainty) == ("FROZEN_DRIFT", "may")


def test_a_wrapper_that_goes_back_to_training_mode():
    reset = {path: {"wrapper_frozen": True, "kind": "torch.BatchNorm2d"} for path in PATHS}
    found = causes(facts(reset), measurement(GAP, shares=[0.25] * 4, sites=FAR), [])
    assert codes(found)[0] == "MODE_RESET"


@pytest.mark.parametrize(
    ("updates", "reference", "certainty", "share"),
    [
        ((120, 120), False, "may", 0.75),  # no step was made without them
        ((120, 200), False, "may", None),  # the others trained, these did not
        ((120, 0), False, "may", None),
        ((120, 200), True, "is", 0.75),  # they have moved since
    ],
)
def test_eval_by_hand_is_blamed_where_something_shows_that_train_undoes_it(
    updates: tuple[int, int], reference: bool, certainty: str, share: float | None
):
    """Lightning from 2.2 on leaves modes as they are: it had all of the gap, for a fact."""
    frozen, trains = updates
    by_hand = {"undone": True, "mode": False, "params_frozen": True, "updates": frozen}
    flags = dict.fromkeys(PATHS[:3], by_hand) | {"bn4": {"mode": True, "updates": trains}}
    seen = dict.fromkeys(PATHS, (1.0, 0.0, True))
    moved = Difference(params={}, statistics=dict.fromkeys(PATHS[:3], 0.3)) if reference else None
    measured = measurement(
        GAP, shares=[0.25] * 4, behaviour=seen, difference=moved,
        sites=far(*PATHS[:3], first=0.3),
    )  # fmt: skip
    known = facts(flags, mode=True)
    reset = next(c for c in causes(known, measured, []) if c.code == "MODE_RESET")
    assert reset.sites == PATHS[:3]
    assert reset.certainty == certainty
    assert (reset.share is None) == (share is None)
    assert ("would" in reset.message) == (share is None)
    assert (reset.settle is None) == reference
    told = rules.check(known, rules.select("FL118,FL302"), measurement=measured)[0]
    assert {(f.code, f.severity, f.certainty) for f in told} == {("FL118", "warning", "may")}


def test_a_switch_that_came_too_late():
    flags = dict.fromkeys(PATHS[:3], FROZEN) | {"bn4": {}}
    probes = {**GAP, "population frozen": (0.5, 0.85)}
    switched = [finding("FL107", path) for path in PATHS[:3]]
    found = causes(
        facts(flags, steps=40, traced=True),
        measurement(probes, shares=[0, 0, 0, 1], sites=FAR, steps=40),
        switched,
    )
    assert set(codes(found)) == {"STALE_SWITCH", "EMA_LAG"}
    assert codes(found)[0] == "EMA_LAG" or found[0].share >= 0.3


# --- averages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "decay"), [(5, 0.99), (48, 0.99), (100, 0.99), (300, 0.999)])
def test_lag_is_said_in_numbers(steps: int, decay: float):
    slow = {path: {"decay": decay} for path in PATHS}
    found = causes(
        facts(slow, steps=steps), measurement(GAP, shares=[0.1, 0.2, 0.3, 0.4], sites=FAR), []
    )
    assert codes(found) == ["EMA_LAG"]
    assert found[0].certainty == "is"
    assert found[0].evidence["old_share"] == pytest.approx(decay**steps)
    assert found[0].share == pytest.approx(1.0)


def test_statistics_that_are_better_than_exact_ones_are_told():
    """Inference is the better phase, and exact statistics are as bad as training mode."""
    probes = {**dict.fromkeys(GAP, (3.3, 0.3)), "inference": (1.3, 0.6)}
    (found,) = causes(facts(steps=5000), measurement(probes, shares=[0.25] * 4, sites=FAR), [])
    assert (found.code, found.certainty) == ("NONE", "may")
    assert "so do exact statistics of these data" in found.message
    assert "nothing that is known" not in found.message


def test_weights_that_outran_an_average_are_a_guess():
    fast = {path: {"decay": 0.9} for path in PATHS}
    found = causes(
        facts(fast, steps=50), measurement(GAP, shares=[0.25] * 4, sites=far(*PATHS)), []
    )
    assert codes(found) == ["EMA_LAG"]
    assert found[0].certainty == "may"
    assert found[0].settle is not None


def test_what_an_average_missed_in_ten_windows_changed_afterwards():
    fast = {path: {"decay": 0.9} for path in PATHS}
    found = causes(
        facts(fast, steps=100), measurement(GAP, shares=[0.25] * 4, sites=far(*PATHS)), []
    )
    assert codes(found) == ["STALE_AFTER_WEIGHT_EDIT"]
    assert found[0].certainty == "may"
    assert found[0].evidence["windows"] == pytest.approx(10)
    assert found[0].settle is not None


def test_large_steps_that_an_average_trails_are_no_edit():
    """An edit of weights moves the first site at once; large steps leave more behind it."""
    near = {"bn1": site_measurement("bn1", shift=0.1, ratio=1.1)}
    found = causes(
        facts({path: {"decay": 0.9} for path in PATHS}, steps=120),
        measurement(GAP, shares=[0.25] * 4, sites=far(*PATHS[1:]) | near),
        [],
    )
    assert codes(found) == ["EMA_LAG"]
    assert found[0].certainty == "may"


def on_the_way() -> dict[str, Any]:
    """Sites whose statistics have gone two fifths of the way from 0 and 1 to those of the data."""
    mean, variance = np.linspace(-2, 2, CHANNELS), np.geomspace(0.05, 4, CHANNELS)
    half = (0.4 * mean, 1 + 0.4 * (variance - 1))
    return {
        path: site_measurement(
            path,
            stored=half,
            shift=(mean - half[0]) / np.sqrt(half[1]),
            ratio=variance / half[1],
        )
        for path in PATHS
    }


def test_statistics_on_their_way_from_0_and_1_tell_lag_without_any_step_count():
    sites = on_the_way()
    found = causes(facts(), measurement(GAP, shares=[0.25] * 4, sites=sites), [])
    assert codes(found) == ["EMA_LAG"]
    assert found[0].certainty == "is"
    assert found[0].evidence["way_from_initial"] == pytest.approx(0.4, abs=0.01)


def test_an_average_is_as_young_as_another_of_its_decay():
    """The first site of a flow was said to hold other data, beside sites on their way from 0."""
    sites = on_the_way() | {"bn1": site_measurement("bn1", shift=1.0, ratio=0.16)}
    made = measurement(GAP, shares=[0.25] * 4, sites=sites)
    found = causes(facts(), made, [])
    assert codes(found) == ["EMA_LAG"]
    assert found[0].sites == PATHS
    longer = facts({"bn1": {"decay": 0.9}} | {path: {"decay": 0.99} for path in PATHS[1:]})
    assert "DOMAIN_STATS" in codes(causes(longer, made, []))  # it forgets more per update


def test_what_small_batches_do_is_no_part_of_a_gap_that_exact_statistics_close():
    """A flow's likelihood counts the variance of its batch, and falls with every batch size."""
    sweep = tuple(
        SweepPoint(
            batch_size=size,
            batch_loss=loss,
            batch_accuracy=None,
            inference_loss=1.0,
            inference_change=0.0,
        )
        for size, loss in ((2, -0.5), (8, 0.0), (32, 0.1))
    )
    sites = {path: replace(site, values=1) for path, site in on_the_way().items()}
    made = measurement(GAP, shares=[0.25] * 4, sites=sites, sweep=sweep)
    found = causes(facts(), made, [])
    assert codes(found) == ["EMA_LAG", "SMALL_BATCH"]
    assert (found[0].share, found[1].share) == (pytest.approx(1.0), None)


def test_what_batches_scatter_by_is_said():
    """Training mode is worse by the noise of its batches, which larger ones do not have."""
    worse = dict.fromkeys(("training", "training blend", "batch"), (0.3, 0.9))
    for large, wanted in ((0.12, True), (0.29, False)):
        sweep = tuple(
            SweepPoint(
                batch_size=size,
                batch_loss=loss,
                batch_accuracy=None,
                inference_loss=0.1,
                inference_change=0.0,
            )
            for size, loss in ((2, 0.9), (32, 0.3), (128, large))
        )
        (none,) = causes(facts(), measurement({**NO_GAP, **worse}, sweep=sweep), [])
        assert none.code == "NONE"
        assert ("batch statistics scatter" in none.message) is wanted


def test_locked_sites_at_initial_values_keep_statistics_of_no_data():
    new = {"mean": np.zeros(CHANNELS), "variance": np.ones(CHANNELS)}
    stuck = {path: {**FROZEN, **new} for path in PATHS}
    probes = {**dict.fromkeys(GAP, (1.0, 0.7)), "population": (0.1, 0.97)}
    stored = (np.zeros(CHANNELS), np.ones(CHANNELS))
    sites = {
        path: site_measurement(path, stored=stored, shift=0.8, ratio=SCATTERED) for path in PATHS
    }
    found = causes(facts(stuck, steps=50), measurement(probes, sites=sites), [])
    assert codes(found) == ["STATS_NEVER_UPDATED"]
    assert found[0].share == pytest.approx(1)


def test_pretrained_lag_names_the_other_data_too():
    # One ratio in all channels of the first site: another contrast of the input.
    sites = far(*PATHS) | {"bn1": site_measurement("bn1", shift=0.5, ratio=0.16)}
    found = causes(
        facts(steps=30, sites={path: {"decay": 0.9} for path in PATHS}),
        measurement(GAP, shares=[0.4, 0.3, 0.2, 0.1], sites=sites),
        [],
    )
    assert codes(found) == ["EMA_LAG", "DOMAIN_STATS"]
    assert sum(cause.share for cause in found) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "site",
    [
        {"mean": np.zeros(CHANNELS), "variance": np.ones(CHANNELS)},
        {"mean": np.linspace(-1, 1, CHANNELS), "variance": np.ones(CHANNELS)},
        {"mean": np.zeros(CHANNELS), "variance": np.zeros(CHANNELS)},
        {"decay": 1.0},
    ],
    ids=["initial", "variance kept", "zeros", "decay 1"],
)
def test_statistics_that_never_moved(site: dict[str, Any]):
    found = causes(
        facts(dict.fromkeys(PATHS, site), steps=60),
        measurement(GAP, shares=[0.25] * 4, sites=FAR),
        [],
    )
    assert codes(found) == ["STATS_NEVER_UPDATED"]
    assert found[0].certainty == "is"


def test_trained_on_initial_statistics_there_is_no_gap_the_usual_way_round():
    initial = {"mean": np.zeros(CHANNELS), "variance": np.ones(CHANNELS)}
    probes = dict.fromkeys(GAP, (2.0, 0.3)) | {"inference": (0.1, 0.97)}
    found = causes(
        facts(dict.fromkeys(PATHS, initial)), measurement(probes, shares=[0.25] * 4, sites=FAR), []
    )
    assert codes(found)[0] == "STATS_NEVER_UPDATED"


def test_a_new_model_on_standardised_inputs_is_not_blamed():
    new = {
        "mean": np.zeros(CHANNELS),
        "variance": np.ones(CHANNELS),
        "gamma": np.ones(CHANNELS),
        "beta": np.zeros(CHANNELS),
    }
    found = causes(facts(dict.fromkeys(PATHS, new)), measurement(NO_GAP), [])
    assert codes(found) == ["NONE"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5])
def test_poisoned_statistics_need_no_gap(bad: float):
    variance = np.linspace(0.5, 2, CHANNELS)
    variance[2] = bad
    probes = dict(NO_GAP)
    made = measurement(probes)
    broken = replace(probe("inference", 1.0, 0.7), losses=np.full(SAMPLES, np.nan), broken=SAMPLES)
    made = replace(made, probes={**made.probes, "inference": broken}, gaps={})
    found = causes(facts({"bn1": {}, "bn2": {"variance": variance}, "bn3": {}}), made, [])
    assert codes(found)[0] == "POISONED"
    assert found[0].sites == ("bn2",)


@pytest.mark.parametrize(
    ("decay", "code"),
    [(0.1, "MOMENTUM_CONVENTION"), (0.01, "MOMENTUM_CONVENTION"), (0.2, "EMA_NOISE")],
)
def test_an_average_of_the_last_batch(decay: float, code: str):
    found = causes(
        facts({path: {"decay": decay} for path in PATHS}, steps=500),
        measurement(GAP, shares=[0.25] * 4, sites=FAR),
        [],
    )
    assert codes(found)[0] == code
    assert codes(found).count(code) == 1


def test_statistics_off_from_one_site_on_after_they_had_settled():
    found = causes(
        facts(steps=5000), measurement(GAP, shares=[0, 0, 0.6, 0.4], sites=far("bn3", "bn4")), []
    )
    assert codes(found)[0] == "STALE_AFTER_WEIGHT_EDIT"
    assert found[0].sites == ("bn3", "bn4")
    assert found[0].certainty == "may"


def test_a_settled_average_is_never_said_to_be_old():
    """One client's statistics in averaged weights: it said "EMA_LAG, leave 0.0%" before."""
    early = {path: site_measurement(path, shift=0.12, ratio=1.2) for path in PATHS}
    fast = facts({path: {"decay": 0.9} for path in PATHS}, steps=90)
    found = causes(fast, measurement(GAP, shares=[0.25] * 4, sites=early), [])
    assert (codes(found), found[0].certainty) == (["EMA_LAG"], "may")
    assert "lag" not in found[0].message
    assert "averaged or edited since" in found[0].message
    assert "one client" in found[0].message
    assert "reference=" in found[0].settle
    assert "as data" in found[0].settle
    trailing = {"bn1": site_measurement("bn1", shift=0.1, ratio=1.1)} | far(*PATHS[1:])
    for steps in (50, 120, 5000):
        lagging = facts({path: {"decay": 0.9} for path in PATHS}, steps=steps)
        for cause in causes(lagging, measurement(GAP, shares=[0.25] * 4, sites=trailing), []):
            assert "0.0%" not in cause.message
            assert not cause.message.startswith("weights were changed")


def test_rules_speak_the_words_of_a_framework_that_nobody_knows_here():
    """A framework's adapter supplies its words; rules and causes need no edit for it."""
    words = Vocabulary(name="flax", convention="new", usual_momentum="0.05", positional_names=True)
    short = facts({path: {"decay": 0.1, "words": words} for path in PATHS}, steps=500, words=words)
    (finding, *_) = rules.check(short, rules.select("FL111"))[0]
    assert finding.message.startswith("flax momentum 0.9: a step keeps 0.1")
    assert rules.check(short, rules.select("FL115"))[0] == ()
    found = causes(short, measurement(GAP, shares=[0.25] * 4, sites=FAR), [])
    assert codes(found)[0] == "MOMENTUM_CONVENTION"
    assert "with momentum 0.9" in found[0].message


def test_a_history_tells_augmentation_from_an_edit():
    early = {path: site_measurement(path, shift=0.3, ratio=SCATTERED) for path in PATHS}
    settled = facts({path: {"decay": 0.9} for path in PATHS}, steps=500)
    made = measurement(GAP, shares=[0.25] * 4, sites=early, history={"loss": (0.9, 0.9, 0.9)})
    found = causes(settled, made, [])
    assert (codes(found), found[0].certainty) == (["AUGMENT_TRAIN_ONLY"], "may")
    assert found[0].share == pytest.approx(1.0)


def test_an_epsilon_takes_the_share_that_it_closes():
    """FL113 alone had a share of None before, and the gap went to the averages."""
    probes = {**GAP, "epsilon": (0.19, 0.96)}
    made = measurement(probes, shares=[0.25] * 4, sites=far(*PATHS))
    odd = facts({"bn1": {"epsilon": 1e-3}} | {path: {"epsilon": 1e-5} for path in PATHS[1:]})
    assert odd.odd_epsilons == {"bn1": 1e-5}
    found = causes(odd, made, [finding("FL113", "bn1", effect=0.3)])
    assert codes(found)[0] == "EPS_MISMATCH"
    assert found[0].share == pytest.approx(0.9, abs=0.02)


def test_another_encoding_that_closes_most_of_the_loss_is_never_no_cause():
    """x*2-1: 1.416 -> 0.367, of inputs that do not fill [0, 1], and the verdict was "no cause"."""
    probes = dict.fromkeys(NO_GAP, (1.416, 0.6)) | {"input x*2-1": (0.367, 0.9)}
    dark = InputMoments(
        mean=np.array([0.2]), deviation=np.array([0.1]), low=np.array([0.0]), high=np.array([0.5])
    )
    found = causes(facts(steps=5000), measurement(probes, input=dark), [])
    assert (codes(found), found[0].certainty) == (["PREPROCESS"], "may")
    assert found[0].evidence["trial"] == "x*2-1"
    worse = dict.fromkeys(NO_GAP, (1.416, 0.6)) | {"input x*2-1": (1.3, 0.6)}
    assert codes(causes(facts(steps=5000), measurement(worse, input=dark), [])) == ["NONE"]


def test_pre_activation_is_not_thawed_among_frozen():
    """A block that begins with its BN behind a frozen stem: FROZEN_DRIFT was named before."""
    layers = (
        LayerFacts(path="stem/conv", order=0, trains=False),
        LayerFacts(path="block1/conv1", order=2, trains=True),
    )
    for name, prefix in (("block1/bn1", ()), ("stem/bn", ("stem/bn",)), ("bn", ("bn",))):
        known = ModelFacts(sites=(site_facts(name),), layers=layers, order={name: 1})
        assert Case(known, measurement(NO_GAP, sites={})).thawed_in_prefix == prefix


def test_a_design_in_which_the_batch_matters_voids_nothing():
    seen = dict.fromkeys(PATHS, (1.0, 0.0, True))
    made = measurement(GAP, shares=[0.25] * 4, sites=FAR, behaviour=seen, neighbours=0.4)
    found = causes(facts(steps=48), made, [])
    assert codes(found) == ["EMA_LAG", "KERNEL_BUG"]
    assert found[1].certainty == "may"
    assert "by design" in found[1].message


def test_a_reference_shows_the_edit():
    edit = Difference(
        params={"conv1": 0.4, "conv2": 0.3, "head": 0.0}, statistics=dict.fromkeys(PATHS, 0.0)
    )
    found = causes(
        facts(), measurement(GAP, shares=[0.25] * 4, sites=far(*PATHS), difference=edit), []
    )
    assert (found[0].code, found[0].certainty) == ("STALE_AFTER_WEIGHT_EDIT", "is")


def test_other_data_at_the_first_site_of_a_settled_network():
    sites = {path: site_measurement(path, shift=1.0, ratio=0.16) for path in PATHS}
    found = causes(facts(steps=5000), measurement(GAP, shares=[0.25] * 4, sites=sites), [])
    assert codes(found)[0] == "DOMAIN_STATS"
    assert "moved since" not in found[0].message
    uncounted = causes(facts(), measurement(GAP, shares=[0.25] * 4, sites=sites), [])
    assert codes(uncounted)[0] == "DOMAIN_STATS"
    assert "or of weights that have moved since" in uncounted[0].message
    assert "reference=" in uncounted[0].settle


def test_locked_sites_of_other_data_where_it_costs_loss():
    locked = dict.fromkeys(PATHS, FROZEN)
    probes = {**dict.fromkeys(GAP, (1.0, 0.7)), "population": (0.2, 0.95),
              "population frozen": (0.2, 0.95), "batch": (0.2, 0.95)}  # fmt: skip
    found = causes(facts(locked), measurement(probes, sites=FAR), [])
    assert codes(found)[0] == "DOMAIN_STATS"
    assert found[0].certainty == "is"


def test_thawed_sites_that_no_step_updates_are_no_averages_that_lag():
    """A call() without training: the phase never reaches them, whatever their flags say."""
    untold = dict.fromkeys(PATHS, (0.0, 0.0, False))
    probes = {**dict.fromkeys(GAP, 1.0), "population": 0.1, "population unfrozen": 0.1}
    made = measurement(probes, behaviour=untold, sites=FAR)
    found = causes(facts(steps=50), made, [])
    assert codes(found) == ["DOMAIN_STATS"]
    assert "their calls do not learn the phase" in found[0].message
    told = causes(facts(dict.fromkeys(PATHS, FROZEN)), measurement(probes, sites=FAR), [])
    assert "do not learn the phase" not in told[0].message


def test_batches_of_one_that_do_worse_than_inference_are_too_small():
    worse = {**dict.fromkeys(GAP, (0.9, 0.7)), "inference": (0.3, 0.9)}
    worse |= {"population": (0.35, 0.9), "population unfrozen": (0.35, 0.9)}
    agreeing = {path: site_measurement(path) for path in PATHS}
    made = measurement(worse, shares=[0.1, 0.2, 0.3, 0.4], sites=agreeing, batch_size=1)
    found = causes(facts(steps=5000), made, [])
    assert codes(found) == ["SMALL_BATCH"]
    assert (found[0].share, found[0].certainty) == (pytest.approx(1.0), "may")
    assert "inference is the better one" in found[0].message
    large = measurement(worse, shares=[0.1, 0.2, 0.3, 0.4], sites=agreeing, batch_size=32)
    assert codes(causes(facts(steps=5000), large, [])) == ["NONE"]


def test_locked_sites_that_the_network_was_trained_with_are_not_blamed():
    locked = dict.fromkeys(PATHS, FROZEN)
    probes = {**NO_GAP, "population": (2.0, 0.4), "population frozen": (2.0, 0.4)}
    assert codes(causes(facts(locked), measurement(probes, sites=FAR), [])) == ["NONE"]


def test_the_variance_between_classes_is_missing():
    within = np.linspace(0.5, 2, CHANNELS)
    sites = {
        path: site_measurement(path, ratio=3.0, shift=0.05, within_variance=within)
        for path in PATHS
    }
    found = causes(facts(steps=5000), measurement(GAP, shares=[0.25] * 4, sites=sites), [])
    assert codes(found)[0] == "MIXED_SOURCES"
    assert found[0].evidence["missing_variance"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("gap", [GAP, NO_GAP], ids=["gap", "hidden by small batches"])
def test_the_class_that_came_last(gap: dict[str, Any]):
    probes = {**gap, "population": (0.05, 0.98), "population unfrozen": (0.05, 0.98)}
    apart = np.array([0.9, 0.4, 0.1])  # from batches of classes 0, 1 and 2
    sites = {p: replace(s, class_distances=apart) for p, s in FAR.items()}
    shares = [0.25] * 4 if gap is GAP else None
    made = measurement(probes, shares=shares, sites=sites)
    found = causes(facts(steps=5000), made, [])
    assert codes(found) == ["MIXED_SOURCES"]
    assert found[0].evidence["last_class"] == 2
    assert found[0].share == pytest.approx(1.0, abs=0.05)
    # Another class at one site, or all of the data nearly as near: no class came last.
    other = {**sites, "bn2": replace(sites["bn2"], class_distances=apart[::-1])}
    near = {p: replace(s, class_distances=np.full(3, 0.7)) for p, s in FAR.items()}
    for wrong in (other, near):
        assert (
            "last_class"
            not in causes(facts(steps=5000), replace(made, sites=wrong), [])[0].evidence
        )


def test_a_shared_site_with_uses_apart():
    one, other = np.zeros(CHANNELS), np.full(CHANNELS, 5.0)
    variance = np.ones(CHANNELS)
    uses = ((one, variance), (other, variance))
    sites = {"bn1": site_measurement("bn1", shift=0.4, uses=uses)}
    found = causes(
        facts({"bn1": {"calls": 2}}, steps=5000),
        measurement(GAP, shares=[1.0], paths=("bn1",), sites=sites),
        [],
    )
    assert codes(found)[0] == "MIXED_SOURCES"


def test_what_lies_behind_a_shared_site_with_uses_apart_has_nothing_wrong_of_its_own():
    """In training it sees what each use's own statistics hand on, and it agrees with that."""
    uses = ((np.zeros(CHANNELS), np.ones(CHANNELS)), (np.full(CHANNELS, 5.0), np.ones(CHANNELS)))
    sites = {
        "bn1": site_measurement("bn1", shift=0.4, uses=uses),
        "bn2": site_measurement("bn2", shift=0.2),
    }
    stored = {
        "batch_mean": sites["bn2"].stored_mean,
        "batch_variance": sites["bn2"].stored_variance,
    }
    shared = facts({"bn1": {"calls": 2}, "bn2": {"calls": 2}}, steps=5000)

    def asked(sites: dict[str, Any]) -> tuple[Cause, ...]:
        made = measurement(GAP, shares=[0.4, 0.6], paths=PATHS[:2], sites=sites)
        return causes(shared, made, [])

    found = asked({**sites, "bn2": replace(sites["bn2"], **stored)})
    assert codes(found) == ["MIXED_SOURCES"]
    assert found[0].sites == ("bn1",)
    assert found[0].share == pytest.approx(1.0)
    assert len(codes(asked(sites))) == 2  # off in training as well


@pytest.mark.parametrize(("steps", "expected"), [(60, "EMA_LAG"), (5000, "MIXED_SOURCES")])
def test_an_average_that_lags_at_a_shared_site(steps: int, expected: str):
    """Exact statistics close the gap: one average serves both uses well enough."""
    one, other = np.zeros(CHANNELS), np.full(CHANNELS, 5.0)
    uses = ((one, np.ones(CHANNELS)), (other, np.ones(CHANNELS)))
    sites = {"bn1": site_measurement("bn1", shift=0.4, uses=uses)}
    made = measurement(GAP, shares=[1.0], paths=("bn1",), sites=sites)
    found = codes(causes(facts({"bn1": {"calls": 2}}, steps=steps), made, []))
    assert found[0] == expected
    assert ("EMA_LAG" in found) != ("MIXED_SOURCES" in found)


def test_what_exact_statistics_leave_at_a_shared_site_that_lags():
    one, other = np.zeros(CHANNELS), np.full(CHANNELS, 5.0)
    uses = ((one, np.ones(CHANNELS)), (other, np.ones(CHANNELS)))
    sites = {"bn1": site_measurement("bn1", shift=0.4, uses=uses)}
    probes = {**GAP, "population": (0.28, 0.9), "population unfrozen": (0.28, 0.9)}
    made = measurement(probes, shares=[1.0], paths=("bn1",), sites=sites)
    found = {c.code: c for c in causes(facts({"bn1": {"calls": 2}}, steps=60), made, [])}
    assert found["MIXED_SOURCES"].share == pytest.approx(0.2)
    assert found["MIXED_SOURCES"].sites == ("bn1",)


def test_uses_that_no_one_average_serves():
    """Exact statistics do not help: the whole gap is that of the shared site."""
    one, other = np.zeros(CHANNELS), np.full(CHANNELS, 5.0)
    uses = ((one, np.ones(CHANNELS)), (other, np.ones(CHANNELS)))
    sites = {"bn1": site_measurement("bn1", shift=0.02, uses=uses)}
    probes = {**GAP, "population": (1.2, 0.6), "population unfrozen": (1.2, 0.6)}
    made = measurement(probes, shares=[1.0], paths=("bn1",), sites=sites)
    found = causes(facts({"bn1": {"calls": 2}}, steps=5000), made, [])
    assert codes(found) == ["MIXED_SOURCES"]
    assert found[0].share == pytest.approx(1.0)


@pytest.mark.parametrize(("classes", "expected"), [(2, "MIXED_SOURCES"), (10, "BATCH_LEAK")])
def test_a_network_that_does_best_in_batches_of_one_class(classes: int, expected: str):
    probes = {**GAP, "batch": (0.3, 0.9), "population": (0.3, 0.9), "sorted": (0.05, 0.99)}
    made = measurement(probes, shares=[0.25] * 4, sites=FAR, classes=classes)
    found = causes(facts(steps=5000), made, [])
    assert codes(found)[0] == expected
    assert found[0].sites == PATHS
    mixed = measurement({**GAP, "sorted": (0.6, 0.8)}, shares=[0.25] * 4, sites=FAR)
    assert expected not in codes(causes(facts(steps=5000), mixed, []))


def test_a_bias_that_is_exact_needs_no_gap():
    """The present batches may be other ones than those in training, where the gap is."""
    bias = {"stored": (np.zeros(CHANNELS), np.full(CHANNELS, 64 / 63)), "shift": 0.0}
    names = tuple(f"bn{i}" for i in range(20))
    own = {"batch_variance": np.ones(CHANNELS), "batch_mean": np.zeros(CHANNELS), "values": 1}
    sites = {path: site_measurement(path, ratio=0.97, **bias, **own) for path in names}
    probes = {**NO_GAP, "population": (0.05, 0.97), "population unfrozen": (0.05, 0.97)}
    known = facts({name: {"values": 1} for name in names}, steps=5000)
    made = measurement(probes, paths=names, sites=sites, batch_size=64)
    assert codes(causes(known, made, [])) == ["BESSEL"]
    own["batch_variance"] = np.linspace(0.9, 1.1, CHANNELS)  # not one number
    sites = {path: site_measurement(path, ratio=0.97, **bias, **own) for path in names}
    made = measurement(probes, paths=names, sites=sites, batch_size=64)
    assert codes(causes(known, made, [])) == ["NONE"]


def test_stacked_bessel_predicts_the_ratio():
    names = tuple(f"bn{i}" for i in range(20))
    sites = {
        path: site_measurement(
            path,
            stored=(np.zeros(CHANNELS), np.full(CHANNELS, 64 / 63)),
            shift=0.0,
            ratio=63 / 64 * (63 / 64) ** i,  # each site before shrinks what comes next
            batch_variance=np.ones(CHANNELS),
            batch_mean=np.zeros(CHANNELS),
            values=1,
        )
        for i, path in enumerate(names)
    }
    probes = {"inference": 0.03, "training": 1e-6, "training blend": 1e-6, "population": 1e-6}
    found = causes(
        facts({name: {"values": 1} for name in names}, steps=5000),
        measurement(probes, shares=[0.05] * 20, paths=names, sites=sites, batch_size=64),
        [],
    )
    assert codes(found)[0] == "BESSEL"
    assert found[0].evidence["predicted_ratio"] == pytest.approx((64 / 63) ** 10)


def test_epsilon_of_the_reference():
    other = Difference(params={"conv1": 0.0}, epsilons={"bn1": (1e-3, 1e-5)}, outputs=0.2)
    found = causes(facts(), measurement(NO_GAP, difference=other), [])
    assert (found[0].code, found[0].certainty) == ("EPS_MISMATCH", "is")


@pytest.mark.parametrize("theirs", [4.0, 1.1e-3], ids=["matters", "does not"])
def test_another_epsilon_explains_what_lies_behind_it(theirs: float):
    """Weights and statistics are the reference's: nothing was edited, nothing lags."""
    other = Difference(
        params={"conv1": 0.0},
        statistics=dict.fromkeys(PATHS, 0.0),
        epsilons=dict.fromkeys(PATHS, (1e-3, theirs)),
        outputs=0.2,
    )
    sites = far("bn3", "bn4")
    made = measurement(GAP, shares=[0.0, 0.0, 0.5, 0.5], sites=sites, difference=other)
    found = causes(facts(steps=5000), made, [])
    assert codes(found)[0] == ("EPS_MISMATCH" if theirs > 1 else "STALE_AFTER_WEIGHT_EDIT")
    if theirs > 1:
        assert codes(found) == ["EPS_MISMATCH"]
        assert found[0].share == pytest.approx(1.0)
    lagging = causes(facts(steps=20), replace(made, steps=20), [])
    assert "EMA_LAG" in codes(lagging)  # decayⁿ is a fact of its own


def test_an_epsilon_that_closes_little_leaves_the_rest_to_the_average():
    """Of an average that lags and an epsilon that was lost, only the epsilon was named."""
    other = Difference(
        params={"conv1": 0.0},
        statistics=dict.fromkeys(PATHS, 0.0),
        epsilons=dict.fromkeys(PATHS, (1e-3, 4.0)),
        outputs=0.2,
    )
    probes = {**GAP, "epsilon": (0.75, 0.75)}
    made = measurement(probes, shares=[0.25] * 4, sites=FAR, difference=other)
    found = causes(facts(steps=600), made, [])
    assert codes(found) == ["EMA_LAG", "EPS_MISMATCH"]
    assert found[0].share == pytest.approx(0.72, abs=0.02)
    assert found[1].certainty == "is"


@pytest.mark.parametrize("closes", [True, False])
def test_another_default_of_epsilon_is_tried_without_a_reference(closes: bool):
    """Locked statistics that agree up to some site are not of other data, as was said for sure."""
    locked = dict.fromkeys(PATHS, FROZEN)
    probes = {**dict.fromkeys(GAP, (1.0, 0.7)), "population": (0.2, 0.95),
              "population frozen": (0.2, 0.95), "batch": (0.2, 0.95),
              "epsilon": (0.21, 0.95) if closes else (0.99, 0.7)}  # fmt: skip
    made = measurement(probes, sites=far("bn3", "bn4"), epsilon=1e-5)
    found = causes(facts(locked), made, [])
    assert found[0].certainty == "may"
    assert "reference=" in found[0].settle
    if closes:
        assert codes(found) == ["EPS_MISMATCH"]
        assert found[0].sites == PATHS[:2]
        assert found[0].share == pytest.approx(1.0)
    else:
        assert codes(found) == ["STALE_AFTER_WEIGHT_EDIT"]
        assert "the data are not others" in found[0].message


def test_equal_weights_and_other_statistics_are_a_replica():
    replica = Difference(params={"conv1": 0.0}, statistics=dict.fromkeys(PATHS, 0.5), outputs=0.1)
    found = causes(facts(steps=500), measurement(NO_GAP, difference=replica), [])
    assert (found[0].code, found[0].certainty) == ("RANK_DIVERGENCE", "is")


def test_statistics_that_were_not_loaded_are_no_replica():
    new = {"mean": np.zeros(CHANNELS), "variance": np.ones(CHANNELS)}
    stored = (np.zeros(CHANNELS), np.ones(CHANNELS))
    sites = {
        path: site_measurement(path, stored=stored, shift=0.8, ratio=SCATTERED) for path in PATHS
    }
    trained = Difference(params={"conv1": 0.0}, statistics=dict.fromkeys(PATHS, 0.5), outputs=0.1)
    found = causes(
        facts(dict.fromkeys(PATHS, new), steps=500),
        measurement(GAP, shares=[0.25] * 4, sites=sites, difference=trained),
        [],
    )
    assert codes(found) == ["STATS_NEVER_UPDATED"]


# --- batches --------------------------------------------------------------------------------------


def test_batches_of_few_values():
    probes = {**GAP, "population": (0.8, 0.75), "population unfrozen": (0.8, 0.75)}
    sites = {path: site_measurement(path, shift=0.3, ratio=SCATTERED, values=4) for path in PATHS}
    found = causes(
        facts({path: {"values": 4} for path in PATHS}, steps=3000),
        measurement(probes, shares=[0.25] * 4, sites=sites, batch_size=1),
        [],
    )
    assert codes(found)[0] == "SMALL_BATCH"
    assert found[0].share > 0.5
    assert sum(cause.share or 0 for cause in found) <= 1 + 1e-9


def test_large_batches_are_not_small():
    probes = {**GAP, "population": (0.8, 0.75), "population unfrozen": (0.8, 0.75)}
    found = causes(facts(steps=3000), measurement(probes, shares=[0.25] * 4, sites=FAR), [])
    assert codes(found)[0] == "BATCH_LEAK"  # what no fixed statistics give lies in the batches
    assert found[0].certainty == "may"
    assert "SMALL_BATCH" not in codes(found)


def test_layers_behind_locked_sites_need_what_those_have_stored():
    """The patched network: exact statistics do harm everywhere, at thawed sites they help."""
    locked = {path: FROZEN if path in PATHS[:2] else {} for path in PATHS}
    probes = {
        **GAP,
        "population": (0.8, 0.75),
        "population frozen": (0.9, 0.75),
        "population unfrozen": GAP["training blend"],
    }
    made = measurement(probes, shares=[0, 0, 0.5, 0.5], sites=FAR)
    found = causes(facts(locked, steps=30), made, [])
    assert codes(found) == ["EMA_LAG"]
    assert set(found[0].sites) == set(PATHS[2:])
    assert "close 100% of the BN gap" in found[0].message


def test_batches_of_a_single_image_are_small_whatever_its_size():
    probes = {**GAP, "population": (0.8, 0.75), "population unfrozen": (0.8, 0.75)}
    own = np.linspace(0.5, 2, CHANNELS)  # within an image; images differ from each other as well
    sites = {
        path: site_measurement(path, shift=0.0, ratio=3.0, batch_variance=own) for path in PATHS
    }
    made = measurement(probes, shares=[0.25] * 4, sites=sites, batch_size=1)
    found = causes(facts(steps=3000), made, [])
    assert codes(found) == ["SMALL_BATCH"]
    assert found[0].share == pytest.approx(1.0)


def test_batches_whose_means_scatter_are_small():
    probes = {**GAP, "population": (0.8, 0.75), "population unfrozen": (0.8, 0.75)}
    for noise, expected in ((0.4, "SMALL_BATCH"), (0.1, "BATCH_LEAK")):
        sites = {path: site_measurement(path, shift=0.3, noise=noise) for path in PATHS}
        made = measurement(probes, shares=[0.25] * 4, sites=sites)
        assert codes(causes(facts(steps=3000), made, []))[0] == expected


def test_the_sweep_tells_of_small_batches_in_training():
    bad = dict.fromkeys(GAP, (2.0, 0.3))
    sweep = tuple(
        SweepPoint(
            batch_size=size,
            batch_loss=loss,
            batch_accuracy=None,
            inference_loss=2.0,
            inference_change=0.0,
        )
        for size, loss in ((1, 0.1), (8, 1.5), (32, 2.0))
    )
    small = {path: {"values": 4} for path in PATHS}
    sites = {path: site_measurement(path, values=4) for path in PATHS}
    found = causes(facts(small, steps=900), measurement(bad, sites=sites, sweep=sweep), [])
    assert (found[0].code, found[0].certainty) == ("SMALL_BATCH", "may")


def test_batches_that_tell_the_class():
    probes = {**dict.fromkeys(GAP, (2.0, 0.3)), "sorted": (0.05, 0.99)}
    found = causes(facts(steps=3000), measurement(probes), [])
    assert codes(found)[0] == "BATCH_LEAK"
    worse = {**NO_GAP, "sorted": (2.0, 0.3)}
    assert codes(causes(facts(steps=3000), measurement(worse), [])) == ["NONE"]
    guessed = {**dict.fromkeys(GAP, (3.0, 0.04)), "inference": (3.6, 0.05), "sorted": (2.7, 0.06)}
    found = causes(facts(steps=3000), measurement(guessed, shares=[0.25] * 4), [])
    assert "BATCH_LEAK" not in codes(found)  # a loss of guesses tells of no class


def test_what_acts_in_training_only_beside_batch_statistics_is_not_said_to_be_bn():
    made = measurement({"inference": 0.126, "training": 0.123, "training blend": 0.175})
    (none,) = causes(facts(steps=3000), made, [])
    assert (none.code, none.certainty) == ("NONE", "may")
    assert "step=" in none.message
    assert "does something of its own" not in none.message


def test_inference_that_uses_the_batch():
    seen = dict.fromkeys(PATHS, (1.0, 1.0, False))
    probes = {**NO_GAP, "population": (0.6, 0.8)}
    found = causes(facts(), measurement(probes, behaviour=seen, neighbours=0.4), [])
    assert codes(found)[0] == "FORCED_TRAIN"
    assert "too good" in found[0].message
    assert "change by up to 0.4 with the neighbours" in found[0].message
    assert found[0].certainty == "is"
    found = causes(facts(), measurement(probes, behaviour=seen, neighbours=0.0), [])
    assert "neighbours" not in found[0].message


def test_a_caller_that_overrides_the_phase_is_told_apart_from_a_forgotten_eval():
    seen = dict.fromkeys(PATHS, (1.0, 1.0, False))
    made = measurement({**NO_GAP, "population": (0.6, 0.8)}, behaviour=seen, neighbours=0.4)
    left = facts({path: {"mode": True} for path in PATHS}, mode=False)
    nothing_stored = facts({path: {"mean": None, "variance": None} for path in PATHS})
    for model, wanted in ((facts(), True), (left, False), (nothing_stored, False)):
        found = causes(model, made, [])
        assert found[0].code == "FORCED_TRAIN"
        assert ("overrides it: pass the phase on there" in found[0].message) is wanted


def test_a_batch_size_that_computes_something_else():
    seen = dict.fromkeys(PATHS, (1.0, 0.0, True))
    sweep = tuple(
        SweepPoint(
            batch_size=size,
            batch_loss=0.1,
            batch_accuracy=0.97,
            inference_loss=0.1,
            inference_change=change,
        )
        for size, change in ((8, 1e-6), (16, 0.6), (32, 0.0))
    )
    found = causes(facts(), measurement(NO_GAP, behaviour=seen, sweep=sweep, neighbours=1e-7), [])
    assert codes(found) == ["KERNEL_BUG"]
    assert bn(found) == []


@pytest.mark.parametrize(
    ("kinds", "expected"), [({}, "KERNEL_BUG"), ({"drop": "dropout"}, "DROPOUT")]
)
def test_what_inference_loses_to_its_company_is_no_dropout(kinds: Any, expected: str):
    """Alone a sample gets what it gets in training mode: a vote over the batch, in no training."""
    probes = {"inference": (0.7, 0.8), "training": (0.17, 0.95), "dropout": (0.17, 0.95)}
    sweep = tuple(
        SweepPoint(
            batch_size=size,
            batch_loss=loss,
            batch_accuracy=0.9,
            inference_loss=loss,
            inference_change=change,
        )
        for size, loss, change in ((1, 0.16, 1.1), (32, 0.7, 0.0), (64, 0.72, 0.3))
    )
    made = measurement(
        probes, sites={}, sweep=sweep, neighbours=0.4, noise_layers=kinds, batch_size=32
    )
    found = causes(ModelFacts(sites=(), layers=(), order={}), made, [])
    assert found[0].code == expected
    assert found[0].share == pytest.approx(1.0)
    assert (found[0].code == "DROPOUT") or "in batches of 1" in found[0].message


def test_batches_that_are_padded_otherwise_are_no_wrong_operation():
    seen = dict.fromkeys(PATHS, (1.0, 0.0, True))
    point = SweepPoint(
        batch_size=2,
        batch_loss=0.1,
        batch_accuracy=0.97,
        inference_loss=0.1,
        inference_change=0.2,
        padded=True,
    )
    made = measurement(NO_GAP, behaviour=seen, sweep=(point,), neighbours=1e-7)
    (found,) = causes(facts(), made, [])
    assert (found.code, found.certainty) == ("KERNEL_BUG", "may")
    assert "by design" in found.message
    assert "padding" in found.settle


# --- not BN ---------------------------------------------------------------------------------------


def test_dropout_alone():
    probes = {**NO_GAP, "training": (0.5, 0.9), "dropout": (0.5, 0.9)}
    found = causes(facts(steps=5000), measurement(probes, noise_layers={"drop": "dropout"}), [])
    assert codes(found) == ["DROPOUT"]
    assert found[0].share == pytest.approx(1.0, abs=0.05)
    assert found[0].sites == ()


@pytest.mark.parametrize("kind", ["dropout", "augmentation"])
def test_statistics_taken_under_dropout_are_no_lag(kind: str):
    """The variance shift: what is stored are the statistics of training, dropout included."""
    probes = {**NO_GAP, "inference": (0.4, 0.9), "training": (0.5, 0.9), "dropout": (0.8, 0.8)}
    layers, stored = {"noise": kind}, site_measurement("bn4")
    seen = {"noisy_mean": stored.stored_mean, "noisy_variance": 1.05 * stored.stored_variance}
    sites = {**far(), "bn4": site_measurement("bn4", ratio=0.6 * SCATTERED, **seen)}
    made = measurement(probes, shares=[0, 0, 0, 1.0], sites=sites, noise_layers=layers)
    found = causes(facts(steps=5000), made, [])
    assert codes(found) == ["DROPOUT" if kind == "dropout" else "AUGMENT_TRAIN_ONLY"]
    assert found[0].evidence["variance_shift"] == pytest.approx(0.3)
    assert found[0].share == pytest.approx(1.0, abs=0.15)
    sites["bn4"] = replace(sites["bn4"], noisy_variance=stored.stored_variance / 3)
    assert bn(causes(facts(steps=5000), replace(made, sites=sites), []))


def test_dropout_and_lag_are_both_named():
    probes = {**GAP, "training": (0.5, 0.9), "dropout": (1.4, 0.6)}
    found = causes(
        facts(steps=50),
        measurement(probes, shares=[0.25] * 4, sites=FAR, noise_layers={"drop": "dropout"}),
        [],
    )
    assert set(codes(found)) == {"EMA_LAG", "DROPOUT"}
    assert sum(cause.share for cause in found) == pytest.approx(1.0, abs=0.02)


def test_noise_on_top_of_statistics_that_lag_counts_as_in_training():
    """A code drawn from variances that are far off: neither phase shows that loss."""
    probes = {**GAP, "training": (0.5, 0.9), "dropout": (30.0, 0.3)}
    found = causes(
        facts(steps=50),
        measurement(probes, shares=[0.25] * 4, sites=FAR, noise_layers={"drawn": "noise"}),
        [],
    )
    assert codes(found) == ["EMA_LAG", "DROPOUT"]
    assert found[1].evidence["dropout_gap"] == pytest.approx(0.4)
    assert "with BN as in training" in found[1].message


def test_augmentation_layers():
    probes = {**NO_GAP, "training": (0.5, 0.9), "dropout": (0.5, 0.9)}
    layers = {"flip": "augmentation"}
    found = causes(facts(steps=5000), measurement(probes, noise_layers=layers), [])
    assert codes(found) == ["AUGMENT_TRAIN_ONLY"]


def test_a_training_metric_that_is_a_mean_over_the_epoch():
    found = causes(facts({}), measurement(NO_GAP, paths=(), history={"loss": (0.9,)}), [])
    assert codes(found) == ["EPOCH_AVERAGE"]


def test_a_training_metric_that_stays_worse_is_no_average():
    history = {"loss": (0.9, 0.81, 0.8, 0.8, 0.8)}
    found = causes(facts({}), measurement(NO_GAP, paths=(), history=history), [])
    assert codes(found) == ["AUGMENT_TRAIN_ONLY"]


def test_inputs_in_another_scale_are_not_blamed_on_bn():
    # The trap: the statistics do not fit, and recalibrating closes the gap.
    sites = {path: site_measurement(path, shift=50.0, ratio=255.0**2) for path in PATHS}
    probes = {**GAP, "inference": (4.0, 0.2), "input x/255": (0.12, 0.97)}
    found = causes(facts(steps=600), measurement(probes, shares=[0.25] * 4, sites=sites), [])
    assert codes(found) == ["PREPROCESS"]
    assert found[0].certainty == "is"
    assert found[0].share == pytest.approx(1.0, abs=0.05)


def test_an_encoding_that_helps_a_little_explains_nothing():
    probes = {**GAP, "input x*2-1": (0.85, 0.75)}
    found = causes(facts(steps=48), measurement(probes, shares=[0.25] * 4, sites=FAR), [])
    assert codes(found) == ["EMA_LAG"]


def test_accuracy_that_differs_counts_where_the_loss_hardly_moves():
    """A network of a few steps is unsure of all classes."""
    better = (1.33, 0.46)
    probes = {**dict.fromkeys(GAP, better), "inference": (1.37, 0.30)}
    found = causes(facts(steps=4), measurement(probes, shares=[0.25] * 4, sites=FAR), [])
    assert codes(found) == ["EMA_LAG"]
    for inference, wanted in (((1.37, 0.44), "too little"), ((1.29, 0.30), "accuracy is 30.")):
        made = measurement({**probes, "inference": inference}, shares=[0.25] * 4, sites=FAR)
        (none,) = causes(facts(steps=4), made, [])
        assert none.code == "NONE"
        assert wanted in none.message
        assert (none.certainty == "may") is (wanted != "too little")


def test_in_a_regression_a_constant_answer_is_no_encoding():
    """Inputs that are mapped to one value: better than answers far off, far from the best."""
    for loss, wanted in ((0.22, False), (0.012, True)):
        probes = {"inference": 1.5, "input x/127.5-1": loss}
        probes |= dict.fromkeys(("training", "training blend", "batch", "population"), 0.006)
        found = causes(facts(steps=50), measurement(probes, shares=[0.25] * 4, sites=FAR), [])
        assert ("PREPROCESS" in codes(found)) is wanted


def test_another_contrast_that_suits_a_lagging_average_is_no_encoding():
    probes = {**GAP, "input x*2-1": (0.2, 0.95)}
    made = measurement(probes, shares=[0.25] * 4, sites=FAR)
    assert codes(causes(facts(steps=48), made, [])) == ["EMA_LAG"]
    assert codes(causes(facts(steps=5000), made, []))[0] == "PREPROCESS"


def test_an_encoding_that_the_first_site_was_not_trained_on_helps_by_chance():
    probes = {**GAP, "input (x+1)*127.5": (0.2, 0.95)}
    for off, wanted in ((6.8, False), (0.3, True)):
        misfits = {"x": 0.4, "(x+1)*127.5": off}
        made = measurement(probes, shares=[0.25] * 4, sites=FAR, input_misfits=misfits)
        found = causes(facts(steps=48), made, [])
        assert ("PREPROCESS" in codes(found)) is wanted
        assert "EMA_LAG" in codes(found) or wanted


def test_wrong_inputs_and_frozen_batch_statistics_are_both_named():
    probes = {**GAP, "input x*255": (0.2, 0.95)}
    found = causes(
        facts(BATCH_POLICY, steps=5000),
        measurement(probes, shares=[0.5, 0.3, 0.2, 0.0], sites=FAR),
        [],
    )
    assert set(codes(found)) == {"PREPROCESS", "FROZEN_BATCH_STATS"}
    assert sum(cause.share for cause in found) == pytest.approx(1.0)
    assert min(cause.share for cause in found) > 0.3


def moments(scale: float = 1.0, offset: float = 0.0, deviation: float = 0.3) -> InputMoments:
    def values(number: float) -> np.ndarray:
        return np.array([scale * number + offset])

    return InputMoments(
        mean=values(0.4),
        deviation=np.array([abs(scale) * deviation]),
        low=values(0.0),
        high=values(1.0),
    )


def test_validation_inputs_in_another_scale():
    probes = {
        **NO_GAP,
        "validation inference": (5.0, 0.2),
        "validation batch": (0.2, 0.95),
        "validation population": (5.0, 0.2),
    }
    given_inputs = {"input": moments(), "validation_input": moments(255.0)}
    found = causes(facts(steps=600), measurement(probes, **given_inputs), [])
    assert codes(found) == ["PREPROCESS"]
    assert found[0].evidence["scale"] == pytest.approx(255)


def test_validation_inputs_in_another_scale_that_cost_loss_and_few_right_answers():
    loss = NO_GAP["inference"][0]
    for factor, wanted in ((1.0, False), (40.0, True)):
        seen = (factor * loss, NO_GAP["inference"][1] - 0.05)
        probes = {**NO_GAP, **{f"validation {p}": seen for p in ("inference", "batch")}}
        given_inputs = {"input": moments(), "validation_input": moments(255.0)}
        found = causes(facts(steps=600), measurement(probes, **given_inputs), [])
        assert ("PREPROCESS" in codes(found)) is wanted


def test_overfit_where_small_batches_make_training_mode_worse():
    probes = {
        **dict.fromkeys(NO_GAP, (0.3, 0.9)),
        "inference": (0.1, 0.97),
        "population": (0.1, 0.97),
        "validation inference": (2.0, 0.5),
        "validation batch": (2.0, 0.5),
        "validation population": (2.0, 0.5),
    }
    inputs = {"input": moments(), "validation_input": moments()}
    found = causes(facts(steps=600), measurement(probes, **inputs), [])
    assert codes(found) == ["OVERFIT"]


def test_overfit_is_both_phases_alike():
    probes = {
        **NO_GAP,
        "validation inference": (2.0, 0.5),
        "validation batch": (2.0, 0.5),
        "validation population": (2.0, 0.5),
    }
    inputs = {"input": moments(), "validation_input": moments()}
    found = causes(facts(steps=600), measurement(probes, **inputs), [])
    assert codes(found) == ["OVERFIT"]


def test_few_samples_of_one_source_are_not_prepared_in_another_way():
    """80 and 200 samples of 30 normal values with one preparation, and with a shift of 1."""
    probes = {
        **NO_GAP,
        **dict.fromkeys(("validation inference", "validation batch"), (2.0, 0.5)),
        "validation population": (2.0, 0.5),
    }
    for seed in range(20):
        rng = np.random.default_rng(seed)
        train, own, other = rng.normal(size=(80, 30)), *rng.normal(size=(2, 200, 30))
        for values, wanted in ((own, "OVERFIT"), (other + 1.0, "PREPROCESS")):
            batches = [[Batch(x)] for x in (train, values)]
            given = dict(zip(("input", "validation_input"), map(of_inputs, batches), strict=True))
            found = causes(facts(steps=600), measurement(probes, **given), [])
            assert codes(found) == [wanted], seed


def test_overfit_is_a_guess_where_validation_phases_disagree_or_sizes_differ():
    values = {"inference": (2.0, 0.5), "batch": (1.9, 0.6), "population": (2.0, 0.5)}
    other = {f"validation {name}": value for name, value in values.items()}
    sized = {
        "input": replace(moments(), size=(64,)),
        "validation_input": replace(moments(), size=(9,)),
    }
    for probes, inputs in (
        ({**NO_GAP, **other}, {}),
        ({**NO_GAP, **other, "validation batch": (2.0, 0.5)}, sized),
    ):
        (found,) = causes(facts(steps=600), measurement(probes, **inputs), [])
        assert (found.code, found.certainty) == ("OVERFIT", "may")
        assert found.settle is not None
        assert ("both phases agree" in found.message) is bool(inputs)


def test_an_encoding_as_bad_as_guessing_is_none_beside_renamed_classes():
    """All answers are wrong with certainty; from other inputs they are a guess, at less loss."""
    wrong = {**dict.fromkeys(GAP, (11.5, 0.0)), "input x*255": (4.2, 0.1)}
    found = causes(facts(steps=600), measurement(wrong, relabelled=1.0), [])
    assert codes(found) == ["LABEL_ORDER"]


def test_renamed_classes():
    wrong = dict.fromkeys(GAP, (6.0, 0.02))
    found = causes(facts(steps=600), measurement(wrong, relabelled=0.96), [])
    assert (found[0].code, found[0].certainty) == ("LABEL_ORDER", "is")
    assert bn(found) == []


def test_a_renaming_of_few_samples_is_chance():
    few = np.zeros((10, 10), int)
    few[[0, 1, 2, 3], [1, 2, 3, 4]] = 1  # four samples: some renaming fits them all
    wrong = dict.fromkeys(GAP, (6.0, 0.0))
    found = causes(facts(steps=600), measurement(wrong, relabelled=1.0, confusion=few), [])
    assert found[0].certainty == "may"
    many = causes(facts(steps=600), measurement(wrong, relabelled=1.0, confusion=20 * few), [])
    assert (many[0].code, many[0].certainty) == ("LABEL_ORDER", "is")


def test_inverted_inference_of_two_classes_is_no_renaming():
    """Batch statistics do well by the same labels, so that these are right."""
    probes = {**GAP, "inference": (3.0, 0.1)}
    two = {"task": "binary", "classes": 2, "chance": 0.5, "relabelled": 0.9}
    made = measurement(probes, shares=[0.25] * 4, sites=FAR, **two)
    assert codes(causes(facts(steps=48), made, [])) == ["EMA_LAG"]


def test_a_network_that_was_never_trained_says_nothing_of_its_labels():
    made = measurement(dict.fromkeys(GAP, (6.0, 0.1)), relabelled=0.2)
    new = {"mean": np.zeros(CHANNELS), "variance": np.ones(CHANNELS)}
    affine = {"gamma": np.ones(CHANNELS), "beta": np.zeros(CHANNELS)}
    trained = affine | {"beta": np.linspace(-1, 1, CHANNELS)}
    known = {"affine": affine, "none": {}, "trained": trained}
    said = {
        name: codes(causes(facts(dict.fromkeys(PATHS, new | more)), made, []))
        for name, more in known.items()
    }
    assert "LABEL_ORDER" not in said["affine"]
    assert "LABEL_ORDER" in said["none"]  # nothing shows whether it was trained
    assert "LABEL_ORDER" in said["trained"]


def test_labels_of_other_samples():
    wrong = dict.fromkeys(GAP, (6.0, 0.1))
    found = causes(facts(steps=600), measurement(wrong, relabelled=0.2), [])
    assert (found[0].code, found[0].certainty) == ("LABEL_ORDER", "may")
    with_history = measurement(wrong, relabelled=0.2, history={"accuracy": (0.5, 0.98)})
    assert causes(facts(steps=600), with_history, [])[0].certainty == "is"


@pytest.mark.parametrize(
    ("loss", "answers", "size", "code"),
    [
        (2.31, "differ", 2, "SMALL_BATCH"),  # as unsure as a guess
        (6.0, "alike", 2, "SMALL_BATCH"),  # sure of one class
        (6.0, "differ", 2, "LABEL_ORDER"),  # sure, and right of other samples
        (2.31, "differ", 32, "LABEL_ORDER"),
        (6.0, "alike", 32, "NONE"),
    ],
)
def test_batches_that_taught_nothing_are_no_labels_of_other_samples(
    loss: float, answers: str, size: int, code: str
):
    confusion = np.full((10, 10), 4)
    if answers == "alike":
        confusion = np.zeros((10, 10), int)
        confusion[:, 3] = 40
    wrong = dict.fromkeys(GAP, (loss, 0.1))
    known = {"relabelled": 0.2, "confusion": confusion, "batch_size": size}
    found = causes(facts(steps=600), measurement(wrong, **known), [])
    assert found[0].code == code
    assert found[0].certainty == ("is" if code == "NONE" else "may")


def test_an_untrained_model_at_chance_has_no_cause():
    guessing = dict.fromkeys(GAP, (2.31, 0.1))
    assert codes(causes(facts(), measurement(guessing, relabelled=0.2), [])) == ["NONE"]


def test_loading_changes_the_outputs():
    found = causes(facts(), measurement(NO_GAP, round_trip=0.3), [])
    assert codes(found) == ["LOADING"]
    other = Difference(
        params={"conv1": 0.0},
        statistics=dict.fromkeys(PATHS, 0.0),
        outputs=0.2,
        settings={"up": "interpolation: nearest, reference bilinear"},
    )
    found = causes(facts(), measurement(NO_GAP, difference=other), [])
    assert codes(found) == ["LOADING"]
    assert "nearest" in found[0].message


def test_weights_that_never_arrived_are_no_statistics_that_were_never_updated():
    """A clone without the weights of its original: recalibration was recommended."""
    new = {"mean": np.zeros(CHANNELS), "variance": np.ones(CHANNELS)}
    affine = {"gamma": np.ones(CHANNELS), "beta": np.zeros(CHANNELS)}
    trained = affine | {"beta": np.linspace(-1, 1, CHANNELS)}
    stored = (np.zeros(CHANNELS), np.ones(CHANNELS))
    sites = {
        path: site_measurement(path, stored=stored, shift=0.8, ratio=SCATTERED) for path in PATHS
    }
    apart = Difference(params={"conv1": 1.4, "head": 1.3}, statistics=dict.fromkeys(PATHS, 2.0))
    same = Difference(params={"conv1": 0.0, "head": 0.0}, statistics=dict.fromkeys(PATHS, 2.0))
    new_too = Difference(params={"conv1": 1.4, "head": 1.3}, statistics=dict.fromkeys(PATHS, 0.0))
    for more, reference, wanted in (
        (affine, apart, "LOADING"),
        (trained, apart, "STATS_NEVER_UPDATED"),
        (affine, same, "STATS_NEVER_UPDATED"),
        (affine, new_too, "STATS_NEVER_UPDATED"),
        (affine, None, "STATS_NEVER_UPDATED"),
    ):
        made = measurement(GAP, shares=[0.25] * 4, sites=sites, difference=reference)
        found = causes(facts(dict.fromkeys(PATHS, new | more)), made, [])
        assert codes(found)[0] == wanted
        assert (wanted == "LOADING") is ("STATS_NEVER_UPDATED" not in codes(found))
    found = causes(
        facts(dict.fromkeys(PATHS, new | affine)),
        measurement(GAP, sites=sites, difference=apart),
        [],
    )
    assert "2 of 2 layers with weights differ" in found[0].message


def test_weights_that_are_still_those_of_the_start():
    same = Difference(params={"conv1": 0.0}, statistics=dict.fromkeys(PATHS, 0.0), outputs=0.0)
    bad = dict.fromkeys(GAP, (2.3, 0.12))
    found = causes(
        facts(steps=500), measurement(bad, difference=same, history={"loss": (1.0, 0.1)}), []
    )
    assert "STALE_PARAMS" in codes(found)[:2]
    assert bn(found) == []


# --- nothing, and how sure one may be -------------------------------------------------------------


@pytest.mark.parametrize(
    "probes",
    [
        NO_GAP,
        {**NO_GAP, "training blend": (0.13, 0.965), "training": (0.13, 0.965)},
        {
            **NO_GAP,
            "inference": (0.012, 1.0),
            "training blend": (0.008, 1.0),
            "training": (0.008, 1.0),
        },
    ],
    ids=["no gap", "training mode a little worse", "both tiny"],
)
def test_a_healthy_model(probes: dict[str, tuple[float, float]]):
    found = causes(facts(steps=1000), measurement(probes, shares=None), [])
    assert codes(found) == ["NONE"]


def test_a_model_without_bn():
    found = causes(facts({}), measurement({"inference": (0.1, 0.97), "training": (0.1, 0.97)}), [])
    assert codes(found) == ["NONE"]


def test_no_cause_from_a_gap_that_may_be_chance():
    rng = np.random.default_rng(0)
    made = measurement(GAP, sites=FAR)
    noisy = {
        name: replace(each, losses=rng.exponential(each.loss + 5, 16), hits=None)
        for name, each in made.probes.items()
    }
    made = replace(made, probes=noisy, gaps={}, samples=16, attribution=None)
    found = causes(facts(steps=48), made, [])
    assert codes(found) == ["NONE"]
    assert "chance" in found[0].message


ROLES = st.sampled_from(
    [{}, {"decay": 0.1}, {**FROZEN, "policy": "batch"}, FROZEN, {"params_frozen": True}]
)


@given(
    roles=st.lists(ROLES, min_size=4, max_size=4),
    shares=st.lists(st.floats(-0.5, 1.0), min_size=4, max_size=4),
    losses=st.lists(st.floats(0.05, 3.0), min_size=6, max_size=6),
    steps=st.sampled_from([None, 5, 100, 5000]),
    values=st.sampled_from([1, 64]),
)
def test_shares_add_up_to_at_most_one(
    roles: list[Any], shares: list[float], losses: list[float], steps: int | None, values: int
):
    names = ("inference", "training", "training blend", "population", "dropout", "input x/255")
    made = measurement(
        dict(zip(names, losses, strict=True)),
        shares=shares,
        sites={p: site_measurement(p, shift=0.9, ratio=3.0, values=values) for p in PATHS},
        noise_layers={"drop": "dropout"},
    )
    found = causes(facts(dict(zip(PATHS, roles, strict=True)), steps=steps), made, [])
    assert found
    told = [cause.share for cause in found if cause.share is not None]
    assert all(0 <= share <= 1 + 1e-9 for share in told)
    assert sum(told) <= 1 + 1e-9
    assert len(set(codes(found))) == len(found)
    assert all(cause.code in BN_CAUSES or not cause.sites for cause in found)


# --- two causes, and what one of them makes of the others -----------------------------------------


def scaled(factor: float) -> dict[str, Any]:
    """The first site's statistics are of inputs ``factor`` times as strong."""
    sites = {path: site_measurement(path) for path in PATHS}
    sites["bn1"] = site_measurement("bn1", shift=0.3, ratio=factor**-2)
    return sites


@pytest.mark.parametrize("factor", [255.0, 1 / 255, 127.5, 255 / 0.4])
def test_inputs_of_another_encoding_beside_frozen_batch_statistics(factor: float):
    behaviour = dict.fromkeys(PATHS[:3], (1.0, 0.0, False))
    made = measurement(GAP, shares=[0.9, 0.05, 0.05, 0], sites=scaled(factor), behaviour=behaviour)
    found = causes(facts(BATCH_POLICY, steps=100), made, [])
    assert set(codes(found)) == {"FROZEN_BATCH_STATS", "PREPROCESS"}
    assert sum(cause.share or 0 for cause in found) == pytest.approx(1.0)
    assert all(cause.share == pytest.approx(0.5) for cause in found)


@pytest.mark.parametrize("factor", [1.0, 2.0, 10.0, 1e5])
def test_contrast_is_no_encoding(factor: float):
    behaviour = dict.fromkeys(PATHS[:3], (1.0, 0.0, False))
    made = measurement(GAP, shares=[0.9, 0.05, 0.05, 0], sites=scaled(factor), behaviour=behaviour)
    assert codes(causes(facts(BATCH_POLICY, steps=100), made, [])) == ["FROZEN_BATCH_STATS"]


def test_small_variances_on_the_way_from_one_are_no_encoding():
    first = site_measurement(
        "bn1",
        stored=(np.zeros(CHANNELS), 0.6 + 0.4 * np.geomspace(1e-5, 3e-5, CHANNELS)),
        batch_variance=np.geomspace(1e-5, 3e-5, CHANNELS),
    )
    made = measurement(GAP, shares=[1, 0, 0, 0], sites={**FAR, "bn1": first})
    assert "PREPROCESS" not in codes(causes(facts(steps=50), made, []))


def test_wrong_labels_make_every_loss_void():
    probes = {**dict.fromkeys(GAP, (6.0, 0.05)), "sorted": (3.0, 0.2)}
    found = causes(facts(steps=3000), measurement(probes, relabelled=0.98), [])
    assert codes(found) == ["LABEL_ORDER"]


def test_another_network_behind_the_same_weights_is_not_other_data():
    same = Difference(
        params={"conv1": 0.0}, statistics=dict.fromkeys(PATHS, 0.0), outputs=0.9,
        settings={"up": "interpolation nearest, not bilinear"},
    )  # fmt: skip
    made = measurement(GAP, shares=[0.25] * 4, sites=FAR, difference=same)
    assert codes(causes(facts(), made, [])) == ["LOADING"]


def test_exact_statistics_that_small_batches_hide_are_told():
    """Training mode is no better, but for the noise of its batches alone."""
    probes = {**dict.fromkeys(GAP, (0.31, 0.93)), "population": (0.1, 0.97)}
    none = causes(facts(steps=5000), measurement(probes, batch_size=8), [])[0]
    assert (none.code, none.certainty) == ("NONE", "may")
    assert "exact statistics of these data would save 0.21" in none.message


def test_a_gap_that_nothing_explains_is_not_called_small():
    made = measurement({"inference": (1.0, 0.7), "training": (0.1, 0.97)}, sites={})
    none = causes(facts({}), made, [])[0]
    assert (none.code, none.certainty) == ("NONE", "may")
    assert "too little" not in none.message


# --- outputs compared, and uses of one layer ------------------------------------------------------


def outputs_compared(inference: float, population: float) -> tuple[Cause, ...]:
    """Of a generator without labels: the outputs of training are those that are wanted."""
    probes = {name: np.zeros(SAMPLES) for name in ("training", "training blend", "batch")}
    spread = np.linspace(0.9, 1.1, SAMPLES)
    probes |= {"inference": inference * spread, "population": population * spread}
    near = {path: site_measurement(path, shift=0.15, ratio=SCATTERED) for path in PATHS}
    known = measurement({"inference": 1.0}, sites=near)
    made = {name: replace(probe(name, 0.0), losses=losses) for name, losses in probes.items()}
    return causes(facts(steps=5000), replace(known, probes=made), [])


def test_what_only_batches_do_is_no_gap_where_outputs_are_compared():
    """The distance from batches is never 0; what exact statistics save of it is the gap."""
    assert codes(outputs_compared(0.0044, 0.0031)) == ["NONE"]
    assert codes(outputs_compared(0.3, 0.2995)) == ["NONE"]
    (cause, *rest) = outputs_compared(0.3, 0.0031)
    assert cause.is_bn
    assert cause.evidence["bn_gap"] == pytest.approx(0.0031 - 0.3)
    assert "BATCH_LEAK" not in codes((cause, *rest))


def test_a_young_average_lacks_what_it_has_not_seen():
    within = {
        path: site_measurement(
            path, shift=0.1, ratio=2.5, within_variance=np.linspace(0.5, 2, CHANNELS)
        )
        for path in PATHS
    }
    for steps, code in ((12, "EMA_LAG"), (5000, "MIXED_SOURCES")):
        fast = facts({path: {"decay": 0.9} for path in PATHS}, steps=steps)
        found = causes(fast, measurement(GAP, shares=[0.25] * 4, sites=within), [])
        assert codes(found)[0] == code
