"""ROIAlign on a CPU as a product with a sparse matrix; several times faster than the operator, backward above all.

ROIAlign is linear in the features: every bin is a weighted sum of 16 cells (four samples, four corners each). The
weights stand in one CSR matrix, rows the bins of all regions and columns the cells of all levels and images, so that
forward is one product and backward one with the transpose.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_available(device: torch.device) -> bool:
    """Whether this device and this build of torch multiply sparse matrices."""
    return device.type == "cpu" and bool(torch._C.has_mkl)


def sparse_roi_align(
    pyramid: Sequence[Tensor], boxes: Tensor, image_index: Tensor, levels: Tensor, pool_size: int, samples_per_side: int
) -> Tensor:
    """Equal to `torchvision.ops.roi_align(aligned=True)` of each region on its level, in float32.

    Args:
        pyramid: levels with strides 4, 8, 16, ..., each (B, channels, h, w).
        boxes: (N, 4) xyxy in input pixels; N may be 0. No gradient reaches them.
        image_index: (N,) int64.
        levels: (N,) int64, index into `pyramid`.
        pool_size: bins a side.
        samples_per_side: samples a side of a bin.

    Returns:
        (N, channels, pool_size, pool_size) float32 in channels-last memory.
    """
    channels = pyramid[0].shape[1]
    cells = torch.cat([level.float().permute(0, 2, 3, 1).reshape(-1, channels) for level in pyramid])  # (M, channels)
    if boxes.shape[0] == 0:
        return cells.new_zeros(0, channels, pool_size, pool_size) + 0.0 * cells.sum()
    columns, weights = _cells_of_bins(pyramid, boxes.float(), image_index, levels, pool_size, samples_per_side)
    pooled: Tensor = _SparseProduct.apply(cells, columns, weights)
    return pooled.reshape(-1, pool_size, pool_size, channels).permute(0, 3, 1, 2)


@torch.no_grad()
def _cells_of_bins(
    pyramid: Sequence[Tensor], boxes: Tensor, image_index: Tensor, levels: Tensor, pool_size: int, samples_per_side: int
) -> tuple[Tensor, Tensor]:
    """For every bin its cells, as (bins, K) rows of the cell matrix, and their weights (bins, K)."""
    sizes = torch.tensor([level.shape[2:] for level in pyramid], device=boxes.device)  # (levels, 2) rows, columns
    counts = torch.tensor([level.shape[0] * level.shape[2] * level.shape[3] for level in pyramid], device=boxes.device)
    height, width = sizes[levels].unbind(dim=1)  # (N,)
    first_cell = (counts.cumsum(0) - counts)[levels] + image_index * height * width
    stride = 4.0 * 2.0 ** levels.to(boxes.dtype)
    y, weight_y = _neighbours(boxes[:, 1::2] / stride[:, None] - 0.5, height, pool_size, samples_per_side)
    x, weight_x = _neighbours(boxes[:, 0::2] / stride[:, None] - 0.5, width, pool_size, samples_per_side)
    # y and x are (N, bins, 2 * samples); the cells of a bin are their products.
    rows = first_cell[:, None, None] + y * width[:, None, None]
    columns = rows[:, :, None, :, None] + x[:, None, :, None, :]
    weights = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
    bins = boxes.shape[0] * pool_size * pool_size
    return columns.reshape(bins, -1), weights.reshape(bins, -1)


def _neighbours(ends: Tensor, length: Tensor, pool_size: int, samples_per_side: int) -> tuple[Tensor, Tensor]:
    """Along one axis: cells beside the samples of every bin and their weights, (N, pool_size, 2 * samples_per_side).

    Args:
        ends: (N, 2) start and end of the region in cells, cell 0 having its centre at 0.
        length: (N,) cells along the axis.
        pool_size: bins.
        samples_per_side: samples a bin.
    """
    num_samples = pool_size * samples_per_side
    steps = (torch.arange(num_samples, device=ends.device) + 0.5) / num_samples
    position = ends[:, :1] + steps * (ends[:, 1:] - ends[:, :1])  # (N, samples)
    last = (length - 1)[:, None]
    inside = (position >= -1) & (position <= length[:, None])
    position = torch.minimum(position.clamp(min=0), last.to(position.dtype))
    low = position.long()
    high = torch.minimum(low + 1, last)
    weight_high = position - low
    share = inside / samples_per_side
    cells = torch.stack([low, high], dim=2)
    weights = torch.stack([(1 - weight_high) * share, weight_high * share], dim=2)
    return cells.reshape(-1, pool_size, 2 * samples_per_side), weights.reshape(-1, pool_size, 2 * samples_per_side)


class _SparseProduct(torch.autograd.Function):
    """(bins, K) columns and weights times (M, channels) cells."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(columns, weights)
        ctx.num_cells = cells.shape[0]
        bins, per_bin = columns.shape
        first = torch.arange(0, bins * per_bin + 1, per_bin)
        return _multiply(first, columns.reshape(-1), weights.reshape(-1), cells.shape[0], cells)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        columns, weights = ctx.saved_tensors
        bins, per_bin = columns.shape
        sorted_columns, order = torch.sort(columns.reshape(-1), stable=True)
        first = torch.searchsorted(sorted_columns, torch.arange(ctx.num_cells + 1))
        transposed = _multiply(first, order // per_bin, weights.reshape(-1)[order], bins, gradients[0].contiguous())
        return transposed, None, None


def _multiply(first: Tensor, columns: Tensor, weights: Tensor, num_columns: int, dense: Tensor) -> Tensor:
    """CSR matrix times dense matrix, in float32 also inside autocast."""
    with torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(
            first, columns, weights, size=(len(first) - 1, num_columns), check_invariants=False
        )
        product: Tensor = matrix @ dense
    return product
