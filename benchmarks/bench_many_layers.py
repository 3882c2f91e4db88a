"""What 2,000 BN layers and 10^6 samples cost: looks beside the loading, and memory.

    KERAS_BACKEND=torch python benchmarks/bench_many_layers.py --json many-layers.json

``looks``: a chain of 2,000 blocks (a 1x1 convolution, BN, an activation; for Keras in nested models
of 20) is written as ``.keras``, ``.h5``, ``.pt`` (its state) and ``.pt2`` (an exported program).
Each is read by its framework in a fresh process, which imports the framework and loads the file; by
``fl.sites`` and ``fl.lint`` on the model that the framework read, which counts the call alone; and
by ``frostline sites`` and ``frostline lint -o page.html`` on the command line, which count from the
start of the process to its end. What the command line takes beyond the framework's process is what
Frostline adds. The processes take turns, and each cell is the smallest of the rounds. A ``.pt`` is
put into its module, which a function builds, by both; a ``.pt2`` is loaded by
``torch.export.load``, and read by Frostline in its own way.

Keras takes minutes to write and load such a file. A file is written once; with ``--folder`` it is
kept for later runs.

``memory``: 10^4, 10^5 and 10^6 samples from a generator that makes its batches go through
``fl.recalibrate`` and ``fl.phases`` of a small network, each in a process of its own, whose peak
(``VmHWM``) is read at the end.

Aims: at most a second beyond the loading; a peak that does not grow with the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

LAYERS = 2000
KINDS = ("keras", "h5", "pt", "pt2")
SAMPLES = (10**4, 10**5, 10**6)
#: What a framework's own process does with a file.
LOADS = {
    "keras": "import keras, sys; keras.saving.load_model(sys.argv[1])",
    "h5": "import keras, sys; keras.saving.load_model(sys.argv[1])",
    "pt": "import chain_of, torch, sys; "
    "chain_of.net().load_state_dict(torch.load(sys.argv[1], weights_only=True))",
    "pt2": "import torch, sys; torch.export.load(sys.argv[1])",
}


# --- files ----------------------------------------------------------------------------------------


def write(kind: str, path: Path, layers: int) -> None:
    """Write a chain of ``layers`` BN layers."""
    if kind in ("keras", "h5"):
        import keras

        keras.utils.set_random_seed(0)
        # In parts of 20: Keras follows a chain by recursion, which Python ends at 1,000.
        parts = [
            [
                layer
                for number in range(start, min(start + 20, layers))
                for layer in (
                    keras.layers.Conv2D(2, 1, name=f"conv{number}"),
                    keras.layers.BatchNormalization(name=f"bn{number}"),
                    keras.layers.ReLU(name=f"relu{number}"),
                )
            ]
            for start in range(0, layers, 20)
        ]
        inner = [keras.Sequential(part, name=f"part{n}") for n, part in enumerate(parts)]
        keras.Sequential([keras.Input((4, 4, 2)), *inner]).save(path)
        return
    import torch

    torch.manual_seed(0)
    model = chain(layers).eval()
    (path.parent / "chain_of.py").write_text(
        f"import bench_many_layers\ndef net():\n    return bench_many_layers.chain({layers})\n"
    )
    if kind == "pt":
        torch.save(model.state_dict(), path)
    else:
        torch.export.save(torch.export.export(model, (torch.zeros(1, 2, 4, 4),)), path)


def chain(layers: int) -> Any:
    """The torch module."""
    from torch import nn

    blocks = [
        part for _ in range(layers) for part in (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    ]
    return nn.Sequential(*blocks)


# --- looks ----------------------------------------------------------------------------------------


def api(kind: str, path: Path) -> dict[str, float]:
    """Seconds of loading and of the two verbs, in this process."""
    import frostline as fl

    start = time.perf_counter()
    if kind in ("keras", "h5"):
        import keras

        model = keras.saving.load_model(path)
    else:  # of these torch has no module: the chain again, with the state that was stored
        import torch

        state = torch.load(path, weights_only=True)
        model = chain(len(state) // 7)
        model.load_state_dict(state)
    found = {"load": time.perf_counter() - start}
    for name in ("sites", "lint"):
        start = time.perf_counter()
        getattr(fl, name)(model)
        found[name] = time.perf_counter() - start
    return found


def process(*words: str, folder: Path | None = None) -> float:
    """Seconds from the start of a Python process in a folder to its end."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(
        [here, str(folder or here), os.environ.get("PYTHONPATH", "")]
    )}  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=folder,
        env=environment,
    )  # fmt: skip
    clean = (0, 1) if words[:2] == ("-m", "frostline") else (0,)
    if done.returncode not in clean:
        raise RuntimeError(f"{words}: {done.stderr[-400:]}")
    return time.perf_counter() - start


