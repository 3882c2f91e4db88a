"""Cost and fixed point of ``fl.recalibrate``: ``python -m tests.slow.thirdparty.recalibration``.

On models of other libraries that ``torch.fx`` cannot carry from site to site: processor time in
passes of the model at inference over the same batches, and how far a second recalibration moves
what the first stored, in standard deviations (means) or relative (variances). The batches are those
of the table, four small images each, where Python weighs as much as arithmetic; with ``--usual``
they have the size that the model is used with.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = (
    "timm ghostnet_100",
    "torchvision shufflenet_v2_x0_5",
    "torchvision retinanet_resnet50_fpn",
    "torchvision fasterrcnn_mobilenet_v3_large_320_fpn",
    "Ultralytics YOLOv8n, its own loss",
)
TIMES = 3
BATCHES = 8
#: Images per batch and their side, as the models are used on a processor.
USUAL = {
    "timm ghostnet_100": (16, 224),
    "torchvision shufflenet_v2_x0_5": (16, 224),
    "torchvision retinanet_resnet50_fpn": (2, 320),
    "torchvision fasterrcnn_mobilenet_v3_large_320_fpn": (4, 320),
    "Ultralytics YOLOv8n, its own loss": (8, 320),
}


def enlarged(value: Any, count: int, side: int) -> Any:
    """A batch of so many images of such a side; what belongs to an image comes as often."""
    import torch
    from torch.nn.functional import interpolate

    again = functools.partial(enlarged, count=count, side=side)
    if isinstance(value, dict):
        numbered = {"batch_idx": torch.arange(count).float()} if "batch_idx" in value else {}
        return {key: again(item) for key, item in value.items()} | numbered
    if isinstance(value, tuple):
        return tuple(map(again, value))
    if isinstance(value, list):  # of pictures, or of what is on them
        items = [value[i % len(value)] for i in range(count)]
        big = lambda x: interpolate(x[None], (side, side))[0]  # noqa: E731
        return [big(x) if isinstance(x, torch.Tensor) and x.ndim == 3 else x for x in items]
    rows = value[torch.arange(count) % len(value)]
    if rows.ndim < 4:
        return rows
    rows = interpolate(rows, (side, side))
    return rows + 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))


def took(run: Callable[[], object]) -> float:
    """The shortest processor time of a few runs, in seconds."""
    found = []
    for _ in range(TIMES):
        begin = time.process_time()
        run()
        found.append(time.process_time() - begin)
    return min(found)


def measured(name: str, *, usual: bool = False) -> dict[str, Any]:
    """One model: finite, fixed point, passes."""
    import torch

    import frostline as fl

    from .__main__ import load

    program = load()[name].build()
    model = program.model.eval()
    batches = [program.batches[i % len(program.batches)] for i in range(BATCHES)]
    if usual:
        count, side = USUAL[name]
        batches = [enlarged(batch, count, side) for batch in batches]
        if hasattr(model, "transform"):  # a detector resizes what it gets
            model.transform.min_size, model.transform.max_size = (side,), side

    # An evaluation as the library makes it, its loss included where there is one at inference.
    ask = program.call if program.in_training_mode or program.ask is None else program.ask

    def inference() -> None:
        with torch.no_grad():
            for batch in batches:
                ask(model, batch)

    passes = took(inference)
    cost = took(lambda: fl.recalibrate(model, batches, sites="all").undo())
    fl.recalibrate(model, batches, sites="all")
    once = copy.deepcopy(model.state_dict())
    fl.recalibrate(model, batches, sites="all")
    worst = 0.0
    for key, mean in once.items():
        if key.endswith("running_mean"):
            variance = once[key.replace("mean", "var")].double()
            moved = (model.state_dict()[key].double() - mean.double()).abs()
            ratio = model.state_dict()[key.replace("mean", "var")].double() / variance
            off = (moved / (variance + 1e-5).sqrt()).max(), (ratio - 1).abs()[variance > 1e-6]
            worst = max(worst, float(off[0]), float(off[1].max()) if off[1].numel() else 0.0)
    finite = all(bool(v.isfinite().all()) for v in once.values() if v.is_floating_point())
    return {
        "finite": finite,
        "moved_by_a_second": worst,
        "inference_s": round(passes, 3),
        "recalibrate_s": round(cost, 3),
        "passes": round(cost / passes, 2),
    }


def main() -> int:
    """Measure, print, write; 1 where one is not finite or no fixed point."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.slow.thirdparty.recalibration", description=__doc__
    )
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--usual", action="store_true", help="batches as the model is used with")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    known: dict[str, Any] = {}
    if given.json and given.json.exists():
        known = json.loads(given.json.read_text(encoding="utf-8"))
    for name in given.names:
        key = f"{name}, {USUAL[name][0]} images of {USUAL[name][1]}²" if given.usual else name
        known[key] = measured(name, usual=given.usual)
        print(key, known[key], flush=True)  # noqa: T201
        if given.json:
            given.json.write_text(
                json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    return int(not all(r["finite"] and r["moved_by_a_second"] < 1e-5 for r in known.values()))


if __name__ == "__main__":
    sys.exit(main())
