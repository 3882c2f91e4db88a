"""The tools, each called as its documentation says."""

from __future__ import annotations

import importlib.util
from typing import Any

from .scenarios import Tool


def ours(model: Any, loader: Any, count: int) -> None:
    """``fl.recalibrate``."""
    import frostline as fl

    del count
    fl.recalibrate(model, loader)


def ours_in_one_pass(model: Any, loader: Any, count: int) -> None:
    """``fl.recalibrate`` with batch statistics in one pass, as the others do."""
    import frostline as fl

    del count
    fl.recalibrate(model, loader, method="batch")


def update_bn(model: Any, loader: Any, count: int) -> None:
    """``torch.optim.swa_utils.update_bn``; takes the whole loader."""
    from torch.optim.swa_utils import update_bn as run

    del count
    run(loader, model)


def precise_bn(model: Any, loader: Any, count: int) -> None:
    """``fvcore.nn.precise_bn.update_bn_stats``; its model takes the loader's items."""
    from fvcore.nn.precise_bn import update_bn_stats

    class Inputs:
        def __iter__(self) -> Any:
            return (x for x, _ in loader)

        def __len__(self) -> int:
            return len(loader)

    update_bn_stats(model, Inputs(), num_iters=count)


def available() -> dict[str, Tool]:
    """Name -> tool, for those that are installed."""
    tools: dict[str, Tool] = {
        "frostline": ours,
        "frostline method='batch'": ours_in_one_pass,
        "torch update_bn": update_bn,
    }
    if importlib.util.find_spec("fvcore") is not None:
        tools["fvcore precise_bn"] = precise_bn
    return tools
