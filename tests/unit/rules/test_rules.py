"""Rules on facts written by hand: what triggers, what just does not, registry, documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from frostline import rules
from frostline.adapters.torch.vocabulary import TORCH as TORCH_WORDS
from frostline.rules import Hit, Rule
from frostline.types import FrostlineError, Site
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts
from frostline.types.measured import Measurement

HEADINGS = (
    "What it does",
    "Why is this bad?",
    "Example",
    "Use instead",
    "When not to use it",
    "Options",
    "References",
)


def site(path: str = "bn", **changes: Any) -> Site:
    facts: dict[str, Any] = {
        "path": path,
        "name": path.rpartition("/")[2],
        "kind": "BatchNormalization",
        "index": 0,
        "channels": 3,
        "axis": -1,
        "decay": 0.99,
        "epsilon": 1e-3,
        "params_frozen": False,
        "stats_frozen": False,
        "policy": "inference",
    }
    return Site(**{**facts, **changes})


FROZEN = {"params_frozen": True, "stats_frozen": True}


def facts(path: str = "bn", *, at: dict[str, Any] | None = None, **changes: Any) -> SiteFacts:
    """A healthy site; ``at`` changes its flags, the rest its numbers."""
    numbers: dict[str, Any] = {
        "mean": np.array([0.1, -0.4, 2.0]),
        "variance": np.array([0.5, 1.5, 3.0]),
        "gamma": np.array([1.0, 0.5, 1.2]),
        "beta": np.array([0.0, 0.1, -0.2]),
    }
    made = site(path, **(at or {}))
    if made.kind.endswith("BatchNorm2d"):
        numbers["words"] = TORCH_WORDS
        numbers["wrapper_frozen"] = False if made.kind.startswith("torch.") else None
    return SiteFacts(site=made, **{**numbers, **changes})


def model(*sites: SiteFacts, **changes: Any) -> ModelFacts:
    order = {each.site.path: 10 * index for index, each in enumerate(sites)}
    return replace(ModelFacts(sites=sites, order=order, steps=5000), **changes)


def codes(given: ModelFacts, *, select: str | None = None, **kwargs: Any) -> list[str]:
    found, _ = rules.check(given, rules.select(select), **kwargs)
    return [finding.code for finding in found]


def ones(value: float) -> Any:
    return np.full(3, value)


TORCH = {"kind": "torch.BatchNorm2d", "policy": "update", "decay": 0.9}
NATIVE = {"words": TORCH_WORDS, "backend": "torch", "mode": True}
MODULE = {"kind": "BatchNorm2d", "policy": "update", "decay": 0.9}
LOCKED = {**MODULE, **FROZEN, "policy": "inference"}
BEHIND = (LayerFacts(path="conv", order=5, trains=False),)
BEFORE = (LayerFacts(path="conv", order=-5, trains=True),)
INITIAL = {"mean": ones(0.0), "variance": ones(1.0)}
FRESH = {**INITIAL, "gamma": ones(1.0), "beta": ones(0.0)}

#: What must be found, and nothing else.
TRIGGERS: list[tuple[str, ModelFacts]] = [
    ("FL101", model(facts(at={**FROZEN, "policy": "batch"}))),
    ("FL101", model(facts(at={**TORCH, **FROZEN}))),
    ("FL102", model(facts(at={"params_frozen": True, "policy": "update"}))),
    ("FL103", model(facts(at={"params_frozen": True}))),
    ("FL103", model(facts(at={**TORCH, "params_frozen": True}, wrapper_frozen=False))),
    ("FL104", model(facts(at={"stats_frozen": True}))),
    ("FL105", model(facts(at=TORCH, wrapper_frozen=True))),
    ("FL106", model(facts(), layers=BEHIND)),
    ("FL107", model(facts(at=FROZEN, optimized=True), traced=True)),
    ("FL107", model(facts(at=FROZEN, stepped=frozenset(["statistics"])), traced=True)),
    ("FL107", model(facts(optimized=False), traced=True)),
    ("FL107", model(facts(optimized=False), backend="torch")),
    ("FL107", model(facts(at=FROZEN, optimized=True), backend="jax")),
    ("FL108", model(facts(training=False))),
    ("FL109", model(facts(training=True))),
    ("FL110", model(facts(at={**TORCH, "stats_frozen": True}, mean=None, variance=None))),
    ("FL111", model(facts(at={"decay": 0.1}))),
    ("FL112", model(facts(at={"decay": 0.0}))),
    ("FL112", model(facts(at={"decay": 1.0}))),
    ("FL112", model(facts(at={"decay": 1.5}))),
    ("FL113", model(facts("a"), facts("b"), facts("c", at={"epsilon": 0.1}))),
    ("FL114", model(facts(at={"calls": 2}))),
    ("FL115", model(facts("a/bn"), facts("b/bn"))),
    ("FL116", model(facts(values=1), batch=15)),
    ("FL117", model(facts(at={**FROZEN, "trained_by": "critic"}, two_regimes=True))),
    (
        "FL101",
        model(
            facts(at={**MODULE, "stats_frozen": True, "params_frozen": True, "policy": "batch"}),
            **NATIVE,
        ),
    ),
    ("FL103", model(facts(at={**MODULE, "params_frozen": True}), **NATIVE)),
    ("FL104", model(facts(at={**LOCKED, "params_frozen": False}), **NATIVE)),
    ("FL110", model(facts(at=MODULE, mean=None, variance=None), **NATIVE)),
    ("FL111", model(facts(at={**MODULE, "decay": 0.1}), **NATIVE)),
    ("FL112", model(facts(at={**MODULE, "decay": 1.0}), **NATIVE)),
    ("FL112", model(facts(at={**MODULE, "decay": 0.0}), **NATIVE)),
    ("FL118", model(facts(at={**LOCKED, "params_frozen": False}, undone=True), **NATIVE)),
    ("FL118", model(facts(at=LOCKED, undone=True), **NATIVE)),
    ("FL119", model(facts(at=MODULE, mode=True), **{**NATIVE, "mode": False})),
    ("FL120", model(facts(at={**MODULE, "decay": 0.0}, cumulative=True, updates=0), **NATIVE)),
    ("FL120", model(facts(at={**TORCH, "decay": 0.0}, cumulative=True, wrapper_frozen=False))),
    (
        "FL121",
        model(
            facts("a", at=MODULE, mean=None, variance=None),
            facts("b", at=MODULE, mean=None, variance=None),
            **NATIVE,
        ),
    ),
    (
        "FL121",
        model(facts("a", at=MODULE, mean=None, variance=None), facts("b", at=MODULE), **NATIVE),
    ),
    ("FL203", model(facts("a", at=MODULE, updates=21), facts("b", at=MODULE), **NATIVE)),
    ("FL204", model(facts(at=MODULE, **INITIAL, updates=0), **{**NATIVE, "steps": None})),
    ("FL201", model(facts(mean=np.array([0.0, np.nan, 1.0])))),
    ("FL201", model(facts(variance=np.array([1.0, np.inf, 1.0])))),
    ("FL202", model(facts(variance=np.array([1.0, -1e-9, 1.0])))),
    ("FL203", model(facts(), steps=229)),
    ("FL204", model(facts(**INITIAL))),
    ("FL204", model(facts(at=FROZEN, **FRESH), steps=None)),
    ("FL204", model(facts(**{**FRESH, "gamma": np.array([1.0, 1.1, 1.0])}), steps=None)),
    ("FL204", model(facts(variance=ones(1.0)))),
    ("FL204", model(facts(mean=ones(0.0)))),
    ("FL205", model(facts(variance=ones(0.0)))),
    ("FL206", model(facts(variance=np.array([1.0, 0.0, 1.0])))),
    ("FL207", model(facts(gamma=np.array([1.0, 1e-4, 1.0])))),
    ("FL207", model(facts(gamma=ones(0.0)))),
    ("FL208", model(facts(dtype="bfloat16"))),
    ("FL209", model(facts(shadow_variance=np.array([0.5, 1.5, 3.1])))),
    ("FL210", model(facts(at={"dtype": "float16"}, mean=ones(300.0)))),
    ("FL210", model(facts(mean=ones(3000.0), cancels=True), backend="torch")),
    ("FL211", model(facts(beta=np.array([0.0, 0.0, -np.inf])))),
    ("FL901", model(facts(at=FROZEN), layers=BEFORE)),
]

#: The nearest thing that is all right.
HARMLESS: list[tuple[str, ModelFacts]] = [
    ("healthy", model(facts("a"), facts("b", at=FROZEN))),
    ("thawed site with a policy for later", model(facts(at={"policy": "batch"}))),
    ("torch site without parameters", model(facts(at={**TORCH, "params_frozen": True}, gamma=None,
                                                  beta=None, wrapper_frozen=False))),
    ("thawed before a trained layer", model(facts(), layers=(replace(BEHIND[0], trains=True),))),
    ("thawed behind a frozen layer", model(facts(), layers=(replace(BEHIND[0], order=-5),))),
    ("live flip", model(facts(at=FROZEN, optimized=True, live=True), traced=True)),
    ("flip before training", model(facts(at=FROZEN, optimized=True), steps=None)),
    ("frozen on torch later", model(facts(at=FROZEN, optimized=True), backend="torch")),
    ("frozen before the step is made again", model(facts(at=FROZEN, optimized=True))),
    ("training=False and frozen", model(facts(at=FROZEN, training=False))),
    ("training=True and locked", model(facts(at=FROZEN, training=True))),
    ("momentum of a frozen site", model(facts(at={**FROZEN, "decay": 1.0}))),
    ("cumulative average of a locked site", model(facts(at={**LOCKED, "decay": 0.0},
                                                        cumulative=True, updates=9), **NATIVE)),
    ("locked", model(facts(at=LOCKED, live=True, mode=False), **NATIVE)),
    ("locked, all in eval()", model(facts(at=LOCKED, live=True, mode=False),
                                    **{**NATIVE, "mode": False})),
    ("a module that only serves", model(facts(at={**MODULE, "params_frozen": True}, mode=False),
                                        **{**NATIVE, "mode": False})),
    ("modules named by position", model(facts("a/1", at=MODULE), facts("b/1", at=MODULE),
                                        **NATIVE)),
    ("far mean in a torch kernel, which centres first",
     model(facts(at=MODULE, mean=ones(3000.0)), **NATIVE)),
    ("momenta of torch", model(facts("a", at=MODULE), facts("b", at={**MODULE, "decay": 0.99}),
                               **NATIVE)),
    ("decay one half", model(facts(at={"decay": 0.5}))),
    ("epsilon without effect", model(facts("a"), facts("b"), facts("c", at={"epsilon": 1e-5}))),
    ("shared and locked", model(facts(at={**FROZEN, "calls": 2}))),
    ("torch modules named by position", model(facts("a/1", at=TORCH), facts("b/1", at=TORCH))),
    ("enough values", model(facts(values=4), batch=4)),
    ("free batch size", model(facts(values=1))),
    ("enough steps", model(facts(), steps=230)),
    ("debiased average", model(facts(at={"debias": True}), steps=3)),
    ("new layer", model(facts(**FRESH), steps=None)),
    ("new residual branch whose last gamma starts at 0", model(
        facts(**{**FRESH, "gamma": ones(0.0)}), steps=None)),
    ("constant initializer", model(facts(mean=ones(0.0), variance=ones(2.0)), steps=None)),
    ("small but alive", model(facts(variance=np.array([1.0, 1e-5, 1.0])))),
    ("dead channel that gamma switched off", model(
        facts(variance=np.array([1.0, 0.0, 1.0]), gamma=np.array([1.0, 0.1, 1.0])))),
    ("residual branch before training", model(facts(gamma=ones(0.0)), steps=None)),
    ("half precision, frozen", model(facts(at=FROZEN, dtype="float16"))),
    ("renorm of a new layer", model(facts(variance=ones(1.0), mean=ones(0.5),
                                          shadow_variance=ones(0.999)), steps=None)),
    ("far mean in float32", model(facts(mean=ones(3000.0)))),
    ("far mean of a constant channel", model(facts(at={"dtype": "float16"},
        mean=np.array([0.1, 5.0, 0.1]), variance=np.array([1.0, 1e-7, 1.0]),
        gamma=np.array([1.0, 0.1, 1.0])))),
    ("no sites at all", model()),
]  # fmt: skip


@pytest.mark.parametrize(("code", "given"), TRIGGERS)
def test_triggers_its_rule_and_no_other(code: str, given: ModelFacts) -> None:
    # Every rule is applied, also those that are off by default: no second rule may join in.
    assert set(codes(given, select="FL")) - {"FL901"} | ({code} & {"FL901"}) == {code}


@pytest.mark.parametrize(("what", "given"), HARMLESS)
def test_does_not_trigger(what: str, given: ModelFacts) -> None:
    assert codes(given) == [], what


def test_every_rule_has_a_case_here() -> None:
    without_data = {each.code for each in own_rules() if each.needs != "data"}
    assert {code for code, _ in TRIGGERS} == without_data  # the others: test_data_rules.py


def test_off_by_default() -> None:
    given = model(facts(at=FROZEN), layers=BEFORE)
    assert codes(given) == []
    assert codes(given, select="FL901") == ["FL901"]


@pytest.mark.parametrize(("code", "given"), TRIGGERS)
def test_findings_are_complete(code: str, given: ModelFacts) -> None:
    for finding in rules.check(given, rules.select(code))[0]:
        origin = rules.get(code)
        assert (finding.name, finding.severity) == (origin.name, origin.severity)
        assert finding.fix == (given.words.lock if code == "FL101" else origin.fix)
        assert 20 < len(finding.message) <= 120
        assert finding.evidence
        assert all(isinstance(value, float | str) for value in finding.evidence.values())
        assert finding.sites
        assert set(finding.sites) <= set(given.order)
        assert not any(path in finding.message.split() for path in given.order)


@pytest.mark.parametrize(("code", "given"), TRIGGERS)
def test_large_numbers_keep_messages_short(code: str, given: ModelFacts) -> None:
    wide = replace(given, sites=tuple(
        replace(each, **{name: np.resize(value, 4096) for name in
                         ("mean", "variance", "gamma", "beta", "shadow_variance")
                         if (value := getattr(each, name)) is not None})
        for each in given))  # fmt: skip
    found, _ = rules.check(wide, rules.select(code))
    assert found
    assert max(len(finding.message) for finding in found) <= 120


@pytest.mark.parametrize(("code", "given"), TRIGGERS)
def test_rules_change_nothing(code: str, given: ModelFacts) -> None:
    before = [
        None if value is None else value.copy()
        for each in given
        for value in (each.mean, each.variance, each.gamma, each.beta)
    ]
    codes(given, select="FL")
    after = [v for each in given for v in (each.mean, each.variance, each.gamma, each.beta)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_layer_that_nothing_can_update_is_noted_at_its_initial_statistics() -> None:
    """Training may have used it so; recalibrating it was the advice, and ruins such a network."""
    given = model(facts(at={**LOCKED, "decay": 1.0}, **FRESH), **NATIVE)
    (hit,) = rules.check(given, rules.select("FL204"))[0]
    assert (hit.severity, hit.certainty, hit.fix) == ("info", "may", None)
    lost = replace(given.sites[0], gamma=np.array([1.0, 1.1, 1.0]))  # those of a training
    (hit,) = rules.check(replace(given, sites=(lost,)), rules.select("FL204"))[0]
    assert (hit.severity, hit.fix) == ("error", "recalibrate")


def test_numbers_in_evidence() -> None:
    (stale,) = rules.check(model(facts(), steps=48), rules.select("FL203"))[0]
    assert stale.evidence["old_share"] == pytest.approx(0.99**48)
    assert "62%" in stale.message  # the figure that DESIGN.md uses
    (few,) = rules.check(model(facts(values=2), batch=4), rules.select("FL116"))[0]
    estimates = np.random.default_rng(0).normal(size=(40_000, 8)).var(1, ddof=1)
    assert few.evidence["relative_error"] == pytest.approx(estimates.std(), rel=0.02)
    (other,) = rules.check(
        model(facts("a"), facts("b"), facts("c", at={"epsilon": 0.1})), rules.select("FL113")
    )[0]
    assert other.evidence["effect"] == pytest.approx(np.sqrt(0.6 / 0.501) - 1)


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_half_precision_loses_what_the_rule_says(kind: str) -> None:
    """FL208 against numpy's own rounding: below the limit no stored value moves."""
    lost = 2.0**-11 / (2 * (1 - 0.99))
    stored = np.random.default_rng(0).uniform(0.5, 200, 1000).astype(kind)
    wide = stored.astype(np.float32)
    moved = (wide * 0.99 + wide * (1 + 0.98 * lost) * 0.01).astype(kind)
    assert np.any(moved != stored) == (kind == "float32")


