"""Run by test_distributed_measuring.py: gloo processes look at one model together.

    python tests/slow/distributed_measuring.py PROCESSES FOLDER [kill]

Every rank writes FOLDER/RANK.json; what takes all ranks' data is computed by each alone, too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import frostline as fl

SHARDS = {2: (150, 7), 3: (80, 80, 80), 4: (120, 0, 1, 60)}
TIMEOUT = 20.0


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def data(world: int) -> list[Any]:
    """``(x, y)`` of each rank, of other distributions."""
    random = np.random.default_rng(1)
    return [
        (
            (random.normal(size=(size, 6)) * (1 + rank) + rank).astype(np.float32),
            random.integers(0, 3, size),
        )
        for rank, size in enumerate(SHARDS[world])
    ]


def losses(outputs: Any, y: Any) -> Any:
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def state(model: Any) -> list[Any]:
    return [value.clone() for value in model.state_dict().values()]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def plain(report: Any) -> str:
    """A report as text, without the seconds that it took."""
    found = report.as_dict()
    found["measurement"].pop("cost", None)
    return json.dumps(found, sort_keys=True)


def refused(call: Any) -> str:
    try:
        call()
    except (fl.FrostlineError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def failing(shard: Any, how: Any) -> Any:
    """Batches of which the third cannot be read."""

    class Batches:
        def __iter__(self) -> Any:
            x, y = shard
            for start in range(0, len(x), 16):
                if start == 32:
                    how()
                yield torch.as_tensor(x[start : start + 16]), torch.as_tensor(y[start : start + 16])

    return Batches()


def unreadable() -> None:
    raise OSError("the disk of this rank is gone")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work(rank: int, world: int, folder: str, kill: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    notes: dict[str, Any] = {}
    parts = data(world)
    shard = parts[rank]
    model = network()
    whole = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
    if kill:
        before, began = state(model), time.monotonic()
        own = failing(shard, killed) if rank == 0 else shard
        verb = fl.diagnose if kill == "diagnose" else fl.phases
        notes["kill"] = refused(lambda: verb(model, own, loss=losses))
        notes["seconds"] = time.monotonic() - began
        notes["as before"] = same(state(model), before)
        Path(folder, f"{rank}.json").write_text(json.dumps(notes))
        os._exit(0)

    # Statistics of each rank are its own, as training leaves them.
    model[1].running_mean.fill_(0.1 * rank)
    before = state(model)
    table = fl.phases(model, shard, loss=losses)
    alone = network()
    alone[1].running_mean.fill_(0.0)
    single = fl.phases(alone, whole, loss=losses, process_group=False)
    notes["samples"] = [table.samples, single.samples]
    notes["phase 0"] = [[t["0"].loss, t["0"].metrics["accuracy"]] for t in (table, single)]
    notes["phase 1"] = table["1"].loss
    notes["patterns"] = list(table.patterns)
    notes["phases as before"] = same(state(model), before)

    report = fl.diagnose(model, shard, loss=losses, max_samples=128, verbose=0)
    notes["report"] = plain(report)
    notes["drawn"] = report.measurement.samples
    notes["notes"] = list(report.measurement.notes)
    notes["as before"] = same(state(model), before)

    spread = fully_shard(network(), mesh=init_device_mesh("cpu", (world,)))
    spread[1].running_mean.fill_(0.1 * rank)
    table = fl.phases(spread, shard, loss=losses)
    notes["phase 0 sharded"] = [table["0"].loss, table["0"].metrics["accuracy"]]
    other = fl.diagnose(spread, shard, loss=losses, max_samples=128, verbose=0)
    notes["report sharded"] = plain(other)
    with fl.watch(spread, shard, loss=losses, max_samples=64) as watching:
        notes["watch sharded"] = watching.check().gap
    with fl.recalibrated(spread, shard):
        pass
    notes["sharded as before"] = same(list(spread.buffers()), list(model.buffers()))
    notes["still sharded"] = sorted({type(p).__name__ for p in spread.parameters()})

    bad = failing(shard, unreadable) if rank == 0 else shard
    notes["raise phases"] = refused(lambda: fl.phases(model, bad, loss=losses))
    notes["raise diagnose"] = refused(lambda: fl.diagnose(model, bad, loss=losses, verbose=0))
    notes["nothing"] = refused(lambda: fl.phases(model, [], loss=losses))
    odd = [({"x": object()}, 1)] if rank == 0 else shard
    notes["odd"] = refused(
        lambda: fl.diagnose(model, odd, step=lambda m, b: m(b["x"]).sum(), verbose=0)
    )

    with fl.watch(model, shard, loss=losses, max_samples=64) as watching:
        first = watching.check()
        if rank == world - 1:
            model[4].running_mean.add_(1.0)
    last = watching.checks[-1]
    notes["watch"] = [first.drift, first.gap, last.drift, last.gap]
    notes["still as before"] = same(state(model)[:-6], before[:-6])
    Path(folder, f"{rank}.json").write_text(json.dumps(notes))
    distributed.destroy_process_group()


if __name__ == "__main__":
    words = sys.argv[3:]
    arguments = (int(sys.argv[1]), sys.argv[2], words[0] if words else "")
    started = [
        multiprocessing.get_context("spawn").Process(target=work, args=(rank, *arguments))
        for rank in range(arguments[0])
    ]
    for each in started:
        each.start()
    for each in started:
        each.join()
