"""Sequential recalibration without a graph, held to forward hooks, site after site in float64."""

from __future__ import annotations

import copy
import gc
import os
import sys
import tempfile
import threading
from collections import UserDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional

import frostline as fl
from frostline.adapters import spool
from frostline.adapters.torch import lockstep
from frostline.adapters.torch.adapter import TorchView
from frostline.measure.recalibration import recalibrated
from frostline.types import DataError, ModelError

X = np.random.default_rng(0).normal(0.5, 2, (24, 3, 8, 8)).astype("float32")


def statistics(model: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def by_hooks(model: Any, names: Sequence[str], batches: Sequence[Any]) -> Any:
    """Site after site over all batches, in float64; no part of Frostline."""
    twin = copy.deepcopy(model).double().eval()
    for name in names:
        module, seen = twin.get_submodule(name), []
        hook = module.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        with torch.no_grad():
            for batch in batches:
                twin(torch.as_tensor(batch).double())
        hook.remove()
        flat = torch.cat([each.movedim(1, -1).reshape(-1, each.shape[1]) for each in seen])
        module.running_mean.copy_(flat.mean(0))
        module.running_var.copy_(flat.var(0, correction=0))
    return twin


def assert_same(model: Any, twin: Any, rtol: float = 1e-4) -> None:
    theirs = statistics(twin)
    for name, value in statistics(model).items():
        np.testing.assert_allclose(value, theirs[name], rtol=rtol, atol=1e-5, err_msg=name)


class Deep(nn.Module):
    """torch.fx cannot follow it; one pass with old statistics after the other overflows."""

    def __init__(self, depth: int = 60, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(
            nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False) for i in range(depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))

    def forward(self, x: Any) -> Any:
        if float(x.abs().sum()) < 0:
            raise ValueError("a check that torch.fx cannot trace")
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.relu(norm(conv(x)))
        return x.mean((2, 3))


def test_sixty_layers_that_cannot_be_traced() -> None:
    threads = threading.active_count()
    model = Deep()
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.as_tensor(X))
    calls: list[int] = []
    model.convs[0].register_forward_hook(lambda *_: calls.append(threading.get_ident()))
    names = [f"norms.{index}" for index in range(60)]
    twin = by_hooks(model, names, [X[:8], X[8:16], X[16:]])
    calls.clear()
    fl.recalibrate(model, X, batch_size=8)
    assert len(calls) == 3 + 1  # every batch went through once, and the first again, alone
    assert_same(model, twin, rtol=1e-3)
    with torch.no_grad():
        assert bool(torch.isfinite(model.eval()(torch.as_tensor(X))).all())
    before = statistics(model)
    fl.recalibrate(model, X, batch_size=8)
    for name, value in statistics(model).items():
        np.testing.assert_allclose(value, before[name], rtol=1e-5, atol=1e-6)
    assert threading.active_count() < threads + 4


