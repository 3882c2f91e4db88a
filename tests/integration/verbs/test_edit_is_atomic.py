"""An exception at any line of a verb leaves a torch module as it was, and so does Ctrl-C."""

from __future__ import annotations

import gc
import inspect
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn

import frostline as fl

SOURCES = str(Path(fl.__file__).parent)


class Injected(BaseException):
    """Raised in the middle of a line, by no code of ours."""


def module() -> Any:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2)
    )
    made[1].running_mean.normal_()
    made[0].weight.grad = torch.ones_like(made[0].weight)
    made[4].eval()
    return made


def state(model: Any) -> Any:
    return (
        [
            (
                *(name, type(each), each.training, each.__dict__.get("forward")),
                *(getattr(each, flag, None) for flag in ("p", "momentum", "track_running_stats")),
                *(each.__dict__.get("_frostline_rates"), list(each._forward_hooks.values())),
                list(each._forward_pre_hooks.values()),
            )
            for name, each in model.named_modules()
        ],
        [(name, id(p), p.requires_grad, id(p.grad)) for name, p in model.named_parameters()],
        {name: value.tolist() for name, value in model.state_dict().items()},
        (torch.is_grad_enabled(), torch.get_rng_state().tolist(), signal.getsignal(signal.SIGINT)),
    )


DATA = torch.randn(8, 2, 2, 2, generator=torch.Generator().manual_seed(1)).numpy()


def within_frozen(model: Any) -> None:
    with fl.frozen(model[1]):
        pass


VERBS: dict[str, Callable[[Any], Any]] = {
    "freeze": lambda model: fl.freeze(model, 4, dropout=True),
    "freeze statistics": lambda model: fl.freeze(model, params=False),
    "unfreeze": lambda model: fl.unfreeze(model, 1),
    "set_momentum": lambda model: fl.set_momentum(model, 0.5),
    "recalibrate": lambda model: fl.recalibrate(model, DATA, sites="all", batch_size=4),
    "recalibrate batch": lambda model: fl.recalibrate(model, DATA, sites="all", method="batch"),
    "frozen": within_frozen,
}


