"""Arithmetic of boxes: xyxy, right and bottom exclusive, any leading dimensions; N may be 0 everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.constants import constant

# A predicted size change beyond this factor is a wild early guess; without the limit exp() overflows.
MAX_LOG_SIZE_RATIO = math.log(1000.0 / 16.0)


def box_area(boxes: Tensor) -> Tensor:
    """Area of (..., 4) boxes in squared pixels, 0 where right is not right of left or bottom not below top."""
    width = (boxes[..., 2] - boxes[..., 0]).clamp(min=0)
    height = (boxes[..., 3] - boxes[..., 1]).clamp(min=0)
    return width * height


@torch.no_grad()
def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every box with every other.

    Args:
        boxes: (..., N, 4) xyxy.
        others: (..., M, 4) xyxy in the same frame.

    Returns:
        (..., N, M) in 0..1; 0 where either box has no area, NaN where one is NaN. There is no
        gradient.
    """
    left, top, right, bottom = boxes[..., :, None, :].unbind(dim=-1)  # (..., N, 1)
    # Coordinates of the others one behind the other: twice as fast where there are many of them.
    other_left, other_top, other_right, other_bottom = others.movedim(-1, 0).contiguous()[..., None, :]  # (..., 1, M)
    # In place: for a quarter of a million anchors and a hundred objects each of these holds 100 MB.
    width = torch.minimum(right, other_right).sub_(torch.maximum(left, other_left)).clamp_(min=0)  # (..., N, M)
    height = torch.minimum(bottom, other_bottom).sub_(torch.maximum(top, other_top)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (box_area(boxes)[..., :, None] + box_area(others)[..., None, :]).sub_(intersection)
    return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al. 2019) of each box with its counterpart: IoU less the empty share of their common hull.

    Args:
        boxes: (..., 4) xyxy.
        others: (..., 4) xyxy in the same frame.

    Returns:
        (...,) in -1..1; 1 for equal boxes, below 0 for boxes far apart, where it still has a gradient.
    """
    tiny = torch.finfo(boxes.dtype).tiny
    width_height = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    intersection = width_height.clamp(min=0).prod(dim=-1)
    union = box_area(boxes) + box_area(others) - intersection
    hull_sides = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    hull = hull_sides.prod(dim=-1)
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def encode_boxes(boxes: Tensor, references: Tensor, delta_scale: Sequence[float]) -> Tensor:
    """Deltas that move and stretch the references onto the boxes (R-CNN, appendix C); inverse of `decode_boxes`.

    Args:
        boxes: (..., 4) xyxy.
        references: (..., 4) xyxy in the same frame: anchors or proposals.
        delta_scale: dx, dy, dw, dh are divided by these four numbers.

    Returns:
        (..., 4) dx, dy in reference widths and heights, dw, dh as log ratios. Finite also for boxes without area
        (empty slots): their sides count as one thousandth of a pixel.
    """
    smallest = 1e-3
    reference_size = (references[..., 2:] - references[..., :2]).clamp(min=smallest)
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=smallest)
    shift = ((boxes[..., :2] + boxes[..., 2:]) - (references[..., :2] + references[..., 2:])) / 2
    deltas = torch.cat([shift / reference_size, torch.log(size / reference_size)], dim=-1)
    return deltas / constant(delta_scale, deltas.device, deltas.dtype)


def decode_boxes(deltas: Tensor, references: Tensor, delta_scale: Sequence[float]) -> Tensor:
    """Move and stretch references by predicted deltas: `decode_boxes(encode_boxes(b, r), r) == b`.

    Args:
        deltas: (..., 4) dx, dy, dw, dh, each in units of `delta_scale`.
        references: (..., 4) xyxy, any frame.
        delta_scale: four numbers.

    Returns:
        (..., 4) xyxy in the frame of the references, not clipped.
    """
    deltas = deltas * constant(delta_scale, deltas.device, deltas.dtype)
    reference_size = references[..., 2:] - references[..., :2]
    centre = (references[..., :2] + references[..., 2:]) / 2 + deltas[..., :2] * reference_size
    size = reference_size * torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SIZE_RATIO))
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def clip_boxes(boxes: Tensor, windows: Tensor) -> Tensor:
    """Clip boxes to a window each.

    Args:
        boxes: (B, N, 4) xyxy, or (N, 4) with one window.
        windows: (B, 4) or (4,) xyxy in the same frame.

    Returns:
        Boxes of the same shape; one that lay outside has no area.
    """
    windows = windows.to(boxes.dtype)
    if boxes.dim() == 3:
        windows = windows[:, None, :]
    low, high = windows[..., :2], windows[..., 2:]
    low, high = torch.cat([low, low], dim=-1), torch.cat([high, high], dim=-1)
    return torch.minimum(torch.maximum(boxes, low), high)


def last_pixel_inside(boxes: Tensor) -> Tensor:
    """Boxes with the right and bottom edge moved in by a pixel: the frame of `ModelConfig.boxes: inclusive`."""
    return boxes - constant((0.0, 0.0, 1.0, 1.0), boxes.device, boxes.dtype)


def last_pixel_outside(boxes: Tensor) -> Tensor:
    """Inverse of `last_pixel_inside`."""
    return boxes + constant((0.0, 0.0, 1.0, 1.0), boxes.device, boxes.dtype)