def looks(kind: str, folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    """One row: seconds of the framework, of the API and of the command line."""
    path = folder / f"chain.{kind}"
    source = ["chain_of:net", "--state", str(path)] if kind == "pt" else [str(path)]
    if not path.exists():
        process(str(Path(__file__).resolve()), "--write", kind, str(path), "--layers", str(layers))
    page = folder / f"{kind}.html"
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        ways = {
            "framework": ("-c", LOADS[kind], str(path)),
            "sites": ("-m", "frostline", "sites", *source),
            "lint": ("-m", "frostline", "lint", *source, "-o", str(page), "--force"),
        }
        for name, words in ways.items():
            seconds.setdefault(name, []).append(process(*words, folder=folder))
        if kind != "pt2":
            done = subprocess.run(
                [sys.executable, __file__, "--api", kind, str(path)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            for name, took in json.loads(done.stdout.splitlines()[-1]).items():
                seconds.setdefault(f"api {name}", []).append(took)
    row = {name: round(min(each), 2) for name, each in seconds.items()}
    return {"kind": kind, **row, "report": opened(page)}


def opened(page: Path) -> dict[str, Any]:
    """What a browser says of a report: seconds until it is drawn, errors, title and rows."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
    import chromium

    found: dict[str, Any] = {"bytes": page.stat().st_size}
    if chromium.PROGRAM is None:
        return found
    with chromium.Browser() as browser:
        start = time.perf_counter()
        visit = browser.open(page, width=1280)
        found["seconds"] = round(time.perf_counter() - start, 2)
        found["errors"] = len(visit.errors)
        found["title"] = browser.evaluate(visit, "document.title")
        found["rows"] = browser.evaluate(visit, "document.querySelectorAll('tr').length")
    return found


# --- memory ---------------------------------------------------------------------------------------


def memory(framework: str, verb: str, samples: int) -> dict[str, Any]:
    """Peak megabytes of this process after a verb has seen that many samples, and its seconds."""
    import numpy as np

    import frostline as fl

    drawn = np.random.default_rng(0).normal(size=(1000, 16)).astype("float32")
    labels = np.arange(1000) % 3
    made = 0

    def batches() -> Iterator[Any]:
        nonlocal made
        for number in range(samples // 1000):
            made += 1000
            shifted = drawn + np.float32(number % 7)
            yield shifted if verb == "recalibrate" else (shifted, labels)

    more: dict[str, Any] = {}
    if framework == "keras":
        import keras

        keras.utils.set_random_seed(0)
        layers = keras.layers
        model: Any = keras.Sequential(
            [keras.Input((16,)), layers.Dense(16), layers.BatchNormalization(), layers.Dense(3)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
    else:
        import torch
        from torch import nn

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
        more = {"loss": nn.functional.cross_entropy} if verb == "phases" else {}
    start = time.perf_counter()
    getattr(fl, verb)(model, batches(), **more)
    took = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "framework": framework, "verb": verb, "samples": made, "seconds": round(took, 1),
        "megabytes": round(peak / 1024, 1),
    }  # fmt: skip


def memories(samples: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Each of the verbs, on each framework, in processes of their own."""
    for framework in ("torch", "keras"):
        for verb in ("recalibrate", "phases"):
            for count in samples:
                done = subprocess.run(
                    [sys.executable, __file__, "--memory", framework, verb, str(count)],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise RuntimeError(done.stderr[-800:])
                yield json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("looks", "memory"),
                        default=("looks", "memory"))  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--json", type=Path, help="file that the rows are added to")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    for name, words in (("--write", 2), ("--api", 2), ("--memory", 3)):
        parser.add_argument(name, nargs=words, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write[0], Path(options.write[1]), options.layers)
        return
    if options.api:
        print(json.dumps(api(options.api[0], Path(options.api[1]))))
        return
    if options.memory:
        framework, verb, samples = options.memory
        print(json.dumps(memory(framework, verb, int(samples))))
        return
    from frostline import environment

    known: dict[str, Any] = {"looks": [], "memory": []}
    if options.json is not None and options.json.is_file():
        known |= json.loads(options.json.read_text())

    def add(part: str, row: dict[str, Any], *keys: str) -> None:
        print(row, flush=True)
        known[part] = [old for old in known[part] if any(old[key] != row[key] for key in keys)]
        known[part].append(row)
        known["environment"] = environment.facts()
        if options.json is not None:
            options.json.write_text(json.dumps(known, indent=2) + "\n")

    if "looks" in options.parts:
        with tempfile.TemporaryDirectory() as name:
            folder = options.folder or Path(name)
            folder.mkdir(parents=True, exist_ok=True)
            for kind in options.kinds:
                row = looks(kind, folder, options.layers, options.rounds)
                add("looks", {"layers": options.layers, "rounds": options.rounds, **row}, "kind")
    if "memory" in options.parts:
        for row in memories(options.samples):
            add("memory", row, "framework", "verb", "samples")


if __name__ == "__main__":
    main()