def under(trace: Any, run: Callable[[], Any]) -> None:
    """Run under a trace function, and put the one that was there back."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)


def traced(run: Callable[[], Any], at: int | None) -> list[tuple[str, int]]:
    """Run with an exception at the ``at``-th line of ours; returns the lines that were met."""
    lines: list[tuple[str, int]] = []

    def local(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == at:
                raise Injected
        return local

    def called(frame: Any, _event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(SOURCES) else None

    under(called, run)
    return lines


@pytest.mark.once
@pytest.mark.timeout(600)
@pytest.mark.parametrize("verb", VERBS)
def test_an_exception_at_any_line_leaves_the_module_as_it_was(verb: str) -> None:
    def prepared() -> Any:
        model = module()
        if verb == "unfreeze":
            fl.freeze(model, dropout=True)
        return model

    VERBS[verb](prepared())  # imports happen now
    model = prepared()
    lines = traced(lambda: VERBS[verb](model), None)
    assert len(lines) > 50
    first = {line: at for at, line in reversed(list(enumerate(lines)))}
    last = {line: at for at, line in enumerate(lines)}
    changed = []
    for at in sorted({*first.values(), *last.values()}):
        model = prepared()
        before = state(model)
        with pytest.raises(Injected):
            traced(lambda: VERBS[verb](model), at)  # noqa: B023 - it runs at once
        if state(model) != before:
            changed.append(lines[at])
    assert changed == []


@pytest.mark.once
@pytest.mark.parametrize("verb", ["freeze", "set_momentum", "recalibrate"])
def test_an_undo_that_is_interrupted_completes_and_can_be_repeated(verb: str) -> None:
    model = module()
    before = state(model)
    count = len(traced(VERBS[verb](model).undo, None))
    assert state(model) == before
    for at in range(count):
        change = VERBS[verb](model)
        with pytest.raises(Injected):
            traced(change.undo, at)
        if state(model) != before:  # interrupted before it began
            change.undo()
        assert state(model) == before


@pytest.mark.once
def test_ctrl_c_in_the_clean_up_waits_for_its_end() -> None:
    from frostline.atomic import to_its_end

    seen = []

    def back() -> None:
        signal.raise_signal(signal.SIGINT)
        seen.append("done")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            to_its_end(back)
        assert seen == ["done"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def struck(run: Callable[[], Any], at: int, since: Callable[[], bool] = lambda: True) -> int:
    """Run with a real SIGINT where Python looks for one: as a function of ours is entered.

    It is the ``at``-th entry since ``since`` holds; returns how many there were. Generators are
    left out: one that is closed on its way out swallows what is raised in it.
    """
    met = 0

    def called(frame: Any, _event: str, _: Any) -> None:
        nonlocal met
        ours = frame.f_code.co_filename.startswith(SOURCES)
        if ours and not frame.f_code.co_flags & inspect.CO_GENERATOR and since():
            met += 1
            if met == at + 1:
                signal.raise_signal(signal.SIGINT)

    under(called, run)
    return met


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a fresh interpreter."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.once
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_anywhere_in_a_verb_takes_all_of_it_back() -> None:
    verb = VERBS["set_momentum"]
    verb(module())  # imports happen now
    entries = struck(lambda: verb(module()), -1)
    assert entries > 20
    interrupted = 0
    for at in range(0, entries, 1 + entries // 40):
        model = module()
        before = state(model)
        try:
            # What Python frees meanwhile may have been among the entries that were counted.
            assert struck(lambda: verb(model), at) <= at  # noqa: B023 - it runs at once
        except KeyboardInterrupt:
            interrupted += 1
            assert state(model) == before, at
    assert interrupted > 15


@pytest.mark.once
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_anywhere_in_the_way_back_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is changed, something fails, and the signal comes while the change is taken back."""
    failed = []

    def fails(*_: Any, **__: Any) -> None:
        failed.append(model[1].momentum)
        raise Injected

    monkeypatch.setattr("frostline.verbs.edit.Change", fails)
    seen = []
    for at in range(0, 1000, 5):
        failed.clear()
        model = module()
        before = state(model)
        with pytest.raises((KeyboardInterrupt, Injected)) as caught:
            struck(lambda: VERBS["set_momentum"](model), at, lambda: bool(failed))  # noqa: B023
        assert failed == [0.5]
        assert state(model) == before, at
        seen.append(caught.type)
        if caught.type is Injected:  # the way back was over before the signal
            break
    assert len(seen) > 5
    assert seen == [KeyboardInterrupt] * (len(seen) - 1) + [Injected]


@pytest.mark.once
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_anywhere_in_an_undo_waits_for_its_end() -> None:
    count = struck(VERBS["set_momentum"](module()).undo, -1)
    assert count > 5
    for at in range(count):
        model = module()
        before = state(model)
        change = VERBS["set_momentum"](model)
        with pytest.raises(KeyboardInterrupt):
            struck(change.undo, at)
        if state(model) != before:  # it had not begun, or says that it is not done
            change.undo()
        assert state(model) == before, at


@pytest.mark.once
def test_a_block_whose_exit_was_never_called_is_taken_back_with_the_verb() -> None:
    from frostline.atomic import atomically, taken_back

    model, seen = module(), []
    before = state(model)

    def back() -> None:
        seen.append("block")
        vars(model[0])["training"] = True

    def edit() -> None:
        block = taken_back(back)
        block.__enter__()
        model[0].training = False
        raise Injected  # where `with` would call __exit__

    with pytest.raises(Injected) as kept:
        atomically(lambda: seen.append("verb"), edit)
    assert (state(model), seen) == (before, ["block", "verb"])
    model[0].training = False
    del kept  # its frames, and with them the block, are freed: the model is another one by now
    assert not model[0].training
    assert seen == ["block", "verb"]


