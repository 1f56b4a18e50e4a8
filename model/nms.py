"""Non-maximum suppression with a result of fixed size."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms


def kept_by_nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """(N,) bool: boxes that no better one of their group overlaps by more than the threshold.

    Args:
        boxes: (N, 4) xyxy; N may be 0. A box without area overlaps nothing.
        scores: (N,); of equal ones the first is the better.
        groups: (N,) int64, or None for one group.
        iou_threshold: strictly more than this is dropped.
    """
    if groups is None:
        keep = nms(boxes, scores, iou_threshold)
    elif torch.compiler.is_exporting():  # torchvision's own loops over groups where there are many boxes
        away = groups.to(boxes.dtype) * (boxes.max() - boxes.min() + 1)
        keep = nms(boxes + away[:, None], scores, iou_threshold)
    else:
        keep = batched_nms(boxes, scores, groups, iou_threshold)
    # A wait for the device: nms returns as many as are kept. (The other one of a step is in `pyramid_roi_align`.)
    return torch.zeros_like(scores).scatter(0, keep, 1.0) > 0
