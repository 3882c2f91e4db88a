"""Kill, or let raise, one of several gloo processes at a random moment, again and again.

    python scripts/kill_ranks.py --runs 56 --json docs/results/killed_ranks.json

Each run is one of the collective verbs, in turn, by 2, 4 or 8 processes. Counted are how long the
others take to raise, whether their models are as they were, and whether one hangs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import frostline as fl

TIMEOUT = 15.0
VERBS = (
    "recalibrate sequential", "recalibrate batch", "recalibrated", "phases", "diagnose", "watch",
    "assert_frozen",
)  # fmt: skip


def network() -> Any:
    """The same small network on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


class Slow:
    """Batches that take a while to read, one of which may raise."""

    def __init__(self, rank: int, raises_at: int | None) -> None:
        self.rank, self.raises_at = rank, raises_at

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.rank)
        for number in range(20):
            if number == self.raises_at:
                raise OSError("the disk of this rank is gone")
            time.sleep(0.02)
            x = torch.randn(8, 3, 12, 12, generator=generator) + self.rank
            yield x, torch.randint(0, 3, (8,), generator=generator)


def losses(outputs: Any, y: Any) -> Any:
    """Cross-entropy of each sample."""
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def call(verb: str, model: Any, data: Any) -> None:
    """Run a collective verb."""
    name, _, method = verb.partition(" ")
    if name == "recalibrate":
        fl.recalibrate(model, data, method=method)  # type: ignore[arg-type]
    elif name == "recalibrated":
        with fl.recalibrated(model, data):
            pass
    elif name == "phases":
        fl.phases(model, data, loss=losses)
    elif name == "watch":
        with fl.watch(model, data, loss=losses) as watching:
            for _ in range(10):
                time.sleep(0.1)
                watching.check()
    elif name == "assert_frozen":
        for _ in range(10):
            fl.assert_frozen(model, data=data)
    else:
        fl.diagnose(model, data, loss=losses, max_samples=128, verbose=0)


def work(rank: int, world: int, folder: str, verb: str, raises_at: int | None) -> None:
    """One rank; what it saw goes into ``folder/RANK.json``."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    model = network()
    if verb == "assert_frozen":
        fl.freeze(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Path(folder, f"{rank}.began").touch()
    began, raised = time.monotonic(), ""
    try:
        call(verb, model, Slow(rank, raises_at))
    except (fl.FrostlineError, OSError) as error:
        raised = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    found = {"raised": raised, "seconds": seconds, "as before": same}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the group is broken: leaving it would wait for the one that is gone


def run(choice: random.Random, verb: str) -> dict[str, Any]:
    """One run, and what came of it."""
    world = choice.choice((2, 2, 4, 8))
    how, victim = choice.choice(("raise", "kill")), choice.randrange(world)
    raises_at = choice.randrange(20) if how == "raise" else None
    delay = choice.uniform(0, 1.5)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")  # torch is imported once
        processes = [
            context.Process(
                target=work,
                args=(rank, world, folder, verb, raises_at if rank == victim else None),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        limit = time.monotonic() + 4 * TIMEOUT
        if how == "kill":
            while not all(Path(folder, f"{rank}.began").exists() for rank in range(world)):
                if time.monotonic() > limit:
                    break
                time.sleep(0.01)
            time.sleep(delay)
            pid = processes[victim].pid
            if processes[victim].is_alive() and pid is not None:
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.join(max(0.0, limit - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hung:
            processes[rank].kill()
        found = {
            rank: json.loads(path.read_text())
            for rank in range(world)
            if (path := Path(folder, f"{rank}.json")).exists()
        }
    finished = bool(found) and all(not each["raised"] for each in found.values())
    others = {rank: each for rank, each in found.items() if rank != victim}
    return {
        "processes": world,
        "verb": verb,
        "how": how,
        "victim": victim,
        "hung": hung,
        "finished before": finished,
        "others that raised": sum(bool(each["raised"]) for each in others.values()),
        "others as before": finished or all(each["as before"] for each in found.values()),
        "longest seconds": max((each["seconds"] for each in others.values()), default=0.0),
    }


def main() -> None:
    """Run, print a line per run, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    choice = random.Random(options.seed)
    runs = []
    for number in range(options.runs):
        runs.append(run(choice, VERBS[number % len(VERBS)]))
        print(number, runs[-1], flush=True)
    mixed = [
        each
        for each in runs
        if not each["finished before"] and each["others that raised"] != each["processes"] - 1
    ]
    summary = {
        "runs": len(runs),
        "timeout_s": TIMEOUT,
        "hung": sum(bool(each["hung"]) for each in runs),
        "models_half_changed": sum(not each["others as before"] for each in runs),
        "some_rank_did_not_raise": len(mixed),
        "finished_before": sum(each["finished before"] for each in runs),
        "longest_seconds": max(each["longest seconds"] for each in runs),
        "each": runs,
    }
    print({name: value for name, value in summary.items() if name != "each"})
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