@pytest.mark.once
def test_a_way_back_that_fails_does_not_keep_the_next_one_from_running() -> None:
    from frostline.atomic import undone

    seen = []

    def fails() -> None:
        raise Injected

    with pytest.raises(Injected):
        undone(fails, lambda: seen.append("next"))
    assert set(seen) == {"next"}


@pytest.mark.once
def test_the_frame_of_a_forked_block_is_freed_without_touching_the_generator() -> None:
    from frostline.adapters.torch.random import forked
    from frostline.atomic import atomically

    def edit() -> None:
        torch.manual_seed(1)  # as a rehearsal does
        block = forked()
        block.__enter__()
        raise Injected  # where `with` would call __exit__

    before = torch.get_rng_state()
    with pytest.raises(Injected) as kept:
        atomically(lambda: torch.set_rng_state(before), edit)
    assert torch.equal(torch.get_rng_state(), before)
    del kept  # torch.random.fork_rng would now put back what follows the seed
    assert torch.equal(torch.get_rng_state(), before)


#: Functions of torch and contextlib that take a function mode off and put it on again.
AROUND_MODES = (
    *("_push_mode", "_pop_mode", "_pop_mode_temporarily", "__enter__", "__exit__"),
    *("_push_on_torch_function_stack", "_pop_torch_function_stack", "next"),
)


def at_a_mode(run: Callable[[], Any], at: int) -> list[str]:
    """Run with an exception where a function mode comes or goes, for the ``at``-th time.

    Python looks for signals as a function is entered, and as one that is written in C returns.
    """
    met: list[str] = []

    def watch(frame: Any, event: str, called: Any) -> None:
        file = Path(frame.f_code.co_filename).name
        name = called.__name__ if event == "c_return" else frame.f_code.co_name
        there = file in ("overrides.py", "contextlib.py", "calls.py") and name in AROUND_MODES
        if there and event in ("call", "c_return"):
            met.append(f"{event} {name}")
            if len(met) - 1 == at:
                sys.setprofile(None)
                raise Injected

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return met


