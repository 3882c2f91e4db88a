"""Short runs of the injector; long ones by hand: ``python scripts/inject.py --exceptions 5000``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from inject import Injector, Interruption, Outcome, Trial, again, inject

KEPT = sorted(Path(__file__).parent.glob("inject_*.json"))
on_torch = pytest.mark.skipif(
    os.environ["KERAS_BACKEND"] != "torch", reason="torch has a process of its own"
)


def sound(outcome: Outcome) -> int:
    """Trials that were made; none of them changed anything."""
    total = sum(outcome.counts.values(), start=type(next(iter(outcome.counts.values())))())
    faults = ("changed", "around", "broken", "broken in clean-up")
    faults += tuple(f"signals {fault}" for fault in faults)
    assert {name: total[name] for name in faults if total[name]} == {}, outcome.failures
    return sum(total[name] for name in ("exceptions", "in clean-up", "signals"))


@on_torch
@pytest.mark.filterwarnings("ignore")
def test_an_exception_anywhere_leaves_a_torch_module_and_the_process_as_they_were() -> None:
    assert sound(inject("torch", "small", 200, 8, seed=15)) > 190


@on_torch  # the other backends compile for minutes; by hand
@pytest.mark.filterwarnings("ignore")
def test_an_exception_anywhere_leaves_a_keras_model_and_the_process_as_they_were() -> None:
    verbs = ["convert", "restore", "freeze", "undo of freeze", "set_momentum"]
    assert sound(inject("keras", "small", 40, 4, seed=15, only=verbs)) > 30


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
@pytest.mark.filterwarnings("ignore")
def test_what_failed_once(path: Path) -> None:
    trial = Trial(**json.loads(path.read_text())["trial"])
    if trial.framework == "torch" and os.environ["KERAS_BACKEND"] != "torch":
        pytest.skip("torch has a process of its own")
    assert not again(trial).failed


@pytest.mark.once
def test_the_injector_raises_where_it_is_told_to() -> None:
    from frostline.numerics.stats import mse

    def work() -> object:
        import numpy as np

        return mse(np.zeros((3, 2)), np.ones((3, 2)))

    watch = Injector("line", None)
    watch.run(work)
    assert len(watch.places) >= 2
    again = Injector("line", watch.places[-1], watch.places.count(watch.places[-1]))
    with pytest.raises(Interruption):
        again.run(work)
    assert again.raised
