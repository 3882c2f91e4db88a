"""Freeze every timm network with BN: ``python -m tests.slow.timm_sweep [--json FILE] [PART ...]``.

Of every architecture that builds within a second and takes small images: after ``fl.freeze``
``fl.assert_frozen(model, data=...)`` must be silent, and a pass in training must move nothing;
after a thaw of one layer it must raise an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUILDS_WITHIN_S = 1.0
#: Images that are tried, smallest first.
SIDES = (64, 96, 128, 224, 256)
#: Larger ones are the same designs as smaller ones of their families, and take long.
LARGEST_M = 60


class _Late(Exception):
    pass


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise an exception once the block has used its second of processor time."""

    def late(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, BUILDS_WITHIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def batch(model: Any) -> Any:
    """The smallest images that the network takes; ``None``: none of them, or no time for it."""
    import torch

    wanted = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
    for side in (wanted[1],) if fixed else SIDES:
        x = torch.randn(2, wanted[0], side, side, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                model.train()(x)
        except Exception:  # whatever a network raises on images that are too small
            continue
        return x
    return None


def asked(name: str) -> str:
    """What became of one architecture: a word, with the reason where there is one."""
    import timm
    import torch

    import frostline as fl

    try:
        with limited():
            model = timm.create_model(name, num_classes=4)
    except _Late:
        return "left out: builds in more than a second"
    except Exception as problem:
        return f"left out: {type(problem).__name__}"
    if sum(p.numel() for p in model.parameters()) > LARGEST_M * 10**6:
        return f"left out: more than {LARGEST_M} million parameters"
    kept = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    if not kept:
        return "left out: no BN"
    x = batch(model)
    if x is None:
        return "left out: takes no such images"
    fl.freeze(model)
    before = [(m.running_mean.clone(), m.running_var.clone()) for m in kept]
    with torch.no_grad():
        model.train()(x)
    if not all(
        torch.equal(m.running_mean, mean) and torch.equal(m.running_var, variance)
        for m, (mean, variance) in zip(kept, before, strict=True)
    ):
        return "wrong: statistics moved though frozen"
    try:
        fl.assert_frozen(model, data=x)
    except fl.NotFrozenError as problem:
        return f"false alarm: {problem}"
    fl.unfreeze(model, since=fl.sites(model)[-1].path)
    try:
        fl.assert_frozen(model, data=x)
    except fl.NotFrozenError:
        return "right"
    return "missed: one layer is thawed"


def main() -> int:
    """Run, print, write; 1 where one is not right."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow.timm_sweep", description=__doc__)
    parser.add_argument("parts", nargs="*", help="parts of names; all without")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    from tests.slow.thirdparty.torchvision_operators import load

    load()
    import timm
    import torch

    torch.set_num_threads(1)
    known: dict[str, str] = {}
    if given.json and given.json.exists():
        known = json.loads(given.json.read_text(encoding="utf-8"))["networks"]
    for name in timm.list_models():
        if name in known or (given.parts and not any(part in name for part in given.parts)):
            continue
        known[name] = asked(name)
        print(f"{name}: {known[name][:120]}", flush=True)
        if given.json:
            write(given.json, known, timm.__version__)
    counts = counted(known)
    print(counts)
    return int(any(word not in ("right", "left out") for word in counts))


def counted(known: dict[str, str]) -> dict[str, int]:
    """Outcome -> how many networks."""
    words = [re.sub(":.*", "", told) for told in known.values()]
    return {word: words.count(word) for word in dict.fromkeys(words)}


def write(path: Path, known: dict[str, str], version: str) -> None:
    content = {"timm": version, "counts": counted(known), "networks": known}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