def test_cancellation_costs_what_the_rule_says() -> None:
    """FL210 on torch: E[x²] - E[x]² in float32, as Keras computes it there."""
    rng = np.random.default_rng(0)
    for ratio, reported in ((3000.0, True), (30.0, False)):
        x = (rng.normal(size=(200, 4096)) + rng.uniform(0.9, 1, (200, 1)) * ratio).astype("float32")
        naive = np.mean(np.square(x), axis=1) - np.square(np.mean(x, axis=1))
        errors = naive / x.astype(np.float64).var(axis=1) - 1
        given = model(facts(mean=ones(ratio), variance=ones(1.0) * 0.999, cancels=True))
        found, _ = rules.check(given, rules.select("FL210"))
        assert bool(found) is reported
        measured = float(np.sqrt(np.mean(errors**2)))
        assert (measured > 0.05) is reported  # the rule's own limit
        if found:  # its estimate is a bound of the right size
            assert 0.5 < measured / float(found[0].evidence["error"]) < 2


def test_every_use_of_a_shared_site_is_an_update() -> None:
    shared = facts(at={"calls": 2})
    assert codes(model(shared, steps=114), select="FL203") == ["FL203"]
    assert codes(model(shared, steps=115), select="FL203") == []  # 0.99 ** 230


def test_what_cannot_be_checked_is_told() -> None:
    unbuilt = SiteFacts(site=site(channels=None))
    found, skipped = rules.check(ModelFacts(sites=(unbuilt,)), rules.select())
    assert not found
    assert {each.code for each in skipped} == {
        each.code for each in rules.select() if each.needs != "sites"
    }
    assert {each.reason.partition(":")[0] for each in skipped} == {
        "no site has stored numbers",
        "no training steps",
        "needs data",
    }


