"""The cache on Ray: the memory of the driver by the number of rows.

    python benchmarks/bench_scale.py [--json FILE]

Prediction: it grows by 150 bytes per row, for id, digest and place with the copies that sort them;
the data stay with the workers.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from frostline import scale


def memory(rows: int) -> float:
    """MB that the driver peaks at; its data come from the workers."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20,
             logging_level=logging.ERROR, log_to_driver=False)  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, help="of this many rows, and nothing else")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rows:
        print(memory(options.rows))
        return
    found: dict[str, float] = {}
    for rows in (10_000, 100_000):  # a peak is one of a process, so each has its own
        command = [sys.executable, __file__, "--rows", str(rows)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[str(rows)] = float(out.split()[-1])
        print(f"{rows:7,} rows: {found[str(rows)]:.0f} MB", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"driver MB by rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
