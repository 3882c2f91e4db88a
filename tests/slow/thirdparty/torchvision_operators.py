"""Load torchvision where its wheel does not find its compiled operators: ``nms`` in torch."""

from __future__ import annotations

from typing import Any

import torch


def _nms(boxes: Any, scores: Any, threshold: float) -> Any:
    order, kept = scores.argsort(descending=True), []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while order.numel():
        first, rest = order[0], order[1:]
        kept.append(first)
        low = torch.maximum(boxes[first, :2], boxes[rest, :2])
        high = torch.minimum(boxes[first, 2:], boxes[rest, 2:])
        size = (high - low).clamp(min=0)
        shared = size[:, 0] * size[:, 1]
        order = rest[shared / (area[first] + area[rest] - shared) <= threshold]
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.long)


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
