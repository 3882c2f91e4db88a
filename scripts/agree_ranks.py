"""Recalibrate a network by 2, 4 and 8 gloo processes, and compare with one that has all the data.

    python scripts/agree_ranks.py --json docs/results/agreeing_ranks.json

The shards have 0, 1, 7 and 500 samples; everything is float64. Networks: EfficientNet-Lite0 on
images of 32 pixels, so that it ends, and a small one. Every rank must store the same bits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import frostline as fl

SHARDS = {2: (500, 7), 4: (0, 1, 7, 500), 8: (0, 1, 7, 500, 3, 0, 20, 1)}
SIDE = {"small": 12, "EfficientNet-Lite0": 32}


def network(name: str) -> Any:
    """A network in float64, the same on every rank."""
    torch.manual_seed(0)
    if name == "small":
        made = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip
    else:
        library = importlib.import_module("efficientnet_lite_pytorch")
        made = library.EfficientNet.from_name("efficientnet-lite0")
    return made.double().eval()


def batches(name: str, rank: int, count: int) -> list[Any]:
    """The shard of a rank, of a distribution of its own."""
    generator = torch.Generator().manual_seed(rank)
    side = SIDE[name]
    x = torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
    return [(part,) for part in (x * (1 + 0.2 * rank) + 0.3 * rank).split(32)] if count else []


def statistics(model: Any) -> Any:
    """Means and variances, in one vector each site."""
    state = model.state_dict()
    return torch.cat([value.reshape(-1) for name, value in state.items() if "running" in name])


def work(rank: int, world: int, folder: str, name: str, method: Any) -> None:
    """One rank; rank 0 compares with one process that has all the data."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=world,
        timeout=timedelta(minutes=20),
    )  # fmt: skip
    model = network(name)
    began = time.monotonic()
    fl.recalibrate(model, batches(name, rank, SHARDS[world][rank]), method=method)
    seconds, found = time.monotonic() - began, statistics(model)
    everyone = [torch.empty_like(found) for _ in range(world)]
    distributed.all_gather(everyone, found)
    distributed.destroy_process_group()
    if rank:
        return
    alone = network(name)
    whole = [b for each, count in enumerate(SHARDS[world]) for b in batches(name, each, count)]
    fl.recalibrate(alone, whole, method=method)
    wanted = statistics(alone)
    farthest = ((found - wanted).abs() / wanted.abs().clamp(min=1e-3)).max()
    notes = {
        "network": name,
        "image side": SIDE[name],
        "method": method,
        "processes": world,
        "shards": SHARDS[world],
        "all ranks bit-identical": all(torch.equal(each, found) for each in everyone),
        "largest relative difference": float(farthest),
        "seconds": round(seconds, 1),
    }
    Path(folder, "notes.json").write_text(json.dumps(notes))


def main() -> None:
    """Run all, print a line each, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=tuple(SIDE))
    options = parser.parse_args()
    rows = []
    for name in (options.only,) if options.only else tuple(SIDE):
        for world in SHARDS:
            for method in ("sequential", "batch"):
                with tempfile.TemporaryDirectory() as folder:
                    context = multiprocessing.get_context("fork")
                    started = [
                        context.Process(target=work, args=(rank, world, folder, name, method))
                        for rank in range(world)
                    ]
                    for each in started:
                        each.start()
                    for each in started:
                        each.join()
                    rows.append(json.loads(Path(folder, "notes.json").read_text()))
                print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
