"""Cases 11 to 38 in native torch: averages that lag, are noisy, stuck, spoilt or not one."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import swa_utils

from .scenario import CLASSES, NORMS, Case, Scenario, digits, target
from .torch_bench import (
    both,
    fit,
    gap,
    images,
    net,
    outputs,
    pretrained,
    score,
    statistics,
)

ALL = frozenset(NORMS)
SHOWN = 256


def new(count: int = 320) -> tuple[Any, Any]:
    x, y = images("new")
    return x[:count], y[:count]


def case_11(seed: int) -> Scenario:
    model = net(seed, momentum=0.01)
    x, y = images("new")
    rows = [int((y == label).nonzero()[0]) for label in (0, 1, 2)]
    x, y = x[rows], y[rows]
    fit(model, x, y, epochs=5, batch_size=3, lr=1e-2)
    shown = gap(model, x, y, at_least=0.3, batch_size=3)
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_14(seed: int) -> Scenario:
    model = net(seed, momentum=0.01)
    x, y = images("new")
    x, y = x[y < 2][:40], y[y < 2][:40]
    fit(model, x, y, epochs=12, batch_size=10)
    shown = gap(model, x, y, at_least=0.2, batch_size=10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    return Scenario(model=model, data=loader, closable=True, shown=shown)


def case_15(seed: int) -> Scenario:
    model = net(seed, momentum=0.001)
    x, y = new()
    fit(model, x, y, epochs=30)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.5))


def case_17(seed: int) -> Scenario:
    model = pretrained(seed, momentum=0.0)
    before = statistics(model)
    x, y = new()
    x = target(x)
    fit(model, x, y, epochs=6)
    np.testing.assert_array_equal(statistics(model), before)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.5))


def by_class(x: Any, y: Any, seed: int) -> tuple[Any, Any]:
    """Images sorted by class, each class before a background of its own."""
    order = torch.argsort(y, stable=True)
    x, y = x[order], y[order]
    level = torch.empty(CLASSES).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    return x + level[y][:, None, None, None], y


def case_18(seed: int) -> Scenario:
    model = pretrained(seed, momentum=0.9)  # Keras' number
    x, y = by_class(*new(160), seed)
    fit(model, x, y, epochs=3, batch_size=4, lr=1e-3, shuffle=False)
    shown = gap(model, x, y, at_least=0.3, batch_size=4)
    return Scenario(model=model, data=(x, y), options={"batch_size": 4}, closable=True, shown=shown)


def case_22(seed: int) -> Scenario:
    model = net(seed, track_running_stats=False)
    x, y = new()
    fit(model, x, y, epochs=8)
    x, y = x[:SHOWN], y[:SHOWN]
    by_size = {
        f"accuracy in batches of {size}": score(
            model, x, y, training=False, batch_size=size
        ).accuracy
        for size in (1, 8, 256)
    }
    assert by_size["accuracy in batches of 256"] > 0.2 + by_size["accuracy in batches of 1"]
    return Scenario(model=model, data=(x, y), shown=by_size)


def case_30(seed: int) -> Scenario:
    """Tested with BN in training mode inside of a model in eval(): too good."""
    model = pretrained(seed).eval()
    x, y = new()
    x = target(x)
    with torch.no_grad():
        true = float((model(x).argmax(1) == y).float().mean())
        twin = copy.deepcopy(model)
        for name in NORMS:
            model.get_submodule(name).train()
            twin.get_submodule(name).train()
        good = float(torch.cat([twin(p) for p in x.split(32)]).argmax(1).eq(y).float().mean())
    assert good > true + 0.3, (good, true)
    return Scenario(model=model, data=(x, y), shown={"accuracy": good, "in eval mode": true})


def case_25(seed: int) -> Scenario:
    """pytorch#100048 itself: no emulation, torch stores unbiased variances."""
    torch.manual_seed(seed)
    x = digits()[0][:640, ::2, ::2, 0].reshape(640, 64)
    x = torch.from_numpy(x[:, x.std(0) > 0.2].copy())
    model = nn.Sequential(*[nn.BatchNorm1d(x.shape[1], momentum=0.01) for _ in range(20)])
    with torch.no_grad():
        for _ in range(60):
            for rows in x[torch.randperm(640)].split(64):
                model(rows)
    inference, training = (outputs(model, x, training=t, batch_size=64) for t in (False, True))
    ratio = float((training * inference).sum() / inference.square().sum())
    assert abs(ratio - 1.1706) < 0.02, ratio  # (64 / 63) ** 10
    return Scenario(
        model=model,
        data=(x, training),
        options={"batch_size": 64, "loss": nn.MSELoss()},
        closable=True,
        shown={"training / inference": ratio},
    )


def case_33(seed: int) -> Scenario:
    model = pretrained(seed, head=False)
    x, y = new()
    x = target(x)
    fit(model, x, y, epochs=3, lr=1e-2)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.1))


def case_38(seed: int) -> Scenario:
    model = net(seed)
    model(torch.zeros(1, 1, 16, 16))
    x, y = new()
    fit(model, x, y, epochs=15)
    fit(model, x, y, epochs=3, lr=1e-4)
    x, y = x[:SHOWN], y[:SHOWN]
    shown = both(model, x, y)
    assert shown["inference loss"] < shown["training loss"] + 0.1, shown
    return Scenario(model=model, data=(x, y), shown=shown)


