"""Load torchvision where its wheel does not find its compiled operators: ``nms`` in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def _nms(boxes: Any, scores: Any, threshold: float) -> Any:
    """In numpy, so that it is one call for a function mode, as the compiled operator is."""
    with torch._C.DisableTorchFunction():
        found, order = boxes.detach().cpu().double().numpy(), (-scores.detach()).cpu().argsort()
    order, kept = order.numpy(), []
    area = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    while order.size:
        first, rest = order[0], order[1:]
        kept.append(int(first))
        low = np.maximum(found[first, :2], found[rest, :2])
        high = np.minimum(found[first, 2:], found[rest, 2:])
        shared = (high - low).clip(min=0).prod(axis=1)
        order = rest[shared / (area[first] + area[rest] - shared) <= threshold]
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def load() -> Any:
    """Return torchvision."""
    try:
        import torchvision

        return torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", _nms, "CPU")
        load.library = library  # type: ignore[attr-defined]  # or its registration ends with it
        import torchvision
        from torchvision.ops import boxes

        boxes._assert_has_ops = lambda: None
        return torchvision