@pytest.mark.once
@pytest.mark.parametrize("verb", ["recalibrate", "phases"])
def test_function_modes_are_as_they_were_wherever_one_that_comes_or_goes_is_interrupted(
    verb: str,
) -> None:
    few, labels = DATA[:4], [0, 1, 0, 1]

    def run(model: Any) -> None:
        if verb == "recalibrate":
            fl.recalibrate(model, few, sites="all", method="batch")
        else:
            fl.phases(model, (few, labels), loss=nn.functional.cross_entropy)

    run(module())
    with torch.device("cpu"):  # a mode of the user's
        model = module()
        met = at_a_mode(lambda: run(model), -1)
        assert {"call _push_mode", "c_return _pop_torch_function_stack"} <= set(met)
        modes = torch.overrides._get_current_function_mode_stack()
        assert len(modes) == 1
        for at in range(0, len(met), 1 + len(met) // 60):
            model = module()
            before = state(model)
            with pytest.raises(Injected) as kept:  # and no "trying to pop from empty mode stack"
                at_a_mode(lambda: run(model), at)  # noqa: B023 - it runs at once
            assert state(model) == before, met[at]
            del kept  # its frames, and what waits in them, are freed
            gc.collect(0)
            assert torch.overrides._get_current_function_mode_stack() == modes, met[at]
            assert state(model) == before, met[at]


def twice(run: Callable[[], Any], first: str, second: int) -> bool:
    """Run with an exception at the first call of a function, and one more so many calls later.

    Returns:
        Whether the second one was come to.
    """
    left = second

    def called(frame: Any, _event: str, _: Any) -> None:
        if left == second and frame.f_code.co_qualname == first:
            sys.setprofile(again)
            raise Injected

    def again(frame: Any, event: str, _: Any) -> None:
        nonlocal left
        code = frame.f_code
        # A generator that goes on would end without its handlers, as of nothing but a profile.
        resumed = frame.f_lasti >= 0 and code.co_flags & inspect.CO_GENERATOR
        if event == "call" and code.co_filename != __file__ and not resumed:
            left -= 1
            if not left:
                sys.setprofile(None)
                raise Injected

    def ended() -> None:
        try:
            run()
        finally:
            sys.setprofile(None)

    with pytest.raises(Injected):
        under(called, ended)
    return left == 0


@pytest.mark.once
def test_a_second_exception_while_a_loop_over_cached_batches_ends_leaves_its_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # a loop that is dropped tells it
    model = module()
    fl.freeze(model, 4)
    model[2].eval()  # a loop may draw from the generator; nothing does here
    batches = [(torch.from_numpy(DATA[at : at + 4]), at) for at in (0, 4)]

    def loop() -> None:
        for x, _ in fl.cached(model, batches):
            model(x)

    loop()
    before = state(model)
    for second in itertools.count(1):
        met = twice(loop, "Linear.forward", second)
        gc.collect(0)
        assert state(model) == before, second
        if not met:
            break
    assert second > 10
    loop()
    assert state(model) == before


@pytest.mark.once
def test_a_trace_that_fails_while_it_ends_leaves_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    symbolic: Any = sys.modules["torch.fx._symbolic_trace"]

    def trace(*_: Any, **__: Any) -> None:
        symbolic._is_fx_tracing_flag = True
        torch._C._set_grad_enabled(False)
        raise RuntimeError("in the way back of torch.fx")

    model = module()
    fl.freeze(model, 4)
    before = state(model)
    monkeypatch.setattr(torch.fx.Tracer, "trace", trace)
    fl.split(model, sample=DATA)  # needs no graph
    assert not symbolic._is_fx_tracing_flag
    assert state(model) == before


@pytest.mark.once
def test_an_error_that_an_edit_takes_in_the_way_back_of_a_block_leaves_no_filters() -> None:
    """``fl.cache_features`` went on without a description of its prefix, and warned of nothing."""

    def edit() -> str:
        np.errstate(all="raise").__enter__()
        warnings.catch_warnings().__enter__()
        return "done"  # without what failed

    from frostline.atomic import atomically

    errors, filters = np.geterr(), warnings.filters
    assert atomically(lambda: None, edit) == "done"
    assert np.geterr() == errors
    assert warnings.filters is filters


@pytest.mark.once
def test_an_error_that_a_verb_takes_in_the_way_back_of_a_mode_leaves_no_mode() -> None:
    from frostline.verbs.whole import whole

    model = module()
    before = state(model)

    @whole
    def verb(_: Any) -> str:
        torch.device("cpu").__enter__()
        torch._C._set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        np.errstate(all="raise").__enter__()
        warnings.catch_warnings().__enter__()
        return "done"  # without what failed

    errors, filters = np.geterr(), warnings.filters
    with torch.device("cpu"):  # a mode of the user's
        modes = torch.overrides._get_current_function_mode_stack()
        assert verb(model) == "done"
        assert torch.overrides._get_current_function_mode_stack() == modes
    assert torch.get_default_dtype() == torch.float32
    assert (np.geterr(), warnings.filters) == (errors, filters)
    assert warnings.filters is filters
    assert state(model) == before


@pytest.mark.once
@pytest.mark.parametrize("hit", [(2, 3), (2, 4), (1, 2)])
def test_two_exceptions_at_the_handler_of_ctrl_c_leave_it(
    hit: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.atomic import to_its_end

    before, calls, real = signal.getsignal(signal.SIGINT), itertools.count(1), signal.signal

    def sets(number: int, handler: Any) -> Any:
        if next(calls) in hit:
            raise Injected
        return real(number, handler)

    seen: list[str] = []
    monkeypatch.setattr(signal, "signal", sets)
    with pytest.raises(Injected):
        to_its_end(lambda: seen.append("back"))
    monkeypatch.undo()
    assert seen
    assert signal.getsignal(signal.SIGINT) is before