def test_errors_come_first_then_codes_then_order() -> None:
    given = model(
        facts("a", at={"decay": 0.2}), facts("b", mean=ones(np.nan)), facts("c", mean=ones(np.nan)),
        facts("d", at={"calls": 2}),
    )  # fmt: skip
    found, _ = rules.check(given, rules.select())
    assert [(each.code, each.sites[0]) for each in found] == [
        ("FL201", "b"), ("FL201", "c"), ("FL111", "a"), ("FL114", "d"),
    ]  # fmt: skip


def test_options() -> None:
    given = model(facts(), steps=48)
    assert codes(given, options={"FL203": {"max_share": 0.7}}) == []
    assert codes(given, options={"FL203": {"max_share": 0.6}}) == ["FL203"]
    with pytest.raises(FrostlineError, match="no option 'share'; its options are max_share"):
        codes(given, options={"FL203": {"share": 0.7}})


# --- choosing -------------------------------------------------------------------------------------


def own_rules() -> tuple[Rule, ...]:
    return tuple(each for each in rules.all_rules() if each.code.startswith("FL"))


def chosen(select: Any = None, ignore: Any = None) -> set[str]:
    return {each.code for each in rules.select(select, ignore)}


def test_select_and_ignore() -> None:
    every = {each.code for each in own_rules()}
    stored = {code for code in every if code.startswith("FL2")}
    assert chosen() == {code for code in every if not code.startswith("FL9")}
    assert chosen("FL") == every
    assert chosen("FL2") == stored
    assert chosen(["FL203"]) == chosen("stale-running-statistics") == chosen("fl203") == {"FL203"}
    assert chosen("FL203,FL101") == chosen(["FL203", "FL101"]) == {"FL203", "FL101"}
    assert chosen("FL2", "FL203") == stored - {"FL203"}
    assert chosen("FL2", "stale-running-statistics") == stored - {"FL203"}
    assert chosen(None, "FL2") == chosen() - stored
    assert chosen("FL203", "FL2") == {"FL203"}  # the longer prefix decides
    assert chosen("FL203", "FL203") == set()
    assert chosen("FL2", {"FL203": "recalibrated at serving time"}) == stored - {"FL203"}


