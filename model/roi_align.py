"""Features of regions from P2..P5: ROIAlign (Mask R-CNN section 3, FPN section 4.2) or crop_and_resize."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from model.boxes import box_area
from model.cell_matrix import CellMatrix, cell_matrix
from model.config import RoiConfig
from model.constants import constant
from model.weighted_cells import SamplePositions, has_sparse_product, weighted_cells

NUM_LEVELS = 4  # P2 to P5
SAMPLES_PER_SIDE = 2  # in every bin of ROIAlign, so four samples a bin
FAR_OUTSIDE = -1e6  # input pixels

PooledFrom = list[Tensor] | CellMatrix
"""A pyramid as `as_pooled` gives it."""


def pyramid_levels(boxes: Tensor, config: RoiConfig, canvas: tuple[int, int]) -> Tensor:
    """Which of P2..P5 a region is cut from: 4 + log2(sqrt(area) / canonical_size), FPN equation 1.

    Rounded down; with crop_and_resize to the nearest, sides counted in shares of the canvas, as in the original.

    Args:
        boxes: (N, 4) xyxy in input pixels.
        config: side of the region that belongs to P4, pooling.
        canvas: rows and columns of the images.

    Returns:
        (N,) int64, 0 for P2 to 3 for P5; boxes without area belong to P2.
    """
    if config.pooling == "crop_and_resize":
        rows, columns = canvas
        share = (boxes[:, 2] - boxes[:, 0]) / (columns - 1) * ((boxes[:, 3] - boxes[:, 1]) / (rows - 1))
        side = (share.clamp(min=0) * (rows * columns)).sqrt().clamp(min=1e-6)
        return torch.round(4 + torch.log2(side / config.canonical_size)).clamp(2, 5).long() - 2
    side = box_area(boxes).sqrt().clamp(min=1e-6)
    return torch.floor(4 + torch.log2(side / config.canonical_size) + 1e-6).clamp(2, 5).long() - 2


def pyramid_roi_align(
    pyramid: Sequence[Tensor] | CellMatrix,
    boxes: Tensor,
    image_index: Tensor,
    pool_size: int,
    config: RoiConfig,
    canvas: tuple[int, int],
) -> Tensor:
    """Features of every region on a fixed grid, each from the level that fits its size.

    Args:
        pyramid: P2..P5, each (B, channels, h, w), or as `as_pooled` gives them; with strides 4, 8, 16, 32 unless
            pooling is crop_and_resize, which counts in shares of the canvas.
        boxes: (N, 4) xyxy in input pixels; N may be 0. No gradient reaches them.
        image_index: (N,) int64, which of the B images a box belongs to.
        pool_size: rows and columns of the grid.
        config: pooling, canonical size.
        canvas: rows and columns of the images.

    Returns:
        (N, channels, pool_size, pool_size) float32.
    """
    levels = pyramid_levels(boxes, config, canvas)
    pooled_from = pyramid if isinstance(pyramid, CellMatrix) else as_pooled(pyramid, config)
    if isinstance(pooled_from, CellMatrix):
        positions = _sample_positions(pooled_from, boxes, levels, pool_size, config, canvas)
        return weighted_cells(pooled_from, positions, image_index, levels, pool_size)
    image = image_index[:, None].to(boxes.dtype)
    output = boxes.new_zeros((), dtype=torch.float32)
    for level, features in enumerate(pooled_from[:NUM_LEVELS]):
        # All regions from each level, with no size that depends on the data and so without a wait for a GPU; those of
        # other levels are read far outside of it, which costs next to nothing and gives 0. Every level stays part of
        # the graph in this way, which data-parallel training relies on.
        corners = torch.where((levels == level)[:, None], boxes, FAR_OUTSIDE)
        pooled = roi_align(
            features,
            torch.cat([image, corners], dim=1),
            pool_size,
            1.0 / (4 * 2**level),
            SAMPLES_PER_SIDE,
            aligned=config.pooling == "aligned",
        )
        output = output + pooled
    return output


def as_pooled(pyramid: Sequence[Tensor], config: RoiConfig) -> PooledFrom:
    """Levels in the type and the memory that they are pooled from, so that several poolings share one copy.

    Levels beyond P5 are kept; nothing is pooled from them.
    """
    by_operator = not has_sparse_product(pyramid[0].device) or torch.compiler.is_exporting()
    if by_operator and config.pooling != "crop_and_resize":
        return [level.to(torch.float32, memory_format=torch.contiguous_format) for level in pyramid]
    return cell_matrix(pyramid)


def _sample_positions(
    matrix: CellMatrix,
    boxes: Tensor,
    levels: Tensor,
    pool_size: int,
    config: RoiConfig,
    canvas: tuple[int, int],
) -> SamplePositions:
    """Where the features are read, in cells of the region's level; cell 0 has its centre at 0."""
    starts, ends = boxes[:, :2].flip(1), boxes[:, 2:].flip(1)  # (N, 2) down, across
    if config.pooling == "crop_and_resize":
        last_cell = torch.stack([matrix.heights()[levels] - 1, matrix.widths()[levels] - 1], dim=1)
        # Shares of the canvas, and TensorFlow's order of operations: whether a sample on the border counts hangs on it.
        whole = constant((canvas[0] - 1, canvas[1] - 1), boxes.device, boxes.dtype)
        starts, ends = (starts / whole).float(), (ends / whole).float()
        steps = torch.arange(pool_size, device=boxes.device)
        down, across = _along(starts * last_cell, (ends - starts) * last_cell / (pool_size - 1), steps)
        return SamplePositions(down, across, samples_per_side=1, reach=0)
    stride = (4.0 * 2.0 ** levels.to(boxes.dtype))[:, None]
    extent = (ends - starts) / stride
    half_a_cell = 0.5
    if config.pooling == "unaligned":
        extent, half_a_cell = extent.clamp(min=1), 0.0
    num_samples = pool_size * SAMPLES_PER_SIDE
    steps = (torch.arange(num_samples, device=boxes.device) + 0.5) / num_samples
    down, across = _along(starts / stride - half_a_cell, extent, steps)
    return SamplePositions(down, across, SAMPLES_PER_SIDE, reach=1)


def _along(starts: Tensor, extent: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Positions down and across, (N, S) each."""
    positions = starts[..., None] + steps * extent[..., None]  # (N, 2, S)
    return positions[:, 0], positions[:, 1]
