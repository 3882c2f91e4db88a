"""What is asked of every layer costs no more for each in a large network than in a small one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frostline.graph.addresses import Place, frozen_prefix
from frostline.report import sites as table
from frostline.rules.predicates import layer_before, layer_behind
from frostline.types import Site
from frostline.types.facts import LayerFacts, ModelFacts, SiteFacts


def sites(count: int) -> list[Site]:
    return [
        Site(
            path=f"part/bn{n}", name=f"bn{n}", kind="BatchNormalization", index=n, channels=2,
            axis=-1, decay=0.9, epsilon=1e-3, params_frozen=True, stats_frozen=True,
            policy="inference", calls=1, dtype="float32",
        )
        for n in range(count)
    ]  # fmt: skip


def prefix(count: int) -> None:
    found = sites(count)
    places = [
        Place(path=s.path, name=s.name, layer=None, order=n, top=0, calls=1, leaf=True)
        for n, s in enumerate(found)
    ]
    assert frozen_prefix(places, found, lambda _: False) == (count, None)


def neighbours(count: int) -> None:
    facts = [SiteFacts(site=s, mean=np.zeros(2), variance=np.ones(2)) for s in sites(count)]
    layers = [LayerFacts(path=f"conv{n}", order=2 * n, trains=True) for n in range(count)]
    model = ModelFacts(
        sites=tuple(facts), layers=tuple(layers),
        order={s.site.path: 2 * n + 1 for n, s in enumerate(facts)},
    )  # fmt: skip
    for n, one in enumerate(model):
        before, behind = layer_before(model, one), layer_behind(model, one)
        assert before is layers[n]
        assert behind is (layers[n + 1] if n + 1 < count else None)


def rows(count: int) -> None:
    table.sites_table(sites(count))


@pytest.mark.parametrize("ask", [prefix, neighbours, rows])
def test_twice_as_many_layers_cost_twice_as_much(ask: Callable[[int], None]) -> None:
    ask(10)  # imports happen now
    assert instructions(lambda: ask(240)) < 2.5 * instructions(lambda: ask(120))


def instructions(run: Callable[[], None]) -> int:
    """How many instructions of Python are run."""
    count = 0

    def local(_frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return local

    def called(frame: Any, _event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    before = sys.gettrace()
    sys.settrace(called)
    try:
        run()
    finally:
        sys.settrace(before)
    return count