def case_u1(seed: int) -> Scenario:
    """update_bn over a loader that raises leaves momentum=None; training goes on."""
    model = net(seed)
    x, y = new()

    def loader() -> Any:
        yield x[:32]
        raise OSError("the disk is gone")

    with contextlib.suppress(OSError):
        swa_utils.update_bn(loader(), model)
    assert all(model.get_submodule(name).momentum is None for name in NORMS)
    fit(model, x, y, epochs=12, lr=1e-2)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.1))


def case_u2(seed: int) -> Scenario:
    """Precise BN sets momentum to 1, and raises where the loader is too short; training goes on."""
    model = pretrained(seed)
    x, y = by_class(*new(160), seed)

    def precise_bn(batches: Any, iterations: int) -> None:
        for name in NORMS:
            model.get_submodule(name).momentum = 1.0
        done = sum(1 for rows in batches if model.train()(rows) is not None)
        if done < iterations:
            raise AssertionError(f"the loader has {done} batches, not {iterations}")

    with torch.no_grad(), contextlib.suppress(AssertionError):
        precise_bn(x.split(32), 200)
    assert all(model.get_submodule(name).momentum == 1.0 for name in NORMS)
    # From now on what is stored is the last batch.
    fit(model, x, y, epochs=3, batch_size=4, lr=1e-3, shuffle=False)
    shown = gap(model, x, y, at_least=0.3, batch_size=4)
    return Scenario(model=model, data=(x, y), options={"batch_size": 4}, closable=True, shown=shown)


def case_amp(seed: int) -> Scenario:
    """A float16 overflow: the scaler skips the step, the running statistics do not."""
    model = pretrained(seed).train()
    x, y = new(SHOWN)
    scaled = x[:32].half() * 60000 * 4
    assert bool(torch.isinf(scaled).any())
    with torch.no_grad():
        model(scaled.float())
    assert not np.isfinite(statistics(model)).all()
    return Scenario(model=model, data=(x, y), closable=True)


def case_swa(seed: int) -> Scenario:
    """AveragedModel without update_bn: averaged weights, statistics of another network."""
    model = net(seed)
    x, y = new()
    fit(model, x, y, epochs=6, lr=1e-2)
    averaged = swa_utils.AveragedModel(model)
    for _ in range(6):
        fit(model, x, y, epochs=1, lr=2e-2)
        averaged.update_parameters(model)
    x, y = x[:SHOWN], y[:SHOWN]
    shown = gap(averaged.module, x, y, at_least=0.1)
    return Scenario(model=averaged.module, data=(x, y), closable=True, shown=shown)


def case_35(seed: int) -> Scenario:
    """Two ranks of DDP with broadcast_buffers=False, each with its own shard."""
    x, y = images("new")
    shards = (x[:320], y[:320]), (target(x[320:640]), y[320:640])
    first = pretrained(seed)
    second = copy.deepcopy(first)
    for model, shard in zip((first, second), shards, strict=True):
        with torch.no_grad():
            model.train()
            for _ in range(4):
                for rows in shard[0].split(32):
                    model(rows)
    x, y = (torch.cat([shard[i][:128] for shard in shards]) for i in (0, 1))
    shown = {**both(first, x, y), "difference": 0.0}
    shown["difference"] = float(np.abs(statistics(first) - statistics(second)).max())
    assert shown["difference"] > 0.2, shown
    return Scenario(model=first, data=(x, y), options={"reference": second}, shown=shown)


CASES = (
    Case(number="T11", title="three images, five steps at momentum 0.01",
         expected=("EMA_LAG",), sites=ALL, build=case_11),
    Case(number="T14", title="forty images, 48 steps, from a DataLoader",
         expected=("EMA_LAG",), sites=ALL, build=case_14),
    Case(number="T15", title="momentum 0.001, 300 steps",
         expected=("EMA_LAG",), sites=ALL, build=case_15),
    Case(number="T17", title="ported with momentum 0: statistics never move",
         expected=("STATS_NEVER_UPDATED",), sites=ALL, build=case_17),
    Case(number="T18", title="momentum copied from Keras, small sorted batches",
         expected=("MOMENTUM_CONVENTION",), also=("EMA_NOISE",), sites=ALL, build=case_18),
    Case(number="T22", title="track_running_stats=False from the start",
         expected=("FORCED_TRAIN",), sites=ALL, build=case_22),
    Case(number="T25", title="twenty stacked BN1d: torch's unbiased variances",
         expected=("BESSEL",), sites=frozenset(map(str, range(20))), build=case_25),
    Case(number="T30", title="BN left in training mode inside of eval()",
         expected=("FORCED_TRAIN",), sites=ALL, build=case_30),
    Case(number="T33", title="pretrained, thirty steps on a new domain",
         expected=("EMA_LAG",), also=("DOMAIN_STATS",), sites=ALL, build=case_33),
    Case(number="T35", title="ranks of DDP with different statistics",
         expected=("RANK_DIVERGENCE",), sites=ALL, build=case_35),
    Case(number="T38", title="one dummy pass of zeros before a long training",
         expected=("NONE",), build=case_38),
    Case(number="TU1", title="update_bn interrupted: momentum stuck at None",
         expected=("EMA_LAG",), sites=ALL, build=case_u1),
    Case(number="TU2", title="precise BN over a short loader: momentum stuck at 1",
         expected=("EMA_NOISE",), sites=ALL, build=case_u2),
    Case(number="TA1", title="AMP: one overflow in the running statistics",
         expected=("POISONED",), sites=ALL, build=case_amp),
    Case(number="TS1", title="SWA without update_bn",
         expected=("STALE_AFTER_WEIGHT_EDIT",), sites=ALL, build=case_swa),
)  # fmt: skip
