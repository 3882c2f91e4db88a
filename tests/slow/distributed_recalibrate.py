"""Run by test_distributed_recalibrate.py: several gloo processes recalibrate one model together.

    python tests/slow/distributed_recalibrate.py PROCESSES FOLDER [kill]

Every rank writes FOLDER/RANK.json; the asserts are here, where the ranks can be compared.
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

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import frostline as fl

#: Samples per rank; a rank without any takes part nevertheless.
SHARDS = {2: (50, 7), 4: (50, 0, 1, 7)}
TIMEOUT = 20.0


class Branches(nn.Module):
    """Two branches used against the order of registration, one layer twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(4)
        self.twice = nn.BatchNorm1d(5)
        self.first = nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)
        self.unused = nn.BatchNorm1d(3)

    def forward(self, x: Any) -> Any:
        x = self.twice(self.first(x)).relu()
        if x.mean() > -9:  # torch.fx cannot follow
            x = self.twice(x)
        return self.last(self.head(x))


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3),
    )  # fmt: skip


def seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make().double()


def data(shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """A shard per rank, each of another distribution."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64)
    parts = list(whole.split(list(sizes)))
    return [part * (1 + 0.5 * rank) + rank for rank, part in enumerate(parts)]


def batches_of(part: torch.Tensor, size: int) -> list[tuple[torch.Tensor]]:
    return [(batch,) for batch in part.split(size)] if len(part) else []


def statistics(model: Any) -> torch.Tensor:
    """All in one vector, but for what no pass uses: there each rank keeps what it had."""
    named = sorted(model.state_dict().items())
    used = [v for name, v in named if "running" in name and not name.startswith("unused")]
    return torch.cat([value.double().reshape(-1) for value in used])


def same_everywhere(mine: torch.Tensor) -> bool:
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, mine)
    return all(torch.equal(each, mine) for each in everyone)


def agreeing(make: Any, shape: tuple[int, ...], method: str, rank: int, world: int) -> float:
    """Largest relative difference from one process that has all the data; asserts equal ranks."""
    parts = data(shape, SHARDS[world])
    model, alone = seeded(make), seeded(make)
    wrapped = nn.parallel.DistributedDataParallel(model)
    # Statistics of each rank are its own beforehand, as training leaves them.
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.fill_(rank)
    shard = batches_of(parts[rank], 8 - rank)
    change = fl.recalibrate(wrapped, shard, method=method)  # type: ignore[arg-type]
    assert f"merged over {world} processes" in str(change), change
    assert f"on {sum(SHARDS[world])} samples" in change.text, change
    found = statistics(model)
    assert same_everywhere(found), f"{make.__name__} {method}: the ranks disagree"
    everything = [b for index, part in enumerate(parts) for b in batches_of(part, 8 - index)]
    single = fl.recalibrate(alone, everything, method=method, process_group=False)  # type: ignore[arg-type]
    assert "merged" not in str(single)
    wanted = statistics(alone)
    change.undo()
    own = [v for name, v in model.state_dict().items() if name.endswith("running_mean")]
    assert all(torch.equal(mean, torch.full_like(mean, rank)) for mean in own)
    return float(((found - wanted).abs() / (wanted.abs() + 1e-3)).max())


def sharded(make: Any, world: int) -> Any:
    """A model that FSDP2 has spread over all ranks: a layer of its own, then the rest."""
    model = seeded(make)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model[3], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def agreeing_when_sharded(method: Any, rank: int, world: int) -> float:
    """As :func:`agreeing`, of a model that FSDP2 has sharded; asserts that it is so afterwards."""
    parts = data((2, 8, 8), SHARDS[world])
    model, alone = sharded(chain, world), seeded(chain)
    kinds = [type(module) for module in model.modules()]
    for each in (model, alone):
        for step in range(2):
            each(parts[0][:4] + step).sum().backward()
    change = fl.recalibrate(model, batches_of(parts[rank], 8 - rank), method=method)
    found = statistics(model)
    assert same_everywhere(found), f"sharded {method}: the ranks disagree"
    everything = [b for index, part in enumerate(parts) for b in batches_of(part, 8 - index)]
    fl.recalibrate(alone, everything, method=method, process_group=False)
    wanted = statistics(alone)
    assert [type(module) for module in model.modules()] == kinds
    assert {type(p).__name__ for p in model.parameters()} == {"DTensor"}
    for each in (model, alone):
        each(parts[0][:4]).sum().backward()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)
    change.undo()
    assert {type(value).__name__ for value in model.buffers()} == {"Tensor"}
    return float(((found - wanted).abs() / (wanted.abs() + 1e-3)).max())


class FullyShardedDataParallel(nn.Sequential):
    """By its name the first FSDP, which cannot gather its parameters for a forward pass."""


class Failing:
    """Batches of which one cannot be read on one rank."""

    def __init__(self, batches: list[Any], at: int | None, how: Any) -> None:
        self.batches, self.at, self.how = batches, at, how

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.batches):
            if number == self.at:
                self.how()
            yield batch


def unreadable() -> None:
    raise OSError("the disk of this rank is gone")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused(call: Any) -> str:
    try:
        call()
    except fl.FrostlineError as error:
        return f"{type(error).__name__}: {error}"
    except OSError as error:
        return f"OSError: {error}"
    return "nothing was raised"


def exchanged(call: Any) -> set[torch.dtype]:
    """What the ranks send each other during a call."""
    library: Any = distributed
    plain, seen = library.all_gather, set()

    def gather(out: Any, mine: Any, **more: Any) -> None:
        seen.add(mine.dtype)
        plain(out, mine, **more)

    library.all_gather = gather
    try:
        call()
    finally:
        library.all_gather = plain
    return seen


def work(rank: int, world: int, folder: str, kill: bool) -> None:
    torch.set_num_threads(1)
    notes: dict[str, Any] = {}
    notes["no group"] = refused(lambda: fl.recalibrate(seeded(chain), [], process_group=object()))
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    shard = batches_of(data((2, 8, 8), (40,) * world)[rank], 8)
    model = seeded(chain)
    before = statistics(model)
    if kill:
        last = world - 1
        began = time.monotonic()
        failing = Failing(shard, 2 if rank == last else None, killed)
        notes["kill"] = refused(lambda: fl.recalibrate(model, failing))
        notes["seconds"] = time.monotonic() - began
        notes["as before"] = torch.equal(statistics(model), before)
        Path(folder, f"{rank}.json").write_text(json.dumps(notes))
        os._exit(0)  # the group is broken: leaving it would wait for the one that is gone

    for make, shape in ((chain, (2, 8, 8)), (Branches, (6,))):
        for method in ("sequential", "batch"):
            notes[f"{make.__name__} {method}"] = agreeing(make, shape, method, rank, world)

    for at in (0, 3):
        failing = Failing(shard, at if rank == 1 else None, unreadable)
        notes[f"raise {at}"] = refused(lambda failing=failing: fl.recalibrate(model, failing))
        notes[f"as before {at}"] = torch.equal(statistics(model), before)
    other = seeded(chain)
    if rank == 1:
        with torch.no_grad():
            other[3].weight[0, 0, 0, 0] += 1
    notes["other weights"] = refused(lambda: fl.recalibrate(other, shard))
    wide = nn.Sequential(nn.Linear(6, 4 + rank), nn.BatchNorm1d(4 + rank))
    notes["other shapes"] = refused(lambda: fl.recalibrate(wide, shard))
    method: Any = "batch" if rank == 1 else "sequential"
    notes["other options"] = refused(lambda: fl.recalibrate(model, shard, method=method))
    notes["nothing"] = refused(lambda: fl.recalibrate(model, []))
    notes["not a group"] = refused(lambda: fl.recalibrate(model, shard, process_group="all"))
    for method in ("sequential", "batch"):
        notes[f"sharded {method}"] = agreeing_when_sharded(method, rank, world)
    spread = sharded(chain, world)
    failing = Failing(shard, 3 if rank == 1 else None, unreadable)
    notes["raise sharded"] = refused(lambda: fl.recalibrate(spread, failing))
    assert {type(p).__name__ for p in spread.parameters()} == {"DTensor"}
    notes["as before sharded"] = torch.equal(statistics(spread), before)
    notes["sharded alone"] = refused(lambda: fl.recalibrate(spread, shard, process_group=False))
    first = FullyShardedDataParallel(*seeded(chain))
    notes["first FSDP"] = refused(lambda: fl.recalibrate(first, shard))
    carried = exchanged(lambda: fl.recalibrate(model, shard).undo())
    assert carried == {torch.uint8}, carried  # float64 arrives on a backend without it as well
    pair = distributed.new_group([0, 1])
    if world > 2 and rank < 2:
        notes["sharded in a pair"] = refused(
            lambda: fl.recalibrate(spread, shard, process_group=pair)
        )
    if rank > 1:
        notes["outside"] = refused(lambda: fl.recalibrate(model, shard, process_group=pair))
    else:
        assert "merged over 2" in str(fl.recalibrate(seeded(chain), shard, process_group=pair))
    notes["as before"] = torch.equal(statistics(model), before)
    if rank == 0:
        fl.freeze(model)
    notes["frozen"] = refused(lambda: fl.assert_frozen(model, data=shard))
    fl.freeze(model)
    notes["all frozen"] = refused(lambda: fl.assert_frozen(model, data=shard))
    Path(folder, f"{rank}.json").write_text(json.dumps(notes))
    distributed.destroy_process_group()


if __name__ == "__main__":
    processes = int(sys.argv[1])
    arguments = (processes, sys.argv[2], "kill" in sys.argv[3:])
    # Not torch's own spawn: it ends all as soon as one is gone.
    started = [
        multiprocessing.get_context("spawn").Process(target=work, args=(rank, *arguments))
        for rank in range(processes)
    ]
    for each in started:
        each.start()
    for each in started:
        each.join()
