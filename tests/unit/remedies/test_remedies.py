"""Remedies on a bench that answers from a list: which are tried, how they rank, what is claimed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from written_cases import PATHS, facts, measurement, probe, site_measurement

from frostline.remedies import remedies
from frostline.types import ModelError
from frostline.types.measured import Cause, Difference, Measurement, Probe, Remedy

BAD = {"inference": (1.0, 0.7), "training blend": (0.1, 0.97), "batch": (0.1, 0.97)}
FROZEN = {"params_frozen": True, "stats_frozen": True}


@dataclass
class ListedBench:
    """Condition by name -> mean loss and accuracy; notes what was asked for."""

    answers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    channels = -1
    asked: dict[str, Any] = field(default_factory=dict)
    refuses: bool = False
    step: Any = None
    _probes: dict[Any, Any] = field(default_factory=dict)
    _populations: dict[Any, Any] = field(default_factory=dict)

    def probe(self, name: str, *, blend: float = 0.0, statistics: Any = None) -> Probe:
        self.asked[name] = statistics
        return probe(name, *self.answers[name])

    def population(self, sites: str) -> Any:
        return {"bn4": (np.zeros(8), np.ones(8))}

    @property
    def batches(self) -> list[Any]:
        return [SimpleNamespace(x=np.zeros((2, 1)), y=np.zeros(2))]

    @property
    def adapter(self) -> Any:
        @contextlib.contextmanager
        def trial(batches: Any, *, policy: str, epochs: int) -> Iterator[None]:
            if self.refuses:
                raise ModelError("no optimizer. Received: a torch module")
            assert policy == "inference"
            yield

        return SimpleNamespace(framework="keras", trial=trial)


def cause(code: str, *sites: str) -> Cause:
    return Cause(code=code, share=1.0, sites=sites, certainty="is", message="why")


def tried(
    probes: Mapping[str, tuple[float, float]],
    *causes: Cause,
    model: Any = None,
    bench: ListedBench | None = None,
    **changes: Any,
) -> tuple[Remedy, ...]:
    made: Measurement = measurement({**BAD, **probes}, **changes)
    return remedies(bench or ListedBench(), model or facts(), made, causes)  # type: ignore[arg-type]


def by_name(found: tuple[Remedy, ...]) -> dict[str, Remedy]:
    return {remedy.name: remedy for remedy in found}


LAG = cause("EMA_LAG", *PATHS)


def test_recalibration_of_lagging_sites_with_its_effect():
    bench = ListedBench({"momentum 0.936": (0.15, 0.96)})
    found = tried({"population unfrozen": (0.12, 0.965)}, LAG, bench=bench, steps=70)
    first = found[0]
    assert first.name == "recalibrate unfrozen"
    assert first.recommended
    assert first.before == pytest.approx({"loss": 1.0, "accuracy": 0.7})
    assert first.after == pytest.approx({"loss": 0.12, "accuracy": 0.965})
    assert first.closed == pytest.approx((1.0 - 0.12) / (1.0 - 0.1))
    assert first.change is not None
    assert first.change.estimate == pytest.approx(-0.88)
    assert first.change.high < 0
    assert first.python == 'fl.recalibrate(model, x, sites="unfrozen")'
    assert first.shell is not None


def test_a_settled_average_is_that_of_the_batches():
    bench = ListedBench({"momentum 0.936": (0.15, 0.96)})
    found = by_name(tried({"population unfrozen": (0.12, 0.96)}, LAG, bench=bench, steps=70))
    assert found["momentum 0.936 and train on"].recommended
    mean, variance = bench.asked["momentum 0.936"]["bn2"]
    expected = site_measurement("bn2")
    np.testing.assert_array_equal(mean, expected.batch_mean)
    np.testing.assert_array_equal(variance, expected.batch_variance)


def test_the_momentum_of_the_other_convention():
    bench = ListedBench({"momentum 0.9": (0.15, 0.96)})
    swapped = facts({path: {"decay": 0.1} for path in PATHS})
    found = tried(
        {"population unfrozen": (0.12, 0.96)},
        cause("MOMENTUM_CONVENTION", *PATHS),
        model=swapped,
        bench=bench,
    )
    assert by_name(found)["momentum 0.9 and train on"].python == "fl.set_momentum(model, 0.9)"


def test_of_equal_effects_the_one_that_changes_least_comes_first():
    model = facts(dict.fromkeys(PATHS[:3], FROZEN) | {"bn4": {}})
    bench = ListedBench({"momentum 0.936": (0.12, 0.96)})
    probes = {
        "population unfrozen": (0.12, 0.96),
        "population": (0.115, 0.96),
        "population frozen": (1.4, 0.6),
    }
    found = tried(probes, cause("EMA_LAG", "bn4"), model=model, bench=bench, steps=70)
    assert found[0].name == "recalibrate unfrozen"
    assert "recalibrate frozen" not in by_name(found)  # its sites are not to blame


def test_what_treats_the_first_cause_comes_before_a_larger_effect_on_another():
    model = facts({path: {**FROZEN, "policy": "batch"} for path in PATHS[:3]} | {"bn4": {}})
    probes = {
        "population unfrozen": (0.2, 0.94),
        "population": (0.12, 0.97),
        "population frozen": (0.5, 0.8),
    }
    bench = ListedBench(
        {"locked": (0.4, 0.9), "locked, exact": (0.3, 0.92), "momentum 0.936": (0.5, 0.8)}
    )
    frozen = cause("FROZEN_BATCH_STATS", *PATHS[:3])
    lag = cause("EMA_LAG", "bn4")
    found = tried(probes, frozen, lag, model=model, bench=bench, steps=70)
    names = [remedy.name for remedy in found]
    assert names[0] == "recalibrate all"
    assert names.index("recalibrate frozen") < names.index("recalibrate unfrozen")
    lock = by_name(found)["lock frozen sites and train on"]
    assert lock.python == 'fl.convert(model, policy="inference")'
    assert lock.note is not None
    assert "not the present inference" in lock.note


def test_a_lock_that_cannot_be_tried_leaves_the_other_remedies():
    model = facts({path: {**FROZEN, "policy": "batch"} for path in PATHS})
    found = tried(
        {"population": (0.12, 0.97)},
        cause("FROZEN_BATCH_STATS", *PATHS),
        model=model,
        bench=ListedBench(refuses=True),
    )
    assert [remedy.name for remedy in found] == ["recalibrate all"]


def test_no_remedy_helps():
    found = tried({"population unfrozen": (1.3, 0.6)}, cause("STALE_AFTER_WEIGHT_EDIT", *PATHS))
    assert found
    assert not any(remedy.recommended for remedy in found)
    assert found[0].closed == 0.0


def test_a_change_that_may_be_chance_is_not_recommended():
    same = probe("inference", 1.0, 0.7)
    made = measurement({**BAD, "population unfrozen": (0.99, 0.7)})
    rng = np.random.default_rng(0)
    noisy = replace(same, losses=same.losses + rng.normal(0, 3, len(same.losses)) - 0.01)
    made = replace(made, probes={**made.probes, "population unfrozen": noisy})
    found = remedies(ListedBench(), facts(), made, (cause("DOMAIN_STATS", *PATHS),))  # type: ignore[arg-type]
    assert not found[0].recommended
    assert found[0].change is not None
    assert not found[0].change.excludes_zero


def test_broken_inference_that_is_finite_again():
    made = measurement({**BAD, "population unfrozen": (0.12, 0.97)})
    nothing = replace(
        probe("inference", 1.0, 0.7), losses=np.full(200, np.nan), broken=200, hits=np.zeros(200)
    )
    made = replace(made, probes={**made.probes, "inference": nothing})
    found = remedies(ListedBench(), facts(), made, (cause("POISONED", "bn2"),))  # type: ignore[arg-type]
    assert found[0].recommended
    assert found[0].closed is not None
    assert found[0].closed > 0.8


def test_the_encoding_of_the_inputs():
    def scaled(trial: str) -> Cause:
        return replace(cause("PREPROCESS"), evidence={"trial": trial})

    found = tried({"input x/255": (0.1, 0.97), "population unfrozen": (0.1, 0.97)}, scaled("x/255"))
    assert [remedy.name for remedy in found] == ["inputs as x/255"]
    assert found[0].python == "x = x/255"
    named = tried({"input caffe(255x)": (0.1, 0.97)}, scaled("caffe(255x)"))
    assert named[0].python == "x = 255 * x[..., [2, 1, 0]] - np.array([103.939, 116.779, 123.68])"
    assert not tried({"input x/255": (0.1, 0.97)}, cause("PREPROCESS"))  # not what was found


def test_a_lower_loss_with_fewer_right_answers_is_no_repair():
    for loss, accuracy, wanted in ((0.62, 0.5, False), (0.62, 0.69, True), (0.8, 0.69, False)):
        found = tried({"population unfrozen": (loss, accuracy)}, cause("BATCH_LEAK", *PATHS))
        assert by_name(found)["recalibrate unfrozen"].recommended is wanted


def test_names_of_classes_in_the_order_of_the_model():
    confusion = np.zeros((3, 3), int)
    confusion[0, 2], confusion[1, 0], confusion[2, 1] = 30, 40, 30
    renamed = replace(cause("LABEL_ORDER"), evidence={"relabelled": 0.98})
    found = tried({}, renamed, confusion=confusion, relabelled=0.98)
    assert found[0].python == "y = np.array([2, 0, 1])[y]"
    assert found[0].after == {"accuracy": 0.98}
    assert found[0].recommended
    # At chance some renaming always fits best, and repairs nothing.
    assert tried({}, cause("LABEL_ORDER"), confusion=confusion, relabelled=0.98) == ()


def test_what_only_validation_data_need_is_not_tried_on_the_others():
    other = replace(cause("DOMAIN_STATS", *PATHS), evidence={"validation_loss": 2.0})
    assert tried({"population unfrozen": (0.9, 0.7)}, other) == ()


def test_epsilon_of_the_reference_as_a_variance():
    bench = ListedBench({"epsilon 1e-05": (0.2, 0.95)})
    other = Difference(epsilons={"bn1": (1e-3, 1e-5)})
    exact = {"population unfrozen": (0.3, 0.94)}
    found = tried(exact, cause("EPS_MISMATCH", "bn1"), bench=bench, difference=other)
    assert [remedy.name for remedy in found] == ["epsilon 1e-05", "recalibrate unfrozen"]
    assert found[0].recommended
    stored = site_measurement("bn1").stored_variance
    np.testing.assert_allclose(
        bench.asked["epsilon 1e-05"]["bn1"][1] + 1e-3, stored + 1e-5, rtol=1e-12
    )


def test_nothing_to_repair():
    assert tried({}, cause("NONE")) == ()
    assert tried({}, cause("DROPOUT")) == ()
    assert tried({}, cause("OVERFIT")) == ()
