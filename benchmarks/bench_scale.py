"""Features and statistics by several processes: throughput, overhead, memory, and what kills cost.

    python benchmarks/bench_scale.py --json docs/results/scale.json               # an hour
    python benchmarks/bench_scale.py --parts memory paper --json docs/results/scale.json

The parts: ``memory`` of the driver by rows; ``throughput`` of a feature cache by actors of Ray and
by local processes, both equal byte for byte; ``kills`` of random actors while a cache is built;
``ranks``: a recalibration by gloo ranks, which have imported what they need, and by actors of Ray,
which have not; ``paper``: 10⁹ images, computed, not
measured. The images are the test set of CIFAR-10, the prefix EfficientNet-Lite0 behind its pooling.

Prediction: two actors take at most 1.15 times as long as two processes that start afresh, and as
much more of the processor. The driver's memory grows by 230 bytes per row. A kill costs the batch
in flight and the start of an actor, and loses nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 64
#: Rows of a batch while actors are killed: short, so that many are in flight in turn.
KILLED_ROWS = 128


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and on which images."""

    data: str
    images: int
    kills: int
    rounds: int
    side: int = SIDE


# --- the work -------------------------------------------------------------------------------------


def network() -> Any:
    """EfficientNet-Lite0 at inference, without its stochastic depth, the same in every process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    library = importlib.import_module("efficientnet_lite_pytorch")
    model = library.EfficientNet.from_name("efficientnet-lite0").eval()
    model._global_params = model._global_params._replace(drop_connect_rate=None)
    return model


def prefix() -> Any:
    """All but its last layer: 1280 features of an image."""
    import torch

    import frostline as fl

    model = network()
    fl.freeze(model, until="_fc", dropout=True)
    return fl.split(model, sample=torch.zeros(2, 3, SIDE, SIDE)).prefix


def prepared(images: Any) -> Any:
    """What the network wants of uint8 images: float32, channels first."""
    return np.ascontiguousarray(np.moveaxis(images.astype(np.float32) / 127.5 - 1, -1, 1))


def chosen(sizes: Sizes, count: int | None = None) -> Any:
    """The first images of the test set."""
    from frostline.data import image_sets

    return image_sets.choose(
        sizes.data, split="test", per_class=(count or sizes.images) // 10, image_size=sizes.side
    )


def in_memory(sizes: Sizes, share: slice = slice(None), count: int | None = None) -> Any:
    """The images themselves, decoded here."""
    from frostline.data import image_sets

    found = chosen(sizes, count)
    rows = found.rows[share].tolist()
    return prepared(image_sets.decoded(found.catalogue, rows, found.size, found.source))


def start(processors: int = 3) -> Any:
    """Ray on this machine: room for two actors and for a task that reads."""
    import ray

    ray.init(num_cpus=processors, include_dashboard=False, object_store_memory=400 << 20,
             logging_level=logging.ERROR, log_to_driver=False)  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


class Spent:
    """A block's seconds, and the processor seconds of this process and all that it started."""

    def __enter__(self) -> Spent:
        self._most: dict[str, float] = {}
        self._done = threading.Event()
        self._before = self._look()
        self._watch = threading.Thread(target=self._poll)
        self._watch.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._done.set()
        self._watch.join()
        self.processor = self._look() - self._before

    def _poll(self) -> None:
        while not self._done.wait(0.2):  # what has ended meanwhile is counted as last seen
            self._look()

    def _look(self) -> float:
        parents, seconds = {}, {}
        for each in Path("/proc").iterdir():
            with contextlib.suppress(OSError, IndexError):
                fields = (each / "stat").read_text().rpartition(")")[2].split()
                parents[each.name] = fields[1]
                seconds[each.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for pid, spent in seconds.items():
            above = pid
            while above in parents and above != str(os.getpid()):
                above = parents[above]
            if above == str(os.getpid()):
                self._most[pid] = spent
        return sum(self._most.values())


def built(sizes: Sizes, actors: int, path: Any, made: Any) -> Any:
    """A cache by actors of Ray."""
    from frostline import scale
    from frostline.scale import sources

    _, dataset = sources.of_images(chosen(sizes), prepared)
    return scale.cache_features(
        made, dataset, path, actors=actors, engine="native", verbose=0, batch_size=32
    )


def local(sizes: Sizes, processes: int, folder: Path) -> None:
    """Caches of equal shares by fresh processes, one each."""
    words = [sys.executable, __file__, "--data", sizes.data, "--images", str(sizes.images)]
    started = [
        subprocess.Popen([*words, "--share", f"{number}/{processes}", "--folder", str(folder)])
        for number in range(processes)
    ]
    if any(each.wait() for each in started):
        raise RuntimeError("a local process failed")


def local_share(sizes: Sizes, share: str, folder: Path) -> None:
    """What a local process does."""
    import frostline as fl

    number, _, processes = share.partition("/")
    x = in_memory(sizes, slice(int(number), None, int(processes)))
    fl.cache_features(prefix(), x, folder / number, engine="native", verbose=0)


# --- the parts ------------------------------------------------------------------------------------


def throughput(sizes: Sizes) -> dict[str, Any]:
    """Seconds by actors and by processes, in turn, and whether the features are the same."""
    import frostline as fl

    start()
    made, rows = prefix(), []
    with tempfile.TemporaryDirectory() as path:
        whole = fl.cache_features(made, in_memory(sizes), path, engine="native", verbose=0)
        expected = whole.rows(range(len(whole)))[0]
    equal = []
    for turn in range(sizes.rounds):
        for count in (1, 2) if turn == 0 else (2,):
            with tempfile.TemporaryDirectory() as path:
                with Spent() as spent:
                    local(sizes, count, Path(path))
                rows.append(_row("processes", count, turn, spent))
            with tempfile.TemporaryDirectory() as path:
                with Spent() as spent:
                    cache = built(sizes, count, path, made)
                rows.append(_row("actors", count, turn, spent))
                found = cache.rows(range(len(cache)))[0]
                equal.append(found.tobytes() == expected.tobytes())
            print(rows[-2:], flush=True)
    return {
        "images": len(expected),
        "features": list(expected.shape[1:]),
        "byte for byte equal": all(equal),
        "rows": rows,
        "overhead at two": {name: _ratio(rows, name) for name in ("seconds", "processor_s")},
    }


def _row(how: str, count: int, turn: int, spent: Spent) -> dict[str, Any]:
    load = round(os.getloadavg()[0], 1)
    return {"how": how, "count": count, "round": turn, "seconds": round(spent.seconds, 1),
            "processor_s": round(spent.processor, 1), "load": load}  # fmt: skip


def _ratio(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Median over the rounds of what two actors take by what two processes take."""
    turns: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["count"] == 2:
            turns.setdefault(row["round"], {})[row["how"]] = row[name]
    return round(statistics.median(t["actors"] / t["processes"] for t in turns.values()), 3)


class Counted:
    """A prefix that notes in a file how many samples it computed, in whichever process."""

    identity = "EfficientNet-Lite0 behind its pooling, counted"

    def __init__(self, made: Any, log: str) -> None:
        self.made, self.log = made, log

    def __call__(self, x: Any) -> list[Any]:
        import torch

        torch.set_num_threads(1)
        with torch.no_grad():
            out = self.made(torch.from_numpy(np.array(x))).numpy()
        with Path(self.log).open("ab") as file:  # appended in one write, so none is lost
            file.write(b"1" * len(x))
        return [out]


def kills(sizes: Sizes) -> dict[str, Any]:
    """Kill a random actor at random moments while caches are built, and compare each of them."""
    import frostline as fl
    from frostline.scale import features

    start()
    features._INPUT_BYTES = KILLED_ROWS * 3 * sizes.side**2 * 4
    choice, made = random.Random(0), prefix()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "computed")
        counted = Counted(made, str(log))
        whole = fl.cache_features(
            counted, in_memory(sizes), Path(scratch, "local"), engine="native", verbose=0
        )
        expected, builds, killed = whole.rows(range(len(whole)))[0], [], 0
        while killed < sizes.kills:
            log.write_bytes(b"")
            path = Path(scratch, str(len(builds)))
            victims: list[int] = []
            left = 0 if not builds else sizes.kills - killed  # the first build is undisturbed
            done = threading.Event()
            killer = threading.Thread(target=_kill, args=(choice, done, victims, left))
            killer.start()
            try:
                began = time.perf_counter()
                cache = built(sizes, 2, path, counted)
                seconds = time.perf_counter() - began
            finally:
                done.set()
                killer.join()
            killed += len(victims)
            ids = cache.ids.tolist()
            computed = log.stat().st_size
            builds.append({
                "kills": len(victims),
                "seconds": round(seconds, 1),
                "lost": len(set(range(len(expected))) - set(ids)),
                "duplicates": len(ids) - len(set(ids)),
                "equal": cache.rows(range(len(cache)))[0].tobytes() == expected.tobytes(),
                "computed": computed,
            })  # fmt: skip
            print(builds[-1], flush=True)
    return {
        "images": len(expected),
        "rows of a batch": KILLED_ROWS,
        "kills": killed,
        "lost": sum(each["lost"] for each in builds),
        "duplicates": sum(each["duplicates"] for each in builds),
        "all equal": all(each["equal"] for each in builds),
        **_cost_of_kills(builds),
        "builds": builds,
    }


def _cost_of_kills(builds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the builds took beyond the undisturbed one, which is the first."""
    quiet, *disturbed = builds
    again = [build["computed"] - quiet["computed"] for build in disturbed]
    most = [build["kills"] * KILLED_ROWS for build in disturbed]
    spent = sum(build["seconds"] - quiet["seconds"] for build in disturbed)
    return {
        "computed again": sum(again),
        "at most the batches in flight": all(a <= m for a, m in zip(again, most, strict=True)),
        "seconds lost per kill": round(spent / max(1, sum(b["kills"] for b in disturbed)), 2),
    }


def _kill(choice: random.Random, done: threading.Event, victims: list[int], most: int) -> None:
    while len(victims) < most and not done.wait(choice.uniform(2.0, 20.0)):
        there = workers()
        if there:
            victim = choice.choice(there)
            os.kill(victim, signal.SIGKILL)
            victims.append(victim)


def workers() -> list[int]:
    """Actors that compute, below the Ray that this process started."""

    def parent(pid: str) -> int:
        return int(Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for each in Path("/proc").iterdir():
        try:
            title = Path(each, "cmdline").read_bytes()
            ours = title.startswith(b"ray::MapWorker") and parent(str(parent(each.name)))
            if ours == os.getpid():
                found.append(int(each.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def memory(rows: int) -> float:
    """MB that the driver peaks at; its data come from the workers."""
    from frostline import scale

    ray = start(2)

    def made(batch: dict[str, Any]) -> dict[str, Any]:
        values = batch["id"].astype(np.float32)
        return {"id": batch["id"], "image": np.outer(values, np.ones(64, np.float32))}

    class Twice:
        identity = "twice"

        def __call__(self, x: Any) -> list[Any]:
            return [2 * x]

    with tempfile.TemporaryDirectory() as path:
        data = ray.data.range(rows).map_batches(made, batch_format="numpy")
        scale.cache_features(Twice(), data, path, verbose=0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def driver(_: Sizes) -> dict[str, Any]:
    """The memory of the driver by rows; a peak is one of a process, so each has its own."""
    found = {}
    for rows in (10_000, 100_000):
        command = [sys.executable, __file__, "--rows", str(rows)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[rows] = float(out.split()[-1])
        print(f"{rows:7,} rows: {found[rows]:.0f} MB", flush=True)
    each = (found[100_000] - found[10_000]) * 1e6 / 90_000
    return {"driver MB by rows": found, "bytes per row": round(each)}


def ranks(sizes: Sizes) -> dict[str, Any]:
    """Images per second of a recalibration in one pass, by gloo ranks and by actors of Ray."""
    from frostline import scale
    from frostline.scale import sources

    count, rows = sizes.images // 10, []
    x = in_memory(sizes, count=count)
    context = multiprocessing.get_context("spawn")
    for world in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder, "x.npy"), x)
            started = [
                context.Process(target=_rank, args=(rank, world, folder)) for rank in range(world)
            ]
            for each in started:
                each.start()
            for each in started:
                each.join()
            took = max(float(path.read_text()) for path in Path(folder).glob("*.seconds"))
        rows.append({"how": "gloo ranks", "count": world, "seconds": round(took, 2)})
        print(rows[-1], flush=True)
    start()
    for actors in (1, 2):
        _, dataset = sources.of_images(chosen(sizes, count), prepared)
        dataset = dataset.materialize()
        began = time.perf_counter()
        scale.recalibrate(network(), dataset, inputs="image", sites="all", method="batch",
                          actors=actors)  # fmt: skip
        seconds = round(time.perf_counter() - began, 2)
        rows.append({"how": "actors of Ray", "count": actors, "seconds": seconds})
        print(rows[-1], flush=True)
    return {"images": len(x), "method": "batch", "rows": rows}


def _rank(rank: int, world: int, folder: str) -> None:
    from torch import distributed

    import frostline as fl

    model, x = network(), np.load(Path(folder, "x.npy"), mmap_mode="r")
    fl.recalibrate(network(), np.array(x[:32]), sites="all", method="batch")  # imports, once
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    distributed.barrier()
    began = time.perf_counter()
    fl.recalibrate(model, np.array(x[rank::world]), sites="all", method="batch")
    Path(folder, f"{rank}.seconds").write_text(str(time.perf_counter() - began))
    distributed.destroy_process_group()


# --- on paper -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What the model of a large job rests on."""

    images: float = 1e9
    side: int = 224
    jpeg_bytes: float = 100e3
    features: int = 1280
    gpus: int = 64
    gpus_per_node: int = 8
    images_per_s: float = 2000.0
    network_bytes_per_s: float = 100e9 / 8
    cores_per_gpu: int = 16
    decode_s: float = 12.8e-3
    shard_bytes: int = 64 << 20
    batch: int = 32
    driver_bytes: float = 230.0
    most_per_shard: int = 1024


def on_paper(_: Sizes) -> dict[str, Any]:
    """Bytes moved and stored, hours, and what saturates first; computed, nothing is measured."""
    a = Assumed()
    decoded = a.side**2 * 3
    rows = max(a.batch, min(a.most_per_shard, a.shard_bytes // decoded // a.batch * a.batch))
    per_node = a.gpus_per_node * a.images_per_s * a.jpeg_bytes
    hours = {
        "forward passes": a.images / (a.gpus * a.images_per_s) / 3600,
        "decoding": a.images * a.decode_s / (a.gpus * a.cores_per_gpu) / 3600,
        "network": a.images * a.jpeg_bytes * a.gpus_per_node / a.gpus
        / a.network_bytes_per_s / 3600,
    }  # fmt: skip
    return {
        "assumed": asdict(a),
        "read bytes": a.images * a.jpeg_bytes,
        "decoded bytes": a.images * decoded,
        "stored bytes": a.images * a.features * 4,
        "rows of a shard": rows,
        "files": 2 * a.images / rows,
        "driver bytes": a.images * a.driver_bytes,
        "network of a node, bytes per s": per_node,
        "seconds of a GPU that a kill costs": rows / a.images_per_s,
        "hours": hours,
        "saturates first": max(hours, key=lambda name: hours[name]),
    }


PARTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "memory": driver, "throughput": throughput, "kills": kills, "ranks": ranks, "paper": on_paper,
}  # fmt: skip


def main() -> None:
    """Run the parts, each in a process of its own, and add what they found to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", default="../shared/data", help="CIFAR-10 as parquet files")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    for hidden in ("--part", "--share", "--folder", "--rows"):  # of the processes started below
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = Sizes(options.data, options.images, options.kills, options.rounds)
    if options.share:
        local_share(sizes, options.share, Path(options.folder))
    elif options.rows:
        print(memory(int(options.rows)))
    elif options.part:
        Path(options.folder).write_text(json.dumps(PARTS[options.part](sizes)))
    else:
        _all(options)


def _all(options: argparse.Namespace) -> None:
    found: dict[str, Any] = {}
    if options.json is not None and options.json.is_file():
        found = json.loads(options.json.read_text())
    passed = functools.reduce(
        lambda words, name: [*words, f"--{name}", str(getattr(options, name))],
        ("data", "images", "kills", "rounds"), [],
    )  # fmt: skip
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "found.json")
            command = [sys.executable, __file__, "--part", part, "--folder", str(file), *passed]
            subprocess.run(command, check=True)
            found[part] = json.loads(file.read_text())
        print(part, json.dumps(found[part], indent=1), flush=True)
        if options.json is not None:
            settings = {"side": SIDE, "cores": os.cpu_count(), "load": os.getloadavg()[2]}
            found["settings"] = settings
            options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