@pytest.mark.parametrize(
    ("word", "hint"),
    [("FL7", "no rule 'FL7'"), ("stale-statistics", "stale-running-statistics"), ("X1", "--all")],
)
def test_unknown_words_name_the_closest(word: str, hint: str) -> None:
    for name, given in (("select", (word, None)), ("ignore", (None, word))):
        with pytest.raises(FrostlineError, match=re.escape(hint)) as error:
            rules.select(*given)
        assert str(error.value).endswith(f"Received: {name}={word!r}")
    with pytest.raises(FrostlineError, match="Received: 'FL7'"):
        rules.get("FL7")


def test_get() -> None:
    assert rules.get("fl101") is rules.get("frozen-uses-batch-statistics")
    assert rules.get("FL101").summary.endswith("while training.")


def test_ignored_rules_keep_their_reason() -> None:
    taken_out = rules.ignored("FL2", {"FL203, FL204": "recalibrated", "FL202": "known"})
    assert {each.code: each.reason for each in taken_out} == {
        "FL202": "ignored: known",
        "FL203": "ignored: recalibrated",
        "FL204": "ignored: recalibrated",
    }
    assert [each.reason for each in rules.ignored("FL2", "FL203")] == ["ignored"]


# --- registry -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        ("FL203", "another-name", "FL203 stale-running-statistics"),
        ("FL299", "stale-running-statistics", "FL203 stale-running-statistics"),
        ("fl299", "another-name", "three digits"),
        ("FL99", "another-name", "three digits"),
        ("FL299", "Another Name", "kebab-case"),
    ],
)
def test_bad_registrations_are_refused(code: str, name: str, words: str) -> None:
    before = rules.all_rules()

    def nothing(model: ModelFacts) -> Iterator[Hit]:
        """Find nothing."""
        yield from ()

    with pytest.raises(ValueError, match=words):
        rules.rule(code, name, severity="info")(nothing)
    assert rules.all_rules() == before


