"""Non-maximum suppression with a result of fixed size: torchvision's operator, or one scan of all groups on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
    # On a GPU a wait for the device: nms returns as many as are kept.
    return torch.zeros_like(scores).scatter(0, keep, 1.0) > 0


def has_kernels(device: torch.device) -> bool:
    """Whether the scan of many groups at once runs here: on a GPU for which torch has brought Triton along."""
    return (
        device.type == "cuda" and not torch.compiler.is_exporting() and importlib.util.find_spec("triton") is not None
    )


def kept_by_batched_nms(boxes: Tensor, scores: Tensor, group_sizes: Sequence[int], iou_threshold: float) -> Tensor:
    """(B, N) bool: boxes of B images that no better one of their image and group overlaps by more than the threshold.

    Args:
        boxes: (B, N, 4) xyxy: groups one after the other, in each the best first. A box without area overlaps nothing.
        scores: (B, N); of equal ones the first is the better.
        group_sizes: boxes of each group; they add up to N.
        iou_threshold: strictly more than this is dropped.
    """
    if has_kernels(boxes.device):
        from model.nms_kernels import kept_in_groups

        most = max(group_sizes)
        parts = torch.split(boxes, list(group_sizes), dim=1)
        padded = [F.pad(part, (0, 0, 0, most - part.shape[1])) for part in parts]
        together = torch.stack(padded, dim=1).flatten(0, 1)  # (B * groups, most, 4)
        kept = kept_in_groups(together, iou_threshold).reshape(boxes.shape[0], len(group_sizes), most)
        return torch.cat([kept[:, group, :size] for group, size in enumerate(group_sizes)], dim=1)
    groups: Tensor | None = None
    if len(group_sizes) > 1:
        groups = torch.cat([torch.full((size,), group, device=boxes.device) for group, size in enumerate(group_sizes)])
    of_images = [kept_by_nms(boxes[image], scores[image], groups, iou_threshold) for image in range(boxes.shape[0])]
    return torch.stack(of_images)