class Branches(nn.Module):
    """Batches take different ways, and come to the sites in another order than registration's."""

    def __init__(self, *, swapped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = {"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)}
        for name in sorted(parts, reverse=swapped):
            self.add_module(name, parts[name])
        self.stem, self.unused = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        high = float(x.mean()) > 0.5
        x = self.stem(x)
        if high:
            x = functional.relu(self.a(x) - 0.3)
        return self.b(x)


@pytest.mark.parametrize("swapped", [False, True])
def test_passes_that_part_meet_again_by_site(swapped: bool) -> None:
    model = Branches(swapped=swapped)
    batches = [X[:8], X[8:16] - 1.5, X[16:] + 1.0]
    untouched = copy.deepcopy(model.unused.state_dict())
    twin = by_hooks(model, ["a", "b"], batches)
    change = fl.recalibrate(model, [(batch,) for batch in batches])
    assert_same(model, twin)
    assert all(torch.equal(untouched[k], v) for k, v in model.unused.state_dict().items())
    assert any("does not use ('unused')" in note for note in change.notes)


class Plain(nn.Module):
    """Two sites, with something between them."""

    def __init__(self, between: Any = functional.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.next = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.first, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.between = between
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        return self.last(self.next(self.between(self.first(self.conv(x)))))


def sizes_seen(model: Any) -> list[int]:
    sizes: list[int] = []
    model.conv.register_forward_hook(lambda _, x, __: sizes.append(len(x[0])))
    return sizes


SMALL = [X[at : at + 3] * (1 + at) for at in range(0, 24, 3)]


def test_small_batches_of_one_shape_go_through_in_one_pass() -> None:
    model = Plain()
    twin = by_hooks(model, ["first", "last"], SMALL)
    sizes = sizes_seen(model)
    change = fl.recalibrate(model, [(batch,) for batch in SMALL])
    assert sizes == [3, 12, 24]  # one alone and four in one, to see that it is the same to it
    assert_same(model, twin)
    assert change.notes == ()
    sizes.clear()
    fl.recalibrate(model, iter([(batch,) for batch in SMALL]))
    assert max(sizes) == 3  # they could not be read again
    assert_same(model, twin)


class Loss(Plain):
    """Its loss reads values, behind the last site, and before the first one only its own."""

    def forward(self, x: Any) -> Any:
        made = super().forward(x + float(self.calls))
        return made.mean() if float(made.mean()) > 0 else made.square().mean()


def test_values_behind_the_last_site_and_those_of_the_model_decide_nothing() -> None:
    model = Loss()
    twin = by_hooks(model, ["first", "last"], SMALL)
    sizes = sizes_seen(model)
    fl.recalibrate(model, [(batch,) for batch in SMALL])
    assert max(sizes) == 24
    assert_same(model, twin)


def test_a_model_that_takes_so_many_samples_and_no_more_gets_one_batch_a_pass() -> None:
    state = torch.rand(10, 4, 1, 1)
    model = Plain(lambda x: functional.relu(x) + 0 * state[: len(x)])
    twin = by_hooks(model, ["first", "last"], SMALL)
    fl.recalibrate(model, [(batch,) for batch in SMALL])
    assert_same(model, twin)


def test_mappings_go_through_one_by_one() -> None:
    class Named(Plain):
        def forward(self, image: Any, index: Any) -> Any:
            return super().forward(image[index])

    index = torch.arange(3)
    batches = [{"image": torch.as_tensor(batch), "index": index.flip(0)} for batch in SMALL]
    model = Named()
    twin = by_hooks(Plain(), ["first", "last"], SMALL)
    sizes = sizes_seen(model)
    fl.recalibrate(model, batches)
    assert set(sizes) == {3}
    assert_same(model, twin)


def test_as_many_small_batches_go_through_in_one_pass_as_memory_has_room_for() -> None:
    model = Plain()
    twin = by_hooks(model, ["first", "last"], SMALL)
    sizes = sizes_seen(model)
    meter = TorchView(model).meter(["first", "last"])
    largest = 3 * 3 * 8 * 8 * 4  # bytes of a batch: all that is made of it is smaller
    data = [(batch,) for batch in SMALL]
    recalibrated(meter, ["first", "last"], data, memory_limit=3 * 16 * largest)
    assert max(sizes[2:]) == 9  # the first two are the trial
    assert_same(model, twin)


def of_this_thread() -> Any:
    kept = threading.local()
    kept.scale = 2.0
    return lambda x: functional.relu(x) + getattr(kept, "scale", 0.0)


SEES_OTHERS = {
    "the batch's mean": lambda x: x - x.mean(0),
    "its first sample": lambda x: x - 0.5 * x[:1],
    "its last sample": lambda x: x - 0.5 * x[-1:],
    "a branch on its values": lambda x: x * 2 if bool((x[0] > 1).any()) else functional.relu(x),
    "a number of its values": lambda x: x / (1 + float(x.std())),
    "halves of the batch": lambda x: torch.cat([x.chunk(2)[0] * 2, x.chunk(2)[1]]),
    "so many first samples": lambda x: torch.cat([x[:1] * 2, x[1:]]),
    "the sample at the mirrored place": lambda x: x + 0.5 * x.flip(0),
    "the sample before": lambda x: x + 0.5 * x.roll(1, 0),
    "all samples before": lambda x: x.cumsum(0),
    "a pair from both halves": lambda x: x + 0.5 * x.roll(len(x) // 2, 0),
    "the sizes of a batch": lambda x: x * (1 + len(x)),
    "a thread's own": of_this_thread(),
}


@pytest.mark.parametrize("name", SEES_OTHERS)
def test_batches_whose_samples_see_each_other_go_through_one_by_one(name: str) -> None:
    model = Plain(SEES_OTHERS[name])
    twin = by_hooks(model, ["first", "last"], SMALL)
    sizes = sizes_seen(model)
    fl.recalibrate(model, [(batch,) for batch in SMALL])
    assert set(sizes) <= {3, 12}
    assert sizes.count(12) <= 1  # the trial
    assert_same(model, twin)


def test_batches_of_a_model_that_counts_its_calls_go_through_one_by_one() -> None:
    model = Plain(lambda x: functional.relu(x) + model.calls.add_(1) * 0)
    sizes = sizes_seen(model)
    fl.recalibrate(model, [(batch,) for batch in SMALL])
    assert set(sizes) <= {3, 12}
    assert sizes.count(12) <= 1  # the trial
    assert model.calls == 0


def test_of_small_batches_only_the_one_that_overflows_is_left_out() -> None:
    model = Plain()
    batches = [*SMALL[:5], SMALL[5] * 1e30, *SMALL[6:]]  # no float32
    change = fl.recalibrate(model, [(batch,) for batch in batches])
    assert any("skipped 1 of 8 batches (batch 5" in note for note in change.notes)
    assert_same(model, by_hooks(Plain(), ["first", "last"], [*SMALL[:5], *SMALL[6:]]))


class Towers(nn.Module):
    """One encoder for two inputs, as siamese networks have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv, self.next = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def encode(self, x: Any) -> Any:
        return self.second(self.next(functional.relu(self.first(self.conv(x)))))

    def forward(self, x: Any) -> Any:
        return self.encode(x) - self.encode(x.flip(0) * 2 + 1)


def test_a_site_used_twice_gets_the_moments_of_both_uses() -> None:
    model = Towers()
    twin = by_hooks(model, ["first", "second"], [X[:12], X[12:]])
    fl.recalibrate(model, X, batch_size=12)
    assert_same(model, twin)


class Behind(nn.Module):
    """A site behind its own output: only a fixed point is right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Any) -> Any:
        for _ in range(3):
            x = functional.relu(self.norm(self.conv(x)))
        return x


def test_a_site_behind_itself_comes_to_a_fixed_point() -> None:
    model = Behind()
    fl.recalibrate(model, X, batch_size=12)
    again = by_hooks(model, ["norm"], [X[:12], X[12:]])
    assert_same(model, again, rtol=1e-4)


class Keeps(nn.Module):
    """What it keeps on itself must not reach another batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.kept: Any = None
        self.conv.register_forward_hook(self.keep)

    def keep(self, _: Any, __: Any, output: Any) -> None:
        self.kept = output

    def forward(self, x: Any) -> Any:
        return self.last(self.norm(self.conv(x)) * self.kept)


def test_what_a_model_keeps_on_itself_stays_with_its_batch() -> None:
    model = Keeps()
    batches = [X[:12], X[12:] * 3]
    twin = by_hooks(model, ["norm", "last"], batches)
    fl.recalibrate(model, [(batch,) for batch in batches])
    assert_same(model, twin)
    assert model.kept is None  # the model itself was not run


class Hyper(nn.Module):
    """Each batch has parameters of its own, put into the layers for the time of the call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.network = nn.Sequential(*parts)

    def forward(self, x: Any) -> Any:
        named = self.network.named_parameters()
        scaled = {name: value * x.std() for name, value in named if value.ndim == 4}
        return torch.func.functional_call(self.network, scaled, (x,))


class Stored(nn.Module):
    """Its decoder reads what a hook put outside of the model."""

    def __init__(self, store: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.store = store
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last = nn.BatchNorm2d(4)
        self.stem.register_forward_hook(lambda _, __, output: store(output))

    def forward(self, x: Any) -> Any:
        return self.last(functional.relu(self.norm(self.stem(x))) + 3 * self.store())


def in_a_dictionary() -> Any:
    kept: dict[str, Any] = {}

    def store(output: Any = None) -> Any:
        return kept.setdefault("stem", output) if output is None else kept.update(stem=output)

    return store


class Cut(BaseException):
    """As Ctrl-C."""


# What is cut while it closes a folder leaves that to a finalizer of Python, which warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_stays_behind_an_interruption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Threads, temporary files and open files, where threads start and end, and elsewhere."""
    monkeypatch.setattr("frostline.adapters.torch.lockstep.WINDOW", 3000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = {spool.__file__, lockstep.__file__}
    model = Deep(2, width=2)
    batches = [X[start : start + 6, :, :4, :4] for start in range(0, 24, 6)]

    def traced(cut: tuple[str, str, int] | None) -> set[tuple[str, str, int]]:
        met: set[tuple[str, str, int]] = set()

        def line(frame: Any, event: str, _: Any) -> Any:
            place = (frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno)
            if event == "line" and place not in met:
                met.add(place)
                if place == cut:
                    raise Cut
            return line

        known = sys.gettrace()
        sys.settrace(lambda frame, *_: line if frame.f_code.co_filename in files else None)
        try:
            fl.recalibrate(model, iter(batches), sites="all")
        except Cut:
            pass
        finally:
            sys.settrace(known)
        return met

    traced(None)
    met = sorted(traced(None))
    places = [place for place in met if place[1] in ("start", "go_on", "end", "_end")]
    assert len(places) > 15
    gc.collect()
    threads, opened = set(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))
    for cut in [*places, *met[::16]]:
        traced(cut)
        gc.collect(0)
        for thread in set(threading.enumerate()) - threads:
            thread.join(5)
        assert threads >= set(threading.enumerate()), cut
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert len(list(Path("/proc/self/fd").iterdir())) <= opened


def of_the_thread() -> Any:
    kept = threading.local()
    kept.scale = 2.0
    return lambda output=None: getattr(kept, "scale", 0.0) if output is None else None


@pytest.mark.parametrize(
    ("model", "names", "told"),
    [
        (Hyper(), ["network.1", "network.3"], False),
        (Stored(in_a_dictionary()), ["norm", "last"], True),
        (Stored(of_the_thread()), ["norm", "last"], True),
    ],
)
@pytest.mark.parametrize("again", [True, False])
def test_batches_do_not_see_each_other(
    model: Any, names: list[str], told: bool, again: bool
) -> None:
    model = copy.deepcopy(model) if not told else model
    batches = [X[:8], X[8:16] * 3, X[16:] * 0.5]
    twin = by_hooks_in_place(model, names, batches)
    data = [(batch,) for batch in batches]
    if told and not again:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(DataError, match="running each batch by itself"):
            fl.recalibrate(model, iter(data))
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
        return
    change = fl.recalibrate(model, data if again else iter(data))
    assert_same(model, twin)
    assert ("outside of the model" in str(change)) == told
    change.undo()


def by_hooks_in_place(model: Any, names: Sequence[str], batches: Sequence[Any]) -> Any:
    """:func:`by_hooks` for a model whose copy would still use what it keeps outside."""
    before = copy.deepcopy(model.state_dict())
    was = [module.training for module in model.modules()]
    model.eval()
    for name in names:
        module, seen = model.get_submodule(name), []
        hook = module.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].double()))
        with torch.no_grad():
            for batch in batches:
                model(torch.as_tensor(batch))
        hook.remove()
        flat = torch.cat([part.movedim(1, -1).reshape(-1, part.shape[1]) for part in seen])
        module.running_mean.copy_(flat.mean(0))
        module.running_var.copy_(flat.var(0, correction=0))
    twin = nn.Module()
    found = copy.deepcopy(model.state_dict())
    twin.state_dict = lambda: found  # type: ignore[method-assign,assignment,misc]
    model.load_state_dict(before)
    for module, mode in zip(model.modules(), was, strict=True):
        module.training = mode
    return twin


def test_a_pass_of_its_own_thread_rounds_as_autocast_asks() -> None:
    model = Hyper().network
    batches = [X[:12], X[12:] * 3]
    with torch.autocast("cpu", torch.bfloat16):
        twin = by_hooks_in_place(model, ["1", "3"], batches)
        change = fl.recalibrate(model, [(batch,) for batch in batches])
    assert_same(model, twin, rtol=1e-5)
    change.undo()
    fl.recalibrate(model, [(batch,) for batch in batches])
    with pytest.raises(AssertionError):
        assert_same(model, twin, rtol=1e-5)


def test_the_end_of_a_copy_does_not_release_what_the_model_holds() -> None:
    # As fastai's DynamicUnet, whose ``__del__`` removes the hooks that feed its decoder.
    class Kept:
        def __init__(self, module: Any) -> None:
            self.handle, self.value = module.register_forward_hook(self.keep), None

        def keep(self, _module: Any, _args: Any, output: Any) -> None:
            self.value = output

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
            self.kept = [Kept(self.encoder)]
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Any) -> Any:
            self.encoder(x)
            return self.norm(self.kept[0].value)

        def __del__(self) -> None:
            self.kept[0].handle.remove()

    model = Decoder()
    x = torch.randn(32, 3) * 3 + 1
    fl.recalibrate(model, [(x[:16],), (x[16:],)])
    gc.collect()
    assert len(model.encoder._forward_hooks) == 1
    torch.testing.assert_close(model.norm.running_mean, model.encoder(x).mean(0))


