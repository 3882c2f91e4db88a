"""Run by models/test_torch_distributed.py: two gloo processes train one frozen model with DDP."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.multiprocessing import spawn

import frostline as fl


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4),
        nn.Linear(4, 1),
    )  # fmt: skip


def work(rank: int, file: str) -> None:
    distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = build()
    model[1].running_mean.fill_(0.5)
    fl.freeze(model, 3)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    parallel = nn.parallel.DistributedDataParallel(model)
    assert [site.policy for site in fl.sites(parallel)] == ["inference", "update"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(3):
        parallel.train()
        # Other data on each rank: statistics of batches would differ.
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank)) + rank
        optimizer.zero_grad()
        parallel(x).square().mean().backward()
        optimizer.step()
    fl.assert_frozen(parallel, 3)
    state = model.state_dict()
    for name in ("1.running_mean", "1.running_var", "0.weight", "1.weight"):
        assert torch.equal(state[name], start[name]), name
    assert not torch.equal(state["5.weight"], start["5.weight"])
    mine = torch.cat([value.double().reshape(-1) for name, value in sorted(state.items())
                      if not name.startswith("4.running")])  # fmt: skip
    both = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(both, mine)
    assert torch.equal(both[0], both[1]), "the ranks disagree"
    parts = fl.split(parallel)
    assert parts.suffix.get_submodule("5") is model[5]
    assert "DistributedDataParallel was taken off" in parts.notes[-1]
    Path(f"{file}.{rank}").touch()
    distributed.destroy_process_group()


if __name__ == "__main__":
    spawn(work, (sys.argv[1],), nprocs=2)
