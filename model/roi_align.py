"""ROIAlign over P2..P5 (Mask R-CNN section 3, FPN section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from model.boxes import box_area
from model.sparse_roi_align import is_available, sparse_roi_align

SAMPLES_PER_SIDE = 2  # in every bin, so four samples a bin


def pyramid_levels(boxes: Tensor, canonical_size: float) -> Tensor:
    """Which of P2..P5 a region is cut from: floor(4 + log2(sqrt(area) / canonical_size)), FPN equation 1.

    Args:
        boxes: (N, 4) xyxy in input pixels.
        canonical_size: side of the region that belongs to P4, input pixels.

    Returns:
        (N,) int64, 0 for P2 to 3 for P5; boxes without area belong to P2.
    """
    side = box_area(boxes).sqrt().clamp(min=1e-6)
    return torch.floor(4 + torch.log2(side / canonical_size) + 1e-6).clamp(2, 5).long() - 2


def pyramid_roi_align(
    pyramid: Sequence[Tensor], boxes: Tensor, image_index: Tensor, pool_size: int, canonical_size: float
) -> Tensor:
    """Features of every region on a fixed grid, each from the level that fits its size.

    Args:
        pyramid: P2..P5 with strides 4, 8, 16, 32, each (B, channels, h, w).
        boxes: (N, 4) xyxy in input pixels; N may be 0.
        image_index: (N,) int64, which of the B images a box belongs to.
        pool_size: rows and columns of the grid.
        canonical_size: see `pyramid_levels`.

    Returns:
        (N, channels, pool_size, pool_size) float32: bilinear, `aligned` (half-pixel centres), four samples a bin.
    """
    levels = pyramid_levels(boxes, canonical_size)
    if is_available(boxes.device):
        return sparse_roi_align(pyramid, boxes, image_index, levels, pool_size, SAMPLES_PER_SIDE)
    regions = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)  # (N, 5)
    output = pyramid[0].new_zeros(boxes.shape[0], pyramid[0].shape[1], pool_size, pool_size, dtype=torch.float32)
    for level, features in enumerate(pyramid):
        rows = torch.nonzero(levels == level).flatten()  # on a GPU a wait for the device
        # Also with no rows: every level then stays part of the graph, which data-parallel training relies on.
        pooled = roi_align(
            features.float(), regions[rows], pool_size, 1.0 / (4 * 2**level), SAMPLES_PER_SIDE, aligned=True
        )
        output = output.index_copy(0, rows, pooled)
    return output
