"""FL3xx on facts and measurements written by hand: what triggers, what just does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from frostline import rules
from frostline.causes.case import Case
from frostline.types import Site
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts
from frostline.types.measured import (
    Behaviour,
    Difference,
    InputMoments,
    Measurement,
    SiteMeasurement,
)

MEAN, VARIANCE = np.array([0.5, -1.0, 2.0, 0.2]), np.array([1.0, 4.0, 0.25, 2.0])


def site(path: str = "bn", **flags: Any) -> SiteFacts:
    known: dict[str, Any] = {
        "name": path, "kind": "BatchNormalization", "index": 0, "channels": 4, "axis": -1,
        "decay": 0.99, "epsilon": 1e-3, "params_frozen": False, "stats_frozen": False,
        "policy": "inference",
    }  # fmt: skip
    return SiteFacts(site=Site(path=path, **{**known, **flags}), mean=MEAN, variance=VARIANCE)


def numbers(path: str = "bn", **changes: Any) -> SiteMeasurement:
    """A site whose stored statistics are those of the data, in good batches."""
    given: dict[str, Any] = {
        "stored_mean": MEAN, "stored_variance": VARIANCE, "mean": MEAN, "variance": VARIANCE,
        "batch_mean": MEAN, "batch_variance": VARIANCE, "values": 16, "noise": 0.1,
        "within_variance": VARIANCE,
    }  # fmt: skip
    given |= changes
    width = np.sqrt(np.maximum(given["stored_variance"], 0) + 1e-3)
    given.setdefault("shift", np.abs(given["mean"] - given["stored_mean"]) / width)
    given.setdefault("ratio", (given["variance"] + 1e-3) / width**2)
    return SiteMeasurement(path=path, **given)


def did(training: float | None, *, moves: bool | None = None, inference: float = 0) -> Any:
    return {"bn": Behaviour(path="bn", training=training, inference=inference, moves=moves)}


def measurement(*sites: SiteMeasurement, **changes: Any) -> Measurement:
    base = Measurement(
        samples=320,
        batch_size=32,
        task="multiclass",
        sites={each.path: each for each in sites or (numbers(),)},
    )
    return replace(base, **changes)


def model(*sites: SiteFacts, **changes: Any) -> ModelFacts:
    sites = sites or (site(),)
    order = {each.site.path: 10 * index for index, each in enumerate(sites)}
    return replace(ModelFacts(sites=sites, order=order, steps=5000), **changes)


FROZEN = {"params_frozen": True, "stats_frozen": True}
BEHIND = (LayerFacts(path="conv", order=5, trains=False),)
FAR = numbers(mean=MEAN + 3 * np.sqrt(VARIANCE))
WIDE = numbers(variance=np.array([9.0, 4.0, 2.25, 2.0]))
DIM = numbers(variance=VARIANCE / 16, mean=MEAN / 4)  # means of 1 to 4 deviations: a shift too
STACK = [numbers(f"bn{i}", values=1, stored_variance=VARIANCE * 8 / 7) for i in range(6)]
CALM = [numbers(f"bn{i}", values=1) for i in range(6)]
NAMES = tuple(site(f"bn{i}") for i in range(6))
WITHIN = numbers(stored_variance=VARIANCE, variance=5 * VARIANCE, within_variance=VARIANCE)
TWO = ((MEAN, VARIANCE), (MEAN + 2, VARIANCE))
TINY = numbers(stored_variance=VARIANCE * 1e-4, variance=VARIANCE * 1e-4)
OTHER = Difference(epsilons={"bn": (1e-3, 1e-5)})

#: Code, model, measurement, what may join in.
TRIGGERS: list[tuple[str, ModelFacts, Measurement, set[str]]] = [
    ("FL301", model(site(**FROZEN)), measurement(behaviour=did(1.0, moves=False)), set()),
    ("FL302", model(site(**FROZEN)), measurement(behaviour=did(1.0, moves=True)), set()),
    ("FL302", model(site(params_frozen=True)), measurement(behaviour=did(1, moves=True)), set()),
    ("FL303", model(), measurement(behaviour=did(1.0, inference=1.0)), set()),
    ("FL304", model(), measurement(FAR), set()),
    ("FL304", model(), measurement(WIDE), {"FL309"}),
    ("FL304", model(steps=None), measurement(FAR), set()),
    ("FL305", model(site(**FROZEN)), measurement(FAR), set()),
    ("FL306", model(steps=48), measurement(FAR), set()),
    ("FL306", model(steps=48), measurement(WIDE), set()),
    ("FL307", model(), measurement(numbers(noise=0.26)), set()),
    ("FL308", model(*NAMES), measurement(*STACK, batch_size=8), set()),
    ("FL309", model(), measurement(WITHIN), {"FL304", "FL312"}),
    ("FL310", model(site(calls=2)), measurement(numbers(uses=TWO)), set()),
    ("FL311", model(layers=BEHIND), measurement(FAR), set()),
    ("FL312", model(), measurement(DIM), {"FL304"}),
    ("FL313", model(), measurement(numbers(variance=np.array([1.0, 0.0, 0.25, 2.0]))), {"FL304"}),
    ("FL314", model(site(decay=0.1)), measurement(numbers(noise=0.24)), set()),
    ("FL315", model(), measurement(TINY, difference=OTHER), set()),
]

#: The nearest thing that is all right.
HARMLESS: list[tuple[str, ModelFacts, Measurement]] = [
    ("healthy", model(), measurement(behaviour=did(1.0, moves=True))),
    ("really frozen", model(site(**FROZEN)), measurement(behaviour=did(0.0, moves=False))),
    ("not known", model(site(**FROZEN)), measurement(behaviour=did(None))),
    ("not measured", model(), measurement(sites={})),
    ("a little off", model(), measurement(numbers(mean=MEAN + 0.45 * np.sqrt(VARIANCE)))),
    ("off by chance", model(), measurement(
        numbers(mean=MEAN + 0.6 * np.sqrt(VARIANCE), noise=0.3), samples=64)),
    ("one channel of four is wider", model(), measurement(
        numbers(variance=VARIANCE * np.array([1, 1, 1, 1.4])))),
    ("young but right", model(steps=3), measurement()),
    ("frozen and lagging", model(site(**FROZEN), steps=3), measurement()),
    ("thawed before a frozen layer, alike", model(layers=BEHIND), measurement()),
    ("noise of one batch is not known", model(), measurement(
        numbers(noise=math.nan), samples=32)),
    ("frozen in small batches", model(site(**FROZEN)), measurement(numbers(noise=0.9))),
    ("small batches, three of them", model(), measurement(numbers(noise=0.9), samples=96)),
    ("slow average in noise", model(), measurement(numbers(noise=0.24))),
    ("one Bessel factor", model(), measurement(
        numbers(values=1, stored_variance=VARIANCE * 16 / 15), batch_size=16)),
    ("biased variances stacked", model(*NAMES), measurement(*CALM, batch_size=8)),
    ("between part is stored", model(), measurement(
        numbers(within_variance=VARIANCE / 5))),
    ("shared and alike", model(site(calls=2)), measurement(numbers(uses=(TWO[0], TWO[0])))),
    ("shared, differing and locked", model(site(calls=2, **FROZEN)), measurement(
        numbers(uses=TWO))),
    ("dead before, dead now", model(), measurement(numbers(
        variance=np.array([1, 0, 0.25, 2]), stored_variance=np.array([1, 0, 0.25, 2])))),
    ("another epsilon without effect", model(), measurement(difference=OTHER)),
    ("statistics that are not finite are FL201's", model(), measurement(
        numbers(stored_mean=MEAN * np.nan, shift=MEAN, ratio=MEAN))),
]  # fmt: skip


def codes(given: ModelFacts, seen: Measurement) -> set[str]:
    found, skipped = rules.check(given, rules.select("FL3"), measurement=seen)
    assert not skipped
    return {finding.code for finding in found}


@pytest.mark.parametrize(("code", "given", "seen", "others"), TRIGGERS)
def test_triggers(code: str, given: ModelFacts, seen: Measurement, others: set[str]) -> None:
    assert codes(given, seen) == {code} | others


@pytest.mark.parametrize(("what", "given", "seen"), HARMLESS)
def test_does_not_trigger(what: str, given: ModelFacts, seen: Measurement) -> None:
    assert codes(given, seen) == set(), what


def test_every_rule_that_needs_data_has_a_case_here() -> None:
    needing = {each.code for each in rules.select("FL") if each.needs == "data"}
    assert {code for code, *_ in TRIGGERS} == needing
    assert needing == {each.code for each in rules.select("FL3")}


@pytest.mark.parametrize(("code", "given", "seen", "others"), TRIGGERS)
def test_findings_are_complete(
    code: str, given: ModelFacts, seen: Measurement, others: set[str]
) -> None:
    found, _ = rules.check(given, rules.select(code), measurement=seen)
    for finding in found:
        assert 20 < len(finding.message) <= 120, finding.message
        assert finding.evidence
        assert all(isinstance(value, float | str) for value in finding.evidence.values())
        assert finding.sites
        assert set(finding.sites) <= set(given.order)


def test_without_data_they_are_skipped_and_say_why() -> None:
    found, skipped = rules.check(model(), rules.select("FL3"))
    assert found == ()
    assert len(skipped) == len(rules.select("FL3"))
    assert {each.reason for each in skipped} == {"needs data: frostline diagnose"}


def test_what_a_batch_is_worth_against_simulated_batches() -> None:
    """FL307 and FL314: numpy draws correlated pixels, and runs the moving average itself."""
    rng = np.random.default_rng(0)
    batches, size, pixels = 400, 8, 16
    image = rng.normal(size=(batches, size, 1)) * 0.9  # what the pixels of one image share
    x = image + rng.normal(size=(batches, size, pixels)) * np.sqrt(1 - 0.9**2)
    means = x.mean((1, 2)) / x.std()
    seen = measurement(numbers(noise=float(means.std())), samples=batches * size, batch_size=size)
    (few,) = rules.check(model(), rules.select("FL307"), measurement=seen)[0]
    # Kish's effective sample size with the intraclass correlation 0.81.
    assert few.evidence["effective_values"] == pytest.approx(
        size * pixels / (1 + (pixels - 1) * 0.81), rel=0.15
    )
    average, path = 0.0, []
    for mean in np.tile(means, 20):
        average = 0.2 * average + 0.8 * mean
        path.append(average)
    (noisy,) = rules.check(model(site(decay=0.2)), rules.select("FL314"), measurement=seen)[0]
    assert noisy.evidence["error"] == pytest.approx(np.std(path), rel=0.1)


def test_the_ratio_of_twenty_layers_is_that_of_the_pytorch_issue() -> None:
    paths = [f"bn{i}" for i in range(20)]
    stack = [numbers(path, values=1, stored_variance=VARIANCE * 64 / 63) for path in paths]
    given = model(*(site(path) for path in paths))
    seen = measurement(*stack, batch_size=64, samples=640)
    (finding,) = rules.check(given, rules.select("FL308"), measurement=seen)[0]
    assert finding.evidence["predicted"] == pytest.approx(1 / 1.1706, rel=1e-3)  # pytorch 100048
    assert finding.evidence["ratio"] == pytest.approx(1 / 1.1706, rel=1e-3)
    assert finding.sites == tuple(paths)


def test_a_stored_share_that_remains_is_told_in_numbers() -> None:
    (finding,) = rules.check(model(steps=48), rules.select("FL306"), measurement=measurement(FAR))[
        0
    ]
    assert finding.evidence["old_share"] == pytest.approx(0.99**48)
    assert finding.message.startswith("62% is from before training (0.99**48)")


def test_rules_data_rules_and_causes_know_one_share_of_old_statistics() -> None:
    """A new head's layer with 10 updates in a torch model whose backbone has seen 1,000."""
    new = replace(site(decay=0.9), updates=10)
    given = model(new, steps=1000)
    found, _ = rules.check(given, rules.select("FL"), measurement=measurement(FAR))
    assert {each.code for each in found} == {"FL203", "FL306"}  # and no FL304
    case = Case(given, measurement(FAR))
    shares = [*(each.evidence["old_share"] for each in found), case.old_share("bn")]
    assert shares == [pytest.approx(0.9**10)] * 3
    assert all("35%" in each.message for each in found)


def test_the_scale_of_the_inputs_is_measured() -> None:
    inputs = InputMoments(mean=np.ones(1), deviation=np.ones(1), low=np.zeros(1), high=np.ones(1))
    seen = measurement(numbers(mean=MEAN * 255, variance=VARIANCE * 255.0**2), input=inputs)
    (finding,) = rules.check(model(), rules.select("FL312"), measurement=seen)[0]
    assert finding.evidence["factor"] == pytest.approx(255)
    assert finding.evidence["high"] == 1.0
    assert finding.certainty == "may"


def test_options_move_the_limits() -> None:
    seen = measurement(FAR)
    for options, expected in (({"max_shift": 5.0}, set()), ({"max_shift": 2.0}, {"FL304"})):
        found, _ = rules.check(
            model(), rules.select("FL3"), measurement=seen, options={"FL304": options}
        )
        assert {each.code for each in found} == expected


def test_rules_change_nothing() -> None:
    for _, given, seen, _ in TRIGGERS:
        before = [getattr(s, n).copy() for s in seen.sites.values() for n in ("mean", "variance")]
        codes(given, seen)
        after = [getattr(s, n) for s in seen.sites.values() for n in ("mean", "variance")]
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old, new)
