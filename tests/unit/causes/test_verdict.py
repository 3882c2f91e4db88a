"""Verdicts from measurements written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from frostline.causes import verdict as verdicts
from frostline.types.measured import Cause, Gap, Interval, Measurement, Probe, Remedy


def measured(
    low: float = -1.2, high: float = -0.8, samples: int = 400, broken: int = 0
) -> Measurement:
    interval = Interval((low + high) / 2, low, high, 0.95)
    gap = Gap(name="total", of="training", minus="inference", loss=interval)
    own = Probe(name="inference", losses=np.ones(samples), broken=broken)
    return Measurement(
        samples=samples,
        batch_size=32,
        task="multiclass",
        gaps={"total": gap},
        probes={"inference": own},
    )


def cause(code: str, share: float | None = None, **more: Any) -> Cause:
    more = {"certainty": "is", "message": f"because of {code.lower()}", **more}
    return Cause(code=code, share=share, sites=("bn",), **more)


def remedy(**more: Any) -> Remedy:
    return Remedy(name="recalibrate unfrozen", fix="recalibrate", causes=(), text="", **more)


def test_bn_with_its_share_and_the_measured_effect_of_the_remedy() -> None:
    best = remedy(recommended=True, before={"accuracy": 0.33}, after={"accuracy": 0.88})
    causes = [cause("EMA_LAG", 0.7), cause("FROZEN_BATCH_STATS", 0.3)]
    told = verdicts.of_measurement(measured(), causes, [remedy(), best], 4)
    assert told == (
        "BN: EMA_LAG (70% of the gap), because of ema_lag; also FROZEN_BATCH_STATS (30% of the "
        "gap); recalibrate unfrozen: accuracy 0.33 → 0.88"
    )


@pytest.mark.parametrize(
    ("causes", "start"),
    [
        ([cause("DROPOUT", 0.9)], "not BN: DROPOUT (90% of the gap)"),
        ([cause("PREPROCESS", 0.6), cause("EMA_LAG", 0.4)], "BN too: PREPROCESS"),
        ([cause("EMA_LAG", 0.9, certainty="may")], "probably BN: EMA_LAG"),
        ([cause("OVERFIT", certainty="may")], "probably not BN: OVERFIT"),
    ],
)
def test_what_the_verdict_begins_with(causes: list[Cause], start: str) -> None:
    assert verdicts.of_measurement(measured(), causes, (), 4).startswith(start)


def test_a_small_part_of_the_gap_does_not_acquit_bn() -> None:
    """Most of the gap comes with batch statistics, and nothing explains it."""
    own = Gap(
        name="bn", of="training blend", minus="inference", loss=Interval(-0.8, -1, -0.6, 0.95)
    )
    for share, part in ((0.2, True), (0.9, False)):
        known = measured()
        known = replace(known, gaps={**known.gaps, "bn": own})
        told = verdicts.of_measurement(known, [cause("DROPOUT", share)], (), 4)
        assert told.startswith("in part: DROPOUT" if part else "not BN: DROPOUT")
        assert ("BN is not ruled out" in told) is part


def test_no_remedy_helps_is_an_answer() -> None:
    told = verdicts.of_measurement(measured(), [cause("SMALL_BATCH", 1.0)], [remedy()], 4)
    assert told.endswith("; no remedy that was tried helps for sure")


def test_nothing_found() -> None:
    none = [cause("NONE")]
    assert verdicts.of_measurement(measured(0.001, 0.003), none, (), 4) == (
        "no cause found: training mode and inference differ by +0.002 in loss (95% interval "
        "+0.001 to +0.003, 400 samples): too little to matter"
    )
    assert verdicts.of_measurement(measured(0, 0), none, (), 0) == (
        "not BN: the model has no BatchNormalization layer; training mode and inference give the "
        "same losses on 400 samples"
    )
    unexplained = [cause("NONE", certainty="may")]
    assert verdicts.of_measurement(measured(-0.6, -0.4), unexplained, (), 4) == (
        f"no cause found: {unexplained[0].message}"
    )
    nan = measured(float("nan"), float("nan"))
    assert verdicts.of_measurement(nan, none, (), 4).startswith("no verdict: ")


def test_few_samples_are_told() -> None:
    told = verdicts.of_measurement(measured(-1.0, 0.2, samples=16), (), (), 4)
    assert told.endswith("(95% interval -1 to +0.2, 16 samples): it may be chance")
    told = verdicts.of_measurement(measured(-1.0, -0.2, samples=16), [cause("EMA_LAG")], (), 4)
    assert told.endswith("; 16 samples tell little: the gap in loss is -1 to -0.2")
    told = verdicts.of_measurement(measured(-np.inf, np.inf, samples=1), [cause("EMA_LAG")], (), 4)
    assert told.endswith("; 1 sample tells nothing of a gap")
    told = verdicts.of_measurement(measured(-np.inf, np.inf, samples=16), [cause("EMA_LAG")], (), 4)
    assert told.endswith(", and one batch gives no interval")
    told = verdicts.of_measurement(measured(-1.0, -0.2, broken=2), [cause("EMA_LAG")], (), 4)
    assert told.endswith("; 2 of 400 samples come out as NaN or infinite")
    note = "2 of 400 samples hold NaN or infinite inputs and are left out"
    told = verdicts.of_measurement(
        replace(measured(), notes=("other", note)), [cause("EMA_LAG")], (), 4
    )
    assert told.endswith(f"; {note}")
    told = verdicts.of_measurement(measured(0, 0, samples=16), [cause("OVERFIT")], (), 0)
    assert "tell little" not in told  # the same losses sample by sample, however few


def probes(training: Any, inference: Any, batch: Any) -> dict[str, Probe]:
    given = {"training": training, "inference": inference, "batch": batch}
    return {name: Probe(name=name, losses=np.asarray(losses)) for name, losses in given.items()}


def test_the_first_look_says_a_certain_gap_and_what_batch_statistics_have_of_it() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0.1, 0.2, 100)
    text = verdicts.first(probes(low, low + 1, low + 0.25))
    assert text.startswith("first look: loss 1.155 at inference, 0.1548 in training mode")
    assert "a gap of -1 (-1 to -1); -0.75 with batch statistics everywhere" in text


def test_the_first_look_claims_no_gap_that_its_interval_does_not_show() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 50))
    assert "no certain gap (" in verdicts.first(probes(one, other, one))
    broken = np.full(4, np.nan)
    assert verdicts.first(probes(broken, broken, broken)) == "first look: no loss is finite"
    single = verdicts.first(probes([1.5], [1.0], [1.5]))
    assert single.endswith("a gap of +0.5; one batch gives no interval")
