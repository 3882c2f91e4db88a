"""Print whose BN statistics are those of all the data, where each process has a part.

Four processes with shards of 400, 100, 30 and 7 samples, each of another distribution; the first
BN layer of a small network, whose inputs no statistics change; 64 samples per batch. Running
statistics are cumulative (``momentum=None``), so that no lag is mixed in. timm and fvcore are run
from their packages and left out where they are not installed.

Usage: ``python scripts/compare_distributed.py [--json docs/results/distributed.json]``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import frostline as fl

ROOT = Path(__file__).resolve().parents[1]
SHARDS = (400, 100, 30, 7)
PACKAGES = ("torch", "timm", "fvcore")
Tool = Callable[[Any, list[torch.Tensor]], None]


def network() -> Any:
    """The network, the same on every rank; statistics as at the start."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, momentum=None),
    ).double()  # fmt: skip


def shards() -> list[torch.Tensor]:
    """What each rank reads."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64) * (1 + rank) + rank
        for rank, count in enumerate(SHARDS)
    ]


def trained(model: Any, batches: list[torch.Tensor]) -> None:
    """A pass in training mode: what stands in the buffers after an epoch."""
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)


def each_its_own(model: Any, batches: list[torch.Tensor]) -> None:
    """What each rank stores without any exchange."""
    trained(model, batches)


def broadcast(model: Any, batches: list[torch.Tensor]) -> None:
    """DDP as it is by default: the buffers of rank 0 for all, at the next forward pass."""
    trained(model, batches)
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)
    parallel.train()  # in evaluation mode DDP sends no buffers, and each rank keeps its own
    first = model[1]
    hook = first.register_forward_pre_hook(_stop)
    with contextlib.suppress(_BuffersSentError):
        parallel(batches[0])
    hook.remove()


class _BuffersSentError(Exception):
    """The buffers have been sent; the pass itself would move them again."""


def _stop(*_: Any) -> None:
    raise _BuffersSentError


def timm_reduce(model: Any, batches: list[torch.Tensor]) -> None:
    """timm: the mean of the ranks' means, and of their variances."""
    from timm.utils import distribute_bn  # type: ignore[import-not-found]

    trained(model, batches)
    distribute_bn(model, len(SHARDS), reduce=True)


def fvcore_then_timm(model: Any, batches: list[torch.Tensor]) -> None:
    """Fvcore's precise BN on each rank, averaged over the ranks as timm does."""
    from fvcore.nn.precise_bn import update_bn_stats  # type: ignore[import-untyped]

    model.train()
    update_bn_stats(model, batches, num_iters=len(batches))
    for name, buffer in model.named_buffers():
        if "running" in name:
            distributed.all_reduce(buffer)
            buffer /= len(SHARDS)


def fvcore_alone(model: Any, batches: list[torch.Tensor]) -> None:
    """Fvcore's precise BN, of the data of each rank."""
    from fvcore.nn.precise_bn import update_bn_stats

    model.train()
    update_bn_stats(model, batches, num_iters=len(batches))


def merged(model: Any, batches: list[torch.Tensor]) -> None:
    """What the ranks store, merged as populations of as many samples as they have."""
    trained(model, batches)
    states: list[Any] = [None] * len(SHARDS)
    distributed.all_gather_object(states, model.state_dict())
    fl.merge_statistics(states, SHARDS).load_into(model)


def recalibrated(model: Any, batches: list[torch.Tensor]) -> None:
    """Frostline, all ranks together."""
    fl.recalibrate(model, [(batch,) for batch in batches])


TOOLS: dict[str, Tool] = {
    "each rank its own": each_its_own,
    "torch, buffers of rank 0 (DDP)": broadcast,
    "timm `distribute_bn(reduce=True)`": timm_reduce,
    "fvcore `update_bn_stats`, each rank": fvcore_alone,
    "fvcore, then averaged": fvcore_then_timm,
    "`fl.merge_statistics`": merged,
    "`fl.recalibrate`": recalibrated,
}


def work(rank: int, folder: str) -> None:
    """One rank: every tool in turn, and how far it is from the statistics of all the data."""
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", meeting, rank=rank, world_size=len(SHARDS))
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests" / "slow"))
    with contextlib.suppress(ImportError):  # timm needs it, and its wheel may not fit torch
        importlib.import_module("thirdparty.torchvision_operators").load()
    with torch.no_grad():
        seen = network()[0](torch.cat(shards())).transpose(0, 1).reshape(8, -1)
    mean, variance = seen.mean(1), seen.var(1, unbiased=False)
    rows: dict[str, Any] = {}
    for name, tool in TOOLS.items():
        model = network()
        try:
            tool(model, list(shards()[rank].split(64)))
        except ImportError:
            continue
        site = model[1]
        rows[name] = {
            "mean": float(((site.running_mean - mean).abs() / variance.sqrt()).max()),
            "variance": float((site.running_var / variance - 1).abs().max()),
            "numbers": [*site.running_mean.tolist(), *site.running_var.tolist()],
        }
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()


def main() -> int:
    """Run all ranks and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        started = [context.Process(target=work, args=(r, folder)) for r in range(len(SHARDS))]
        for each in started:
            each.start()
        for each in started:
            each.join()
        found = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(len(SHARDS))]
    result = {
        "versions": {name: _version(name) for name in PACKAGES},
        "shards": SHARDS,
        "rows": [
            {
                "tool": name,
                "mean": max(rank[name]["mean"] for rank in found),
                "variance": max(rank[name]["variance"] for rank in found),
                "equal": all(rank[name]["numbers"] == found[0][name]["numbers"] for rank in found),
            }
            for name in found[0]
        ],
    }
    sys.path.insert(0, str(ROOT / "scripts"))
    import tables

    print(tables.distributed_table([result]))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
