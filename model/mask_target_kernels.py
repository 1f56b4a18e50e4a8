"""Covered shares of all regions at once on a GPU, as a Triton kernel: see `model.mask_targets`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _bit(content, first_bit, row, column, height, width):  # type: ignore[no-untyped-def]
    """Pixels of a mask as float32, 0 outside of its box."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = first_bit + row.to(tl.int64) * width + column.to(tl.int64)
    byte = tl.load(content + (index >> 3), mask=inside, other=0).to(tl.int32)
    return ((byte >> (7 - (index & 7).to(tl.int32))) & 1).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _neighbours(position, first, last):  # type: ignore[no-untyped-def]
    """Of a sample along one axis of the image's pixels first..last - 1: the two it lies between, the weight of the
    second, and whether it counts, as in torchvision's operator."""  # noqa: D205, D209
    length = (last - first).to(tl.float32)
    position = position - first.to(tl.float32)
    counts = (position >= -1.0) & (position <= length)
    position = tl.maximum(position, 0.0)
    low = tl.floor(position).to(tl.int32)
    at_end = low >= last - first - 1
    low = tl.where(at_end, last - first - 1, low)
    high = tl.where(at_end, low, low + 1)
    weight = tl.where(at_end, 0.0, position - low.to(tl.float32))
    return low + first, high + first, weight, counts


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _share_of_cells(  # type: ignore[no-untyped-def]
    content, first_bits, sizes, regions, borders, shares, SIZE: tl.constexpr, WIDTH: tl.constexpr  # noqa: N803
):  # fmt: skip
    """One row of cells of one region: the mean of its samples, as many as the cell has pixels."""
    region, cell_row = tl.program_id(0), tl.program_id(1)
    cell = tl.arange(0, WIDTH)
    first_bit = tl.load(first_bits + region)
    height, width = tl.load(sizes + region * 2), tl.load(sizes + region * 2 + 1)
    left, top = tl.load(regions + region * 4), tl.load(regions + region * 4 + 1)
    right, bottom = tl.load(regions + region * 4 + 2), tl.load(regions + region * 4 + 3)
    first_x, first_y = tl.load(borders + region * 4), tl.load(borders + region * 4 + 1)
    last_x, last_y = tl.load(borders + region * 4 + 2), tl.load(borders + region * 4 + 3)
    cell_width, cell_height = tl.maximum(right - left, 1.0) / SIZE, tl.maximum(bottom - top, 1.0) / SIZE
    samples_across, samples_down = tl.ceil(cell_width).to(tl.int32), tl.ceil(cell_height).to(tl.int32)
    total = tl.full([WIDTH], 0.0, tl.float32)
    for j in range(samples_down):
        y = top + (cell_row + 0 * cell) * cell_height + (j + 0.5) * cell_height / samples_down
        low_y, high_y, weight_y, counts_y = _neighbours(y, first_y, last_y)
        for i in range(samples_across):
            x = left + cell * cell_width + (i + 0.5) * cell_width / samples_across
            low_x, high_x, weight_x, counts_x = _neighbours(x, first_x, last_x)
            above = _bit(content, first_bit, low_y, low_x, height, width) * (1.0 - weight_x)
            above += _bit(content, first_bit, low_y, high_x, height, width) * weight_x
            below = _bit(content, first_bit, high_y, low_x, height, width) * (1.0 - weight_x)
            below += _bit(content, first_bit, high_y, high_x, height, width) * weight_x
            total += tl.where(counts_y & counts_x, above * (1.0 - weight_y) + below * weight_y, 0.0)
    share = total / (samples_down * samples_across).to(tl.float32)
    tl.store(shares + (region * SIZE + cell_row) * SIZE + cell, share, mask=cell < SIZE)


def covered_shares(
    content: Tensor, first_bits: Tensor, sizes: Tensor, regions: Tensor, borders: Tensor, size: int
) -> Tensor:
    """(P, M, M) float32 share of each cell of each region that the object covers.

    Args:
        content: (bytes,) uint8 mask bits.
        first_bits: (P,) int64.
        sizes: (P, 2) int64 rows and columns of the mask.
        regions: (P, 4) float32 xyxy in mask pixels, 0 at the start of the mask.
        borders: (P, 4) float32 xyxy of the image in mask pixels.
        size: M.
    """
    number = regions.shape[0]
    shares = torch.empty(number, size, size, device=regions.device)
    if number:
        _share_of_cells[(number, size)](
            content,
            first_bits.contiguous(),
            sizes.contiguous(),
            regions.float().contiguous(),
            borders.round().int().contiguous(),
            shares,
            SIZE=size,
            WIDTH=triton.next_power_of_2(size),
            num_warps=1,
        )
    return shares
