"""Every noun of a report survives JSON exactly, whatever numbers and names are in it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from frostline.report import schema
from frostline.types import DataError
from frostline.types.measured import (
    Attribution,
    Behaviour,
    Cause,
    Difference,
    Gap,
    InputMoments,
    Interval,
    Measurement,
    Probe,
    Remedy,
    SiteMeasurement,
    SweepPoint,
)
from frostline.types.report import Report

WORDS = ("NaN", "Infinity", "-Infinity")
NUMBERS = st.floats()
NAMES = st.text(max_size=8)
CHANNELS = arrays.arrays(np.float64, st.integers(0, 4), elements=NUMBERS)
EVIDENCE = st.dictionaries(
    NAMES, NUMBERS | st.integers() | NAMES.filter(lambda text: text not in WORDS), max_size=3
)


def named(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(NAMES, values, max_size=2)


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


def tuples(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=2).map(tuple)


INTERVALS = st.builds(Interval, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
PROBES = st.builds(
    Probe, name=NAMES, losses=CHANNELS, hits=optional(CHANNELS), metrics=named(NUMBERS)
)
SITES = st.builds(
    SiteMeasurement,
    path=NAMES, stored_mean=CHANNELS, stored_variance=CHANNELS, mean=CHANNELS, variance=CHANNELS,
    batch_mean=CHANNELS, batch_variance=CHANNELS, values=optional(st.integers()), shift=CHANNELS,
    ratio=CHANNELS, noise=NUMBERS, within_variance=optional(CHANNELS),
    uses=tuples(st.tuples(CHANNELS, CHANNELS)),
)  # fmt: skip
ATTRIBUTIONS = st.builds(
    Attribution,
    paths=tuples(NAMES), shares=CHANNELS, gap=NUMBERS, residual=NUMBERS, complete=st.booleans(),
    nodes=st.integers(), groups=named(NUMBERS), alone=named(NUMBERS),
    curve=tuples(st.tuples(NUMBERS, NUMBERS)),
)  # fmt: skip
MEASUREMENTS = st.builds(
    Measurement,
    samples=st.integers(), batch_size=st.integers(),
    task=st.sampled_from(["binary", "multiclass", "regression", "unknown"]),
    classes=optional(st.integers()), chance=optional(NUMBERS), probes=named(PROBES),
    gaps=named(st.builds(Gap, name=NAMES, of=NAMES, minus=NAMES, loss=INTERVALS,
                         accuracy=optional(INTERVALS))),
    behaviour=named(st.builds(Behaviour, path=NAMES, training=optional(NUMBERS),
                              inference=optional(NUMBERS), moves=optional(st.booleans()))),
    sites=named(SITES), attribution=optional(ATTRIBUTIONS),
    sweep=tuples(st.builds(SweepPoint, batch_size=st.integers(), batch_loss=NUMBERS,
                           batch_accuracy=optional(NUMBERS), inference_loss=NUMBERS,
                           inference_change=NUMBERS)),
    input=optional(st.builds(InputMoments, mean=CHANNELS, deviation=CHANNELS, low=CHANNELS,
                             high=CHANNELS)),
    history=named(tuples(NUMBERS)),
    difference=optional(st.builds(Difference, params=named(NUMBERS),
                                  epsilons=named(st.tuples(NUMBERS, NUMBERS)),
                                  settings=named(NAMES))),
    confusion=optional(arrays.arrays(st.sampled_from([np.int64, np.int32, np.float32, np.bool_]),
                                     st.tuples(st.integers(0, 3), st.integers(0, 3)))),
    skipped=named(NAMES),
)  # fmt: skip
REPORTS = st.builds(
    Report,
    verdict=NAMES,
    origin=named(NAMES),
    causes=tuples(st.builds(Cause, code=NAMES, share=optional(NUMBERS), sites=tuples(NAMES),
                            certainty=st.sampled_from(["is", "may"]), message=NAMES,
                            evidence=EVIDENCE, settle=optional(NAMES), findings=tuples(NAMES))),
    remedies=tuples(st.builds(Remedy, name=NAMES, fix=NAMES, causes=tuples(NAMES), text=NAMES,
                              python=optional(NAMES), before=named(NUMBERS), after=named(NUMBERS),
                              change=optional(INTERVALS), closed=optional(NUMBERS))),
    measurement=optional(MEASUREMENTS),
)  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Compare without the code under test: types, dtypes, shapes, and NaN equal to NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        equal = np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
        return one.dtype == other.dtype and one.shape == other.shape and equal
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, n), getattr(other, n)) for n in one.__dataclass_fields__)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


@settings(max_examples=60)
@given(REPORTS)
def test_a_report_survives_json(report: Report) -> None:
    read = Report.from_dict(json.loads(report.as_json()))
    assert same(read, report)
    assert read == report


def test_reports_with_other_numbers_are_not_equal() -> None:
    probe = Probe(name="inference", losses=np.array([1.0, 2.0]))
    measured = Measurement(samples=2, batch_size=2, task="unknown", probes={"inference": probe})
    report = Report(verdict="", measurement=measured)
    other = replace(measured, probes={"inference": replace(probe, losses=np.array([1.0, 2.5]))})
    assert report == Report(verdict="", measurement=replace(measured))
    assert report != Report(verdict="", measurement=other)
    assert report != "a report"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"samples": "many"}, "measurement.samples should be a whole number"),
        ({"task": "art"}, "measurement.task should be one of binary, multiclass"),
        ({"gaps": [1]}, "measurement.gaps should be an object"),
        ({"history": {"loss": [1.0, "x"]}}, r"measurement.history.loss\[1\] should be a number"),
        ({"confusion": {"dtype": "object", "shape": [1], "values": ["a"]}}, "array of numbers"),
        ({"confusion": {"dtype": "int64", "shape": [7], "values": [1]}}, "array of numbers"),
        ({"confusion": [[1.0], [1.0, 2.0]]}, "array of numbers"),
        ({"input": {"mean": ["x"]}}, "measurement.input.mean should be an array of numbers"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(change: dict[str, Any], told: str) -> None:
    plain = Report(verdict="v").as_dict()
    plain["measurement"] = {"samples": 1, "batch_size": 1, "task": "unknown", **change}
    with pytest.raises(DataError, match=f"this is not a report: .*{told}"):
        Report.from_dict(plain)


def test_fields_of_a_later_version_are_passed_over_and_missing_ones_take_their_default() -> None:
    plain = {"schema_version": 2, "verdict": "fine", "colour": "blue"}
    assert Report.from_dict(plain) == Report(verdict="fine")


def test_json_is_of_this_form() -> None:
    probe = Probe(name="inference", losses=np.array([0.5, np.nan]), metrics={"auc": np.inf})
    report = Report(
        verdict="v",
        measurement=Measurement(
            samples=2, batch_size=2, task="binary", probes={"inference": probe},
            confusion=np.array([[1, 0], [0, 1]]),
        ),
    )  # fmt: skip
    text = report.as_json()
    assert '        "losses": [0.5, "NaN"],\n' in text
    plain = json.loads(text)
    assert plain["schema_version"] == 2
    assert plain["clean"] is True
    assert plain["measurement"]["probes"]["inference"]["metrics"] == {"auc": "Infinity"}
    confusion = {"dtype": "int64", "shape": [2, 2], "values": [1, 0, 0, 1]}
    assert plain["measurement"]["confusion"] == confusion
    assert schema.encode(np.float32(0.5)) == 0.5
