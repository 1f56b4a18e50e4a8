"""Pooling of regions as a weighted sum of cells; on a CPU a product with a sparse matrix.

ROIAlign is linear in the features: every bin is a weighted sum of cells (four corners a sample). The weights stand in
one CSR matrix, rows the bins of all regions and columns the cells of all levels and images, so that forward is one
product and backward one with the transpose: several times faster than the operator, backward above all. Of the 16 cells
that a bin reads many are the same, so there are 5 to 9 entries a row.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cell_matrix import CellMatrix


@dataclass(frozen=True)
class SamplePositions:
    """Where N regions read their features; in cells of the region's level, cell 0 having its centre at 0."""

    down: Tensor
    """(N, pool_size * samples_per_side)."""
    across: Tensor
    """(N, pool_size * samples_per_side)."""
    samples_per_side: int
    """In every bin, which is their mean."""
    reach: int
    """Cells beyond the outermost centre from which a sample still counts, with the value there; farther ones are 0."""


def has_sparse_product(device: torch.device) -> bool:
    """Whether this device and this build of torch multiply sparse matrices fast."""
    return device.type == "cpu" and bool(torch._C.has_mkl)


def weighted_cells(
    matrix: CellMatrix, positions: SamplePositions, image_index: Tensor, levels: Tensor, pool_size: int
) -> Tensor:
    """Bilinear samples of each region on its level, averaged in every bin, in float32.

    Args:
        matrix: of the pyramid.
        positions: of N regions; N may be 0.
        image_index: (N,) int64.
        levels: (N,) int64.
        pool_size: bins a side.

    Returns:
        (N, channels, pool_size, pool_size) float32 in channels-last memory.
    """
    cells = matrix.cells
    channels = cells.shape[1]
    if levels.shape[0] == 0:
        return cells.new_zeros(0, channels, pool_size, pool_size) + 0.0 * cells.sum()
    by_product = has_sparse_product(cells.device) and not torch.compiler.is_exporting()
    columns, weights = _cells_of_bins(matrix, positions, image_index, levels, pool_size, united=by_product)
    if by_product:
        pooled: Tensor = _SparseProduct.apply(cells, *compressed(columns, weights))
    else:
        pooled = (cells[columns] * weights[..., None]).sum(dim=1)
    return pooled.reshape(-1, pool_size, pool_size, channels).permute(0, 3, 1, 2)


@torch.no_grad()
def _cells_of_bins(
    matrix: CellMatrix,
    positions: SamplePositions,
    image_index: Tensor,
    levels: Tensor,
    pool_size: int,
    united: bool,
) -> tuple[Tensor, Tensor]:
    """For every bin its cells, as (bins, K) rows of the cell matrix, and their weights (bins, K).

    United, a cell that a bin reads several times has all its weight at the first; the others have none.
    """
    height, width = matrix.heights()[levels], matrix.widths()[levels]  # (N,)
    first_cell = matrix.first_cells()[levels] + image_index * height * width
    y, weight_y = _neighbours(positions.down, height, pool_size, positions)
    x, weight_x = _neighbours(positions.across, width, pool_size, positions)
    if united:
        weight_y, weight_x = united_weights(y, weight_y), united_weights(x, weight_x)
    # y and x are (N, bins, cells); a bin reads every pair of them. Written out, which is faster than to broadcast over
    # the four cells of an axis.
    rows = first_cell[:, None, None] + y * width[:, None, None]
    cells = y.shape[2]
    columns = rows.repeat_interleave(cells, dim=2)[:, :, None] + x.repeat(1, 1, cells)[:, None]
    weights = weight_y.repeat_interleave(cells, dim=2)[:, :, None] * weight_x.repeat(1, 1, cells)[:, None]
    return columns.flatten(0, 2), weights.flatten(0, 2).float()


def _neighbours(position: Tensor, length: Tensor, pool_size: int, positions: SamplePositions) -> tuple[Tensor, Tensor]:
    """Along one axis: cells beside the samples of every bin and their weights, (N, pool_size, 2 * samples_per_side).

    Args:
        position: (N, samples).
        length: (N,) cells along the axis.
        pool_size: bins.
        positions: samples a bin, and how far they reach beyond the cells.
    """
    last = (length - 1)[:, None]
    inside = (position >= -positions.reach) & (position <= last + positions.reach)
    position = torch.minimum(position.clamp(min=0), last.to(position.dtype))
    low = position.long()
    high = torch.minimum(low + 1, last)
    weight_high = position - low
    share = inside / positions.samples_per_side
    cells = torch.stack([low, high], dim=2)
    weights = torch.stack([(1 - weight_high) * share, weight_high * share], dim=2)
    per_bin = 2 * positions.samples_per_side
    return cells.reshape(-1, pool_size, per_bin), weights.reshape(-1, pool_size, per_bin)


def united_weights(cells: Tensor, weights: Tensor) -> Tensor:
    """Weights (..., K) of cells (..., K) that may be the same, with the whole weight of each at its first place."""
    places = list(weights.unbind(dim=-1))
    for second in range(1, len(places)):
        for first in range(second):
            same = cells[..., first] == cells[..., second]
            places[first] = places[first] + torch.where(same, places[second], 0.0)
            places[second] = torch.where(same, 0.0, places[second])
    return torch.stack(places, dim=-1)


def compressed(columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(bins, K) columns and weights in CSR form without the weights of 0: first (bins + 1,), columns, weights."""
    counts = (weights != 0).sum(dim=1)
    entries = torch.nonzero(weights.flatten()).flatten()
    first = F.pad(counts.cumsum(dim=0), (1, 0))
    return first, columns.flatten().index_select(0, entries), weights.flatten().index_select(0, entries)


class _SparseProduct(torch.autograd.Function):
    """A CSR matrix (bins, M) times (M, channels) cells."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, first: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(first, columns, weights)
        ctx.num_cells = cells.shape[0]
        return _multiply(first, columns, weights, cells.shape[0], cells)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        first_of_bin, columns, weights = ctx.saved_tensors
        bins = len(first_of_bin) - 1
        sorted_columns, order = torch.sort(columns.int(), stable=True)  # half the bytes, twice as fast
        first = torch.searchsorted(sorted_columns, torch.arange(ctx.num_cells + 1, dtype=torch.int32))
        bin_of_entry = torch.repeat_interleave(first_of_bin.diff())
        rows, weights = bin_of_entry.index_select(0, order), weights.index_select(0, order)
        return _multiply(first, rows, weights, bins, gradients[0].contiguous()), None, None, None


def _multiply(first: Tensor, columns: Tensor, weights: Tensor, num_columns: int, dense: Tensor) -> Tensor:
    """CSR matrix times dense matrix, in float32 also inside autocast."""
    with torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(
            first, columns, weights, size=(len(first) - 1, num_columns), check_invariants=False
        )
        product = dense.new_empty(len(first) - 1, dense.shape[1])
        torch.addmm(product, matrix, dense, beta=0, out=product)  # matrix @ dense would add it to zeros
    return product