def test_rules_on_data_get_the_measurement_and_are_skipped_without() -> None:
    def few(model: ModelFacts, measured: Measurement, *, least: int = 100) -> Iterator[Hit]:
        """Few samples."""
        if measured.samples < least:
            yield Hit(sites=(), message=f"{measured.samples} samples", evidence={})

    rule = Rule(
        code="FL399", name="few-samples", severity="info", needs="data", fix=None, check=few
    )
    known = ModelFacts(sites=(facts(),))
    measured = Measurement(samples=16, batch_size=8, task="unknown")
    found, skipped = rules.check(known, [rule], measurement=measured)
    assert [(each.code, each.message) for each in found] == [("FL399", "16 samples")]
    assert skipped == ()
    least = {"FL399": {"least": 10}}
    assert rules.check(known, [rule], measurement=measured, options=least) == ((), ())
    found, skipped = rules.check(known, [rule])
    assert found == ()
    assert [each.reason for each in skipped] == ["needs data: frostline diagnose"]


def test_rules_that_name_one_fixture_get_one_object() -> None:
    seen: list[Any] = []

    def first(old_shares: Any, model: ModelFacts) -> Iterator[Hit]:
        """One."""
        seen.extend([old_shares, model])
        yield from ()

    def second(measurement: Measurement, old_shares: Any) -> Iterator[Hit]:
        """Two."""
        seen.extend([old_shares, measurement])
        yield from ()

    made = [
        Rule(code=f"FL39{i}", name="a-name", severity="info", needs="data", fix=None, check=check)
        for i, check in enumerate((first, second))
    ]
    known, measured = model(facts(), steps=10), Measurement(samples=1, batch_size=1, task="unknown")
    rules.check(known, made, measurement=measured)
    assert seen[0] is seen[2]
    assert seen[0] == {"bn": pytest.approx(0.99**10)}
    assert seen[1] is known
    assert seen[3] is measured