@pytest.mark.parametrize("limit", [0, 20_000])
def test_what_does_not_fit_in_memory_is_computed_again(limit: int) -> None:
    model, roomy = Deep(4), Deep(4)
    paths = [f"norms/{index}" for index in range(4)]
    done = recalibrated(TorchView(model).meter(paths), paths, X, batch_size=6, memory_limit=limit)
    assert done.passes > 1
    assert recalibrated(TorchView(roomy).meter(paths), paths, X, batch_size=6).passes == 1
    assert_same(model, roomy, rtol=1e-6)


def stream(stop: int = 4) -> Iterator[Any]:
    for index in range(stop):
        yield (X[6 * index : 6 * index + 6],)


@pytest.mark.parametrize("window", [0, 200, 1 << 20])
@pytest.mark.parametrize("tensors", [False, True])
def test_a_generator_is_read_once_and_waits_on_disk_where_it_does_not_fit(
    window: int, tensors: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("frostline.adapters.torch.lockstep.WINDOW", window)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, whole = Deep(3), Deep(3)
    written = []
    write = spool._Slots.write
    monkeypatch.setattr(spool._Slots, "write", lambda *given: written.append(1) or write(*given))
    paths = ["norms/0", "norms/1", "norms/2"]
    data = ((torch.from_numpy(np.asarray(x)) if tensors else x,) for (x,) in stream())
    recalibrated(TorchView(model).meter(paths), paths, data, memory_limit=1000)
    fl.recalibrate(whole, X, batch_size=6)
    assert_same(model, whole, rtol=1e-6)
    assert bool(written) == (window < 1000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["arrays", "tensors", "graphs"])
def test_phases_of_a_generator_are_those_of_a_list(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("frostline.measure.phases.WINDOW", 300)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, rng = Deep(2), np.random.default_rng(0)
    seen: list[Any] = []

    def step(net: Any, batch: Any) -> Any:
        seen.append(batch)
        return net(batch["x"] if kind == "graphs" else batch[0]).square().mean()

    pairs: list[Any] = [(np.asarray(x), rng.integers(0, 3, len(x))) for (x,) in stream()]
    if kind == "tensors":
        pairs = [tuple(map(torch.from_numpy, pair)) for pair in pairs]
    if kind == "graphs":  # a mapping of a class of its own is handed on as it is
        pairs = [UserDict(x=torch.from_numpy(x)) for x, _ in pairs]
    listed, given = fl.phases(model, pairs, step=step), len(seen)
    streamed = fl.phases(model, iter(pairs), step=step)
    assert [row.loss for row in streamed.rows] == [row.loss for row in listed.rows]
    assert [type(batch) for batch in seen[:given]] == [type(batch) for batch in seen[given:]]
    assert not list(tmp_path.iterdir())


class Fails(Deep):
    def forward(self, x: Any) -> Any:
        found = super().forward(x)
        if float(x.mean()) > 2:
            raise ArithmeticError("this batch is too much")
        return found


@pytest.mark.parametrize("problem", [ArithmeticError, KeyboardInterrupt])
def test_a_pass_that_raises_ends_all_and_nothing_is_changed(problem: Any) -> None:
    model = Fails(3)
    if problem is KeyboardInterrupt:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        model.norms[2].register_forward_pre_hook(interrupted)
    before, threads = statistics(model), threading.active_count()
    told = KeyboardInterrupt if problem is KeyboardInterrupt else ModelError
    with pytest.raises(told) as raised:
        fl.recalibrate(model, [(X[:8],), (X[8:16] + 4,), (X[16:],)])
    assert problem is KeyboardInterrupt or isinstance(raised.value.__cause__, problem)
    assert threading.active_count() == threads
    assert all(torch.equal(before[name], value) for name, value in statistics(model).items())
    assert model.training


def test_a_batch_that_overflows_inside_is_left_out_from_there_on() -> None:
    model = Deep(2)
    large = X[8:16].copy()
    large[0] = 3e38
    change = fl.recalibrate(model, [(X[:8],), (large,), (X[16:],)])
    assert_same(model, by_hooks(model, ["norms.0", "norms.1"], [X[:8], X[16:]]))
    assert any("skipped 1 of 3 batches" in note for note in change.notes)


def test_none_of_the_sites_is_used() -> None:
    model = Branches(swapped=False)
    with pytest.raises(ModelError, match="uses none of the chosen"):
        fl.recalibrate(model, X, sites=["unused"])


def test_instance_norm_gets_what_its_average_would_settle_at() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    fl.recalibrate(model, X, batch_size=7)
    with torch.no_grad():
        inner = model[0](torch.as_tensor(X)).double()
    np.testing.assert_allclose(model[1].running_mean, inner.mean((2, 3)).mean(0), rtol=1e-5)
    wanted = inner.var((2, 3), correction=0).mean(0)
    np.testing.assert_allclose(model[1].running_var, wanted, rtol=1e-5)


def test_a_lazy_model_stays_lazy_and_is_told_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    loss = nn.CrossEntropyLoss()
    for ask in (
        lambda: fl.recalibrate(model, X),
        lambda: fl.diagnose(model, (X, np.zeros(24, int)), loss=loss, verbose=0),
        lambda: fl.phases(model, (X, np.zeros(24, int)), loss=loss),
        lambda: fl.assert_frozen(model, data=X, params=False),
    ):
        with pytest.raises(ModelError, match="'3' is lazy"):
            ask()
        assert model[3].has_uninitialized_params()


def test_a_lazy_module_is_not_frozen_before_it_is_built() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    for ask in (lambda: fl.freeze(model), lambda: fl.freeze(model, until="2")):
        with pytest.raises(ModelError, match="'1' is lazy"):
            ask()
        assert all(p.requires_grad for p in model.parameters())
    fl.freeze(model, until="1")  # what is built is frozen beside it
    assert [p.requires_grad for p in model[0].parameters()] == [False, False]


class Recurrent(nn.Module):
    """BN behind its own output, at each step of a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.norm, self.head = nn.GRUCell(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], self.norm(h))
        return self.head(h)


def test_statistics_behind_their_own_output_do_not_run_away() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    batches = [(x := torch.randn(16, 3 + i % 3, 4), x[:, -1, :3].argmax(1)) for i in range(8)]
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(30):
        for x, y in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def loss() -> float:
        with torch.no_grad():
            found = [functional.cross_entropy(model.eval()(x), y).item() for x, y in batches]
        return sum(found) / len(found)

    before = loss()
    fl.recalibrate(model, batches)
    assert loss() < before + 0.1


class PerDomain(nn.Module):
    """One BN per domain; a batch has one domain."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList([nn.BatchNorm1d(8) for _ in range(3)])

    def forward(self, x: Any, domain: int) -> Any:
        return self.head(functional.relu(self.norms[domain](self.features(x))))


def test_a_site_that_only_later_batches_call_moves() -> None:
    torch.manual_seed(0)
    model = PerDomain()
    batches = [
        (x, i % 3, x[:, :3].argmax(1)) for i in range(9) for x in [torch.randn(32, 6) + i % 3]
    ]
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)

    def step(m: Any, batch: Any) -> Any:
        x, domain, y = batch
        return functional.cross_entropy(m(x, domain), y, reduction="none")

    for _ in range(40):
        for batch in batches:
            optimizer.zero_grad()
            step(model, batch).mean().backward()
            optimizer.step()
    model.norms[2].running_mean += 3
    report = fl.diagnose(model, batches, step=step, verbose=0)
    assert report.causes[0].sites == ("norms/2",)
    assert "STATS_NEVER_UPDATED" not in {cause.code for cause in report.causes}


def test_a_momentum_encoder_that_moves_in_forward_is_put_back() -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = (
                nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)
            )
            self.key.requires_grad_(False)

        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                for ours, theirs in zip(
                    self.query.parameters(), self.key.parameters(), strict=True
                ):
                    theirs.data = 0.9 * theirs.data + 0.1 * ours.data
            return self.query(x), self.key(x)

    torch.manual_seed(0)
    model = Momentum()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(24, 3) * 2 + 1
    fl.recalibrate(model, [(x[:12],), (x[12:],)])
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert moved
    assert all("running" in name for name in moved)
