"""`fl.recalibrate` in 2 and 4 gloo processes: shards of any length, a rank that raises or dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)


#: Layers sharded one inside the other, in one process, that are looked at and trained by turns.
BY_TURNS = """
import copy
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
import frostline as fl

store = distributed.FileStore("group", 1)
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
block = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
plain = nn.Sequential(block, nn.Linear(8, 3))
model = copy.deepcopy(plain)
fully_shard(model[0])
fully_shard(model)
x, y = torch.randn(64, 6), torch.arange(64) % 3

def step(net):
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    with torch.no_grad():
        [p.sub_(0.1 * p.grad) for p in net.parameters()]
    net.zero_grad()
    return loss.item()

for _ in range(2):
    fl.phases(model, [(x, y)], loss=F.cross_entropy)
    fl.diagnose(model, [(x, y)], loss=F.cross_entropy, verbose=0)
    fl.recalibrate(model, [(x, y)]).undo()
    assert step(model) == step(plain)
distributed.destroy_process_group()
"""


def ranks(processes: int, folder: Path, *words: str) -> list[Any]:
    """What each rank wrote down; a rank that was killed writes nothing."""
    script = Path(__file__).parent / "distributed_recalibrate.py"
    command = [sys.executable, str(script), str(processes), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    files = [folder / f"{rank}.json" for rank in range(processes - ("kill" in words))]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("processes", [2, 4])
def test_all_ranks_store_the_statistics_of_all_the_data(processes: int, tmp_path: Path) -> None:
    found = ranks(processes, tmp_path)  # that the ranks are equal bit for bit is asserted in there
    for rank, notes in enumerate(found):
        names = ("chain sequential", "chain batch", "Branches batch", "sharded sequential",
                 "sharded batch")  # fmt: skip
        for name in names:
            assert notes[name] < 1e-11, (rank, name)
        assert notes["Branches sequential"] < 1e-6, rank  # settles to 1e-6
        for at in ("raise 0", "raise 3", "raise sharded"):
            own = "OSError: the disk of this rank is gone"
            other = f"FrostlineError: rank 1 of {processes} raised {own}"
            assert notes[at].startswith(own if rank == 1 else other), rank
        for state in ("as before 0", "as before 3", "as before sharded", "as before"):
            assert notes[state] is True, (rank, state)
        assert "'3.weight' has other values on rank" in notes["other weights"]
        assert "'0.weight' is [" in notes["other shapes"]
        assert "method='batch' on rank 1" in notes["other options"]
        assert "hold no samples, here or on any other rank" in notes["nothing"]
        assert "must make this call together" in notes["sharded alone"]
        if "sharded in a pair" in notes:
            assert f"over the ranks {list(range(processes))}" in notes["sharded in a pair"]
        assert "sharded over the ranks by the first FSDP" in notes["first FSDP"]
        assert notes["frozen"].startswith("NotFrozenError: 4 of 4 BN layers are not frozen")
        assert "on rank 1" in notes["frozen"]
        assert notes["all frozen"] == "nothing was raised"
        assert "init_process_group first" in notes["no group"]
        assert "must be a group of" in notes["not a group"]
        assert ("not in the group" in notes.get("outside", "")) == (rank > 1)


def test_a_sharded_model_of_one_process_is_looked_at_and_trained(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BY_TURNS]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_rank_that_is_killed_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    for rank, notes in enumerate(ranks(3, tmp_path, "kill")):
        assert notes["kill"].startswith(f"FrostlineError: rank {rank} of 3 lost the others")
        assert notes["as before"] is True
        assert notes["seconds"] < 60  # the timeout of the group is 20 s