PLUGIN = '''
"""A plugin."""
from frostline.rules import Hit, rule

@rule("ACME001", "too-many-sites", severity="info")
def too_many_sites(model, *, most: int = 0):
    """More sites than wanted."""
    for each in model.sites[most:]:
        yield Hit(sites=(each.site.path,), message="one site too many", evidence={"most": most})
'''
ASK = """
import frostline.rules as rules
print([each.code for each in rules.all_rules() if each.code.startswith("ACME")], len(
    rules.select("FL203")), rules.get("too-many-sites").options)
"""


def test_plugins_add_rules_and_a_broken_one_does_no_harm(tmp_path: Any) -> None:
    (tmp_path / "acme_rules.py").write_text(PLUGIN)
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[frostline.rules]\nbroken = acme_rules_that_are_not_there\nacme = acme_rules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ASK}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "['ACME001'] 1 {'most': 0}"
    assert "acme_rules_that_are_not_there" in done.stderr


def test_rules_need_no_framework() -> None:
    ask = "import sys, frostline.rules as r; r.all_rules(); print({'keras','jax'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- documentation --------------------------------------------------------------------------------


@pytest.mark.parametrize("each", own_rules(), ids=lambda each: each.code)
def test_documentation(each: Rule) -> None:
    assert tuple(re.findall(r"^## (.+)$", each.documentation, re.MULTILINE)) == HEADINGS
    assert each.summary.endswith(".")
    assert len(each.summary) <= 100
    sections = re.split(r"^## .+$", each.documentation, flags=re.MULTILINE)[1:]
    assert all(section.strip() for section in sections)
    blocks = re.findall(r"```python\n(.+?)```", each.documentation, re.DOTALL)
    assert len(blocks) == 2
    assert all("model = " in block for block in blocks)
    named = re.findall(r"`(\w+)` \(default", sections[HEADINGS.index("Options")])
    assert named == list(each.options)
    for name, default in each.options.items():
        assert f"`{name}` (default {default:g})".replace("0.001", "1e-3") in sections[5]


def test_codes_are_in_order_and_names_unique() -> None:
    found = own_rules()
    assert [each.code for each in found] == sorted({each.code for each in found})
    assert len({each.name for each in found}) == len(found) >= 20
    assert not {each.name for each in found} & {each.code for each in found}
